//! The kernels, one file per shader: its parameters, its plan (a pipeline bound to buffers, once) and its record (into a pass, allocating nothing).
//!
//! One decode step is, per layer: [`matvec`] (norm and query, key row, value row in one projection) → [`prepare`] (bias, QK-norm, RoPE, append) → [`score`] →
//! [`values`] → [`merge`] (and the values' up-projection) → [`matvec`] (output projection onto the residual) → [`matvec`] (norm, gate, up, SiLU) → [`matvec`] (down,
//! onto the residual): eight dispatches. Scoring and summing are two kernels, not one, because their groups differ: keys are scored by key/value head, while
//! value rows may belong to all heads at once, and a fused kernel would read those once per head.

pub mod argmax;
pub mod embed;
pub mod matmul;
pub mod matvec;
pub mod merge;
pub mod norm;
pub mod prepare;
pub mod score;
pub mod values;

use crate::gpu::{Access, Spec};
use std::collections::BTreeMap;

/// Lanes of a workgroup in every kernel but the reductions over whole rows. Two subgroups on NVIDIA, one or two on AMD, eight on a software renderer.
pub(crate) const WORKGROUP: u32 = 64;

fn spec(shader: &'static str, flags: &[&'static str], constants: &[(&'static str, u32)], bindings: &[(u32, Access)]) -> Spec {
    Spec { shader, flags: flags.to_vec(), constants: BTreeMap::from_iter(constants.iter().copied()), bindings: bindings.to_vec() }
}

/// Every variant that the decoder can ask for, in sizes as they occur: what the offline translation test translates.
pub fn variants() -> Vec<Spec> {
    [
        argmax::variants(),
        embed::variants(),
        matmul::variants(),
        matvec::variants(),
        merge::variants(),
        norm::variants(),
        prepare::variants(),
        score::variants(),
        values::variants(),
        crate::gpu::roofline_variants(),
    ]
    .concat()
}
