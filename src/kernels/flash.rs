//! `flash.wgsl`: attention of one token in one pass.

use super::attention::AttentionBuffers;
use super::coded::{BOOKS, Coded, Codes, Slice};
use super::columns::Block;
use super::exact::ExactRows;
use super::score::{CodedKeys, fraction};
use super::values::{CodedValues, groups, splits, sums};
use super::{AttentionShape, NEAR, WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Tier, Tuning, Work, pad};
use crate::kv::Slots;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    position: u32,
    plain: u32,
    coded: u32,
    start: u32,
    length: u32,
    along: u32,
    sums: u32,
    near: u32,
    fixed: u32,
    base: u32,
    window: u32,
    sinks: u32,
    ring: u32,
    recent: u32,
    low: u32,
    high: u32,
}

/// Numbers of a row that a lane has.
const PART: usize = 8;

/// Query heads for which a row is to be unpacked at a time, where so many read it.
const TOGETHER: usize = 4;

/// Storage buffers that the kernel is bound to.
const BINDINGS: u32 = 11;
/// The one of them that has RoPE's table.
const ROPE: u32 = 7;

/// Attention of one layer to its exact rows, and to coded ones.
pub struct Flash {
    kernel: Kernel,
    /// Rows of a token, and blocks of the query heads that read one.
    grid: [u32; 2],
    /// Workgroups that a split of plain columns takes of each.
    each_plain: u32,
    /// What a column takes that is plain, and one that is coded.
    each: [Work; 2],
    tuning: Tuning,
    slots: Slots,
    params: Params,
}

/// The coded rows that are read.
#[derive(Clone, Copy)]
pub(super) struct Sides<'a> {
    pub keys: &'a Coded,
    pub values: &'a Coded,
    /// Whether keys have been rebuilt.
    pub rebuilt: bool,
}

impl<'a> Sides<'a> {
    fn of((keys, values): (CodedKeys<'a>, CodedValues<'a>)) -> Sides<'a> {
        Sides { keys: keys.coded, values: values.coded, rebuilt: !keys.absorbed }
    }

    /// Those whose codes are unpacked.
    fn unpacked(&self) -> impl Iterator<Item = &'a Coded> {
        (!self.rebuilt).then_some(self.keys).into_iter().chain([self.values])
    }
}

/// How the work on a row is shared out.
#[derive(Clone, Copy)]
struct Shares {
    /// Key/value heads that share a row, and lanes.
    span: usize,
    lanes: usize,
    /// Times [`PART`] numbers of a lane.
    chunks: usize,
    /// Of a workgroup: query heads, and key/value heads.
    rows: usize,
    kvs: usize,
    /// Workgroups for the query heads of one key/value head.
    blocks: usize,
}

impl Shares {
    /// `most`: parts of queries, and as many of sums, that a lane has in registers; `subgroup`:
    /// lanes of one.
    fn new(attention: &AttentionShape, coded: Option<Sides>, subgroup: u32, most: u32) -> Shares {
        let slices = || coded.iter().flat_map(Sides::unpacked).flat_map(|side| &side.slices);
        let span = coded.map_or(1, |sides| sides.values.widest());
        let parts = slices().map(Slice::rank).chain([attention.head_dim]).max().unwrap_or(0).div_ceil(PART);
        let lanes = parts.next_power_of_two().min(subgroup as usize);
        let (chunks, group) = (parts.div_ceil(lanes), attention.group_size());
        let most = (most as usize / chunks).max(1);
        let even = |all: usize, most: usize| all.div_ceil(all.div_ceil(most));
        let kvs = even(span, (most / group).max(1));
        let blocks = group.div_ceil(most);
        Shares { span, lanes, chunks, rows: if blocks > 1 { even(group, most) } else { kvs * group }, kvs, blocks }
    }
}

