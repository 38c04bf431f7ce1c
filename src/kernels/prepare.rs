//! `prepare.wgsl`: bias, QK-norm and RoPE, the append of new exact rows to the cache, and queries
//! for coded keys.

use super::attention::AttentionBuffers;
use super::coded::{BOOKS, Coded};
use super::{AttentionShape, HeadNorm, NEAR, QueryScaling, WORKGROUP, spec};
use crate::Result;
use crate::gpu::Tuning;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work, pad};
use crate::kernels::exact::ExactRows;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    first: u32,
    stride: u32,
    queries: u32,
    sinks: u32,
    ring: u32,
    epsilon: f32,
    record: u32,
    layer: u32,
    rotating: f32,
    still: f32,
    pairs: u32,
    beta: f32,
    period: f32,
}

/// Numbers that say what 16 bits did not hold, for so many layers: the largest of all, and by layer
/// that of keys and that of values; zero where all fit.
pub(crate) fn record_len(layers: usize) -> usize {
    1 + 2 * layers
}

/// What a family adds to queries and keys, or multiplies them by.
#[derive(Clone, Copy)]
pub(crate) struct Added<'a> {
    /// QK-norm's gains, `[2][head_dim]` or where it is over all heads as in a projection,
    /// `[(H + H_kv)·pad(head_dim)]`; then biases of a token; as far as there are any.
    pub numbers: &'a wgpu::Buffer,
    /// Whether there are biases.
    pub bias: bool,
}

/// The basis of coded keys that queries absorb.
#[derive(Clone, Copy)]
pub(crate) struct Absorbed<'a> {
    pub coded: &'a Coded,
    /// [`Coded::key_table`].
    pub table: &'a wgpu::Buffer,
    /// By key/value head, `[pad(head_dim) / 4][rank]` vectors of f16.
    pub up: &'a wgpu::Buffer,
}

/// Makes a layer's queries and exact rows from its projection.
pub struct Prepare {
    kernel: Kernel,
    params: Params,
    units: u32,
    /// What a token takes, and what is read once for all.
    each: Work,
    once: u64,
}

/// Numbers of a row of values that one workgroup copies.
const BLOCK: usize = WORKGROUP as usize * 4;

/// Where queries absorb a basis of `rank` coordinates at the most, how many workgroups of a head do
/// that, and how many coordinates each has.
pub(super) fn shares(rank: u32, tuning: &Tuning) -> [u32; 2] {
    let share = tuning.absorb.min(rank).max(1);
    [rank.div_ceil(share).max(1), share]
}

/// `shares`: where queries absorb a basis, how many workgroups of a head do that, and how many
/// coordinates each has.
pub(super) fn variant(attention: &AttentionShape, bias: bool, shares: Option<[u32; 2]>) -> Spec {
    let mut flags = Vec::new();
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Write), (3, Access::Write), (4, Access::Write)];
    flags.extend([(bias, "BIAS"), (attention.qk_norm.is_some(), "QK_NORM")].into_iter().filter_map(|(on, flag)| on.then_some(flag)));
    if !flags.is_empty() {
        flags.push("ADDED");
        bindings.push((5, Access::Read));
    }
    match attention.qk_norm {
        None | Some(HeadNorm::Heads) => {}
        Some(HeadNorm::RotatedHeads) => flags.push("ROTATED"),
        Some(HeadNorm::Projection) => flags.push("WHOLE"),
    }
    flags.extend(attention.scaling.map(|_| "SCALED"));
    if shares.is_some() {
        flags.push("ABSORBED");
        bindings.extend([(6, Access::Read), (7, Access::Read)]);
    }
    let [shares, share] = shares.unwrap_or([1, 0]);
    let constants = [
        ("WORKGROUP", WORKGROUP),
        ("SHARES", shares),
        ("SHARE", share),
        ("PAIRS", (attention.head_dim / 2) as u32),
        ("NEAR", NEAR),
        ("BOOKS", BOOKS),
        ("QUERY_HEADS", attention.heads as u32),
        ("KV_HEADS", attention.kv_heads as u32),
        ("GROUP", attention.group_size() as u32),
    ];
    spec("prepare.wgsl", &flags, &constants, &bindings)
}

