//! Coded rows: how what a token leaves in the cache is written in few bits. Rank and precision are one decision.
//!
//! A row begins as a vector `y` that the model computes for a token: keys, values, or both side by side, of some heads in one layer or in several consecutive ones
//! ([`RowSpec`]). An offline basis takes it to coordinates `z = (y − μ)·A` that are uncorrelated and sorted by what they matter ([`Coder`]); these fall into
//! [`Band`]s of equal precision, those after the last band are dropped, and the codes of one row are packed into words ([`Format`]). To read a row is to look
//! its codes up: `ŷ = ẑ·B + μ`. Neither direction needs more: a low-rank row in f16 is one band of 16 bits, a 4-bit cache one band of 4 with a rotation for its basis.
//! Some published methods code several tokens at once, with numbers that these share ([`Blocks`]).
//!
//! Beside the coded rows a sequence keeps its first and its newest tokens exactly; which query reads which is [`Exact`]'s to say. This module knows no GPU: it is what
//! `compress` plans with, what `cpu` decodes by, and what the kernels are tested against.

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
pub use select::{Selection, Selector};
pub use sketch::{Sketch, SketchColumns};
pub use slots::{Slots, Stretch};
pub use spec::{KvSide, RowKind, RowSet, RowSpec, Source};
pub use trellis::levels;
pub(crate) use xkv::basis_bytes;
pub use xkv::{PromptBases, Xkv};