/// `coded`: keys and values, which [`fits`].
pub(super) fn variant(attention: &AttentionShape, coded: Option<Sides>, subgroup: u32, tuning: &Tuning) -> Spec {
    let mut flags = vec!["FLASH"];
    let mut bindings: Vec<_> =
        [Access::Read, Access::Read, Access::Read, Access::Write, Access::Write].into_iter().zip(0..).map(|(a, b)| (b, a)).collect();
    let shares = Shares::new(attention, coded, subgroup, tuning.flash_parts);
    let mut constants = [
        ("WORKGROUP", shares.lanes.max(tuning.flash_lanes as usize)),
        ("LANES", shares.lanes),
        ("CHUNKS", shares.chunks),
        ("SPAN", shares.span),
        ("KVS", shares.kvs),
        ("BLOCKS", shares.blocks),
        ("EXACT_LANES", attention.head_dim / PART),
        ("KV_HEADS", attention.kv_heads),
        ("GROUP", attention.group_size()),
        ("ROWS", shares.rows),
        ("KEYS", tuning.flash_keys as usize),
        ("ALIGN", coded.map_or(1, |sides| sides.keys.block)),
    ]
    .map(|(name, number)| (name, number as u32))
    .to_vec();
    if let Some(cap) = attention.cap {
        flags.push("CAPPED");
        constants.extend(fraction(cap));
    }
    if let Some(sides) = coded {
        flags.push("CODED");
        let codes = Codes::of(sides.unpacked().flat_map(|side| side.slices.iter().map(|slice| &slice.format)));
        flags.extend(codes.flags);
        constants.extend(codes.constants);
        let [exact, coded] = groups(attention, Some(sides.values), false).1;
        constants.extend([("BOOKS", BOOKS), ("EXACT_ENTRIES", exact), ("ENTRIES", coded / sides.values.slices.len() as u32)]);
        if sides.rebuilt {
            flags.push("REBUILT");
        } else {
            let pairs = sides.keys.mean_pairs.iter().map(Vec::len).max().unwrap_or(0);
            constants.extend([
                ("PAIRS", (attention.head_dim / 2) as u32),
                ("NEAR", NEAR),
                ("TURNS", pairs.div_ceil(2).div_ceil(shares.lanes).max(1) as u32),
            ]);
        }
        bindings.extend((5..BINDINGS).filter(|binding| !(sides.rebuilt && *binding == ROPE)).map(|binding| (binding, Access::Read)));
    }
    spec("flash.wgsl", &flags, &constants, &bindings)
}

/// Whether the kernel reads such rows on a device, all of them: not coded in blocks of tokens,
/// those of keys the same heads' as those of values, and not longer than lanes have room for.
pub(crate) fn fits(device: &Device, attention: &AttentionShape, cache: &ExactRows, coded: Option<(CodedKeys, CodedValues)>) -> bool {
    let heads = |side: &Coded| side.slices.iter().map(|slice| slice.kv_heads).collect::<Vec<_>>();
    // All rows but the last are of as many heads, and have as many entries in the table of values.
    let entries = |slice: &Slice| slice.rank().div_ceil(4 * WORKGROUP as usize);
    let even = |side: &Coded| {
        let as_first = |(i, slice): (usize, &Slice)| slice.first_head == i * side.widest() && entries(slice) == entries(&side.slices[0]);
        side.slices.iter().enumerate().all(as_first)
    };
    let whole = coded.is_none_or(|(keys, values)| {
        let all = keys.list.is_none() && values.list.is_none() && keys.coded.block == 1;
        all && heads(keys.coded) == heads(values.coded) && even(values.coded)
    });
    let (tuning, subgroup) = (device.tuning(), device.subgroups()[0]);
    let subgroups = device.tier() == Tier::F16Subgroups && subgroup > 1;
    let room = subgroups && {
        let Shares { chunks, span, .. } = Shares::new(attention, coded.map(Sides::of), subgroup, tuning.flash_parts);
        // Unless a row is unpacked for several query heads at a time two kernels do as well.
        chunks * attention.group_size().min(TOGETHER) <= tuning.flash_parts as usize && span <= tuning.flash_heads as usize
    };
    let enough = device.storage_buffers() >= BINDINGS;
    tuning.flash && room && enough && whole && cache.eviction.is_none() && attention.head_dim.is_multiple_of(PART)
}

