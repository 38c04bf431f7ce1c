//! `score.wgsl`: how well every column answers every query.

use super::attention::AttentionBuffers;
use super::coded::{BOOKS, Coded, Codes};
use super::columns::{Block, Kinds, List};
use super::exact::ExactRows;
use super::{AttentionShape, NEAR, WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Tuning, Work, pad};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    first: u32,
    tokens: u32,
    at: u32,
    stride: u32,
    queries: u32,
    near: u32,
    beside: u32,
    window: u32,
    start: u32,
    coded: u32,
    sinks: u32,
    ring: u32,
    recent: u32,
    low: u32,
    high: u32,
    /// Of a token in rows; or the row of the first rebuilt key.
    words: u32,
}

/// Coded keys: their rows, and what they are scored with.
#[derive(Clone, Copy)]
pub(crate) struct CodedKeys<'a> {
    pub coded: &'a Coded,
    /// `[capacity][words]`.
    pub rows: &'a wgpu::Buffer,
    /// [`Coded::key_table`].
    pub table: &'a wgpu::Buffer,
    /// Up-projections by key/value head.
    ///
    /// `[rank / 4][head_dim]` where keys are rebuilt, else `[pad(head_dim) / 4][rank]`. Vectors of
    /// f16.
    pub up: &'a wgpu::Buffer,
    /// Whether the rows are of keys after RoPE.
    ///
    /// Then queries absorb their basis, and keys are not rebuilt.
    pub absorbed: bool,
    /// Which of them are read; `None` for all.
    pub list: Option<List<'a>>,
}

/// Scores one layer's keys.
pub struct Score {
    /// With the coded columns of a tile, few and many.
    kernels: Vec<(Kernel, u32)>,
    /// Plain columns of a tile.
    tile: u32,
    /// Of both: query heads that are scored together, at the most, and lines of a workgroup.
    lines: [[u32; 2]; 2],
    rebuilt: bool,
    kv_heads: u32,
    /// Parts of a token's coded row that are unpacked apart.
    slices: u32,
    /// With so many of them, tiles are wide. On an H200 four keys a lane took 59 µs for 50 where
    /// there were 256, and 81 for 151 where there were 1,024.
    workgroups: u32,
    /// What a plain column takes for one token, and what a coded one does.
    each: [Work; 2],
    /// Bytes of a plain key, and of a coded one.
    row: [u32; 2],
    params: Params,
}

/// Keys per tile: as many as fit, in f32, into half of the least workgroup memory that any device
/// has.
pub(super) fn tile(head_dim: usize) -> u32 {
    [32, 16, 8].into_iter().find(|t| head_dim * t * 4 <= 8 << 10).unwrap_or(4) as u32
}

/// Vectors of keys that a lane multiplies at a time: a power of two that divides a key's, fewer
/// where each meets more rows. Each takes four registers for a key's and as many for a row's.
fn vectors_at_once(head_dim: usize, rows: u32) -> u32 {
    let vectors = pad(head_dim) as u32 / 4;
    (8 / rows).max(1).next_power_of_two().min(1 << vectors.trailing_zeros())
}

/// Queries of a key/value head that a workgroup answers.
fn span(attention: &AttentionShape, many: bool) -> u32 {
    WORKGROUP / tile(attention.head_dim) * rows(attention, many) * 2
}

/// The most keys that one dispatch scores: a grid has at most 65,535 tiles on the least of devices.
pub(crate) fn most_keys(head_dim: usize) -> usize {
    u16::MAX as usize * tile(head_dim) as usize
}

/// Queries of a key/value head that a lane answers at once.
fn rows(attention: &AttentionShape, many: bool) -> u32 {
    if many { 8 } else { (attention.group_size() as u32).div_ceil(WORKGROUP / tile(attention.head_dim)).min(8) }
}

/// The same of coded rows: of a token alone all query heads that read the row, in equal parts where
/// those are too many.
fn coded_rows(together: usize, many: bool, tuning: &Tuning) -> u32 {
    let (together, most) = (together as u32, tuning.score_rows);
    if many { most } else { together.div_ceil(together.div_ceil(most)) }
}

