//! `values.wgsl`: the weighted sum of value rows, split by split, exact ones and coded ones apart.

use super::coded::{BOOKS, Coded, Striped};
use super::eviction::EvictionStore;
use super::exact::ExactRows;
use super::score::{Block, side_bindings, stores};
use super::{AttentionShape, WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work, pad};
use crate::gpu::{SHARING, Tuning};
use crate::rows::Slots;
use crate::rows::{Selection, Stores, Vague};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    plain: u32,
    coded: u32,
    tokens: u32,
    near: u32,
    stride: u32,
    length: u32,
    sums: u32,
    entries: u32,
    all: u32,
    along: u32,
    start: u32,
    words: u32,
    fixed: u32,
    sinks: u32,
    ring: u32,
    side: u32,
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
    /// Where keys are chosen: how many, and the chunks, `[H_kv][`[`Selection::chunks`]`]`.
    pub chosen: Option<(Selection, &'a wgpu::Buffer)>,
}

/// Sums one layer's values.
pub struct Values {
    kernel: Kernel,
    rows: u32,
    heads: u32,
    /// What a column that is not coded takes for one token, and what a coded one does; and bytes that either takes once for all tokens.
    each: [Work; 2],
    once: [u64; 2],
    tuning: Tuning,
    step: Step,
}

/// The most query heads of a group, and how many of them a workgroup sums for. Where keys are chosen the heads of a group read the same ones: those of one key/value head.
pub(super) fn shape(attention: &AttentionShape, coded: Option<&Coded>, chosen: bool) -> (u32, u32) {
    let widest = coded.filter(|_| !chosen).map_or(1, |coded| coded.slices.iter().map(|slice| slice.kv_heads).max().unwrap_or(1));
    let heads = widest * attention.group_size();
    (heads as u32, heads.div_ceil(heads.div_ceil(MOST_ROWS)) as u32)
}

pub(super) fn variant(
    attention: &AttentionShape,
    coded: Option<Striped>,
    chosen: Option<Selection>,
    stores: Option<&Stores>,
    rows: u32,
    tuning: &Tuning,
) -> Spec {
    let (mut flags, side, vague) = side_bindings(stores);
    let mut constants = vec![
        ("WORKGROUP", WORKGROUP),
        ("CHUNK", Selection::CHUNK as u32),
        ("MOST", chosen.map_or(0, |selection| selection.chunks()) as u32),
        ("VAGUE_COLUMNS", vague),
        ("GROUP", attention.group_size() as u32),
        ("KEYS", tuning.keys),
        ("IN_FLIGHT", tuning.in_flight),
        ("ENDS", tuning.ends),
        ("BOOKS", BOOKS),
        ("ROWS", rows),
        ("HEADS", attention.heads as u32),
        ("EXACT_ROW", (attention.kv_heads * pad(attention.head_dim)) as u32),
    ];
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Read), (3, Access::Write), (4, Access::Write)];
    if coded.is_some() || stores.is_some() {
        flags.push("RING");
    }
    if let Some(striped) = coded {
        flags.push("CODED");
        flags.extend(striped.flags);
        constants.extend(striped.constants);
        bindings.extend([(5, Access::Read), (6, Access::Read)]);
    }
    if chosen.is_some() {
        flags.push("CHOSEN");
        bindings.push((7, Access::Read));
    }
    bindings.extend(side);
    spec("values.wgsl", &flags, &constants, &bindings)
}

pub(super) fn variants() -> Vec<Spec> {
    let kinds = |(attention, tuning): (&AttentionShape, Tuning)| {
        let (rows, chosen) = (shape(attention, None, false).1, Some(Selection { tokens: 256 }));
        let each = || Some(Striped::default());
        let coded = [variant(attention, each(), None, None, MOST_ROWS as u32, &tuning), variant(attention, each(), chosen, None, rows, &tuning)];
        let blocks = super::blocks::formats(attention).map(|format| variant(attention, Some(Striped::of(&format)), None, None, rows, &tuning));
        let beside = |vague| variant(attention, each().filter(|_| vague == Vague::Rows), None, Some(&stores(attention, vague)), rows, &tuning);
        let beside = [Vague::None, Vague::Mean, Vague::Sketch, Vague::Shrunk, Vague::Rows].map(beside);
        [vec![variant(attention, None, None, None, rows, &tuning)], coded.into(), blocks.into(), beside.into()].concat()
    };
    let attentions = AttentionShape::examples();
    [true, false].into_iter().flat_map(|software| attentions.iter().map(move |attention| (attention, Tuning::of(software)))).flat_map(kinds).collect()
}

