//! lowkey runs large language models with a compressed key/value cache on any GPU.

#![deny(missing_docs)]

pub mod bench;
pub mod cache;
pub mod calibrate;
pub mod checkpoint;
pub mod compress;
pub mod cpu;
pub mod decoder;
pub mod eval;
pub mod gpu;
pub mod kernels;
pub mod linalg;
pub mod progress;
#[cfg(feature = "pull")]
pub mod pull;
pub mod sequence;
pub mod session;

mod error;
mod model;
mod output;

pub use error::{Error, Result};
pub use model::{Device, Engine, LoadOptions, Model};
pub use session::{Prompt, Sampling, Session, SessionOptions};

/// The README's program compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