/// Keys that a lane scores, each for so many queries: one, or where all lanes have enough to do as
/// many as registers hold.
fn keys(tuning: &Tuning, coded_rows: u32, many: bool) -> Vec<u32> {
    let most = if many { 1 } else { tuning.score_keys.min(32 / coded_rows) };
    if most > 1 { vec![1, most] } else { vec![1] }
}

/// How a variant reads coded keys.
#[derive(Clone, Default)]
pub(super) enum Reading {
    /// There are none.
    #[default]
    None,
    /// From their rows: how these are packed, for how many queries a lane unpacks one, and of how
    /// many keys.
    Absorbed(Codes, u32, u32),
    /// As keys in f16.
    Rebuilt,
}

/// A soft cap as whole numbers, which constants are: `CAP / 2^CAP_SHIFT`, to 24 bits.
pub(super) fn fraction(cap: f32) -> [(&'static str, u32); 2] {
    let scaled = |shift: u32| cap * (1u32 << shift) as f32;
    let shift = (0..24).find(|shift| scaled(*shift).fract() == 0.0 || scaled(*shift) >= (1 << 23) as f32).unwrap_or(24);
    [("CAP", scaled(shift).round() as u32), ("CAP_SHIFT", shift)]
}

/// `align`: tokens that are coded together.
pub(super) fn variant(attention: &AttentionShape, reading: Reading, kinds: Kinds, align: usize, many: bool) -> Spec {
    let rows = rows(attention, many);
    let mut flags = Vec::from_iter(kinds.flags());
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Write)];
    let mut constants = vec![
        ("WORKGROUP", WORKGROUP),
        ("PAIRS", (attention.head_dim / 2) as u32),
        ("TILE", tile(attention.head_dim)),
        ("SPAN", span(attention, many)),
        ("ROWS", rows),
        ("VECTORS_AT_ONCE", vectors_at_once(attention.head_dim, rows)),
        ("KV_HEADS", attention.kv_heads as u32),
        ("GROUP", attention.group_size() as u32),
        ("ALIGN", align as u32),
    ];
    constants.extend(kinds.constants());
    if let Some(cap) = attention.cap {
        flags.push("CAPPED");
        constants.extend(fraction(cap));
    }
    match reading {
        Reading::None => {}
        Reading::Absorbed(codes, coded_rows, keys) => {
            flags.push("ABSORBED");
            flags.extend(codes.flags);
            constants.extend([("NEAR", NEAR), ("BOOKS", BOOKS), ("CODED_ROWS", coded_rows), ("KEYS", keys)]);
            constants.extend(codes.constants);
            bindings.extend([(3, Access::Read), (4, Access::Read), (5, Access::Read)]);
        }
        Reading::Rebuilt => {
            flags.push("REBUILT");
            bindings.push((6, Access::Read));
        }
    }
    if kinds.counted > 0 {
        bindings.extend([(7, Access::Read), (8, Access::Read)]);
    }
    bindings.extend(kinds.list());
    spec("score.wgsl", &flags, &constants, &bindings)
}