impl Flash {
    /// Reads `queries`, writes `sums` and `weights` of `b`, for one token, of rows that [`fits`].
    pub(crate) fn plan(
        device: &Device,
        attention: &AttentionShape,
        b: &AttentionBuffers,
        cache: &ExactRows,
        coded: Option<(CodedKeys, CodedValues)>,
    ) -> Result<Flash> {
        let mut buffers = vec![&b.queries, &cache.keys, &cache.values, &b.sums, &b.weights];
        let sides = coded.map(Sides::of);
        if let Some((keys, values)) = coded {
            buffers.extend(
                if keys.absorbed { [Some(keys.rows), Some(keys.table), Some(&b.rope)] } else { [Some(&b.rebuilt), Some(keys.table), None] }
                    .into_iter()
                    .flatten(),
            );
            buffers.extend([values.rows, values.table, values.groups]);
        }
        let (tuning, heads, dim) = (device.tuning(), attention.heads, pad(attention.head_dim));
        let work = |bytes: usize, flops: usize| Work { bytes: bytes as u64, flops: flops as u64 };
        let of_coded = sides.map_or(work(0, 0), |sides| {
            let numbers = |side: &Coded| (0..attention.kv_heads).map(|kv| side.rank(kv)).sum::<usize>();
            let all = sides.unpacked().map(|side| work(4 * side.row_words(), 2 * attention.group_size() * numbers(side)));
            let rebuilt = if sides.rebuilt { work(2 * attention.kv_row(), 2 * heads * dim) } else { work(0, 0) };
            all.fold(rebuilt, |sum, side| Work { bytes: sum.bytes + side.bytes, flops: sum.flops + side.flops })
        });
        let subgroup = device.subgroups()[0];
        let shares = Shares::new(attention, sides, subgroup, tuning.flash_parts);
        let blocks = shares.span.div_ceil(shares.kvs) * shares.blocks;
        Ok(Flash {
            kernel: device.kernel(variant(attention, sides, subgroup, &tuning), &buffers)?,
            grid: [attention.kv_heads.div_ceil(shares.span), blocks].map(|n| n as u32),
            each_plain: shares.kvs as u32,
            each: [work(4 * attention.kv_row(), 4 * heads * dim), of_coded],
            tuning,
            slots: cache.slots,
            params: Params {
                sums: sums(attention, sides.map(|sides| sides.values)) as u32 / 4,
                sinks: cache.slots.sinks,
                ring: cache.slots.ring,
                ..bytemuck::Zeroable::zeroed()
            },
        })
    }

