//! `values.wgsl`: the weighted sum of value rows, split by split, exact ones and coded ones apart.

use super::attention::AttentionBuffers;
use super::coded::{Coded, Codes};
use super::columns::{Block, Kinds, List};
use super::exact::ExactRows;
use super::{AttentionShape, WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work, pad};
use crate::gpu::{SHARING, Tuning};
use crate::kv::Slots;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    plain: u32,
    coded: u32,
    tokens: u32,
    stride: u32,
    length: u32,
    along: u32,
    sums: u32,
    entries: u32,
    all: u32,
    start: u32,
    words: u32,
    fixed: u32,
    exact: u32,
    base: u32,
    sinks: u32,
    ring: u32,
}

/// The most query heads that a workgroup sums for: each costs four registers a lane.
const MOST_ROWS: usize = 8;
/// Coded values: their rows, and what they are read with.
#[derive(Clone, Copy)]
pub(crate) struct CodedValues<'a> {
    pub coded: &'a Coded,
    /// `[capacity][words]`.
    pub rows: &'a wgpu::Buffer,
    /// [`Coded::value_table`].
    pub table: &'a wgpu::Buffer,
    /// The table by which they are summed: [`groups`]'s.
    pub groups: &'a wgpu::Buffer,
    /// Which of them are read; `None` for all.
    pub list: Option<List<'a>>,
}

impl CodedValues<'_> {
    /// Whether each key/value head reads its own.
    fn apart(&self) -> bool {
        self.list.is_some_and(|list| list.by_head > 0)
    }
}

/// Sums one layer's values.
pub struct Values {
    kernel: Kernel,
    rows: u32,
    heads: u32,
    /// What a column that is not coded takes for one token, and what a coded one does; and bytes
    /// that either takes once for all tokens.
    each: [Work; 2],
    once: [u64; 2],
    tuning: Tuning,
    slots: Slots,
    params: Params,
}

/// The most query heads of a group, and how many of them a workgroup sums for. Where each key/value
/// head reads its own list (`apart`) a group is one of these.
pub(super) fn shape(attention: &AttentionShape, coded: Option<&Coded>, apart: bool) -> (u32, u32) {
    let widest = coded.filter(|_| !apart).map_or(1, Coded::widest);
    let heads = widest * attention.group_size();
    (heads as u32, heads.div_ceil(heads.div_ceil(MOST_ROWS)) as u32)
}

/// `coded`: how rows are packed, if there are any.
pub(super) fn variant(attention: &AttentionShape, coded: Option<Codes>, kinds: Kinds, rows: u32, tuning: &Tuning) -> Spec {
    let mut flags = Vec::from_iter(kinds.flags());
    let mut constants = vec![
        ("WORKGROUP", WORKGROUP),
        ("GROUP", attention.group_size() as u32),
        ("KEYS", tuning.keys),
        ("IN_FLIGHT", tuning.in_flight),
        ("ENDS", tuning.ends),
        ("ROWS", rows),
        ("HEADS", attention.heads as u32),
        ("EXACT_ROW", attention.kv_row() as u32),
    ];
    constants.extend(kinds.constants());
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Read), (3, Access::Write), (4, Access::Write)];
    if let Some(codes) = coded {
        flags.push("CODED");
        flags.extend(codes.flags);
        constants.extend(codes.constants);
        bindings.extend([(5, Access::Read), (6, Access::Read)]);
    }
    if kinds.counted > 0 {
        bindings.push((7, Access::Read));
    }
    bindings.extend(kinds.list());
    spec("values.wgsl", &flags, &constants, &bindings)
}

/// A block's splits, of columns that are not coded and of those that are: their numbers and
/// lengths. Many tokens fill the device by themselves.
pub(crate) fn splits(block: &Block, tuning: &Tuning) -> [(u32, u32); 2] {
    [(block.plain(), tuning.splits), (block.coded, tuning.coded_splits)].map(|(columns, most)| {
        if block.tokens > 1 {
            return (columns.min(1), columns);
        }
        let length = columns.div_ceil(most).next_multiple_of(tuning.keys);
        (columns.div_ceil(length.max(1)), length)
    })
}