/// A block's splits, of columns that are not coded and of those that are: their numbers and lengths. Many tokens fill the device by themselves.
pub(crate) fn splits(block: &Block, tuning: &Tuning) -> [(u32, u32); 2] {
    [(block.plain(), tuning.splits), (block.coded, tuning.coded_splits)].map(|(columns, most)| {
        if block.tokens > 1 {
            return (columns.min(1), columns);
        }
        let length = columns.div_ceil(most).next_multiple_of(tuning.keys);
        (columns.div_ceil(length.max(1)), length)
    })
}

/// The shader's table of value groups, eight numbers each, exact ones first; and how many of each there are. Where keys are `chosen`, coded ones are by key/value head.
pub(crate) fn groups(attention: &AttentionShape, coded: Option<&Coded>, chosen: bool) -> (Vec<u32>, [u32; 2]) {
    let g = attention.group_size();
    // (where its rows begin, vectors, first query head, query heads, where its sums begin, first run)
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
            let heads = if chosen { 1 } else { slice.kv_heads };
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
    /// `scores`: `[tokens][H][stride]`; `table`: [`groups`]'s; `out`: `[tokens][splits][`[`sums`]`]`; `weights`: `[tokens][splits][H]` pairs. All f32.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn plan(
        device: &Device,
        attention: &AttentionShape,
        scores: &wgpu::Buffer,
        stride: usize,
        cache: &ExactRows,
        slots: Slots,
        coded: Option<CodedValues>,
        table: &wgpu::Buffer,
        out: &wgpu::Buffer,
        weights: &wgpu::Buffer,
    ) -> Result<Values> {
        let (side, chosen) = (coded.map(|coded| coded.coded), coded.and_then(|coded| coded.chosen));
        let (heads, rows) = shape(attention, side, chosen.is_some());
        let mut buffers = vec![scores, &cache.values, table, out, weights];
        buffers.extend(coded.iter().flat_map(|coded| [coded.rows, coded.table]));
        buffers.extend(chosen.map(|(_, chosen)| chosen));
        let beside = cache.side.as_ref();
        buffers.extend(beside.into_iter().flat_map(EvictionStore::buffers));
        let (all, kv_heads) = (attention.heads, attention.kv_heads);
        let ranks = side.map_or(0, |coded| (0..kv_heads).map(|kv| coded.rank(kv)).sum::<usize>());
        let row = side.map_or(0, Coded::row_words);
        let work = |numbers: usize| Work { bytes: 4 * all as u64, flops: 2 * numbers as u64 };
        let [entries, more] = groups(attention, side, chosen.is_some()).1;
        let tuning = device.tuning();
        let selection = chosen.map(|(selection, _)| selection);
        Ok(Values {
            kernel: device
                .kernel(variant(attention, side.map(Coded::striped), selection, beside.map(|side| &side.stores), rows, &tuning), &buffers)?,
            rows,
            heads,
            each: [work(all * attention.head_dim), work(attention.group_size() * ranks)],
            once: [2 * kv_heads * pad(attention.head_dim), 4 * row].map(|bytes| bytes as u64),
            tuning,
            step: Step {
                stride: stride as u32,
                sums: sums(attention, side) as u32 / 4,
                entries,
                all: entries + more,
                words: side.map_or(0, |coded| coded.words as u32),
                sinks: slots.sinks,
                ring: slots.ring,
                ..bytemuck::Zeroable::zeroed()
            },
        })
    }

    /// One workgroup per split, entry of the table and block of rows.
    pub fn record(&self, pass: &mut Pass, block: &Block) {
        let [(splits, length), (more, along)] = splits(block, &self.tuning);
        let step = Step {
            plain: block.plain(),
            coded: block.coded,
            tokens: block.tokens,
            near: block.near,
            length,
            along,
            start: block.start,
            fixed: block.fixed,
            side: block.side,
            ..self.step
        };
        let entries = step.entries.max(step.all - step.entries);
        let [tokens, plain, coded] = [block.tokens, block.plain(), block.coded].map(u64::from);
        let each = |plain_each: u64, coded_each: u64| plain * plain_each + coded * coded_each;
        let sums = 16 * u64::from(splits + more) * u64::from(self.step.sums);
        let work = Work {
            bytes: tokens * (each(self.each[0].bytes, self.each[1].bytes) + sums) + each(self.once[0], self.once[1]),
            flops: tokens * each(self.each[0].flops, self.each[1].flops),
        };
        self.kernel.record(pass, &step, [splits + more, entries, (block.tokens * self.heads).div_ceil(self.rows)], work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{assert_close, beside, coded_side, devices, halves, numbers, run, tuned_devices};
    use crate::kernels::pack::tests::formats;
    use crate::rows::{Exact, Format, Vague};

    /// Each split's largest score, its sum of weights and its sum of rows: 300 keys in several splits, five in one, and two tokens in one, the last keys of the first masked.
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
                let cache = ExactRows { keys: device.buffer("keys", 4).unwrap(), values: device.upload("values", &rows).unwrap(), side: None };
                let table = device.upload("groups", &groups(&c, None, false).0).unwrap();
                let [out, shares] = [sums.len(), weights.len()].map(|n| device.buffer("out", n as u64 * 4).unwrap());
                let values = Values::plan(&device, &c, &from, capacity, &cache, Slots::ALL, None, &table, &out, &shares).unwrap();
                let what = format!("{tokens} tokens, {:?}, {tuning:?}", device.tier());
                let got = run::<f32>(&device, &out, sums.len(), |pass| values.record(pass, &block));
                assert_close(got.into_iter().map(f64::from), &sums, 1e-10, &what);
                let got = run::<f32>(&device, &shares, weights.len(), |_| ());
                assert_close(got.into_iter().map(f64::from), &weights, 1e-10, &what);
            }
        }
    }

    /// Candidates and what is vague are summed with exact rows.
    #[test]
    fn what_stands_beside_is_summed_with_exact_rows() {
        let c = AttentionShape::of(false, None, 6, 2, 14);
        let (heads, padded, stride) = (6, pad(14), 150);
        let (exact, slots) = (Exact { sinks: 3, recent: 5 }, Slots { sinks: 3, ring: 90 });
        for (vague, device) in
            [Vague::None, Vague::Mean, Vague::Sketch, Vague::Shrunk].into_iter().flat_map(|vague| devices(None).map(|d| (vague, d)))
        {
            let beside = beside(&device, &c, slots, vague);
            for (first, tokens) in [(101, 1), (70, 37)] {
                let reach = exact.reach(first, tokens, false, 0);
                let block = Block::new(first as u32, tokens as u32, 0, None, Some(reach)).beside(beside.columns.len() as u32, false);
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
                let values = Values::plan(&device, &c, &from, stride, &beside.cache, slots, None, &table, &out, &shares).unwrap();
                assert_eq!(splits(&block, &device.tuning())[0].0, 1);
                let got = run::<f32>(&device, &out, expected.len(), |pass| values.record(pass, &block));
                assert_close(got.into_iter().map(f64::from), &expected, 1e-10, &format!("{vague:?}, {first}, {:?}", device.tier()));
            }
        }
    }

    /// Exact columns from sinks and ring, coded ones as coordinates: slices of one head and of several, one of them wider than a workgroup.
    #[test]
    fn coded_values_are_summed_as_coordinates_beside_exact_ones() {
        let formats = formats();
        let wide = Format { bands: vec![crate::rows::Band { bits: 2, runs: 17 }], scale: crate::rows::Scale::Band };
        let c = AttentionShape::of(false, None, 12, 6, 10);
        let exact = Exact { sinks: 3, recent: 5 };
        let (heads, padded, capacity, stride) = (12, pad(10), 400, 700);
        let side = coded_side(&c, &[(2, &wide), (1, &formats[0]), (2, &formats[1]), (1, &formats[6])], capacity);
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
                let cache = ExactRows { keys: device.buffer("keys", 4).unwrap(), values: device.upload("values", &ring).unwrap(), side: None };
                let table = device.upload("groups", &groups(&c, Some(&side.coded), false).0).unwrap();
                let [out, shares] = [expected.len(), weights.len()].map(|n| device.buffer("out", n as u64 * 4).unwrap());
                let (rows, runs) = (device.upload("rows", &side.rows).unwrap(), device.upload("table", &side.coded.value_table()).unwrap());
                let coded = CodedValues { coded: &side.coded, rows: &rows, table: &runs, chosen: None };
                let values = Values::plan(&device, &c, &from, stride, &cache, slots, Some(coded), &table, &out, &shares).unwrap();
                let what = format!("{tokens} tokens, {:?}, {tuning:?}", device.tier());
                let got = run::<f32>(&device, &out, expected.len(), |pass| values.record(pass, &block));
                assert_close(got.into_iter().map(f64::from), &expected, 1e-9, &what);
                let got = run::<f32>(&device, &shares, weights.len(), |_| ());
                assert_close(got.into_iter().map(f64::from), &weights, 1e-10, &what);
            }
        }
    }
}
