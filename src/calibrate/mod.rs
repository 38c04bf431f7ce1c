//! Runs text through a decoder and gathers what the methods of compression need to know about
//! activations.
//!
//! What is gathered depends on the model and the text, never on a plan: it is saved once and serves
//! every method and budget. In a layer with `H_kv` heads of width `d`, `n = H_kv·d`, a token's keys
//! `k: [n]` (with bias, after QK-norm, before RoPE) and values `v: [n]` make up its row
//! `y = [k ; v]`, `[2n]`. There are
//!
//! - the mean of `y` and of `yyᵀ`, by layer or over a span of consecutive layers;
//! - the same of keys after RoPE ("post-RoPE keys"), and the mean of `qqᵀ` for the queries that
//!   meet them;
//! - the *sensitivity*: how much the output moves when keys or values are disturbed
//!   (`sensitivity.rs`), and the Fisher information of their projections, by which Palu (Chang et
//!   al., arXiv 2407.21118) deals out ranks;
//! - `y` and keys after RoPE themselves, of a small sample of tokens.
//!
//! The first positions of every window are in none of it: caches keep them exactly.

mod cut;
mod digest;
mod file;
mod gather;
mod layers;
mod moments;
mod options;
mod sample;
mod scalar;
mod sensitivity;
mod statistics;
mod work;

pub use digest::{source_digest, text_digest};
pub use gather::{encode, gather, need, run};
pub use options::{Need, Options, Seconds, SensitivityKind};
pub use sample::sample;
pub use statistics::{LayerStatistics, Sample, Sensitivity, Statistics};
