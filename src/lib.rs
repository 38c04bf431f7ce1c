//! lowkey runs large language models with a compressed key/value cache on any GPU.
//!
//! A model that generates text keeps, for every token it has seen, a key and a value in every
//! layer. lowkey writes them in few bits: once and on the processor it finds a basis in which they
//! matter in order ([`compress`], weighed by what [`calibrate`] found), and from then on caches
//! codes of their coordinates ([`kv`]). The decoder works on these rows as they are: on Vulkan,
//! Metal and DX12 through wgpu ([`decoder`]), and once more in plain Rust ([`cpu`]), which is the
//! specification and what the tests hold the kernels against.
//!
//! ```no_run
//! use lowkey::{LoadOptions, Model, SessionOptions};
//!
//! fn main() -> lowkey::Result<()> {
//!     let model = Model::load("path/to/model", LoadOptions::default())?;
//!     let options = SessionOptions { max_tokens: Some(100), ..SessionOptions::default() };
//!     let mut session = model.session(options)?;
//!     let mut answer = session.generate("Once upon a time")?;
//!     let tokens = answer.by_ref().map(|token| token.map(|token| token.text));
//!     let text = tokens.collect::<lowkey::Result<String>>()?;
//!     println!("{text}: {:.1} tokens per second", answer.summary().decode_tps);
//!     Ok(())
//! }
//! ```
//!
//! From the bottom up: [`task`], [`linalg`] and [`logits`] are for all; [`checkpoint`] reads
//! models; [`kv`], [`cpu`], [`calibrate`] and [`compress`] know no GPU; [`gpu`], [`kernels`],
//! [`cache`] and [`decoder`] stand on each other; [`sequence`] is what both decoders offer;
//! [`session`], [`eval`] and [`mod@bench`] stand on that alone. [`Model`] puts it together. Nothing
//! here prints, ends the process or keeps global state.

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
pub mod kv;
pub mod linalg;
#[cfg(feature = "pull")]
pub mod local;
pub mod logits;
#[cfg(feature = "pull")]
pub mod pull;
pub mod sequence;
pub mod session;
pub mod task;

#[cfg(feature = "report")]
mod chart;
mod error;
mod machine;
mod model;

pub use checkpoint::WeightStorage;
pub use error::{Error, Result};
pub use machine::{available_memory, peak_memory};
pub use model::{Device, Engine, LoadOptions, Model};
pub use session::{Prompt, Sampling, Session, SessionOptions};

/// The README's program compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
