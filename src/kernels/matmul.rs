//! `matmul.wgsl`: many tokens through a weight matrix.

use super::matvec::Around;
use super::spec;
use crate::Result;
use crate::gpu::Tile;
use crate::gpu::{Access, Device, Kernel, Matrix, Pass, Spec, Work};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    first: u32,
    rows: u32,
    width: u32,
    tokens: u32,
    stride: u32,
}

/// `out[t][row] = Σ_k weights[row][k] · x[t][k]`, and what is around it.
pub struct Matmul {
    parts: Vec<(Kernel, Step)>,
    /// Bytes of a weight.
    each: u64,
    tile: Tile,
}

pub(super) fn variant(flags: &[&'static str], tile: &Tile) -> Spec {
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Write)];
    if flags.contains(&"BIAS") {
        bindings.push((3, Access::Read));
    }
    let Tile { tokens, rows, depth, lane_tokens, lane_rows } = *tile;
    spec("matmul.wgsl", flags, &[("BM", tokens), ("BN", rows), ("BK", depth), ("TM", lane_tokens), ("TN", lane_rows)], &bindings)
}

impl Matmul {
    /// `x`: `[n][weights.stride]` f32, padding zero; `out`: `[n][stride]`. [`Around::norm`] does not apply.
    pub(crate) fn plan(device: &Device, weights: &Matrix, x: &wgpu::Buffer, out: &wgpu::Buffer, stride: usize, around: Around) -> Result<Matmul> {
        let mut flags = around.flags();
        flags.extend(weights.full.then_some("FULL"));
        let tile = device.tuning().tile;
        let parts = weights.parts.iter().map(|part| {
            let mut buffers = vec![&part.buffer, x, out];
            buffers.extend(around.bias);
            let step = Step { first: part.first, rows: part.rows, width: weights.stride / 4, tokens: 0, stride: stride as u32 };
            Ok((device.kernel(variant(&flags, &tile), &buffers)?.called(format_args!("{}×{}", part.rows, weights.stride)), step))
        });
        Ok(Matmul { parts: parts.collect::<Result<_>>()?, each: if weights.full { 4 } else { 2 }, tile })
    }

    /// One dispatch per part of the matrix.
    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        for (kernel, step) in &self.parts {
            let [rows, width, n] = [step.rows, 4 * step.width, tokens].map(u64::from);
            let work = Work { bytes: self.each * rows * width + 4 * n * (rows + width), flops: 2 * n * rows * width };
            kernel.record(pass, &Step { tokens, ..*step }, [step.rows.div_ceil(self.tile.rows), tokens.div_ceil(self.tile.tokens), 1], work);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::matvec::tests::{BINDING, CASES};
    use crate::kernels::oracle::{assert_close, devices, numbers, run, tuned_devices};

    #[test]
    fn weights_in_f32_are_not_rounded() {
        let (rows, cols, tokens) = (150, 70, 33);
        let (weights, mut x) = (numbers(1, rows * cols), numbers(2, tokens * 72));
        (0..tokens).for_each(|t| x[t * 72 + cols..][..2].fill(0.0));
        let dot = |t: usize, row: usize| (0..cols).map(|k| f64::from(weights[row * cols + k]) * f64::from(x[t * 72 + k])).sum();
        let expected: Vec<f64> = (0..tokens).flat_map(|t| (0..rows).map(move |row| (t, row))).map(|(t, row)| dot(t, row)).collect();
        for device in devices(None) {
            let matrix = Matrix::upload(&device, "weights", &weights, rows, cols, 128).unwrap();
            let (x, out) = (device.upload("x", &x).unwrap(), device.buffer("out", expected.len() as u64 * 4).unwrap());
            let matmul = Matmul::plan(&device, &matrix, &x, &out, rows, Around::default()).unwrap();
            let got = run::<f32>(&device, &out, expected.len(), |pass| matmul.record(pass, tokens as u32));
            assert_close(got.into_iter().map(f64::from), &expected, 1e-12, &format!("{:?}", device.tier()));
        }
    }

    #[test]
    fn many_tokens_by_every_variant() {
        for (device, tuning) in tuned_devices(Some(BINDING)) {
            for case in CASES.iter().filter(|case| !case.norm).chain([&crate::kernels::matvec::tests::Case { norm: false, ..CASES[2] }]) {
                for tokens in [1, 3, 65] {
                    let n = case.numbers(tokens);
                    let weights = Matrix::upload(&device, "weights", &n.weights, case.rows, case.cols, 128).unwrap();
                    let [x, bias, out] = [&n.x, &n.bias, &n.before].map(|v| device.upload("numbers", v).unwrap());
                    let around = Around { gated: case.gated, residual: case.residual, bias: case.bias.then_some(&bias), ..Default::default() };
                    let matmul = Matmul::plan(&device, &weights, &x, &out, case.stride(), around).unwrap();
                    let got = run::<f32>(&device, &out, tokens * case.stride(), |pass| matmul.record(pass, tokens as u32));
                    let what = format!("{} for {tokens}, {:?}, {tuning:?}", case.name, device.tier());
                    assert_close(got.into_iter().map(f64::from), &case.expected(&n), 1e-10, &what);
                }
            }
        }
    }
}
