//! `merge.wgsl`: joins the splits of one attention and takes sums of coordinates up to whole heads.

use super::attention::AttentionBuffers;
use super::coded::Coded;
use super::columns::Block;
use super::values::{splits, sums};
use super::{AttentionShape, WORKGROUP, spec};
use crate::Result;
use crate::gpu::Tuning;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work, pad};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    splits: u32,
    exact: u32,
    at: u32,
    stride: u32,
    sums: u32,
}

/// What sums of coordinates need.
#[derive(Clone, Copy)]
pub(crate) struct Up<'a> {
    pub coded: &'a Coded,
    /// [`heads`]'s table.
    pub heads: &'a wgpu::Buffer,
    /// By key/value head, `[rank / 4][head_dim]` vectors of f16.
    pub up: &'a wgpu::Buffer,
    /// `[H_kv][head_dim]` f32.
    pub means: &'a wgpu::Buffer,
}

/// Joins one layer's splits.
pub struct Merge {
    kernel: Kernel,
    heads: u32,
    /// Bytes of the up-projection, and operations with it for one token.
    up: Work,
    tuning: Tuning,
    params: Params,
}

pub(super) fn variant(attention: &AttentionShape, coded: bool, head_sinks: bool, many: bool, tuning: &Tuning) -> Spec {
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Write)];
    let flags: Vec<_> = [(coded, "CODED"), (head_sinks, "HEAD_SINKS")].into_iter().filter_map(|(on, flag)| on.then_some(flag)).collect();
    let constants = [
        ("WORKGROUP", if many { WORKGROUP } else { tuning.merge_lanes }),
        ("HEADS", attention.heads as u32),
        ("HEAD", attention.head_dim as u32),
        ("IN_FLIGHT", tuning.in_flight),
        ("SPLITS", tuning.splits + if coded { tuning.coded_splits } else { 0 }),
    ];
    bindings.extend([3, 4, 5].into_iter().filter(|_| coded).chain(head_sinks.then_some(6)).map(|binding| (binding, Access::Read)));
    spec("merge.wgsl", &flags, &constants, &bindings)
}

/// The shader's table of query heads, four numbers each: vector at which the head's sum begins, its
/// vectors, vector of `up` and number of `means` at which its key/value head begins.
pub(crate) fn heads(attention: &AttentionShape, coded: &Coded) -> Vec<u32> {
    let at = coded.sums(attention);
    let up = coded.ups(attention);
    let head = |h: usize| {
        let kv = h / attention.group_size();
        [at[h], coded.rank(kv) / 4, up[kv], kv * attention.head_dim].map(|n| n as u32)
    };
    (0..attention.heads).flat_map(head).collect()
}

impl Merge {
    /// Reads `sums` and `weights`, writes `attended` of `b`. `many`: for blocks of many tokens,
    /// else of one.
    pub(crate) fn plan(device: &Device, attention: &AttentionShape, b: &AttentionBuffers, up: Option<Up>, many: bool) -> Result<Merge> {
        let mut buffers: Vec<&wgpu::Buffer> = vec![&b.sums, &b.weights, &b.attended];
        buffers.extend(up.iter().flat_map(|up| [up.heads, up.up, up.means]));
        buffers.extend(&b.head_sinks);
        let heads = attention.heads;
        let params = Params {
            stride: (heads * pad(attention.head_dim)) as u32,
            sums: sums(attention, up.map(|up| up.coded)) as u32 / 4,
            ..bytemuck::Zeroable::zeroed()
        };
        let ranks = up.map_or(0, |up| (0..attention.kv_heads).map(|kv| up.coded.rank(kv)).sum::<usize>());
        let numbers = (ranks * attention.head_dim) as u64;
        let work = Work { bytes: 2 * numbers, flops: 2 * attention.group_size() as u64 * numbers };
        let tuning = device.tuning();
        let kernel = device.kernel(variant(attention, up.is_some(), b.head_sinks.is_some(), many, &tuning), &buffers)?;
        Ok(Merge { kernel, heads: heads as u32, up: work, tuning, params })
    }

