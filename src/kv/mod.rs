//! What is cached of a token, and in how many bits: formats, codebooks, windows, eviction, options.
//!
//! A latent begins as a vector `y` that the model computes for a token: keys, values, or both, of
//! some heads in one layer or in several consecutive ones ([`LatentSpec`]). A basis takes it to
//! coordinates `z = (y − μ)·A` that are uncorrelated and sorted by importance ([`Coder`]), and
//! their codes are packed into words ([`Format`]). To read it is to look its codes up:
//! `ŷ = ẑ·B + μ`. This module knows no GPU: `compress` plans with it, `cpu` decodes by it, and
//! kernels are tested against it.
//!
//! # Glossary
//!
//! - *latent*: what is cached of a token in a basis; one *row* of words per token.
//! - *codec* ([`Coder`]): the basis and format that encode and decode a latent.
//! - *band* ([`Band`]): coordinates of equal precision; coordinates after the last band are
//!   dropped.
//! - *run* ([`Run`]): 16 consecutive coordinates of a band, coded and read together.
//! - *block* ([`Blocks`]): tokens that are coded together and share scales.
//! - *prefill*, *decode*: reading a prompt chunk by chunk; one new token at a time.
//! - *plan*: pipelines and bindings of a prefill chunk or a decode step, made once; in `compress`,
//!   what a method does with a budget.
//! - *params*: the numbers that a kernel is given for one dispatch.
//! - *RoPE table*: cosines and sines by position; keys are *pre-RoPE* or *post-RoPE*.
//! - *absorbed query*: a query taken into a latent's basis, which then scores codes directly.
//! - *sink*, *window* ([`Exact`]): the first and the newest tokens, whose rows are exact (f16).
//! - *slot* ([`Slots`]): where an exact row stands: sinks first, then the window as a ring.
//! - *selector* ([`Selector`]): chooses the latents that a new token reads (top-k attention).
//! - *landmark*: the mean key of a chunk of tokens, by which selectors choose.
//! - *eviction* ([`Reviver`]): tokens that leave the window are dropped, or kept where there is
//!   room.
//! - *candidate*: an evictable token that is still exact; *heavy hitters* stay, by the attention
//!   that they have received. [`Evicted`] says what is left of the others.
//! - *saved* ([`Saved`]): a cache's content by position, which any device goes on from.
//! - *cursor* ([`Cursor`]): which tokens are exact, coded or gone, as index arithmetic.
//! - *adapter*: a file with the bases and specs of a model, opened beside the model's own file.

mod balance;
mod blocks;
mod budget;
mod codebook;
mod coder;
mod cursor;
mod exact;
mod format;
mod geometry;
mod layout;
mod memory;
mod method;
mod price;
mod reviver;
mod run;
mod saved;
mod select;
mod sketch;
mod slots;
mod spec;
pub mod trellis;
mod trellis_levels;
mod xkv;

pub use balance::{Balance, LEAST_DEVIATION, LOGARITHMS, ROUNDS, balance};
pub use blocks::{Blocks, Steps};
pub use budget::Budget;
pub use codebook::{EIGHT_BITS, distortion};
pub use coder::{Coder, Energy};
pub use cursor::{Call, Coding, Cursor};
pub use exact::{Exact, Reach, Schedule};
pub use format::{Band, Format, Scale};
pub use geometry::Geometry;
pub use layout::{Layout, Place};
pub use memory::KvMemory;
pub use method::{CacheMethod, Read};
pub use price::Price;
pub(crate) use reviver::fade;
pub use reviver::{Evicted, HALF_LIFE, Reviver, Stores};
pub use run::{RUN, Run, ScaleSource};
pub use saved::{Kept, Room, Saved, SavedBases, SavedEviction, SavedLayer, SavedPrompt, SavedSketch, Standing};
pub use select::{Selection, Selector};
pub use sketch::{Sketch, SketchColumns};
pub use slots::{Slots, Stretch};
pub use spec::{KvSide, LatentKind, LatentSet, LatentSpec, Source};
pub use trellis::levels;
pub(crate) use xkv::basis_bytes;
pub use xkv::{PromptBases, Xkv};
