//! `score.wgsl`: how well every column answers every query.

use super::attention::AttentionBuffers;
use super::coded::{BOOKS, Coded, Striped};
use super::columns::{Block, Kinds, List};
use super::exact::ExactRows;
use super::{AttentionShape, NEAR, WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work, pad};

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
    /// By key/value head: `[rank / 4][head_dim]` where keys are rebuilt, else `[pad(head_dim) / 4][rank]`. Vectors of f16.
    pub up: &'a wgpu::Buffer,
    /// Whether the rows are of keys after RoPE: then queries absorb their basis, and keys are not rebuilt.
    pub absorbed: bool,
    /// Which of them are read; `None` for all.
    pub list: Option<List<'a>>,
}

/// Scores one layer's keys.
pub struct Score {
    kernel: Kernel,
    tile: u32,
    /// Lines of a workgroup.
    span: u32,
    rebuilt: bool,
    kv_heads: u32,
    group: u32,
    /// What a plain column takes for one token, and what a coded one does.
    each: [Work; 2],
    /// Bytes of a plain key, and of a coded one.
    row: [u32; 2],
    params: Params,
}

/// Keys per tile: as many as fit, in f32, into half of the least workgroup memory that any device has.
pub(super) fn tile(head_dim: usize) -> u32 {
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

/// How a variant reads coded keys.
#[derive(Clone, Default)]
pub(super) enum Reading {
    /// There are none.
    #[default]
    None,
    /// From their rows, and how these are packed.
    Absorbed(Striped),
    /// As keys in f16.
    Rebuilt,
}

/// `align`: tokens that are coded together.
pub(super) fn variant(attention: &AttentionShape, reading: Reading, kinds: Kinds, align: usize, rows: u32) -> Spec {
    let mut flags = Vec::from_iter(kinds.flags());
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Write)];
    let mut constants = vec![
        ("WORKGROUP", WORKGROUP),
        ("PAIRS", (attention.head_dim / 2) as u32),
        ("TILE", tile(attention.head_dim)),
        ("ROWS", rows),
        ("VECTORS_AT_ONCE", vectors_at_once(attention.head_dim, rows)),
        ("KV_HEADS", attention.kv_heads as u32),
        ("GROUP", attention.group_size() as u32),
        ("ALIGN", align as u32),
    ];
    constants.extend(kinds.constants());
    match reading {
        Reading::None => {}
        Reading::Absorbed(striped) => {
            flags.push("ABSORBED");
            flags.extend(striped.flags);
            constants.extend([("NEAR", NEAR), ("BOOKS", BOOKS)]);
            constants.extend(striped.constants);
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
    /// Reads `queries`, writes `scores` of `b`; reads `rebuilt` where coded keys are. `many`: for blocks of many tokens, else of one.
    pub(crate) fn plan(
        device: &Device,
        attention: &AttentionShape,
        b: &AttentionBuffers,
        cache: &ExactRows,
        coded: Option<CodedKeys>,
        many: bool,
    ) -> Result<Score> {
        let (tile, rows) = (tile(attention.head_dim), rows(attention, many));
        let (heads, dim, kv_heads, group) = (attention.heads, attention.head_dim, attention.kv_heads, attention.group_size());
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
                    (Reading::Absorbed(keys.coded.striped()), queries, work(4 * heads, 2 * group * ranks), 4 * keys.coded.row_words())
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
        Ok(Score {
            kernel: device.kernel(variant(attention, reading, kinds, coded.map_or(1, |keys| keys.coded.block), rows), &buffers)?,
            tile,
            span: WORKGROUP / tile * rows * 2,
            rebuilt,
            kv_heads: kv_heads as u32,
            group: group as u32,
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

    /// One workgroup per tile, key/value head, and span of lines. `rebuilt`: the row of the first of the block's rebuilt keys.
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
        let tiles = block.plain().div_ceil(self.tile) + block.coded.div_ceil(self.tile);
        let [tokens, plain, coded, queries] = [block.tokens, block.plain(), block.coded, self.params.queries].map(u64::from);
        let ([of_plain, of_coded], [row, coded_row]) = (self.each, self.row.map(u64::from));
        let work = Work {
            bytes: tokens * (4 * queries + plain * of_plain.bytes + coded * of_coded.bytes) + plain * row + coded * coded_row,
            flops: tokens * (plain * of_plain.flops + coded * of_coded.flops),
        };
        self.kernel.record(pass, &params, [tiles, self.kv_heads, (block.tokens * self.group).div_ceil(self.span)], work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::coded::{by_coordinates, by_dimensions};
    use crate::kernels::oracle::{assert_close, beside, buffers, devices, exact, frequencies, halves, latent_side, numbers, rotated, run, upload};
    use crate::kernels::rebuild::Rebuild;
    use crate::kernels::rope_table;
    use crate::kernels::sketch::Sketch;
    use crate::kv::{Evicted, Exact, Format, Slots};

    /// Blocks of one token and of several, from the beginning and from within, of keys that are all exact.
    #[test]
    fn every_key_answers_every_query() {
        let c = AttentionShape::of(false, Some(40), 10, 5, 14);
        let (head, query, heads, capacity) = (c.head_dim, pad(c.head_dim), c.heads, 110);
        let queries: Vec<f32> = numbers(1, 40 * heads * query).into_iter().enumerate().map(|(i, x)| if i % query < head { x } else { 0.0 }).collect();
        let rows = halves(2, capacity * 5 * query);
        for device in devices(None) {
            let cache = exact(&device, Slots::ALL, [&rows, &[]]);
            let from = device.upload("queries", &queries).unwrap();
            for b in [Block::new(101, 1, 0, Some(40), None), Block::new(90, 5, 2, Some(40), None), Block::new(0, 37, 0, Some(40), None)] {
                let (tokens, count) = (b.tokens as usize, b.exact() as usize);
                let out = device.buffer("scores", (tokens * heads * capacity * 4) as u64).unwrap();
                let through = AttentionBuffers { queries: from.clone(), scores: out.clone(), ..buffers(&device, capacity) };
                let score = Score::plan(&device, &c, &through, &cache, None, tokens > 1).unwrap();
                let got = run::<f32>(&device, &out, tokens * heads * capacity, |pass| score.record(pass, &b, 0));
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

    /// After exact keys come candidates and what is left of evicted tokens, as many times as they are tokens; nobody looks past a token's window for its exact key.
    #[test]
    fn what_stands_beside_answers_as_often_as_it_is_tokens() {
        let c = AttentionShape::of(false, None, 6, 2, 14);
        let (heads, padded, columns) = (6, pad(14), 150);
        let (exact, slots) = (Exact { sinks: 3, recent: 5 }, Slots { sinks: 3, ring: 90 });
        let queries: Vec<f32> = numbers(1, 40 * heads * padded).into_iter().enumerate().map(|(i, x)| if i % padded < 14 { x } else { 0.0 }).collect();
        for (evicted_as, device) in
            [Evicted::None, Evicted::Mean, Evicted::Sketch, Evicted::Shrunk].into_iter().flat_map(|evicted_as| devices(None).map(|d| (evicted_as, d)))
        {
            let beside = beside(&device, &c, slots, evicted_as);
            let from = device.upload("queries", &queries).unwrap();
            for (first, tokens) in [(101, 1), (70, 37)] {
                let reach = exact.reach(first, tokens, false, 0);
                let b = Block::new(first as u32, tokens as u32, 0, None, Some(reach)).beside(beside.columns.len() as u32).listed(0);
                let out = device.buffer("scores", (tokens * heads * columns * 4) as u64).unwrap();
                let through = AttentionBuffers { queries: from.clone(), scores: out.clone(), ..beside.buffers(&device, &c, columns) };
                let score = Score::plan(&device, &c, &through, &beside.cache, None, tokens > 1).unwrap();
                let sketch = Sketch::plan(&device, &c, &through, &beside.cache).unwrap();
                let got = run::<f32>(&device, &out, tokens * heads * columns, |pass| {
                    sketch.iter().for_each(|sketch| sketch.record(pass));
                    score.record(pass, &b, 0);
                });
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
                            assert!(*got < -3e38, "{evicted_as:?}, {first}, {column}: {got}");
                        } else {
                            seen.push(f64::from(*got));
                            expected.push(dot(&key[h / 3 * padded..][..padded]) + f64::from(count).ln());
                        }
                    }
                }
                // What is made of a sketch is rounded to 16 bits.
                let most = if evicted_as == Evicted::None { 1e-10 } else { 1e-6 };
                assert_close(seen, &expected, most, &format!("{evicted_as:?}, {first}, {:?}", device.tier()));
            }
        }
    }

    /// Sinks, a ring and latents of uneven slices: rebuilt and rotated, or with the query absorbed to them; every query reads every key once, exactly or by its code.
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
            for absorbed in [false, true] {
                let mut means = numbers(4, kv_heads * head);
                // The first head has a mean in every other pair of RoPE.
                means[..head].iter_mut().enumerate().filter(|(i, _)| i % (head / 2) % 2 == 1).for_each(|(_, mean)| *mean = 0.0);
                let side = latent_side(c, slices, capacity);
                let side = if absorbed { side.about(c, &means) } else { side };
                let stride = side.coded.query_stride(c, absorbed);
                // Queries as `prepare` leaves them.
                let table = side.coded.key_table(c, absorbed, &means);
                let mut queries = numbers(1, 40 * stride);
                let plain = |t: usize, h: usize, i: usize| t * stride + h * query + i;
                for (t, h) in (0..40).flat_map(|t| (0..heads).map(move |h| (t, h))) {
                    (head..query).for_each(|i| queries[plain(t, h, i)] = 0.0);
                    if absorbed {
                        let (kv, rank) = (h / group, side.coded.rank(h / group));
                        let mean_pairs = &side.coded.mean_pairs[kv];
                        let vectors = rank / 4 + mean_pairs.len().div_ceil(2);
                        let at = t * stride + 4 * (table[(BOOKS as usize) + 2 * kv][3] as usize + h % group * vectors);
                        for i in 0..rank {
                            queries[at + i] = (0..head).map(|d| queries[plain(t, h, d)] * side.up(kv, i, d)).sum();
                        }
                        queries[at + rank..at + 4 * vectors].fill(0.0);
                        for (i, &pair) in mean_pairs.iter().enumerate() {
                            let (a, b) = (pair as usize, pair as usize + head / 2);
                            let ([q, p], [m, n]) = ([a, b].map(|d| queries[plain(t, h, d)]), [a, b].map(|d| means[kv * head + d]));
                            (queries[at + rank + 2 * i], queries[at + rank + 2 * i + 1]) = (q * m + p * n, p * m - q * n);
                        }
                    }
                }
                let up: Vec<_> = (0..kv_heads)
                    .flat_map(|kv| {
                        let (up, rank) = (|i, d| side.up(kv, i, d), side.coded.rank(kv));
                        if absorbed { by_dimensions(up, rank, head) } else { by_coordinates(up, rank, head) }
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
                        if absorbed { from(&rotated(c, &mean, None, position)) } else { rotated(c, &from(&mean), None, position) }
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
                    let cache = crate::kernels::oracle::exact(&device, slots, [&ring, &[]]);
                    let [from, rope_table] =
                        [&queries, rope_table(&frequencies(c.head_dim), capacity).as_flattened()].map(|v| upload(&device, v, v.len()));
                    let (rows, table, up) =
                        (device.upload("rows", &side.rows).unwrap(), device.upload("table", &table).unwrap(), device.upload("up", &up).unwrap());
                    let keys = CodedKeys { coded: &side.coded, rows: &rows, table: &table, up: &up, absorbed, list: None };
                    let rebuilt = device.buffer("rebuilt", (2 * capacity * c.kv_row()) as u64).unwrap();
                    for (first, tokens, at, strict, exact_from) in blocks {
                        let reach = exact.reach(first, tokens, strict, exact_from);
                        let b = Block::new(first as u32, tokens as u32, at, c.window, Some(reach));
                        let (many, columns) = (tokens > 1, 200);
                        let out = device.buffer("scores", (tokens * heads * columns * 4) as u64).unwrap();
                        let through = AttentionBuffers {
                            queries: wgpu::Buffer::clone(&from),
                            rope: rope_table.clone(),
                            scores: out.clone(),
                            rebuilt: rebuilt.clone(),
                            ..buffers(&device, columns)
                        };
                        let score = Score::plan(&device, c, &through, &cache, Some(keys), many).unwrap();
                        let rebuild = (!absorbed).then(|| Rebuild::plan(&device, c, &through, keys, slots).unwrap());
                        // Some more before the block's own, as where another block of the call reaches further back.
                        let before = if absorbed { 0 } else { b.start.min(3) };
                        let got = run::<f32>(&device, &out, tokens * heads * columns, |pass| {
                            rebuild.iter().for_each(|rebuild| rebuild.record(pass, b.start - before, b.coded + before));
                            score.record(pass, &b, before);
                        });
                        let what = format!("{first} + {tokens}, strict: {strict}, absorbed: {absorbed}, {:?}", device.tier());
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
                        // Rebuilt keys are rounded to 16 bits.
                        assert_close(seen, &expected, if absorbed { 1e-9 } else { 1e-6 }, &what);
                    }
                }
            }
        }
    }
}