impl Prepare {
    /// Of layer `index`: reads `projected`, writes `queries` of `b`.
    pub(crate) fn plan(
        device: &Device,
        (attention, index): (&AttentionShape, usize),
        b: &AttentionBuffers,
        cache: &ExactRows,
        added: Option<Added>,
        absorbed: Option<Absorbed>,
    ) -> Result<Prepare> {
        let mut buffers: Vec<&wgpu::Buffer> = vec![&b.projected, &b.rope, &b.queries, &cache.keys, &cache.values];
        buffers.extend(added.map(|added| added.numbers));
        buffers.extend(absorbed.iter().flat_map(|absorbed| [absorbed.table, absorbed.up]));
        let whole = attention.heads * pad(attention.head_dim);
        let nothing = QueryScaling { scales: [1.0; 2], pairs: 0, temperature: [0.0, 1.0] };
        let QueryScaling { scales: [rotating, still], pairs, temperature: [beta, period] } = attention.scaling.unwrap_or(nothing);
        let params = Params {
            first: 0,
            stride: attention.projection_row() as u32,
            queries: absorbed.map_or(whole, |absorbed| absorbed.coded.query_stride(attention, true)) as u32,
            sinks: cache.slots.sinks,
            ring: cache.slots.ring,
            epsilon: attention.epsilon,
            record: b.record,
            layer: index as u32,
            rotating,
            still,
            pairs,
            beta,
            period,
        };
        let kv_heads = attention.kv_heads;
        let shares_of = absorbed.map(|absorbed| {
            let most = (0..kv_heads).map(|kv| absorbed.coded.rank(kv)).max().unwrap_or(0) as u32;
            shares(most, &device.tuning())
        });
        let heads = attention.heads * shares_of.map_or(1, |[count, _]| count as usize);
        let units = heads + kv_heads + (kv_heads * pad(attention.head_dim)).div_ceil(BLOCK);
        let ranks = absorbed.map_or(0, |absorbed| (0..kv_heads).map(|kv| absorbed.coded.rank(kv)).sum::<usize>());
        let each = Work {
            bytes: (4 * params.stride + 4 * params.queries) as u64 + 4 * (kv_heads * pad(attention.head_dim)) as u64,
            flops: (2 * attention.group_size() * ranks * attention.head_dim) as u64,
        };
        let once = (2 * ranks * pad(attention.head_dim)) as u64;
        Ok(Prepare {
            kernel: device.kernel(variant(attention, added.is_some_and(|added| added.bias), shares_of), &buffers)?,
            params,
            units: units as u32,
            each,
            once,
        })
    }

