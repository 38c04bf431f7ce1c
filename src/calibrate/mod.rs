//! Runs text through a decoder and gathers what the methods of compression need to know about activations.
//!
//! What is gathered depends on the model and the text, never on a plan: it is saved once and serves every method and budget. So far it is, for each
//! layer, the second moment of what enters attention: `C`, the mean of `xᵀx` (the first tokens weighted as they are attended to: [`Options::sinks`]), `[D, D]`, of the residual stream after its RMSNorm. From it follow the second
//! moments of everything linear in `x`, keys and values above all: `WᵀCW`.

mod digest;
mod gather;
mod statistics;

pub use digest::{source_digest, text_digest};
pub use gather::{Options, gather, run};
pub use statistics::Statistics;
