//! lowkey runs large language models with a compressed key/value cache on any GPU.

#![deny(missing_docs)]

pub mod bench;
pub mod calibrate;
pub mod checkpoint;
pub mod compress;
pub mod cpu;
pub mod eval;
pub mod linalg;
#[cfg(feature = "pull")]
pub mod pull;
pub mod sequence;
pub mod session;

mod error;

pub use error::{Error, Result};
