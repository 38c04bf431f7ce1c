//! lowkey runs large language models with a compressed key/value cache on any GPU.

#![deny(missing_docs)]

pub mod calibrate;
pub mod checkpoint;
pub mod compress;
pub mod cpu;
pub mod linalg;
#[cfg(feature = "pull")]
pub mod pull;
pub mod sequence;

mod error;

pub use error::{Error, Result};