    /// One workgroup per split, row, and block of the query heads that read it.
    pub fn record(&self, pass: &mut Pass, block: &Block) {
        let [(splits, length), (more, along)] = splits(block, &self.tuning);
        let params = Params {
            position: block.first,
            plain: block.exact(),
            coded: block.coded,
            start: block.start,
            length,
            along,
            near: block.near,
            fixed: block.fixed,
            base: block.base(self.slots),
            window: block.window,
            recent: block.reach.recent as u32,
            low: block.reach.low as u32,
            high: block.reach.high as u32,
            ..self.params
        };
        let [plain, coded] = [block.exact(), block.coded].map(u64::from);
        let sums = 16 * u64::from(splits + more) * u64::from(self.params.sums);
        let [of_plain, of_coded] = self.each;
        let work = Work { bytes: plain * of_plain.bytes + coded * of_coded.bytes + sums, flops: plain * of_plain.flops + coded * of_coded.flops };
        self.kernel.record(pass, &params, [splits * self.each_plain + more, self.grid[0], self.grid[1]], work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Options;
    use crate::kernels::oracle::{assert_close, buffers, exact, frequencies, halves, latent_side, numbers, run, tuned_devices, upload};
    use crate::kernels::rope_table;
    use crate::kernels::score::Score;
    use crate::kernels::values::Values;
    use crate::kv::{Band, Exact, Format, Scale};

    fn format(bits: &[u8], scale: Scale) -> Format {
        Format { bands: bits.iter().map(|&bits| Band { bits, runs: 1 }).collect(), scale }
    }

    /// Splits and weights are those of `score.wgsl` and `values.wgsl`, which are held against
    /// definitions: rows of all kinds, over one head, over two and what is left, and over all of
    /// them, heads that share a row in one block and in several, keys that have been rebuilt,
    /// sinks, a ring, a window.
    #[test]
    fn one_pass_is_what_two_are() {
        let mixed = [format(&[16, 8, 3, 2], Scale::Fixed), format(&[8, 4, 3, 2], Scale::Band), format(&[4, 4, 4], Scale::Affine)];
        let together = [format(&[4, 3, 2, 2], Scale::Band), format(&[2], Scale::Band), format(&[3, 3], Scale::Band)];
        let steps = [format(&[4, 4], Scale::Affine), format(&[4, 4], Scale::Affine), format(&[8, 8], Scale::Affine)];
        let shape = |group: usize, head: usize, window| AttentionShape::of(false, window, 3 * group, 3, head);
        let long = |bits: u8, runs| Format { bands: vec![Band { bits, runs }, Band { bits: 2, runs: 2 }], scale: Scale::Band };
        let wide = [long(4, 10), long(3, 8), long(3, 4)];
        let cases = [
            (shape(3, 32, None), Some((&mixed, 1, true))),
            (AttentionShape { cap: Some(2.55), ..shape(1, 16, Some(700)) }, Some((&together, 1, true))),
            (shape(6, 16, None), Some((&steps, 1, true))),
            (shape(2, 64, Some(900)), None),
            (shape(3, 16, Some(800)), Some((&together, 2, true))),
            (shape(5, 128, None), Some((&wide, 3, true))),
            (shape(4, 32, None), Some((&wide, 3, false))),
        ];
        let (capacity, last) = (1200, 1100);
        let mut ran = 0;
        for (c, formats) in cases {
            let [keys, values] = [[0, 1, 2], [2, 0, 1]].map(|order| {
                formats.map(|(all, heads, _)| {
                    let slices: Vec<_> = (0..3).step_by(heads).map(|first| (heads.min(3 - first), &all[order[first]])).collect();
                    latent_side(&c, &slices, capacity)
                })
            });
            let mut means = numbers(4, 3 * c.head_dim);
            means[..4].fill(0.0);
            let keys = keys.map(|side| side.about(&c, &means));
            let rows = Exact { sinks: 3, recent: 40 };
            let absorbed = formats.is_none_or(|(.., absorbed)| absorbed);
            let (slots, reach) = match formats {
                Some(_) => (Slots::new(&rows.blocks(1), 200, capacity), Some(rows.reach(last, 1, true, 0))),
                None => (Slots::ALL, None),
            };
            let count = if formats.is_some() { slots.count() } else { capacity };
            let stored = [2, 3].map(|seed| halves(seed, count * c.kv_row()));
            let block = Block::new(last as u32, 1, 0, c.window, reach);
            // The small tuning has several keys and parts under way, as a GPU's has: one of the two
            // takes long enough to compile.
            let tuned = tuned_devices(None).filter(|(device, tuning)| device.tier() == Tier::F16Subgroups && *tuning != Tuning::of(false));
            let tuned = tuned.filter(|(_, tuning)| formats.is_none_or(|(_, heads, _)| heads <= tuning.flash_heads as usize));
            for (device, tuning) in tuned {
                let cache = exact(&device, slots, [&stored[0], &stored[1]]);
                let columns = (block.exact() + block.coded) as usize;
                let stride = keys.as_ref().map_or(c.query_row(), |side| side.coded.query_stride(&c, absorbed));
                let queries = numbers(1, stride);
                let table = |numbers: &[[u32; 4]]| device.upload("table", numbers.as_flattened()).unwrap();
                let groups = device.upload("groups", &groups(&c, values.as_ref().map(|side| &side.coded), false).0).unwrap();
                let own = |side: &crate::kernels::oracle::LatentSide| device.upload("rows", &side.rows).unwrap();
                let buffers_of = keys.as_ref().zip(values.as_ref()).map(|(keys, values)| {
                    (own(keys), table(&keys.coded.key_table(&c, absorbed, &means)), own(values), table(&values.coded.value_table()))
                });
                let nothing = device.buffer("nothing", 4).unwrap();
                let coded =
                    keys.as_ref().zip(values.as_ref()).zip(buffers_of.as_ref()).map(|((keys, values), (rows, key_table, value_rows, table))| {
                        let keys = CodedKeys { coded: &keys.coded, rows, table: key_table, up: &nothing, absorbed, list: None };
                        (keys, CodedValues { coded: &values.coded, rows: value_rows, table, groups: &groups, list: None })
                    });
                let [(exact_splits, _), (coded_splits, _)] = splits(&block, &tuning);
                let vectors = sums(&c, values.as_ref().map(|side| &side.coded));
                let all = (exact_splits + coded_splits) as usize;
                let through = AttentionBuffers {
                    queries: wgpu::Buffer::clone(&upload(&device, &queries, stride)),
                    rope: upload(&device, rope_table(&frequencies(c.head_dim), capacity).as_flattened(), 2),
                    rebuilt: wgpu::Buffer::clone(&upload(&device, &halves(5, block.coded as usize * c.kv_row()), c.kv_row())),
                    scores: device.buffer("scores", (c.heads * columns * 4) as u64).unwrap(),
                    sums: device.buffer("sums", (all * vectors * 4) as u64).unwrap(),
                    weights: device.buffer("weights", (all * c.heads * 8) as u64).unwrap(),
                    ..buffers(&device, columns)
                };
                assert!(fits(&device, &c, &cache, coded), "{c:?}");
                let own = AttentionBuffers {
                    sums: device.buffer("sums", (all * vectors * 4) as u64).unwrap(),
                    weights: device.buffer("weights", (all * c.heads * 8) as u64).unwrap(),
                    ..through.clone()
                };
                let flash = Flash::plan(&device, &c, &own, &cache, coded).unwrap();
                let (score, value) = (
                    Score::plan(&device, &c, &through, &cache, coded.map(|(keys, _)| keys), false).unwrap(),
                    Values::plan(&device, &c, &through, &cache, &groups, coded.map(|(_, values)| values)).unwrap(),
                );
                let apart = run::<f32>(&device, &through.sums, all * vectors, |pass| {
                    score.record(pass, &block, 0);
                    value.record(pass, &block);
                });
                let weights = run::<f32>(&device, &through.weights, all * c.heads * 2, |_| ());
                let together = run::<f32>(&device, &own.sums, all * vectors, |pass| flash.record(pass, &block));
                let what = format!("{c:?}, {tuning:?}");
                assert!(apart.iter().any(|x| *x != 0.0));
                assert_close(together.into_iter().map(f64::from), &apart.into_iter().map(f64::from).collect::<Vec<_>>(), 1e-10, &what);
                let got = run::<f32>(&device, &own.weights, weights.len(), |_| ());
                assert_close(got.into_iter().map(f64::from), &weights.into_iter().map(f64::from).collect::<Vec<_>>(), 1e-10, &what);
                ran += 1;
            }
        }
        assert_eq!(ran, 11);
        // Other tiers have no subgroups.
        let device = Device::open(&Options { tier: Some(Tier::F16), ..Default::default() }).unwrap();
        let c = shape(2, 64, None);
        assert!(!fits(&device, &c, &exact(&device, Slots::ALL, [&[], &[]]), None));
    }
}
