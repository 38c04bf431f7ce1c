//! The kernels, one file per shader: its parameters, its plan (a pipeline bound to tensors, once)
//! and its record (into a pass, allocating nothing).
//!
//! One decode step is, per layer: [`matvec`] (norm and query, key row, value row in one projection)
//! → [`prepare`] (bias, QK-norm, RoPE, append) → [`flash`] (scores and the values' weighted sums,
//! split by split) → [`merge`] (and the values' up-projection) → [`matvec`] (output projection onto
//! the residual) → [`matvec`] (norm, gate, up, SiLU) → [`matvec`] (down, onto the residual): seven
//! dispatches. Where rows belong to several heads, or there are no subgroups, [`score`] and
//! [`values`] stand for the third: there the groups of keys and of values differ, and one kernel
//! would read a row once for every head.
//!
//! Where MLPs are experts the last two are four: [`norm`] → [`route`] (which of them each token
//! goes through) → [`experts`] (gate and up of those) → [`experts`] (down, weighed, onto the
//! residual).
//!
//! Beside latents the newest tokens are kept exactly, and every so often a block of them is coded:
//! [`gather`] (what a row is made from, less its mean) → [`matmul`] (to coordinates) → [`pack`].
//! Where a token chooses among latents, their [`landmark`]s are made then, and a step has two
//! dispatches more in a layer before its scores: landmarks are scored, and [`select`] chooses.
//!
//! Where tokens are evicted a layer has one dispatch more for the attention that they receive
//! ([`accumulate`]), and in a step in which some leave the window two further ones: [`evict`] and
//! [`move_rows`].

pub mod accumulate;
pub mod argmax;
mod attention;
pub mod blocks;
pub(crate) mod coded;
pub mod columns;
pub mod embed;
pub mod energy;
pub mod evict;
pub mod eviction;
pub mod exact;
pub mod experts;
pub mod flash;
mod fusion;
pub mod gather;
pub mod gram;
mod hot;
pub mod landmark;
pub mod matmul;
pub mod matvec;
pub mod merge;
pub mod move_rows;
pub mod norm;
pub mod pack;
pub mod prepare;
pub mod project;
pub mod rebuild;
pub mod repeat;
pub mod route;
pub mod score;
pub mod select;
pub mod sketch;
pub mod stripe;
pub mod values;

pub use attention::{AttentionBuffers, AttentionShape, HeadNorm, QueryScaling};
pub(crate) use fusion::{Activation, Fusion};
pub use hot::{Hot, hot_variants};

use crate::gpu::{Access, Spec};
use std::collections::BTreeMap;

/// Lanes of a workgroup in every kernel but the reductions over whole rows. Two subgroups on
/// NVIDIA, one or two on AMD, eight on a software renderer.
pub(crate) const WORKGROUP: u32 = 64;

/// Positions of RoPE's first table: see [`rope_table`].
pub(crate) const NEAR: u32 = 64;

/// RoPE's tables, `(cos, sin)`, from angles in f64: the positions below `NEAR`, `[NEAR][pairs]`,
/// the same as `[pairs][NEAR]`, then its multiples, `[ceil(capacity / NEAR)][pairs]`. A shader
/// rotates by the sum of two angles.
pub(crate) fn rope_table(frequencies: &[f64], capacity: usize) -> Vec<[f32; 2]> {
    let near = NEAR as usize;
    let rotation = |p: usize, f: f64| [(p as f64 * f).cos() as f32, (p as f64 * f).sin() as f32];
    let row = |p: usize| frequencies.iter().map(move |f| rotation(p, *f));
    let by_pair = frequencies.iter().flat_map(|f| (0..near).map(move |p| rotation(p, *f)));
    (0..near).flat_map(row).chain(by_pair).chain((0..capacity.div_ceil(near)).flat_map(|i| row(near * i))).collect()
}