    /// Tokens at positions `first`, `first + 1`, ….
    pub fn record(&self, pass: &mut Pass, first: u32, tokens: u32) {
        let n = u64::from(tokens);
        let work = Work { bytes: self.once + n * self.each.bytes, flops: n * self.each.flops };
        self.kernel.record(pass, &Params { first, ..self.params }, [self.units, tokens, 1], work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::coded::by_dimensions;
    use crate::kernels::oracle::{assert_close, buffers, devices, frequencies, latent_side, numbers, rotated, run, tuned_devices, upload};
    use crate::kernels::pack::tests::formats;
    use crate::kernels::rope_table;
    use crate::kv::Slots;
    use half::f16;

    /// Queries and rows of three tokens around position 64, where RoPE's tables meet: into a slot
    /// for every token with everything that a family adds, and into a ring that wraps between them,
    /// with queries that absorb a basis.
    #[test]
    fn queries_are_turned_and_rows_appended() {
        let formats = formats();
        let [by_head, after, all] = [HeadNorm::Heads, HeadNorm::RotatedHeads, HeadNorm::Projection].map(Some);
        let scaling = QueryScaling { scales: [1.5, 0.7], pairs: 4, temperature: [0.3, 20.0] };
        for (qk_norm, bias, absorbed, scaling) in [
            (by_head, true, false, None),
            (None, false, true, None),
            (by_head, false, true, None),
            (None, true, false, None),
            (after, false, true, Some(scaling)),
            (all, true, false, Some(scaling)),
        ] {
            let c = AttentionShape { qk_norm, scaling, ..AttentionShape::of(false, None, 6, 3, 14) };
            let (first, tokens, heads, padded) = (63, 3, c.heads, pad(c.head_dim));
            let row = 3 * padded;
            let slots = if absorbed { Slots { sinks: 2, ring: 30 } } else { Slots::ALL };
            let (stride, mut means) = (c.projection_row(), numbers(5, 3 * c.head_dim));
            // The first head has a mean in every other pair of RoPE, which are four of seven.
            (0..14).filter(|i| i % 7 % 2 == 1).for_each(|i| means[i] = 0.0);
            let side = latent_side(&c, &[(1, &formats[0]), (2, &formats[3])], 1).about(&c, &means);
            let whole = qk_norm == all;
            // Padding is zero where something is made of all of a row.
            let padding = |mut numbers: Vec<f32>| {
                numbers.iter_mut().enumerate().filter(|(i, _)| whole && i % padded >= c.head_dim).for_each(|(_, x)| *x = 0.0);
                numbers
            };
            let (projected, biases) = (padding(numbers(1, tokens * stride)), padding(numbers(2, stride)));
            let gains = numbers(3, if whole { (heads + 3) * padded } else { 2 * c.head_dim });

            let added = |i: usize| if bias { f64::from(biases[i]) } else { 0.0 };
            let input = |t: usize, at: usize, width: usize| (at..at + width).map(|i| projected[t * stride + i] as f64 + added(i)).collect::<Vec<_>>();
            // Of a head of queries, side 0, or keys: what is normalised, then rotated and scaled.
            let head = |t: usize, at: usize, side: usize| {
                let x = input(t, at, c.head_dim);
                let of = if whole { input(t, side * heads * padded, [heads, 3][side] * padded) } else { x.clone() };
                let count = of.len() / if whole { padded } else { c.head_dim } * c.head_dim;
                let scale = 1.0 / (of.iter().map(|x| x * x).sum::<f64>() / count as f64 + f64::from(c.epsilon)).sqrt();
                let gain = |i: usize| f64::from(if whole { gains[at + i] } else { gains[side * c.head_dim + i] });
                let normed = |after: bool| {
                    move |(i, x): (usize, f64)| match qk_norm {
                        Some(HeadNorm::RotatedHeads) if !after => x * scale,
                        Some(HeadNorm::RotatedHeads) => x * gain(i),
                        Some(_) if !after => x * scale * gain(i),
                        _ => x,
                    }
                };
                let before: Vec<f64> = x.into_iter().enumerate().map(normed(false)).collect();
                let turned = rotated(&c, &before, None, first + t).into_iter().enumerate().map(normed(true));
                let query = |(i, x): (usize, f64)| match scaling.filter(|_| side == 0) {
                    None => x,
                    Some(QueryScaling { scales, pairs, temperature: [beta, period] }) => {
                        let temperature = 1.0 + f64::from(beta) * (1.0 + ((first + t) as f64 / f64::from(period)).floor()).ln();
                        x * f64::from(scales[usize::from(i % (c.head_dim / 2) >= pairs as usize)]) * temperature
                    }
                };
                let mut head: Vec<f64> = turned.enumerate().map(query).collect();
                head.resize(padded, 0.0);
                head
            };
            let mut queries: Vec<f64> = Vec::new();
            for t in 0..tokens {
                let whole: Vec<Vec<f64>> = (0..heads).map(|h| head(t, h * padded, 0)).collect();
                queries.extend(whole.iter().flatten());
                for (h, q) in whole.iter().enumerate().filter(|_| absorbed) {
                    let (kv, rank) = (h / 2, side.coded.rank(h / 2));
                    queries.extend((0..rank).map(|i| (0..c.head_dim).map(|d| q[d] * f64::from(side.up(kv, i, d))).sum::<f64>()));
                    for pair in (0..7).filter(|pair| kv > 0 || pair % 2 == 0) {
                        let [m, n] = [pair, pair + 7].map(|d| f64::from(means[kv * c.head_dim + d]));
                        queries.extend([q[pair] * m + q[pair + 7] * n, q[pair + 7] * m - q[pair] * n]);
                    }
                    queries.resize(queries.len().next_multiple_of(4), 0.0);
                }
            }
            let key_rows: Vec<f64> =
                (0..tokens).flat_map(|t| (0..3).flat_map(move |h| [(t, h)])).flat_map(|(t, h)| head(t, (heads + h) * padded, 1)).collect();
            let value_rows: Vec<f64> = (0..tokens).flat_map(|t| input(t, (heads + 3) * padded, row)).collect();

            let mut added = if qk_norm.is_some() { gains.clone() } else { Vec::new() };
            added.extend(biases.iter().filter(|_| bias));
            let up: Vec<_> = (0..3).flat_map(|kv| by_dimensions(|i, d| side.up(kv, i, d), side.coded.rank(kv), c.head_dim)).collect();
            for (device, tuning) in tuned_devices(None) {
                let [projected, rope_table] =
                    [&projected, rope_table(&frequencies(c.head_dim), 70).as_flattened()].map(|v| upload(&device, v, v.len()));
                let out = device.buffer("queries", (queries.len() + record_len(2)) as u64 * 4).unwrap();
                let through =
                    AttentionBuffers { projected, rope: rope_table, queries: out.clone(), record: queries.len() as u32, ..buffers(&device, 0) };
                let count = if absorbed { slots.count() } else { 70 };
                let rows = || device.buffer("rows", count as u64 * row as u64 * 2).unwrap();
                let cache = ExactRows { keys: rows(), values: rows(), slots, eviction: None };
                let buffer = (!added.is_empty()).then(|| device.upload("added", &added).unwrap());
                let (table, up) = (device.upload("table", &side.coded.key_table(&c, true, &means)).unwrap(), device.upload("up", &up).unwrap());
                let basis = absorbed.then_some(Absorbed { coded: &side.coded, table: &table, up: &up });
                let numbers = buffer.as_ref().map(|numbers| Added { numbers, bias });
                let prepare = Prepare::plan(&device, (&c, 1), &through, &cache, numbers, basis).unwrap();
                let what = |side: &str| format!("{side}, norm: {qk_norm:?}, absorbed: {absorbed}, {:?}, {tuning:?}", device.tier());
                let mut got = run::<f32>(&device, &out, queries.len() + record_len(2), |pass| prepare.record(pass, first as u32, tokens as u32));
                assert_eq!(got.split_off(queries.len()), [0.0; 5], "{}", what("nothing was too large"));
                assert_close(got.into_iter().map(f64::from), &queries, 1e-10, &what("queries"));
                for (side, buffer, expected) in [("keys", &cache.keys, &key_rows), ("values", &cache.values, &value_rows)] {
                    let mut got = run::<f16>(&device, buffer, count * row, |_| ());
                    let written: Vec<f16> = (first..first + tokens).flat_map(|p| got[slots.of(p) * row..][..row].to_vec()).collect();
                    (first..first + tokens).for_each(|p| got[slots.of(p) * row..][..row].fill(f16::ZERO));
                    assert!(got.iter().all(|x| *x == f16::ZERO), "{}: other rows", what(side));
                    assert_close(written.iter().map(|x| x.to_f64()), expected, 1e-6, &what(side));
                }
            }
        }
    }

    /// A key and a value that 16 bits do not hold, and one of each that they just do: the largest
    /// of each side is noted at its layer.
    #[test]
    fn what_16_bits_do_not_hold_is_noted() {
        let attention = AttentionShape::of(false, None, 2, 1, 8);
        let (stride, tokens) = (attention.projection_row(), 3);
        let (key, value) = (16, 24);
        for device in devices(None) {
            let note = |large: &[(usize, f32)]| {
                let mut projected = vec![0.5f32; tokens * stride];
                large.iter().for_each(|&(at, x)| projected[at] = x);
                let [projected, rope_table] = [&projected, rope_table(&frequencies(8), 70).as_flattened()].map(|v| upload(&device, v, v.len()));
                let count = tokens * attention.query_row();
                let out = device.buffer("queries", 4 * (count + record_len(3)) as u64).unwrap();
                let rows = || device.buffer("rows", 2 * (tokens * attention.kv_row()) as u64).unwrap();
                let cache = ExactRows { keys: rows(), values: rows(), slots: Slots::ALL, eviction: None };
                let through = AttentionBuffers { projected, rope: rope_table, queries: out.clone(), record: count as u32, ..buffers(&device, 0) };
                let prepare = Prepare::plan(&device, (&attention, 2), &through, &cache, None, None).unwrap();
                run::<f32>(&device, &out, count + record_len(3), |pass| prepare.record(pass, 0, tokens as u32)).split_off(count)
            };
            assert_eq!(note(&[(key + 1, 65504.0), (value + 2, -65519.0)]), [0.0; 7]);
            assert_eq!(note(&[(key + 1, -71000.0), (stride + value + 2, 65520.0)]), [71000.0, 0.0, 0.0, 0.0, 0.0, 71000.0, 65520.0]);
        }
    }
}