/// The shader's table of value groups, eight numbers each, exact ones first; and how many of each
/// there are. Where these read `apart`, coded ones are by key/value head.
pub(crate) fn groups(attention: &AttentionShape, coded: Option<&Coded>, apart: bool) -> (Vec<u32>, [u32; 2]) {
    let g = attention.group_size();
    // (where its rows begin, vectors, first query head, query heads, where its sums begin, first
    // run)
    let entries = |[at, width, first, heads, sums, runs]: [usize; 6]| {
        let dims = width.next_power_of_two().clamp((WORKGROUP / SHARING) as usize, WORKGROUP as usize);
        (0..width).step_by(dims).map(move |begin| [at, width, first, heads, sums, begin, dims, runs].map(|n| n as u32)).collect::<Vec<_>>()
    };
    let vectors = pad(attention.head_dim) / 4;
    let mut table: Vec<_> = (0..attention.kv_heads).flat_map(|kv| entries([kv * vectors, vectors, kv * g, g, kv * g * vectors, 0])).collect();
    let exact = table.len();
    if let Some(coded) = coded {
        let (sums, runs) = (coded.sums(attention), coded.value_runs());
        for (slice, runs) in coded.slices.iter().zip(runs) {
            let heads = if apart { 1 } else { slice.kv_heads };
            for kv in (slice.first_head..slice.first_head + slice.kv_heads).step_by(heads) {
                table.extend(entries([slice.word, slice.rank() / 4, kv * g, heads * g, sums[kv * g], runs]));
            }
        }
    }
    let counts = [exact, table.len() - exact].map(|n| n as u32);
    (table.into_iter().flatten().collect(), counts)
}

/// Numbers that a token's sums of one split take: whole heads, or coordinates.
pub(crate) fn sums(attention: &AttentionShape, coded: Option<&Coded>) -> usize {
    let exact = attention.heads * pad(attention.head_dim);
    exact.max(coded.map_or(0, |coded| 4 * coded.sums(attention)[attention.heads]))
}

impl Values {
    /// Reads `scores`, writes `sums` and `weights` of `b`. `table`: [`groups`]'s of exact values.
    pub(crate) fn plan(
        device: &Device,
        attention: &AttentionShape,
        b: &AttentionBuffers,
        cache: &ExactRows,
        table: &wgpu::Buffer,
        coded: Option<CodedValues>,
    ) -> Result<Values> {
        let (side, apart, list) = (coded.map(|coded| coded.coded), coded.is_some_and(|coded| coded.apart()), coded.and_then(|coded| coded.list));
        let (heads, rows) = shape(attention, side, apart);
        let mut buffers = vec![&b.scores, &cache.values, coded.map_or(table, |coded| coded.groups), &b.sums, &b.weights];
        buffers.extend(coded.iter().flat_map(|coded| [coded.rows, coded.table]));
        let counted = cache.eviction.as_ref().map_or(0, |eviction| eviction.stores.evicted_columns());
        if counted > 0 {
            buffers.push(&b.counted[1]);
        }
        buffers.extend(list.map(|list| list.tokens));
        let (all, kv_heads) = (attention.heads, attention.kv_heads);
        let ranks = side.map_or(0, |coded| (0..kv_heads).map(|kv| coded.rank(kv)).sum::<usize>());
        let row = side.map_or(0, Coded::row_words);
        let work = |numbers: usize| Work { bytes: 4 * all as u64, flops: 2 * numbers as u64 };
        let [entries, more] = groups(attention, side, apart).1;
        let (tuning, kinds) = (device.tuning(), Kinds { listed: list.map(|list| list.by_head), counted });
        Ok(Values {
            kernel: device.kernel(variant(attention, side.map(Coded::codes), kinds, rows, &tuning), &buffers)?,
            rows,
            heads,
            each: [work(all * attention.head_dim), work(attention.group_size() * ranks)],
            once: [2 * attention.kv_row(), 4 * row].map(|bytes| bytes as u64),
            tuning,
            slots: cache.slots,
            params: Params {
                stride: b.columns as u32,
                sums: sums(attention, side) as u32 / 4,
                entries,
                all: entries + more,
                words: side.map_or(0, |coded| coded.words as u32),
                sinks: cache.slots.sinks,
                ring: cache.slots.ring,
                ..bytemuck::Zeroable::zeroed()
            },
        })
    }

