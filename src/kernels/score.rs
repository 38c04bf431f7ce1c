//! `score.wgsl`: how well every cached key answers every query: exact keys, and coded ones beside them.

use super::coded::{BOOKS, Coded, Striped};
use super::eviction::EvictionStore;
use super::exact::ExactRows;
use super::{AttentionShape, NEAR, WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work, pad};
use crate::rows::Slots;
use crate::rows::{Reach, Selection, Stores, Vague};
use std::ops::Range;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    first: u32,
    tokens: u32,
    at: u32,
    stride: u32,
    span: u32,
    queries: u32,
    near: u32,
    /// Or columns of what stands beside.
    window: u32,
    start: u32,
    coded: u32,
    sinks: u32,
    ring: u32,
    recent: u32,
    low: u32,
    high: u32,
    words: u32,
}

/// A run of tokens whose queries are scored at once, and the keys that they are scored against. Scores have a column for each exact key and for what stands beside, then one for each coded key.
#[derive(Debug, Clone)]
pub struct Block {
    /// Position of the first token.
    pub first: u32,
    /// Tokens.
    pub tokens: u32,
    /// The first token's place in the chunk.
    pub at: u32,
    /// Columns of sinks; none where every key is exact.
    pub fixed: u32,
    /// The first exact key after them.
    pub near: u32,
    /// Columns behind exact keys' that every query sees, where the sequence forgets.
    pub side: u32,
    /// The first coded key; the last where they are chosen.
    pub start: u32,
    /// Columns of coded keys.
    pub coded: u32,
    /// The chunks that coded keys are chosen from; none where all are read.
    pub chunks: Range<u32>,
    reach: Reach,
}

impl Block {
    /// `tokens` from position `first` on, which see no key `window` or more before them, and read of coded rows what `reach` says, if there are any.
    pub fn new(first: u32, tokens: u32, at: u32, window: Option<usize>, reach: Option<Reach>) -> Block {
        let seen = window.map_or(0, |window| (first as usize + 1).saturating_sub(window));
        let reach_of_none = Reach { sinks: 0, low: 0, high: 0, recent: 0, block: 1 };
        let dense = Block { first, tokens, at, fixed: 0, near: seen as u32, side: 0, start: 0, coded: 0, chunks: 0..0, reach: reach_of_none };
        let Some(reach) = reach else { return dense };
        let end = (first + tokens) as usize;
        let (start, beyond) = (reach.sinks.max(seen), reach.of(end - 1));
        Block {
            fixed: reach.sinks.min(end) as u32,
            near: reach.of(first as usize).max(seen) as u32,
            start: start as u32,
            coded: beyond.saturating_sub(start) as u32,
            reach,
            ..dense
        }
    }

    /// This block, of one token, where it reads chosen chunks of its coded keys.
    pub fn choosing(self, selection: Selection) -> Block {
        let end = self.start + self.coded;
        let chunks = Selection::range(self.start as usize, end as usize);
        let chunks = if self.coded == 0 { 0..0 } else { chunks.start as u32..chunks.end as u32 };
        let columns = Selection::CHUNK * chunks.len().min(selection.chunks());
        Block { start: end.saturating_sub(1), coded: columns as u32, chunks, ..self }
    }

    /// This block where tokens are forgotten: beside so many columns that every query sees, and where they do not leave coded `rows`, without these.
    pub fn beside(self, side: u32, rows: bool) -> Block {
        Block { side, coded: if rows { self.coded } else { 0 }, ..self }
    }

    /// Columns of exact keys.
    pub fn exact(&self) -> u32 {
        self.fixed + (self.first + self.tokens).saturating_sub(self.near)
    }

    /// Columns that are not coded.
    pub fn plain(&self) -> u32 {
        self.exact() + self.side
    }

    /// The key of an exact column.
    #[cfg(test)]
    pub fn exact_key(&self, column: u32) -> u32 {
        if column < self.fixed { column } else { self.near + column - self.fixed }
    }
}

