//! The kernels, one file per shader: its parameters, its plan (a pipeline bound to buffers, once) and its record (into a pass, allocating nothing).
//!
//! One decode step is, per layer: [`matvec`] (norm and query, key row, value row in one projection) → [`prepare`] (bias, QK-norm, RoPE, append) → [`score`] →
//! [`values`] → [`merge`] (and the values' up-projection) → [`matvec`] (output projection onto the residual) → [`matvec`] (norm, gate, up, SiLU) → [`matvec`] (down,
//! onto the residual): eight dispatches. Scoring and summing are two kernels, not one, because their groups differ: keys are scored by key/value head, while
//! value rows may belong to all heads at once, and a fused kernel would read those once per head.

pub mod argmax;
pub mod embed;
pub mod matmul;
pub mod matvec;
pub mod merge;
pub mod norm;
pub mod prepare;
pub mod score;
pub mod values;

use crate::gpu::{Access, Spec};
use std::collections::BTreeMap;

/// Lanes of a workgroup in every kernel but the reductions over whole rows. Two subgroups on NVIDIA, one or two on AMD, eight on a software renderer.
pub(crate) const WORKGROUP: u32 = 64;

/// Positions of RoPE's first table: see [`turns`].
const NEAR: u32 = 64;

/// RoPE's tables, `(cos, sin)` as `[NEAR + ceil(capacity / NEAR)][frequencies]`: the positions below `NEAR`, then its multiples, from angles in f64. A shader turns
/// by the sum of two angles.
pub(crate) fn turns(frequencies: &[f64], capacity: usize) -> Vec<[f32; 2]> {
    let near = NEAR as usize;
    let positions = (0..near).chain((0..capacity.div_ceil(near)).map(|i| near * i));
    let row = |p: usize| frequencies.iter().map(move |f| [(p as f64 * f).cos() as f32, (p as f64 * f).sin() as f32]);
    positions.flat_map(row).collect()
}

fn spec(shader: &'static str, flags: &[&'static str], constants: &[(&'static str, u32)], bindings: &[(u32, Access)]) -> Spec {
    Spec { shader, flags: flags.to_vec(), constants: BTreeMap::from_iter(constants.iter().copied()), bindings: bindings.to_vec() }
}

/// Every variant that the decoder can ask for, in sizes as they occur: what the offline translation test translates.
pub fn variants() -> Vec<Spec> {
    [
        argmax::variants(),
        embed::variants(),
        matmul::variants(),
        matvec::variants(),
        merge::variants(),
        norm::variants(),
        prepare::variants(),
        score::variants(),
        values::variants(),
        crate::gpu::roofline_variants(),
    ]
    .concat()
}

/// What the kernels' tests share: devices of every tier, numbers, running and reading back.
#[cfg(test)]
mod oracle {
    use crate::checkpoint::Config;
    use crate::gpu::{Device, Options, Pass, Tier};
    use half::f16;
    use std::sync::Arc;

    /// One device of every tier.
    pub fn devices(max_binding: Option<u64>) -> [Arc<Device>; 3] {
        Tier::ALL.map(|tier| Device::open(&Options { tier: Some(tier), max_binding, ..Default::default() }).unwrap())
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

    /// Records, submits, and reads the first `count` elements of `from`.
    pub fn run<T: bytemuck::Pod>(device: &Device, from: &wgpu::Buffer, count: usize, record: impl FnOnce(&mut Pass)) -> Vec<T> {
        let mut out = vec![T::zeroed(); count];
        let bytes = std::mem::size_of_val(&out[..]) as u64;
        let back = device.readback("read back", bytes).unwrap();
        let (commands, _) = device.encode("test", record, |encoder| encoder.copy_buffer_to_buffer(from, 0, &back, 0, bytes));
        device.submit_and_read(commands, &back, &mut out).unwrap();
        out
    }

    /// Normalised mean square error below `most`, or the test fails with `what`.
    pub fn assert_close(got: impl IntoIterator<Item = f64>, expected: &[f64], most: f64, what: &str) {
        let got: Vec<f64> = got.into_iter().collect();
        assert_eq!(got.len(), expected.len(), "{what}");
        let error: f64 = got.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / expected.iter().map(|b| b * b).sum::<f64>();
        assert!(error < most, "{what}: {error}");
    }

    /// A head as attention sees it: normalised and multiplied by `gain` where there is one, then turned to its position.
    pub fn turned(config: &Config, head: &[f64], gain: Option<&[f32]>, position: usize) -> Vec<f64> {
        let scale = 1.0 / (head.iter().map(|x| x * x).sum::<f64>() / head.len() as f64 + config.rms_norm_eps as f64).sqrt();
        let x: Vec<f64> = head.iter().enumerate().map(|(i, x)| gain.map_or(*x, |g| x * scale * g[i] as f64)).collect();
        let (half, frequencies) = (head.len() / 2, config.rope_frequencies());
        let turn = |i: usize| {
            let (sin, cos) = (position as f64 * frequencies[i % half]).sin_cos();
            if i < half { x[i] * cos - x[i + half] * sin } else { x[i] * cos + x[i - half] * sin }
        };
        (0..head.len()).map(turn).collect()
    }
}