    /// One workgroup per split, entry of the table and block of rows.
    pub fn record(&self, pass: &mut Pass, block: &Block) {
        let [(splits, length), (more, along)] = splits(block, &self.tuning);
        let params = Params {
            plain: block.plain(),
            coded: block.coded,
            tokens: block.tokens,
            length,
            along,
            start: block.start,
            fixed: block.fixed,
            exact: block.exact(),
            base: block.base(self.slots),
            ..self.params
        };
        let entries = params.entries.max(params.all - params.entries);
        let [tokens, plain, coded] = [block.tokens, block.plain(), block.coded].map(u64::from);
        let each = |plain_each: u64, coded_each: u64| plain * plain_each + coded * coded_each;
        let sums = 16 * u64::from(splits + more) * u64::from(self.params.sums);
        let work = Work {
            bytes: tokens * (each(self.each[0].bytes, self.each[1].bytes) + sums) + each(self.once[0], self.once[1]),
            flops: tokens * each(self.each[0].flops, self.each[1].flops),
        };
        self.kernel.record(pass, &params, [splits + more, entries, (block.tokens * self.heads).div_ceil(self.rows)], work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{assert_close, beside, buffers, devices, exact, halves, latent_side, numbers, run, tuned_devices};
    use crate::kernels::pack::tests::formats;
    use crate::kernels::sketch::Sketch;
    use crate::kv::{Evicted, Exact, Format, Slots};

    /// Each split's largest score, its sum of weights and its sum of rows: 300 keys in several
    /// splits, five in one, and two tokens in one, the last keys of the first masked.
    #[test]
    fn every_split_is_the_sum_of_its_keys() {
        let c = AttentionShape::of(false, None, 9, 3, 14);
        let (heads, width, capacity) = (c.heads, 16, 310);
        let row = 3 * width;
        let rows = halves(2, capacity * row);
        for (tokens, start, keys) in [(1, 9, 300), (1, 30, 5), (2, 0, 131)] {
            // The window ends where the keys are to begin.
            let window = (start > 0).then_some(keys);
            let block = Block::new((start + keys - tokens) as u32, tokens as u32, 0, window, None);
            assert_eq!((block.near as usize, block.exact() as usize), (start, keys));
            let mut scores: Vec<f32> = numbers(1, tokens * heads * capacity).into_iter().map(|x| 5.0 * x).collect();
            for h in 0..heads {
                scores[h * capacity + keys - (tokens - 1)..h * capacity + keys].fill(-3.4028234e38);
            }
            for (device, tuning) in tuned_devices(None) {
                let [(count, length), none] = splits(&block, &tuning);
                assert_eq!(none.0, 0);
                let (mut sums, mut weights) = (Vec::new(), Vec::new());
                for (t, s) in (0..tokens).flat_map(|t| (0..count as usize).map(move |s| (t, s))) {
                    for h in 0..heads {
                        let within = s * length as usize..keys.min((s + 1) * length as usize);
                        let line = &scores[(t * heads + h) * capacity..][..keys];
                        let largest = line[within.clone()].iter().copied().fold(f32::MIN, f32::max) as f64;
                        let p: Vec<f64> = within.clone().map(|k| (line[k] as f64 - largest).exp()).collect();
                        let value = |k: usize, i: usize| rows[(start + k) * row + h / 3 * width + i].to_f64();
                        sums.extend((0..width).map(|i| within.clone().zip(&p).map(|(k, p)| p * value(k, i)).sum::<f64>()));
                        weights.extend([largest, p.iter().sum()]);
                    }
                }
                let from = device.upload("scores", &scores).unwrap();
                let cache = exact(&device, Slots::ALL, [&[], &rows]);
                let table = device.upload("groups", &groups(&c, None, false).0).unwrap();
                let [out, shares] = [sums.len(), weights.len()].map(|n| device.buffer("out", n as u64 * 4).unwrap());
                let through = AttentionBuffers { scores: from, sums: out.clone(), weights: shares.clone(), ..buffers(&device, capacity) };
                let values = Values::plan(&device, &c, &through, &cache, &table, None).unwrap();
                let what = format!("{tokens} tokens, {:?}, {tuning:?}", device.tier());
                let got = run::<f32>(&device, &out, sums.len(), |pass| values.record(pass, &block));
                assert_close(got.into_iter().map(f64::from), &sums, 1e-10, &what);
                let got = run::<f32>(&device, &shares, weights.len(), |_| ());
                assert_close(got.into_iter().map(f64::from), &weights, 1e-10, &what);
            }
        }
    }

    /// Candidates and what is left of evicted tokens are summed with exact rows.
    #[test]
    fn what_stands_beside_is_summed_with_exact_rows() {
        let c = AttentionShape::of(false, None, 6, 2, 14);
        let (heads, padded, stride) = (6, pad(14), 150);
        let (exact, slots) = (Exact { sinks: 3, recent: 5 }, Slots { sinks: 3, ring: 90 });
        for (evicted_as, device) in
            [Evicted::None, Evicted::Mean, Evicted::Sketch, Evicted::Shrunk].into_iter().flat_map(|evicted_as| devices(None).map(|d| (evicted_as, d)))
        {
            let beside = beside(&device, &c, slots, evicted_as);
            for (first, tokens) in [(101, 1), (70, 37)] {
                let reach = exact.reach(first, tokens, false, 0);
                let block = Block::new(first as u32, tokens as u32, 0, None, Some(reach)).beside(beside.columns.len() as u32).listed(0);
                let scores: Vec<f32> = numbers(1, tokens * heads * stride).into_iter().map(|x| 5.0 * x).collect();
                let mut expected = Vec::new();
                for (line, scores) in scores.chunks_exact(stride).enumerate() {
                    let kv = line % heads / 3;
                    let scores = &scores[..block.plain() as usize];
                    let largest = f64::from(scores.iter().copied().fold(f32::MIN, f32::max));
                    let mut sum = vec![0.0; padded];
                    for (column, score) in scores.iter().enumerate() {
                        let own = block.exact() as usize;
                        let value: Vec<f64> = match column < own {
                            true => {
                                let slot = slots.of(block.exact_key(column as u32) as usize);
                                beside.rows[1][slot * 2 * padded..][..2 * padded].iter().map(|x| x.to_f64()).collect()
                            }
                            false => beside.columns[column - own].1[1].clone(),
                        };
                        let p = (f64::from(*score) - largest).exp();
                        sum.iter_mut().zip(&value[kv * padded..]).for_each(|(sum, v)| *sum += p * v);
                    }
                    expected.extend(sum);
                }
                let from = device.upload("scores", &scores).unwrap();
                let table = device.upload("groups", &groups(&c, None, false).0).unwrap();
                let [out, shares] = [expected.len(), tokens * heads * 2].map(|n| device.buffer("out", n as u64 * 4).unwrap());
                let through = AttentionBuffers { scores: from, sums: out.clone(), weights: shares.clone(), ..beside.buffers(&device, &c, stride) };
                let values = Values::plan(&device, &c, &through, &beside.cache, &table, None).unwrap();
                let sketch = Sketch::plan(&device, &c, &through, &beside.cache).unwrap();
                assert_eq!(splits(&block, &device.tuning())[0].0, 1);
                let got = run::<f32>(&device, &out, expected.len(), |pass| {
                    sketch.iter().for_each(|sketch| sketch.record(pass));
                    values.record(pass, &block);
                });
                // What is made of a sketch is rounded to 16 bits.
                let most = if evicted_as == Evicted::None { 1e-10 } else { 1e-6 };
                assert_close(got.into_iter().map(f64::from), &expected, most, &format!("{evicted_as:?}, {first}, {:?}", device.tier()));
            }
        }
    }

    /// Exact columns from sinks and ring, coded ones as coordinates: slices of one head and of
    /// several, one of them wider than a workgroup.
    #[test]
    fn coded_values_are_summed_as_coordinates_beside_exact_ones() {
        let formats = formats();
        let wide = Format { bands: vec![crate::kv::Band { bits: 2, runs: 17 }], scale: crate::kv::Scale::Band };
        let c = AttentionShape::of(false, None, 12, 6, 10);
        let exact = Exact { sinks: 3, recent: 5 };
        let (heads, padded, capacity, stride) = (12, pad(10), 400, 700);
        let side = latent_side(&c, &[(2, &wide), (1, &formats[0]), (2, &formats[1]), (1, &formats[6])], capacity);
        let slots = Slots::new(&exact.blocks(1), 40, capacity);
        let ring = halves(2, slots.count() * 6 * padded);
        let (at, split) = (side.coded.sums(&c), sums(&c, Some(&side.coded)));
        for (first, tokens) in [(390, 1), (100, 3)] {
            let block = Block::new(first, tokens, 0, None, Some(exact.reach(first as usize, tokens as usize, false, 0)));
            for (device, tuning) in tuned_devices(None) {
                let [(count, length), (more, along)] = splits(&block, &tuning);
                assert!(if tokens == 1 { more >= 3 } else { (count, more) == (1, 1) });
                let scores: Vec<f32> = numbers(1, tokens as usize * heads * stride).into_iter().map(|x| 5.0 * x).collect();
                let (mut expected, mut weights) = (vec![0.0; (tokens * (count + more)) as usize * split], Vec::new());
                for (line, out) in expected.chunks_exact_mut(split).enumerate() {
                    let (t, s) = (line as u32 / (count + more), line as u32 % (count + more));
                    let coded = s >= count;
                    let (begin, end) = match coded {
                        false => (0, length.min(block.exact())),
                        true => (block.exact() + (s - count) * along, block.exact() + block.coded.min((s - count + 1) * along)),
                    };
                    for h in 0..heads {
                        let line = &scores[(t as usize * heads + h) * stride..][begin as usize..end as usize];
                        let largest = f64::from(line.iter().copied().fold(f32::MIN, f32::max));
                        weights.extend([largest, line.iter().map(|s| (f64::from(*s) - largest).exp()).sum()]);
                        for (column, score) in (begin..end).zip(line) {
                            let p = (f64::from(*score) - largest).exp();
                            if coded {
                                let z = &side.coordinates[side.coded.of_head(h / 2).0][(block.start + column - block.exact()) as usize];
                                z.iter().enumerate().for_each(|(i, z)| out[4 * at[h] + i] += p * z);
                            } else {
                                let value = &ring[(slots.of(block.exact_key(column) as usize) * 6 + h / 2) * padded..][..padded];
                                value.iter().enumerate().for_each(|(i, v)| out[h * padded + i] += p * v.to_f64());
                            }
                        }
                    }
                }
                let from = device.upload("scores", &scores).unwrap();
                let cache = crate::kernels::oracle::exact(&device, slots, [&[], &ring]);
                let table = device.upload("groups", &groups(&c, Some(&side.coded), false).0).unwrap();
                let [out, shares] = [expected.len(), weights.len()].map(|n| device.buffer("out", n as u64 * 4).unwrap());
                let (rows, runs) = (device.upload("rows", &side.rows).unwrap(), device.upload("table", &side.coded.value_table()).unwrap());
                let coded = CodedValues { coded: &side.coded, rows: &rows, table: &runs, groups: &table, list: None };
                let through = AttentionBuffers { scores: from, sums: out.clone(), weights: shares.clone(), ..buffers(&device, stride) };
                let values = Values::plan(&device, &c, &through, &cache, &table, Some(coded)).unwrap();
                let what = format!("{tokens} tokens, {:?}, {tuning:?}", device.tier());
                let got = run::<f32>(&device, &out, expected.len(), |pass| values.record(pass, &block));
                assert_close(got.into_iter().map(f64::from), &expected, 1e-9, &what);
                let got = run::<f32>(&device, &shares, weights.len(), |_| ());
                assert_close(got.into_iter().map(f64::from), &weights, 1e-10, &what);
            }
        }
    }
}
