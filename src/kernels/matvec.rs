//! `matvec.wgsl`: one token through a weight matrix.

use super::{WORKGROUP, spec};
use crate::Result;
use crate::gpu::Tuning;
use crate::gpu::{Access, Device, Kernel, Matrix, Pass, Spec, Tier, Work};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    first: u32,
    rows: u32,
    width: u32,
    count: u32,
    epsilon: f32,
}

/// What a projection does beside the product, before or after it.
#[derive(Clone, Copy, Default)]
pub(crate) struct Around<'a> {
    /// RMSNorm of the input: its gain and epsilon, and the width under the mean (matvec only; many tokens are normalised by [`super::norm`]).
    pub norm: Option<(&'a wgpu::Buffer, f32, usize)>,
    /// The matrix's rows are pairs of gate and up: `silu(gate) · up` is written.
    pub gated: bool,
    /// Added to what is there.
    pub residual: bool,
    /// A bias `[rows]`.
    pub bias: Option<&'a wgpu::Buffer>,
}

impl Around<'_> {
    /// The flags that both projection shaders know.
    pub(super) fn flags(&self) -> Vec<&'static str> {
        let pairs = [(self.gated, "GATED"), (self.residual, "RESIDUAL"), (self.bias.is_some(), "BIAS")];
        pairs.into_iter().filter_map(|(on, flag)| on.then_some(flag)).collect()
    }
}

/// Lanes of a team where there are no subgroups.
const TEAM: u32 = 16;

/// `out[row] = Σ_k weights[row][k] · x[k]`, and what is around it.
pub struct Matvec {
    parts: Vec<(Kernel, Step, [u32; 3])>,
    /// Numbers of a row.
    width: u32,
}

/// As many rows as the teams of a workgroup take in one go, where a device says that its subgroups have so many lanes, or without subgroups.
pub(super) fn block(subgroups: Option<[u32; 2]>, tuning: &Tuning) -> u32 {
    (WORKGROUP / subgroups.map_or(TEAM, |[min, max]| subgroup(min, max))).max(1) * tuning.team_rows
}

pub(super) fn variant(flags: &[&'static str], rows: u32, tuning: &Tuning) -> Spec {
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Write)];
    if flags.contains(&"NORM") || flags.contains(&"BIAS") {
        bindings.push((3, Access::Read));
    }
    let constants = [("WORKGROUP", WORKGROUP), ("UNROLL", tuning.team_rows), ("TEAM", TEAM), ("ROWS", rows), ("AHEAD", tuning.ahead)];
    spec("matvec.wgsl", flags, &constants, &bindings)
}

/// Lanes of the subgroups that a device is likely to form for a kernel that does not ask for a size, of those that it says it may: Metal says 4 to 64 and forms 32, Intel 8 to 32 and forms 16
/// or 32, AMD 32 to 64 and forms either. The shader reads what they really are; a workgroup has as many rows as it then takes at once, or takes them in several goes.
fn subgroup(min: u32, max: u32) -> u32 {
    (max / 2).max(min).max(1)
}

impl Matvec {
    /// `x`: `[stride]` f32, padding zero; `out`: `[rows]`, or `[rows / 2]` where gated.
    pub(crate) fn plan(device: &Device, weights: &Matrix, x: &wgpu::Buffer, out: &wgpu::Buffer, around: Around) -> Result<Matvec> {
        let tuning = device.tuning();
        let block = block((device.tier() == Tier::F16Subgroups).then(|| device.subgroups()), &tuning);
        let mut flags = around.flags();
        let paired = tuning.paired && weights.stride.is_multiple_of(8);
        if paired {
            flags.push("PAIRED");
        }
        let width = weights.stride / if paired { 8 } else { 4 };
        let mut count = 0;
        let mut epsilon = 0.0;
        let mut last = around.bias;
        if let Some((gain, e, width)) = around.norm {
            flags.insert(0, "NORM");
            (last, epsilon, count) = (Some(gain), e, width as u32);
        }
        let parts = weights.parts.iter().map(|part| {
            let mut buffers = vec![&part.buffer, x, out];
            buffers.extend(last);
            let kernel = device.kernel(variant(&flags, block, &tuning), &buffers)?.called(format_args!("{}×{}", part.rows, weights.stride));
            let blocks = part.rows.div_ceil(block);
            let across = blocks.min(32768);
            Ok((kernel, Step { first: part.first, rows: part.rows, width, count, epsilon }, [across, blocks.div_ceil(across), 1]))
        });
        Ok(Matvec { parts: parts.collect::<Result<_>>()?, width: weights.stride })
    }

    /// One dispatch per part of the matrix.
    pub fn record(&self, pass: &mut Pass) {
        for (kernel, step, grid) in &self.parts {
            let [rows, width] = [step.rows, self.width].map(u64::from);
            kernel.record(pass, step, *grid, Work { bytes: 2 * rows * width + 4 * (rows + width), flops: 2 * rows * width });
        }
    }
}

