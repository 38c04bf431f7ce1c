//! `matmul.wgsl`: many tokens through a weight matrix.

use super::fusion::{Fusion, bindings};
use super::spec;
use crate::Result;
use crate::gpu::{Device, Kernel, Matrix, Pass, Spec, Tensor, Tile, WeightType, Work, pad};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    first: u32,
    rows: u32,
    width: u32,
    tokens: u32,
    stride: u32,
    scale: f32,
    cap: f32,
}

/// `out[t][row] = Σ_k weights[row][k] · x[t][k]`, and what is fused with it.
pub struct Matmul {
    /// With the bytes of its weights.
    parts: Vec<(Kernel, Params, u64)>,
    tile: Tile,
}

/// `flags` are [`Fusion::flags`].
pub(super) fn variant(weights: WeightType, flags: &[&'static str], tile: &Tile) -> Spec {
    let Tile { tokens, rows, depth, lane_tokens, lane_rows } = *tile;
    let mut constants = weights.constants();
    constants.extend([("BM", tokens), ("BN", rows), ("BK", depth), ("TM", lane_tokens), ("TN", lane_rows)]);
    let flags = [flags, weights.flags()].concat();
    spec("matmul.wgsl", &flags, &constants, &bindings(weights, &flags))
}

impl Matmul {
    /// For as many tokens as `x` and `out` have rows.
    ///
    /// `x`: `[n][cols]`; `out`: `[n][rows]`, or half of that where gated. All f32. There is no
    /// [`Fusion::norm`].
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, weights: &Matrix, x: &Tensor, out: &Tensor, fusion: Fusion) -> Result<Matmul> {
        fusion.check("matmul", weights, x, out);
        assert!(fusion.norm.is_none(), "matmul: {x} would have to be normalised");
        let (tile, cols) = (device.tuning().tile, pad(weights.cols));
        let parts = weights.parts.iter().map(|part| {
            let spec = variant(part.kind, &fusion.flags(), &tile);
            let kernel = device.kernel(spec, &fusion.buffers(part, x, out))?.called(format_args!("{}×{cols}", part.rows()));
            let [first, rows, width, stride] = [part.first, part.rows(), cols / 4, out.shape.stride].map(|n| n as u32);
            let [scale, cap] = fusion.numbers();
            Ok((kernel, Params { first, rows, width, tokens: 0, stride, scale, cap }, part.bytes()))
        });
        Ok(Matmul { parts: parts.collect::<Result<_>>()?, tile })
    }

    /// One dispatch per part of the matrix.
    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        for (kernel, params, bytes) in &self.parts {
            let [rows, width, n] = [params.rows, 4 * params.width, tokens].map(u64::from);
            let work = Work { bytes: bytes + 4 * n * (rows + width), flops: 2 * n * rows * width };
            kernel.record(pass, &Params { tokens, ..*params }, [params.rows.div_ceil(self.tile.rows), tokens.div_ceil(self.tile.tokens), 1], work);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{ElementType, Shape};
    use crate::kernels::matvec::tests::{Case, cases};
    use crate::kernels::oracle::{assert_close, devices, numbers, run, tuned_devices};

    #[test]
    fn weights_in_f32_are_not_rounded() {
        let (rows, cols, tokens) = (150, 70, 33);
        let (weights, x) = (numbers(1, rows * cols), numbers(2, tokens * cols));
        let dot = |t: usize, row: usize| (0..cols).map(|k| f64::from(weights[row * cols + k]) * f64::from(x[t * cols + k])).sum();
        let expected: Vec<f64> = (0..tokens).flat_map(|t| (0..rows).map(move |row| (t, row))).map(|(t, row)| dot(t, row)).collect();
        for device in devices(None) {
            let matrix = Matrix::upload(&device, "weights", &weights, [rows, cols]).unwrap();
            let x = Tensor::upload(&device, "x", &x, Shape::padded(tokens, cols)).unwrap();
            let out = Tensor::zeroed(&device, "out", ElementType::F32, Shape::dense(tokens, rows)).unwrap();
            let matmul = Matmul::plan(&device, &matrix, &x, &out, Fusion::default()).unwrap();
            let got = run::<f32>(&device, &out, expected.len(), |pass| matmul.record(pass, tokens as u32));
            assert_close(got.into_iter().map(f64::from), &expected, 1e-12, &format!("{:?}", device.tier()));
        }
    }

    #[test]
    fn many_tokens_by_every_variant() {
        for (device, tuning) in tuned_devices(None) {
            let without_norm = cases()
                .into_iter()
                .filter(|(case, _)| !case.norm || case.gated || case.activation.is_some())
                .map(|(case, types)| (Case { norm: false, ..case }, types));
            for (case, types) in without_norm {
                for tokens in [1, 3, 65] {
                    let n = case.numbers(tokens, types);
                    let weights = Matrix::of(&device, "weights", &n.rows, case.cols).unwrap();
                    let x = Tensor::vector(&device, "x", &n.x).unwrap().view(Shape::padded(tokens, case.cols));
                    let bias = Tensor::vector(&device, "bias", &n.bias).unwrap();
                    let out = Tensor::upload(&device, "out", &n.before, Shape::dense(tokens, case.stride())).unwrap();
                    let fusion = Fusion {
                        gated: case.gated,
                        residual: case.residual,
                        bias: case.bias.then_some(&bias),
                        activation: case.activation,
                        ..case.more()
                    };
                    let matmul = Matmul::plan(&device, &weights, &x, &out, fusion).unwrap();
                    let got = run::<f32>(&device, &out, tokens * case.stride(), |pass| matmul.record(pass, tokens as u32));
                    let what = format!("{} for {tokens}, {types:?}, {:?}, {tuning:?}", case.name, device.tier());
                    assert_close(got.into_iter().map(f64::from), &case.expected(&n, false), 1e-10, &what);
                }
            }
        }
    }
}