fn spec(shader: &'static str, flags: &[&'static str], constants: &[(&'static str, u32)], bindings: &[(u32, Access)]) -> Spec {
    Spec { shader, flags: flags.to_vec(), constants: BTreeMap::from_iter(constants.iter().copied()), bindings: bindings.to_vec() }
}

/// What the kernels' tests share: devices of every tier, numbers, running and reading back.
#[cfg(test)]
mod oracle {
    use super::coded::{Coded, Slice};
    use super::{AttentionBuffers, AttentionShape};
    use crate::gpu::Tuning;
    use crate::gpu::{Device, Element, Options, Pass, Shape, Tensor, Tier, pad};
    use crate::kernels::exact::ExactRows;
    use crate::kv::Slots;
    use crate::kv::{Evicted, Format, RUN, Stores};
    use half::f16;
    use std::sync::Arc;

    /// One device of every tier.
    pub fn devices(max_binding: Option<u64>) -> [Arc<Device>; 3] {
        Tier::ALL.map(|tier| Device::open(&Options { tier: Some(tier), max_binding, canaries: true, ..Default::default() }).unwrap())
    }

    /// Devices of every tier, and every tuning in the best: a software renderer's, a GPU's, and
    /// small parts with more of everything than there are keys.
    ///
    /// How work is divided and how it is done have little to do with each other, and each variant
    /// takes its time to compile: the lesser tiers have one tuning each.
    pub fn tuned_devices(max_binding: Option<u64>) -> impl Iterator<Item = (Arc<Device>, Tuning)> {
        let small = Tuning {
            tile: crate::gpu::Tile { tokens: 16, rows: 32, depth: 8, lane_tokens: 4, lane_rows: 2 },
            splits: 300,
            coded_splits: 77,
            score_rows: 3,
            score_keys: 3,
            score_workgroups: 1,
            flash: true,
            flash_heads: 3,
            flash_keys: 3,
            flash_lanes: 32,
            flash_parts: 12,
            pack_lanes: 32,
            keys: 32,
            in_flight: 2,
            ends: 3,
            absorb: 20,
            team_rows: 2,
            ahead: 3,
            paired: true,
            int8: true,
            passes: 3,
            logits: 100,
            merge_lanes: 128,
        };
        let tunings = [Tuning::of(true), Tuning::of(false), small];
        devices(max_binding)
            .into_iter()
            .flat_map(move |device| {
                let few = match device.tier() {
                    Tier::F16Subgroups => &tunings[..],
                    Tier::F16 => &tunings[1..2],
                    Tier::Baseline => &tunings[2..],
                };
                few.iter().map(|tuning| (device.clone(), *tuning)).collect::<Vec<_>>()
            })
            .inspect(|(device, tuning)| device.set_tuning(*tuning))
    }

    /// Numbers between -1 and 1, from a seed.
    pub fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    pub fn halves(seed: u64, count: usize) -> Vec<f16> {
        numbers(seed, count).into_iter().map(f16::from_f32).collect()
    }

    /// Rows of `cols` numbers.
    pub fn upload<T: Element>(device: &Device, numbers: &[T], cols: usize) -> Tensor {
        Tensor::upload(device, "numbers", numbers, Shape::dense(numbers.len() / cols, cols)).unwrap()
    }

    /// Records, submits, and reads the first `count` elements of `from`.
    ///
    /// Nothing is to have been written behind any buffer.
    pub fn run<T: bytemuck::Pod>(device: &Device, from: &wgpu::Buffer, count: usize, record: impl FnOnce(&mut Pass)) -> Vec<T> {
        let mut out = vec![T::zeroed(); count];
        let bytes = std::mem::size_of_val(&out[..]) as u64;
        let back = device.readback("read back", bytes).unwrap();
        let (commands, _) = device.encode("test", record, |encoder| encoder.copy_buffer_to_buffer(from, 0, &back, 0, bytes)).unwrap();
        device.submit_and_read(commands, &back, &mut out).unwrap();
        assert_eq!(device.overrun().unwrap(), None, "a buffer behind which something was written, {:?}", device.tier());
        out
    }

    /// Normalised mean square error below `most`, or the test fails with `what`.
    pub fn assert_close(got: impl IntoIterator<Item = f64>, expected: &[f64], most: f64, what: &str) {
        let got: Vec<f64> = got.into_iter().collect();
        assert_eq!(got.len(), expected.len(), "{what}");
        let error: f64 = got.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / expected.iter().map(|b| b * b).sum::<f64>();
        assert!(error < most, "{what}: {error}");
    }

    /// RoPE's, of a base of ten thousand.
    pub fn frequencies(head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2).map(|i| 1e4f64.powf(-2.0 * i as f64 / head_dim as f64)).collect()
    }

    /// A head as attention sees it.
    ///
    /// Normalised and multiplied by `gain` where there is one, then rotated to its position.
    pub fn rotated(attention: &AttentionShape, head: &[f64], gain: Option<&[f32]>, position: usize) -> Vec<f64> {
        let scale = 1.0 / (head.iter().map(|x| x * x).sum::<f64>() / head.len() as f64 + attention.epsilon as f64).sqrt();
        let x: Vec<f64> = head.iter().enumerate().map(|(i, x)| gain.map_or(*x, |g| x * scale * g[i] as f64)).collect();
        let (half, frequencies) = (head.len() / 2, frequencies(head.len()));
        let rotate = |i: usize| {
            let (sin, cos) = (position as f64 * frequencies[i % half]).sin_cos();
            if i < half { x[i] * cos - x[i + half] * sin } else { x[i] * cos + x[i - half] * sin }
        };
        (0..head.len()).map(rotate).collect()
    }

    /// What kernels hand on to each other: nothing yet, with so many columns of scores.
    pub fn buffers(device: &Device, columns: usize) -> AttentionBuffers {
        let none = || device.buffer("nothing", 4).unwrap();
        AttentionBuffers {
            projected: upload(device, &[0f32], 1),
            rope: upload(device, &[0f32], 1),
            queries: none(),
            record: 0,
            scores: none(),
            columns,
            sums: none(),
            weights: none(),
            attended: upload(device, &[0f32], 1),
            landmarks: none(),
            chosen: none(),
            rebuilt: none(),
            counted: [none(), none()],
            counts: none(),
            head_sinks: None,
        }
    }

    /// Exact rows, of which only some are given.
    pub fn exact(device: &Device, slots: Slots, [keys, values]: [&[f16]; 2]) -> ExactRows {
        let [keys, values] =
            [keys, values].map(|rows| if rows.is_empty() { device.buffer("rows", 4).unwrap() } else { device.upload("rows", rows).unwrap() });
        ExactRows { keys, values, slots, eviction: None }
    }

    /// What there is room for beside exact rows, of everything some.
    pub fn stores(attention: &AttentionShape, evicted_as: Evicted) -> Stores {
        Stores::some(2 * attention.kv_row(), evicted_as, 24, 5, 400)
    }

    /// A layer's exact rows and what stands beside them, at random.
    pub struct Beside {
        pub cache: ExactRows,
        /// Rows by slot, candidates' last: keys, and values.
        pub rows: [Vec<f16>; 2],
        /// How many tokens each column is, and its key and value, padded.
        pub columns: Vec<(u32, [Vec<f64>; 2])>,
    }

    impl Beside {
        /// Buffers with room for what is made of a sketch.
        pub fn buffers(&self, device: &Device, attention: &AttentionShape, columns: usize) -> AttentionBuffers {
            let count = self.cache.eviction.as_ref().map_or(0, |eviction| eviction.stores.evicted_columns());
            let rows = || device.buffer("rows of a sketch", (2 * count * attention.kv_row()) as u64).unwrap();
            AttentionBuffers { counted: [rows(), rows()], counts: device.buffer("counts", 4 * count as u64).unwrap(), ..buffers(device, columns) }
        }
    }

    /// Seven candidates, and sums as they may be.
    pub fn beside(device: &Device, attention: &AttentionShape, slots: Slots, evicted_as: Evicted) -> Beside {
        let (stores, held, row) = (stores(attention, evicted_as), 7, attention.kv_row());
        let cache = ExactRows::beside(device, attention, "test", slots, stores).unwrap();
        let eviction = cache.eviction.as_ref().unwrap();
        let is_padding = |i: usize| i % pad(attention.head_dim) >= attention.head_dim;
        let rows = [60, 61].map(|seed| {
            let mut rows = halves(seed, (slots.count() + stores.candidates) * row);
            rows.iter_mut().enumerate().filter(|(i, _)| is_padding(*i)).for_each(|(_, x)| *x = f16::ZERO);
            rows
        });
        device.queue.write_buffer(&cache.keys, 0, bytemuck::cast_slice(&rows[0]));
        device.queue.write_buffer(&cache.values, 0, bytemuck::cast_slice(&rows[1]));
        let wide = |from: &[f16]| from.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
        let candidate = |i: usize| (1, [0, 1].map(|side: usize| wide(&rows[side][(slots.count() + i) * row..][..row])));
        let mut columns: Vec<_> = (0..held).map(candidate).collect();

        let sums: Vec<i32> =
            numbers(62, stores.buckets * 2 * row).iter().enumerate().map(|(i, x)| if is_padding(i) { 0 } else { (x * 2e5) as i32 }).collect();
        let mean: Vec<f32> = numbers(63, 2 * row).iter().enumerate().map(|(i, x)| if is_padding(i) { 0.0 } else { *x }).collect();
        // A bucket without any, and buckets without either sign.
        let members: Vec<[u32; 2]> =
            (0..stores.buckets as u32).map(|bucket| [bucket, 3 - bucket.min(3)].map(|n| if bucket == 2 { 0 } else { n })).collect();
        let split = |both: Vec<f64>| [both[..row].to_vec(), both[row..].to_vec()];
        match evicted_as {
            Evicted::None | Evicted::Rows => {}
            Evicted::Mean => {
                device.queue.write_buffer(&eviction.marks, 0, bytemuck::bytes_of(&9u32));
                columns.push((9, split(mean.iter().map(|x| f64::from(*x)).collect())));
            }
            Evicted::Sketch | Evicted::Shrunk => {
                for (bucket, [plus, minus]) in members.iter().copied().enumerate() {
                    device.queue.write_buffer(&eviction.marks, 16 * bucket as u64, bytemuck::cast_slice(&[plus, minus]));
                    let (n, signs) = (f64::from((plus + minus).max(1)), f64::from(plus) - f64::from(minus));
                    for (count, sign) in [(plus, 1.0), (minus, -1.0)] {
                        let number = |(i, sum): (usize, &i32)| {
                            let (sum, mean) = (f64::from(*sum) / 65536.0, f64::from(mean[i]));
                            if evicted_as == Evicted::Sketch { sign * sum } else { mean + sign * (sum - signs * mean) / n }
                        };
                        columns.push((count, split(sums[bucket * 2 * row..][..2 * row].iter().enumerate().map(number).collect())));
                    }
                }
            }
        }
        eviction.sums.iter().for_each(|buffer| device.queue.write_buffer(buffer, 0, bytemuck::cast_slice(&sums)));
        eviction.totals.iter().for_each(|buffer| device.queue.write_buffer(buffer, 0, bytemuck::cast_slice(&mean)));
        Beside { cache, rows, columns }
    }

    /// One side of a layer, coded at random.
    pub struct LatentSide {
        pub coded: Coded,
        /// `[capacity][words]`.
        pub rows: Vec<u32>,
        /// By slice and token, what the rows decode to.
        pub coordinates: Vec<Vec<Vec<f64>>>,
        /// By slice, `[rank][heads · head_dim]`, as f16 holds them.
        ups: Vec<Vec<f32>>,
        head_dim: usize,
    }

    impl LatentSide {
        /// The same of keys after RoPE, about means before it.
        pub fn about(self, attention: &AttentionShape, means: &[f32]) -> LatentSide {
            LatentSide { coded: self.coded.about(attention, means), ..self }
        }

        /// A key/value head's up-projection.
        pub fn up(&self, kv: usize, coordinate: usize, dim: usize) -> f32 {
            let (i, slice) = self.coded.of_head(kv);
            self.ups[i][(coordinate * slice.kv_heads + kv - slice.first_head) * self.head_dim + dim]
        }
    }

    /// Slices of so many heads in such formats, behind one another with a word between.
    pub fn latent_side(attention: &AttentionShape, slices: &[(usize, &Format)], capacity: usize) -> LatentSide {
        let (mut word, mut first_head) = (1, 0);
        let slice = |(row, &(kv_heads, format)): (usize, &(usize, &Format))| {
            let slice = Slice { row, word, offset: 0, first_head, kv_heads, runs: 0..format.rank() / RUN, format: format.clone() };
            word += format.words() + 1;
            first_head += kv_heads;
            slice
        };
        let slices: Vec<Slice> = slices.iter().enumerate().map(slice).collect();
        assert_eq!(first_head, attention.kv_heads);
        let mut side = LatentSide {
            rows: vec![0; capacity * word],
            coordinates: Vec::new(),
            ups: Vec::new(),
            head_dim: attention.head_dim,
            coded: Coded { store: 0, words: word, slices, mean_pairs: Vec::new(), block: 1 },
        };
        for (i, slice) in side.coded.slices.iter().enumerate() {
            let (rank, words) = (slice.format.rank(), slice.format.words());
            let encoded = |(token, z): (usize, &[f32])| {
                let words = &mut side.rows[token * side.coded.words + slice.word..][..words];
                slice.format.encode(z, words);
                let mut z = vec![0.0; rank];
                slice.format.decode(words, &mut z);
                z.into_iter().map(f64::from).collect()
            };
            side.coordinates.push(numbers(i as u64 + 20, capacity * rank).chunks_exact(rank).enumerate().map(encoded).collect());
            side.ups.push(halves(i as u64 + 40, rank * slice.kv_heads * attention.head_dim).into_iter().map(f32::from).collect());
        }
        side
    }
}