/// The oracle of both projection kernels, in f64 and in the order of the definition.
#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::gpu::pad;
    use crate::kernels::oracle::{assert_close, halves, numbers, run, tuned_devices};
    use half::f16;

    /// A product and what is around it, on plain numbers.
    pub struct Case {
        pub name: &'static str,
        pub rows: usize,
        pub cols: usize,
        pub norm: bool,
        pub gated: bool,
        pub residual: bool,
        pub bias: bool,
    }

    /// What a case multiplies: `x` is `[tokens][pad(cols)]` with zero padding, `before` what `out` holds.
    pub struct Numbers {
        pub weights: Vec<f16>,
        pub x: Vec<f32>,
        pub gain: Vec<f32>,
        pub bias: Vec<f32>,
        pub before: Vec<f32>,
    }

    impl Case {
        /// Numbers to one token's output.
        pub fn stride(&self) -> usize {
            if self.gated { self.rows / 2 } else { self.rows }
        }

        pub fn numbers(&self, tokens: usize) -> Numbers {
            let stride = pad(self.cols);
            let padded = |seed, rows: usize| {
                numbers(seed, rows * stride).into_iter().enumerate().map(|(i, x)| if i % stride < self.cols { x } else { 0.0 }).collect::<Vec<_>>()
            };
            let weights = halves(1, self.rows * self.cols);
            Numbers { weights, x: padded(2, tokens), gain: padded(3, 1), bias: numbers(4, self.rows), before: numbers(5, tokens * self.stride()) }
        }

        pub fn expected(&self, n: &Numbers) -> Vec<f64> {
            let token = |(t, x): (usize, &[f32])| {
                let square: f64 = x.iter().map(|x| (*x as f64).powi(2)).sum();
                let scale = if self.norm { 1.0 / (square / self.cols as f64 + 1e-3f32 as f64).sqrt() } else { 1.0 };
                let input = |k: usize| x[k] as f64 * scale * if self.norm { n.gain[k] as f64 } else { 1.0 };
                let product = |r: usize| (0..self.cols).map(|k| n.weights[r * self.cols + k].to_f64() * input(k)).sum::<f64>();
                let out = |i: usize| match self.gated {
                    true => product(2 * i) / (1.0 + (-product(2 * i)).exp()) * product(2 * i + 1),
                    false => product(i) + if self.bias { n.bias[i] as f64 } else { 0.0 },
                };
                let before = |i: usize| if self.residual { n.before[t * self.stride() + i] as f64 } else { 0.0 };
                (0..self.stride()).map(|i| out(i) + before(i)).collect::<Vec<_>>()
            };
            n.x.chunks_exact(pad(self.cols)).enumerate().flat_map(token).collect()
        }
    }

    /// In two parts on a device whose bindings hold [`BINDING`] bytes, the second one small; and smaller than anything.
    pub const CASES: [Case; 6] = [
        Case { name: "plain", rows: 139, cols: 301, norm: false, gated: false, residual: false, bias: false },
        Case { name: "norm", rows: 139, cols: 301, norm: true, gated: false, residual: false, bias: false },
        Case { name: "norm, gated", rows: 142, cols: 301, norm: true, gated: true, residual: false, bias: false },
        Case { name: "residual", rows: 139, cols: 297, norm: false, gated: false, residual: true, bias: false },
        Case { name: "residual, bias", rows: 139, cols: 301, norm: false, gated: false, residual: true, bias: true },
        Case { name: "small", rows: 5, cols: 3, norm: false, gated: false, residual: false, bias: false },
    ];
    pub const BINDING: u64 = 96 << 10;

    #[test]
    fn one_token_by_every_variant() {
        for (device, tuning) in tuned_devices(Some(BINDING)) {
            for case in &CASES {
                let n = case.numbers(1);
                let weights = Matrix::upload(&device, "weights", &n.weights, case.rows, case.cols, 128).unwrap();
                assert_eq!(weights.parts.len(), if case.rows > 128 { 2 } else { 1 });
                let [x, gain, bias, out] = [&n.x, &n.gain, &n.bias, &n.before].map(|v| device.upload("vector", v).unwrap());
                let around = Around {
                    norm: case.norm.then_some((&gain, 1e-3, case.cols)),
                    gated: case.gated,
                    residual: case.residual,
                    bias: case.bias.then_some(&bias),
                };
                let matvec = Matvec::plan(&device, &weights, &x, &out, around).unwrap();
                let got = run::<f32>(&device, &out, case.stride(), |pass| matvec.record(pass));
                assert_close(got.into_iter().map(f64::from), &case.expected(&n), 1e-10, &format!("{}, {:?}, {tuning:?}", case.name, device.tier()));
            }
        }
    }

    #[test]
    fn subgroups_are_guessed_from_what_adapters_say() {
        // Metal, Intel, AMD, NVIDIA, Adreno, llvmpipe, SwiftShader.
        let said = [(4, 64), (8, 32), (32, 64), (32, 32), (64, 128), (8, 8), (4, 4), (0, 0)];
        assert_eq!(said.map(|(min, max)| subgroup(min, max)), [32, 16, 32, 32, 64, 8, 4, 1]);
    }
}
