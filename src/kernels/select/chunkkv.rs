//! `chunkkv.wgsl`: see [`crate::kv::Selector::ChunkKv`].

use crate::kernels::AttentionShape;
use crate::kv::Selection;

/// The shader's constants: one workgroup for all heads.
pub(super) fn constants(attention: &AttentionShape, selection: Selection) -> Vec<(&'static str, u32)> {
    let pairs = selection.chunks();
    let [heads, pairs, most, stretch] = [attention.heads, pairs, (pairs / Selection::STRETCH).max(1), Selection::STRETCH].map(|n| n as u32);
    vec![("HEADS", heads), ("PAIRS", pairs), ("MOST", most), ("STRETCH", stretch)]
}
