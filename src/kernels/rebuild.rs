//! `rebuild.wgsl`: coded keys as they were before they were coded, from rows of keys before RoPE.

use super::attention::AttentionBuffers;
use super::coded::{BOOKS, Codes};
use super::columns::Kinds;
use super::score::{CodedKeys, tile};
use super::{AttentionShape, NEAR, WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work, pad};
use crate::kv::Slots;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    start: u32,
    coded: u32,
    words: u32,
    sinks: u32,
    ring: u32,
}

/// Rebuilds one layer's keys.
pub struct Rebuild {
    kernel: Kernel,
    tile: u32,
    kv_heads: u32,
    /// What a column takes.
    each: Work,
    params: Params,
}

/// `codes`: of keys before RoPE, which are not coded in blocks.
pub(super) fn variant(attention: &AttentionShape, codes: Codes, kinds: Kinds) -> Spec {
    let mut constants = vec![
        ("WORKGROUP", WORKGROUP),
        ("PAIRS", (attention.head_dim / 2) as u32),
        ("NEAR", NEAR),
        ("BOOKS", BOOKS),
        ("TILE", tile(attention.head_dim)),
        ("KV_HEADS", attention.kv_heads as u32),
    ];
    constants.extend(codes.constants);
    constants.extend(kinds.constants());
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Read), (3, Access::Read), (4, Access::Write)];
    bindings.extend(kinds.list());
    spec("rebuild.wgsl", &Vec::from_iter(kinds.flags()), &constants, &bindings)
}

impl Rebuild {
    /// Writes `rebuilt` of `b`.
    pub(crate) fn plan(device: &Device, attention: &AttentionShape, b: &AttentionBuffers, keys: CodedKeys, slots: Slots) -> Result<Rebuild> {
        let mut buffers: Vec<&wgpu::Buffer> = vec![keys.rows, keys.table, &b.rope, keys.up, &b.rebuilt];
        buffers.extend(keys.list.map(|list| list.tokens));
        let ranks = (0..attention.kv_heads).map(|kv| keys.coded.rank(kv)).sum::<usize>();
        let bytes = 4 * keys.coded.row_words() + 2 * attention.kv_heads * pad(attention.head_dim);
        Ok(Rebuild {
            kernel: device
                .kernel(variant(attention, keys.coded.codes(), Kinds { listed: keys.list.map(|list| list.by_head), counted: 0 }), &buffers)?,
            tile: tile(attention.head_dim),
            kv_heads: attention.kv_heads as u32,
            each: Work { bytes: bytes as u64, flops: (2 * ranks * attention.head_dim) as u64 },
            params: Params { start: 0, coded: 0, words: keys.coded.words as u32, sinks: slots.sinks, ring: slots.ring },
        })
    }

    /// The first `columns` of a list whose last token is `start`, or as many from there on.
    pub fn record(&self, pass: &mut Pass, start: u32, columns: u32) {
        if columns == 0 {
            return;
        }
        let work = Work { bytes: self.each.bytes * u64::from(columns), flops: self.each.flops * u64::from(columns) };
        self.kernel.record(pass, &Params { start, coded: columns, ..self.params }, [columns.div_ceil(self.tile), self.kv_heads, 1], work);
    }
}
