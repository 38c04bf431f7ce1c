//! `shadowkv.wgsl`: see [`crate::kv::Selector::ShadowKv`].

use crate::kernels::AttentionShape;
use crate::kv::Selection;

/// The shader's constants: a workgroup for each key/value head.
pub(super) fn constants(attention: &AttentionShape, selection: Selection) -> Vec<(&'static str, u32)> {
    vec![("GROUP", attention.group_size() as u32), ("MOST", selection.chunks() as u32)]
}