impl Score {
    /// Reads `queries`, writes `scores` of `b`; reads `rebuilt` where coded keys are. `many`: for
    /// blocks of many tokens, else of one.
    pub(crate) fn plan(
        device: &Device,
        attention: &AttentionShape,
        b: &AttentionBuffers,
        cache: &ExactRows,
        coded: Option<CodedKeys>,
        many: bool,
    ) -> Result<Score> {
        let (heads, dim, kv_heads, group) = (attention.heads, attention.head_dim, attention.kv_heads, attention.group_size());
        let tile = tile(dim);
        let mut lines = [(group, span(attention, many)); 2];
        let mut widths = vec![tile];
        let mut buffers: Vec<&wgpu::Buffer> = vec![&b.queries, &cache.keys, &b.scores];
        let work = |bytes: usize, flops: usize| Work { bytes: bytes as u64, flops: flops as u64 };
        let plain = work(4 * heads, 2 * heads * dim);
        let (reading, queries, each, row) = match coded {
            None => (Reading::None, attention.query_row(), plain, 0),
            Some(keys) => {
                let queries = keys.coded.query_stride(attention, keys.absorbed);
                if keys.absorbed {
                    buffers.extend([keys.rows, keys.table, &b.rope]);
                    let ranks = (0..kv_heads).map(|kv| keys.coded.rank(kv)).sum::<usize>();
                    let together = group * if keys.list.is_some_and(|list| list.by_head > 0) { 1 } else { keys.coded.widest() };
                    let coded_rows = coded_rows(together, many, &device.tuning());
                    lines[1] = (together, coded_rows);
                    widths = self::keys(&device.tuning(), coded_rows, many).iter().map(|keys| keys * WORKGROUP).collect();
                    (Reading::Absorbed(keys.coded.codes(), coded_rows, 1), queries, work(4 * heads, 2 * group * ranks), 4 * keys.coded.row_words())
                } else {
                    buffers.push(&b.rebuilt);
                    (Reading::Rebuilt, queries, plain, 2 * attention.kv_row())
                }
            }
        };
        let (list, counted) = (coded.and_then(|keys| keys.list), cache.eviction.as_ref().map_or(0, |eviction| eviction.stores.evicted_columns()));
        if counted > 0 {
            buffers.extend([&b.counted[0], &b.counts]);
        }
        buffers.extend(list.map(|list| list.tokens));
        let kinds = Kinds { listed: list.map(|list| list.by_head), counted };
        let rebuilt = matches!(reading, Reading::Rebuilt);
        let align = coded.map_or(1, |keys| keys.coded.block);
        let kernels = widths.into_iter().map(|width| {
            let reading = match &reading {
                Reading::Absorbed(codes, rows, _) => Reading::Absorbed(codes.clone(), *rows, width / WORKGROUP),
                other => other.clone(),
            };
            Ok((device.kernel(variant(attention, reading, kinds, align, many), &buffers)?, width))
        });
        Ok(Score {
            kernels: kernels.collect::<Result<_>>()?,
            tile,
            lines: lines.map(|(each, of_group)| [each as u32, of_group]),
            rebuilt,
            kv_heads: kv_heads as u32,
            slices: coded.map_or(0, |keys| keys.coded.slices.len()) as u32,
            workgroups: device.tuning().score_workgroups,
            each: [plain, each],
            row: [2 * attention.kv_row(), row].map(|bytes| bytes as u32),
            params: Params {
                stride: b.columns as u32,
                queries: queries as u32,
                sinks: cache.slots.sinks,
                ring: cache.slots.ring,
                words: coded.map_or(0, |keys| keys.coded.words as u32),
                ..bytemuck::Zeroable::zeroed()
            },
        })
    }

    /// One workgroup per tile, key/value head, and span of lines.
    ///
    /// `rebuilt`: the row of the first of the block's rebuilt keys.
    pub fn record(&self, pass: &mut Pass, block: &Block, rebuilt: u32) {
        let params = Params {
            first: block.first,
            tokens: block.tokens,
            at: block.at,
            near: block.near,
            beside: block.beside,
            window: block.window,
            start: block.start,
            coded: block.coded,
            recent: block.reach.recent as u32,
            low: block.reach.low as u32,
            high: block.reach.high as u32,
            words: if self.rebuilt { rebuilt } else { self.params.words },
            ..self.params
        };
        let busy = |width: u32| block.coded.div_ceil(width) * self.slices >= self.workgroups;
        let (kernel, width) = self.kernels.iter().rev().find(|(_, width)| busy(*width)).unwrap_or(&self.kernels[0]);
        let tiles = block.plain().div_ceil(self.tile) + block.coded.div_ceil(*width);
        let blocks = self.lines.map(|[each, of_group]| (block.tokens * each).div_ceil(of_group));
        let [tokens, plain, coded, queries] = [block.tokens, block.plain(), block.coded, self.params.queries].map(u64::from);
        let ([of_plain, of_coded], [row, coded_row]) = (self.each, self.row.map(u64::from));
        let work = Work {
            bytes: tokens * (4 * queries + plain * of_plain.bytes + coded * of_coded.bytes) + plain * row + coded * coded_row,
            flops: tokens * (plain * of_plain.flops + coded * of_coded.flops),
        };
        kernel.record(pass, &params, [tiles, self.kv_heads, blocks[0].max(blocks[1])], work);
    }
}

#[cfg(test)]
mod tests;