    /// One workgroup per query head and token.
    pub fn record(&self, pass: &mut Pass, block: &Block) {
        let [(exact, _), (coded, _)] = splits(block, &self.tuning);
        let params = Params { splits: exact + coded, exact, at: block.at, ..self.params };
        let [splits, sums, stride, tokens] = [params.splits, params.sums, params.stride, block.tokens].map(u64::from);
        let up = if coded > 0 { self.up } else { Work::default() };
        let work = Work { bytes: up.bytes + tokens * (16 * splits * sums + 4 * stride), flops: tokens * (up.flops + 8 * splits * sums) };
        self.kernel.record(pass, &params, [self.heads, block.tokens, 1], work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::coded::by_coordinates;
    use crate::kernels::oracle::{assert_close, buffers, halves, latent_side, numbers, run, tuned_devices, upload};
    use crate::kernels::pack::tests::formats;
    use crate::kernels::values::{CodedValues, Values, groups};
    use crate::kv::Slots;
    use crate::kv::{Band, Exact, Format, Scale};

    /// Softmax over 5,000 keys and the sum of their values, once in splits of several tiles (one
    /// token) and once in a single pass (the same token twice): both are the definition, and each
    /// other. Values are exact, or all but sinks and the newest are coded, in uneven slices: one
    /// wider than a workgroup of the merge. The same where heads have scores for nothing, some of
    /// them above all others.
    #[test]
    fn splits_equal_one_pass_and_the_definition() {
        let (start, keys, capacity) = (7, 5000, 5011);
        let formats = formats();
        let wide = Format { bands: vec![Band { bits: 2, runs: 65 }], scale: Scale::Fixed };
        let c = AttentionShape::of(false, None, 6, 3, 14);
        let (heads, padded, columns) = (c.heads, pad(c.head_dim), 5300);
        let side = latent_side(&c, &[(2, &wide), (1, &formats[1])], capacity);
        let (means, last) = (numbers(4, 3 * 14), start + keys - 1);
        for coded in [false, true] {
            let exact = Exact { sinks: 3, recent: 5 };
            let slots = if coded { Slots::new(&exact.blocks(1), 200, capacity) } else { Slots::ALL };
            let reach = coded.then(|| exact.reach(last, 1, false, 0));
            let mut ring = halves(2, 3 * padded * if coded { slots.count() } else { capacity });
            ring.iter_mut().enumerate().filter(|(i, _)| i % padded >= 14).for_each(|(_, padding)| *padding = half::f16::ZERO);
            let at = |tokens: u32, at: u32| Block::new(last as u32 + 1 - tokens, tokens, at, Some(keys), reach);
            // Scores far apart, so that splits differ in what they add; by key, since the columns
            // of two tokens differ.
            let by_key = numbers(1, heads * capacity);
            let scores = |block: &Block| -> Vec<f32> {
                let count = (block.exact() + block.coded) as usize;
                let score = |h: usize, column: usize| {
                    let exact = column < block.exact() as usize;
                    let key = if exact { block.exact_key(column as u32) as usize } else { (block.start + column as u32 - block.exact()) as usize };
                    let seen = column < count && key >= start && reach.is_none_or(|reach| reach.coded(last, key) != exact);
                    if seen { 12.0 * by_key[h * capacity + key] } else { -3.4028234e38 }
                };
                let token: Vec<f32> =
                    (0..heads).flat_map(|h| (0..columns).map(move |column| (h, column))).map(|(h, column)| score(h, column)).collect();
                token.repeat(block.tokens as usize)
            };
            let value = |kv: usize, key: usize| -> Vec<f64> {
                if reach.is_some_and(|reach| reach.coded(last, key)) {
                    let z = &side.coordinates[side.coded.of_head(kv).0][key];
                    let dim =
                        |d: usize| f64::from(means[kv * 14 + d]) + z.iter().enumerate().map(|(i, z)| z * f64::from(side.up(kv, i, d))).sum::<f64>();
                    (0..14).map(dim).collect()
                } else {
                    let slot = if coded { slots.of(key) } else { key };
                    ring[(slot * 3 + kv) * padded..][..14].iter().map(|v| v.to_f64()).collect()
                }
            };
            let head_sinks = [-50f32, 10.0, 17.0, 20.0, 16.0, 15.0];
            let (mut expected, mut with_sinks) = (vec![0.0; heads * padded], Vec::new());
            for (h, out) in expected.chunks_exact_mut(padded).enumerate() {
                let p = |key: usize| (12.0 * f64::from(by_key[h * capacity + key])).exp();
                let total: f64 = (start..=last).map(p).sum();
                (start..=last).for_each(|key| value(h / 2, key).iter().zip(&mut *out).for_each(|(v, out)| *out += p(key) / total * v));
                with_sinks.extend(out.iter().map(|out| out * total / (total + f64::from(head_sinks[h]).exp())));
            }
            let up: Vec<_> = (0..3).flat_map(|kv| by_coordinates(|i, d| side.up(kv, i, d), side.coded.rank(kv), 14)).collect();
            for (device, tuning) in tuned_devices(None) {
                let sides = coded.then_some(&side.coded);
                let cache = crate::kernels::oracle::exact(&device, slots, [&[], &ring]);
                let table = device.upload("groups", &groups(&c, sides, false).0).unwrap();
                let parts = u64::from(tuning.splits + tuning.coded_splits).max(4);
                let from = device.buffer("sums", parts * sums(&c, sides) as u64 * 4).unwrap();
                let weights = device.buffer("weights", parts * heads as u64 * 8).unwrap();
                let (rows, runs) = (device.upload("rows", &side.rows).unwrap(), device.upload("table", &side.coded.value_table()).unwrap());
                let lines = device.upload("heads", &super::heads(&c, &side.coded)).unwrap();
                let (up, means) = (device.upload("up", &up).unwrap(), device.upload("means", &means).unwrap());
                let out = upload(&device, &vec![0f32; 3 * expected.len()], expected.len());
                let head_sinks = device.upload("scores for nothing", &head_sinks).unwrap();
                let attend = |block: &Block, sinks: bool| {
                    let scores = device.upload("scores", &scores(block)).unwrap();
                    let coded = sides.map(|coded| CodedValues { coded, rows: &rows, table: &runs, groups: &table, list: None });
                    let through = AttentionBuffers {
                        scores,
                        sums: from.clone(),
                        weights: weights.clone(),
                        attended: out.clone(),
                        head_sinks: sinks.then(|| head_sinks.clone()),
                        ..buffers(&device, columns)
                    };
                    let values = Values::plan(&device, &c, &through, &cache, &table, coded).unwrap();
                    let up = sides.map(|coded| Up { coded, heads: &lines, up: &up, means: &means });
                    let merge = Merge::plan(&device, &c, &through, up, block.tokens > 1).unwrap();
                    let got = run::<f32>(&device, &out, 3 * expected.len(), |pass| {
                        values.record(pass, block);
                        merge.record(pass, block);
                    });
                    got[block.at as usize * expected.len()..][..block.tokens as usize * expected.len()]
                        .iter()
                        .map(|x| f64::from(*x))
                        .collect::<Vec<_>>()
                };
                for (sinks, expected) in [(false, &expected), (true, &with_sinks)] {
                    let what = |way: &str| format!("{way}, coded: {coded}, sinks: {sinks}, {:?}, {tuning:?}", device.tier());
                    let once = attend(&at(1, 2), sinks);
                    assert_close(once.iter().copied(), expected, 1e-9, &what("splits"));
                    assert_close(attend(&at(2, 0), sinks), &[&once[..], &once].concat(), 1e-9, &what("one pass"));
                }
            }
        }
    }
}