/// Coded keys: their rows, and what they are scored with.
#[derive(Clone, Copy)]
pub(crate) struct CodedKeys<'a> {
    pub coded: &'a Coded,
    /// `[capacity][words]`.
    pub rows: &'a wgpu::Buffer,
    /// [`Coded::key_table`].
    pub table: &'a wgpu::Buffer,
    /// By key/value head: `[rank / 4][head_dim]` where keys are rebuilt, else `[pad(head_dim) / 4][rank]`. Vectors of f16.
    pub up: &'a wgpu::Buffer,
    /// Whether the rows are of keys after RoPE: then queries are taken to them, and keys are not rebuilt.
    pub taken: bool,
    /// Where keys are chosen: how many, and the chunks, `[H_kv][`[`Selection::chunks`]`]`.
    pub chosen: Option<(Selection, &'a wgpu::Buffer)>,
}

/// Scores one layer's keys.
pub struct Score {
    kernel: Kernel,
    side: bool,
    tile: u32,
    span: Option<u32>,
    kv_heads: u32,
    group: u32,
    /// What a column that is not coded takes for one token, and what a coded one does; and what a coded one takes once for all tokens.
    each: [Work; 3],
    /// Bytes of an exact key.
    row: u32,
    step: Step,
}

/// Keys per tile: as many as fit, in f32, into half of the least workgroup memory that any device has.
fn tile(head_dim: usize) -> u32 {
    [32, 16, 8].into_iter().find(|t| head_dim * t * 4 <= 8 << 10).unwrap_or(4) as u32
}

/// Vectors of keys that a lane multiplies at a time: a power of two that divides a key's, fewer where each meets more rows. Each takes four registers for a key's and as many for a row's.
fn vectors_at_once(head_dim: usize, rows: u32) -> u32 {
    let vectors = pad(head_dim) as u32 / 4;
    (8 / rows).max(1).next_power_of_two().min(1 << vectors.trailing_zeros())
}

/// The most keys that one dispatch scores: a grid has at most 65,535 tiles on the least of devices.
pub(crate) fn most_keys(head_dim: usize) -> usize {
    u16::MAX as usize * tile(head_dim) as usize
}

/// Queries that a lane answers at once.
pub(super) fn rows(attention: &AttentionShape, many: bool) -> u32 {
    if many { 8 } else { (attention.group_size() as u32).div_ceil(WORKGROUP / tile(attention.head_dim)).min(8) }
}

/// How coded keys are scored, if there are any: whether queries are taken to them, and whether they are chosen.
type Kind = Option<(bool, Option<Selection>)>;

/// How tokens are coded in blocks, where they are: as keys are read, and how many on either side.
#[derive(Default)]
pub(super) struct Aligned {
    striped: Striped,
    block: usize,
}

/// What a kernel that reads what stands beside exact rows binds of it, and how many columns of it are not candidates; `marks` and what follows them are read-only.
pub(super) fn side_bindings(stores: Option<&Stores>) -> (Vec<&'static str>, Vec<(u32, Access)>, u32) {
    let Some(stores) = stores else { return (Vec::new(), Vec::new(), 0) };
    let flags = EvictionStore::flags(stores);
    let binding = |(number, flag): (u32, &str)| flags.contains(&flag).then_some((number, Access::Read));
    let bindings = [(8, "SIDE"), (9, "SKETCH"), (10, "MEAN")].into_iter().filter_map(binding).collect();
    (flags, bindings, stores.vague_columns() as u32)
}

pub(super) fn variant(attention: &AttentionShape, coded: Kind, aligned: Aligned, stores: Option<&Stores>, rows: u32) -> Spec {
    let (mut flags, side, vague) = side_bindings(stores);
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Write)];
    if attention.window.is_some() && stores.is_none() {
        flags.push("WINDOW");
    }
    if coded.is_some() || stores.is_some() {
        flags.push("RING");
    }
    if let Some((taken, chosen)) = coded {
        flags.extend(["CODED", if taken { "TAKEN" } else { "REBUILT" }]);
        bindings.extend([(3, Access::Read), (4, Access::Read), (5, Access::Read)]);
        if !taken {
            bindings.push((6, Access::Read));
        }
        if chosen.is_some() {
            flags.push("CHOSEN");
            bindings.push((7, Access::Read));
        }
    }
    bindings.extend(side);
    if flags.contains(&"REBUILT") || flags.contains(&"VAGUE") {
        flags.push("WIDE");
    }
    let most = coded.and_then(|(_, chosen)| chosen).map_or(0, |selection| selection.chunks());
    let mut constants = vec![
        ("WORKGROUP", WORKGROUP),
        ("CHUNK", Selection::CHUNK as u32),
        ("MOST", most as u32),
        ("VAGUE_COLUMNS", vague),
        ("PAIRS", (attention.head_dim / 2) as u32),
        ("NEAR", NEAR),
        ("BOOKS", BOOKS),
        ("TILE", tile(attention.head_dim)),
        ("ROWS", rows),
        ("VECTORS_AT_ONCE", vectors_at_once(attention.head_dim, rows)),
        ("KV_HEADS", attention.kv_heads as u32),
        ("GROUP", attention.group_size() as u32),
    ];
    flags.extend(aligned.striped.flags);
    constants.extend(aligned.striped.constants);
    if aligned.block > 1 {
        flags.push("ALIGNED");
        constants.push(("ALIGN", aligned.block as u32));
    }
    spec("score.wgsl", &flags, &constants, &bindings)
}

pub(super) fn variants() -> Vec<Spec> {
    let chosen = Some(Selection { tokens: 256 });
    let kinds = [None, Some((false, None)), Some((true, None)), Some((false, chosen)), Some((true, chosen))];
    let plain = AttentionShape::examples().into_iter().flat_map(|attention| kinds.map(|kind| variant(&attention, kind, Aligned::default(), None, 4)));
    let blocks = AttentionShape::examples().into_iter().flat_map(|attention| {
        super::blocks::formats(&attention).map(|format| {
            let aligned = Aligned { striped: Striped::of(&format), block: format.block() };
            variant(&attention, Some((true, None)), aligned, None, 4)
        })
    });
    plain
        .chain(blocks)
        .chain(
            AttentionShape::examples()
                .iter()
                .flat_map(|attention| beside(attention).map(|(kind, stores)| variant(attention, kind, Aligned::default(), Some(&stores), 4))),
        )
        .collect()
}

/// All that can stand beside exact rows, and how coded keys are scored meanwhile.
fn beside(attention: &AttentionShape) -> [(Kind, Stores); 6] {
    let dense = [Vague::None, Vague::Mean, Vague::Sketch, Vague::Shrunk].map(|vague| (None, stores(attention, vague)));
    let coded = [true, false].map(|taken| (Some((taken, None)), stores(attention, Vague::Rows)));
    let ([a, b, c, d], [e, f]) = (dense, coded);
    [a, b, c, d, e, f]
}

/// Some of everything.
pub(super) fn stores(attention: &AttentionShape, vague: Vague) -> Stores {
    Stores::some(2 * attention.kv_row(), vague, 24, 5, 400)
}

impl Score {
    /// `queries`: `[n][…]` f32, `[H][pad(head_dim)]` and then those taken to coded keys; `scores`: `[block tokens][H][stride]` f32. `many`: for blocks of many tokens, else of one.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn plan(
        device: &Device,
        attention: &AttentionShape,
        queries: &wgpu::Buffer,
        cache: &ExactRows,
        slots: Slots,
        scores: &wgpu::Buffer,
        stride: usize,
        turns: &wgpu::Buffer,
        coded: Option<CodedKeys>,
        many: bool,
    ) -> Result<Score> {
        let tile = tile(attention.head_dim);
        let (teams, group, rows) = (WORKGROUP / tile, attention.group_size() as u32, rows(attention, many));
        let mut buffers = vec![queries, &cache.keys, scores];
        let kind = coded.map(|coded| (coded.taken, coded.chosen.map(|(selection, _)| selection)));
        let mut query_stride = attention.heads * pad(attention.head_dim);
        if let Some(coded) = coded {
            buffers.extend([coded.rows, coded.table, turns]);
            if !coded.taken {
                buffers.push(coded.up);
            }
            buffers.extend(coded.chosen.map(|(_, chosen)| chosen));
            query_stride = coded.coded.query_stride(attention, coded.taken);
        }
        let (heads, dim, kv_heads) = (attention.heads, attention.head_dim, attention.kv_heads);
        let ranks = coded.map_or(0, |coded| (0..kv_heads).map(|kv| coded.coded.rank(kv)).sum::<usize>());
        let taken = coded.is_some_and(|coded| coded.taken);
        let work = |bytes: usize, flops: usize| Work { bytes: bytes as u64, flops: flops as u64 };
        // Keys, and scores that are written; a rebuilt key serves all queries.
        let row = coded.map_or(0, |coded| coded.coded.row_words());
        let each = [
            work(4 * heads, 2 * heads * dim),
            work(4 * heads, if taken { 2 * attention.group_size() * ranks } else { 2 * heads * dim }),
            work(4 * row, if taken { 0 } else { 2 * ranks * dim }),
        ];
        let aligned = coded.map_or(Aligned::default(), |coded| Aligned { striped: coded.coded.striped(), block: coded.coded.block });
        let side = cache.side.as_ref();
        buffers.extend(side.into_iter().flat_map(EvictionStore::buffers));
        Ok(Score {
            kernel: device.kernel(variant(attention, kind, aligned, side.map(|side| &side.stores), rows), &buffers)?,
            side: side.is_some(),
            tile,
            // A rebuilt tile serves all rows of the block; a stored one is cheap to load again.
            span: coded.is_none_or(|coded| coded.taken).then_some(teams * rows * 2),
            kv_heads: attention.kv_heads as u32,
            group,
            each,
            row: (2 * kv_heads * pad(dim)) as u32,
            step: Step {
                stride: stride as u32,
                queries: query_stride as u32,
                window: attention.window.unwrap_or(0) as u32,
                sinks: slots.sinks,
                ring: slots.ring,
                words: coded.map_or(0, |coded| coded.coded.words as u32),
                ..bytemuck::Zeroable::zeroed()
            },
        })
    }

    /// One workgroup per tile and key/value head, and per span of rows where keys are not rebuilt.
    pub fn record(&self, pass: &mut Pass, block: &Block) {
        let rows = block.tokens * self.group;
        let span = self.span.unwrap_or(rows);
        let step = Step {
            first: block.first,
            tokens: block.tokens,
            at: block.at,
            span,
            near: block.near,
            window: if self.side { block.side } else { self.step.window },
            start: block.start,
            coded: block.coded,
            recent: block.reach.recent as u32,
            low: block.reach.low as u32,
            high: block.reach.high as u32,
            ..self.step
        };
        let tiles = block.plain().div_ceil(self.tile) + block.coded.div_ceil(self.tile);
        let [tokens, plain, coded, row] = [block.tokens, block.plain(), block.coded, self.row].map(u64::from);
        let [of_plain, of_coded, once] = self.each;
        let work = Work {
            bytes: tokens * (4 * u64::from(self.step.queries) + plain * of_plain.bytes + coded * of_coded.bytes) + plain * row + coded * once.bytes,
            flops: tokens * (plain * of_plain.flops + coded * of_coded.flops) + coded * once.flops,
        };
        self.kernel.record(pass, &step, [tiles, self.kv_heads, rows.div_ceil(span)], work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::coded::{by_coordinates, by_dimensions};
    use crate::kernels::oracle::{assert_close, beside, coded_side, devices, frequencies, halves, numbers, run, turned};
    use crate::kernels::turns;
    use crate::rows::{Exact, Format};

    /// Blocks of one token and of several, from the beginning and from within, of keys that are all exact.
    #[test]
    fn every_key_answers_every_query() {
        let c = AttentionShape::of(false, Some(40), 10, 5, 14);
        let (head, query, heads, capacity) = (c.head_dim, pad(c.head_dim), c.heads, 110);
        let queries: Vec<f32> = numbers(1, 40 * heads * query).into_iter().enumerate().map(|(i, x)| if i % query < head { x } else { 0.0 }).collect();
        let rows = halves(2, capacity * 5 * query);
        for device in devices(None) {
            let cache = ExactRows { keys: device.upload("keys", &rows).unwrap(), values: device.buffer("values", 4).unwrap(), side: None };
            let from = device.upload("queries", &queries).unwrap();
            for b in [Block::new(101, 1, 0, Some(40), None), Block::new(90, 5, 2, Some(40), None), Block::new(0, 37, 0, Some(40), None)] {
                let (tokens, count) = (b.tokens as usize, b.exact() as usize);
                let out = device.buffer("scores", (tokens * heads * capacity * 4) as u64).unwrap();
                let score = Score::plan(&device, &c, &from, &cache, Slots::ALL, &out, capacity, &from, None, tokens > 1).unwrap();
                let got = run::<f32>(&device, &out, tokens * heads * capacity, |pass| score.record(pass, &b));
                let (mut seen, mut expected) = (Vec::new(), Vec::new());
                for (line, got) in got.chunks_exact(capacity).enumerate() {
                    let (t, h) = (line / heads, line % heads);
                    let position = b.first as usize + t;
                    let q = &queries[((b.at as usize + t) * heads + h) * query..][..head];
                    for (column, got) in got.iter().enumerate() {
                        let key = b.exact_key(column as u32) as usize;
                        if column >= count {
                            assert_eq!(*got, 0.0, "{b:?}: nothing is written past the keys");
                        } else if key > position || key + 40 <= position {
                            assert!(*got < -3e38, "{b:?}: token {t} may not see key {key}: {got}");
                        } else {
                            seen.push(*got as f64);
                            let k = &rows[(key * 5 + h / c.group_size()) * query..];
                            expected.push(q.iter().zip(k).map(|(q, k)| *q as f64 * k.to_f64()).sum::<f64>() / (head as f64).sqrt());
                        }
                    }
                }
                assert_close(seen, &expected, 1e-10, &format!("{b:?}, {:?}", device.tier()));
            }
        }
    }

    /// After exact keys come candidates and what is vague, as many times as they are tokens; nobody looks past a token's window for its exact key.
    #[test]
    fn what_stands_beside_answers_as_often_as_it_is_tokens() {
        let c = AttentionShape::of(false, None, 6, 2, 14);
        let (heads, padded, columns) = (6, pad(14), 150);
        let (exact, slots) = (Exact { sinks: 3, recent: 5 }, Slots { sinks: 3, ring: 90 });
        let queries: Vec<f32> = numbers(1, 40 * heads * padded).into_iter().enumerate().map(|(i, x)| if i % padded < 14 { x } else { 0.0 }).collect();
        for (vague, device) in
            [Vague::None, Vague::Mean, Vague::Sketch, Vague::Shrunk].into_iter().flat_map(|vague| devices(None).map(|d| (vague, d)))
        {
            let beside = beside(&device, &c, slots, vague);
            let from = device.upload("queries", &queries).unwrap();
            for (first, tokens) in [(101, 1), (70, 37)] {
                let reach = exact.reach(first, tokens, false, 0);
                let b = Block::new(first as u32, tokens as u32, 0, None, Some(reach)).beside(beside.columns.len() as u32, false);
                let out = device.buffer("scores", (tokens * heads * columns * 4) as u64).unwrap();
                let score = Score::plan(&device, &c, &from, &beside.cache, slots, &out, columns, &from, None, tokens > 1).unwrap();
                let got = run::<f32>(&device, &out, tokens * heads * columns, |pass| score.record(pass, &b));
                let (mut seen, mut expected) = (Vec::new(), Vec::new());
                for (line, got) in got.chunks_exact(columns).enumerate() {
                    let (t, h) = (line / heads, line % heads);
                    let dot =
                        |key: &[f64]| queries[line * padded..][..padded].iter().zip(key).map(|(q, k)| f64::from(*q) * k).sum::<f64>() / 14f64.sqrt();
                    for (column, got) in got.iter().enumerate() {
                        let (count, key) = if column < b.exact() as usize {
                            let key = b.exact_key(column as u32) as usize;
                            let there = key <= first + t && !reach.coded(first + t, key);
                            let row = &beside.rows[0][slots.of(key) * 2 * padded..][..2 * padded];
                            (u32::from(there), row.iter().map(|x| x.to_f64()).collect())
                        } else if let Some((count, [key, _])) = beside.columns.get(column - b.exact() as usize) {
                            (*count, key.clone())
                        } else {
                            assert_eq!(*got, 0.0, "nothing is written past them");
                            continue;
                        };
                        if count == 0 {
                            assert!(*got < -3e38, "{vague:?}, {first}, {column}: {got}");
                        } else {
                            seen.push(f64::from(*got));
                            expected.push(dot(&key[h / 3 * padded..][..padded]) + f64::from(count).ln());
                        }
                    }
                }
                assert_close(seen, &expected, 1e-10, &format!("{vague:?}, {first}, {:?}", device.tier()));
            }
        }
    }

    /// Sinks, a ring and coded rows of uneven slices: rebuilt and turned, or with the query taken to them; every query reads every key once, exactly or by its code.
    #[test]
    fn coded_keys_are_scored_as_what_they_decode_to() {
        let exact = Exact { sinks: 3, recent: 5 };
        let capacity = 110;
        let formats = crate::kernels::pack::tests::formats();
        let cases: Vec<(AttentionShape, Vec<(usize, &Format)>)> = vec![
            (AttentionShape::of(true, Some(60), 10, 5, 14), vec![(2, &formats[1]), (1, &formats[0]), (1, &formats[5]), (1, &formats[6])]),
            (AttentionShape::of(false, None, 3, 1, 512), vec![(1, &formats[2])]),
        ];
        for (c, slices) in &cases {
            let (head, query, heads, kv_heads, group) = (c.head_dim, pad(c.head_dim), c.heads, c.kv_heads, c.group_size());
            let slots = Slots::new(&exact.blocks(1), 40, capacity);
            let ring = halves(2, slots.count() * kv_heads * query);
            for taken in [false, true] {
                let mut means = numbers(4, kv_heads * head);
                // The first head has a mean in every other pair of RoPE.
                means[..head].iter_mut().enumerate().filter(|(i, _)| i % (head / 2) % 2 == 1).for_each(|(_, mean)| *mean = 0.0);
                let side = coded_side(c, slices, capacity);
                let side = if taken { side.about(c, &means) } else { side };
                let stride = side.coded.query_stride(c, taken);
                // Queries as `prepare` leaves them.
                let table = side.coded.key_table(c, taken, &means);
                let mut queries = numbers(1, 40 * stride);
                let plain = |t: usize, h: usize, i: usize| t * stride + h * query + i;
                for (t, h) in (0..40).flat_map(|t| (0..heads).map(move |h| (t, h))) {
                    (head..query).for_each(|i| queries[plain(t, h, i)] = 0.0);
                    if taken {
                        let (kv, rank) = (h / group, side.coded.rank(h / group));
                        let turning = &side.coded.turning[kv];
                        let vectors = rank / 4 + turning.len().div_ceil(2);
                        let at = t * stride + 4 * (table[(BOOKS as usize) + 2 * kv][3] as usize + h % group * vectors);
                        for i in 0..rank {
                            queries[at + i] = (0..head).map(|d| queries[plain(t, h, d)] * side.up(kv, i, d)).sum();
                        }
                        queries[at + rank..at + 4 * vectors].fill(0.0);
                        for (i, &pair) in turning.iter().enumerate() {
                            let (a, b) = (pair as usize, pair as usize + head / 2);
                            let ([q, p], [m, n]) = ([a, b].map(|d| queries[plain(t, h, d)]), [a, b].map(|d| means[kv * head + d]));
                            (queries[at + rank + 2 * i], queries[at + rank + 2 * i + 1]) = (q * m + p * n, p * m - q * n);
                        }
                    }
                }
                let up: Vec<_> = (0..kv_heads)
                    .flat_map(|kv| {
                        let (up, rank) = (|i, d| side.up(kv, i, d), side.coded.rank(kv));
                        if taken { by_dimensions(up, rank, head) } else { by_coordinates(up, rank, head) }
                    })
                    .collect();
                let decoded: Vec<Vec<f64>> = (0..kv_heads * capacity)
                    .map(|i| {
                        let (kv, position) = (i / capacity, i % capacity);
                        let z = &side.coordinates[side.coded.of_head(kv).0][position];
                        let mean: Vec<f64> = means[kv * head..][..head].iter().map(|x| f64::from(*x)).collect();
                        let from = |about: &[f64]| {
                            let at = |d: usize| about[d] + z.iter().enumerate().map(|(i, z)| z * f64::from(side.up(kv, i, d))).sum::<f64>();
                            (0..head).map(at).collect::<Vec<f64>>()
                        };
                        if taken { from(&turned(c, &mean, None, position)) } else { turned(c, &from(&mean), None, position) }
                    })
                    .collect();
                let blocks = [
                    (0, 2, 0, true, 0),
                    (101, 1, 0, false, 0),
                    (101, 1, 0, true, 0),
                    (70, 40, 0, true, 0),
                    (60, 5, 2, false, 0),
                    (99, 3, 1, false, 97),
                ];
                for device in devices(None) {
                    let cache = ExactRows { keys: device.upload("keys", &ring).unwrap(), values: device.buffer("values", 4).unwrap(), side: None };
                    let [from, turns] =
                        [&queries, turns(&frequencies(c.head_dim), capacity).as_flattened()].map(|v| device.upload("numbers", v).unwrap());
                    let (rows, table, up) =
                        (device.upload("rows", &side.rows).unwrap(), device.upload("table", &table).unwrap(), device.upload("up", &up).unwrap());
                    let keys = CodedKeys { coded: &side.coded, rows: &rows, table: &table, up: &up, taken, chosen: None };
                    for (first, tokens, at, strict, exact_from) in blocks {
                        let reach = exact.reach(first, tokens, strict, exact_from);
                        let b = Block::new(first as u32, tokens as u32, at, c.window, Some(reach));
                        let (many, columns) = (tokens > 1, 200);
                        let out = device.buffer("scores", (tokens * heads * columns * 4) as u64).unwrap();
                        let score = Score::plan(&device, c, &from, &cache, slots, &out, columns, &turns, Some(keys), many).unwrap();
                        let got = run::<f32>(&device, &out, tokens * heads * columns, |pass| score.record(pass, &b));
                        let what = format!("{first} + {tokens}, strict: {strict}, taken: {taken}, {:?}", device.tier());
                        let (mut seen, mut expected) = (Vec::new(), Vec::new());
                        for (line, got) in got.chunks_exact(columns).enumerate() {
                            let (t, h) = (line / heads, line % heads);
                            let (position, kv) = (first + t, h / group);
                            let mut read = vec![0; position + 1];
                            for (column, got) in got.iter().enumerate() {
                                let column = column as u32;
                                if column >= b.exact() + b.coded {
                                    assert_eq!(*got, 0.0, "{what}: nothing is written past the keys");
                                    continue;
                                }
                                let coded = column >= b.exact();
                                let key = if coded { b.start + column - b.exact() } else { b.exact_key(column) } as usize;
                                let unseen = key > position || c.window.is_some_and(|w| key + w <= position);
                                if unseen || reach.coded(position, key) != coded {
                                    assert!(*got < -3e38, "{what}: token {t} may not see key {key}, coded: {coded}: {got}");
                                    continue;
                                }
                                read[key] += 1;
                                let k: Vec<f64> = match coded {
                                    true => decoded[kv * capacity + key].clone(),
                                    false => ring[(slots.of(key) * kv_heads + kv) * query..][..head].iter().map(|k| k.to_f64()).collect(),
                                };
                                let q = |d: usize| f64::from(queries[plain(at as usize + t, h, d)]);
                                seen.push(f64::from(*got));
                                expected.push(k.iter().enumerate().map(|(d, k)| q(d) * k).sum::<f64>() / (head as f64).sqrt());
                            }
                            let from = c.window.map_or(0, |w| (position + 1).saturating_sub(w));
                            assert!(read[from..].iter().all(|n| *n == 1), "{what}: token {t} reads {read:?}");
                        }
                        assert_close(seen, &expected, 1e-9, &what);
                    }
                }
            }
        }
    }
}
