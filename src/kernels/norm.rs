//! `norm.wgsl`: RMSNorm of many tokens.

use super::{WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, ElementType, Kernel, Pass, Spec, Tensor, Work, pad};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    width: u32,
    count: u32,
    epsilon: f32,
}

/// By what numbers are normalised: their root mean square, and a gain.
#[derive(Clone, Copy)]
pub(crate) struct RmsNorm<'a> {
    /// `[width]` f32.
    pub gain: &'a Tensor,
    /// Added to the mean of squares.
    pub epsilon: f32,
}

/// Normalises rows.
pub struct Norm {
    kernel: Kernel,
    params: Params,
}

pub(super) fn variant() -> Spec {
    spec("norm.wgsl", &[], &[("WORKGROUP", WORKGROUP)], &[(0, Access::Read), (1, Access::Read), (2, Access::Write)])
}

impl Norm {
    /// `x`, `out`: `[n][width]` f32.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, x: &Tensor, RmsNorm { gain, epsilon }: RmsNorm, out: &Tensor) -> Result<Norm> {
        let width = x.shape.cols;
        [x, gain, out].iter().for_each(|tensor| tensor.expect_padded("norm", ElementType::F32, width));
        let params = Params { width: (pad(width) / 4) as u32, count: width as u32, epsilon };
        Ok(Norm { kernel: device.kernel(variant(), &[x, gain, out])?, params })
    }

    /// One workgroup per token.
    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        let numbers = u64::from(tokens) * u64::from(self.params.count);
        self.kernel.record(pass, &self.params, [tokens, 1, 1], Work { bytes: 8 * numbers, flops: 4 * numbers });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Shape;
    use crate::kernels::oracle::{assert_close, devices, numbers, run};

    #[test]
    fn every_row_by_its_own_root_mean_square() {
        for device in devices(None) {
            for (width, tokens) in [(301, 3), (3, 2)] {
                let stride = pad(width);
                let padded = |seed, rows| numbers(seed, rows * stride).into_iter().enumerate().map(|(i, x)| if i % stride < width { x } else { 0.0 });
                let (x, gain): (Vec<f32>, Vec<f32>) = (padded(1, tokens).collect(), padded(2, 1).collect());
                let row = |row: &[f32]| {
                    let square: f64 = row.iter().map(|x| (*x as f64).powi(2)).sum();
                    let scale = 1.0 / (square / width as f64 + 1e-3f32 as f64).sqrt();
                    row.iter().zip(&gain).map(|(x, g)| *x as f64 * scale * *g as f64).collect::<Vec<_>>()
                };
                let expected: Vec<f64> = x.chunks_exact(stride).flat_map(row).collect();
                let [from, gain] = [&x, &gain].map(|v| Tensor::vector(&device, "numbers", v).unwrap().view(Shape::padded(v.len() / stride, width)));
                let out = Tensor::zeroed(&device, "out", ElementType::F32, from.shape).unwrap();
                let norm = Norm::plan(&device, &from, RmsNorm { gain: &gain, epsilon: 1e-3 }, &out).unwrap();
                let got = run::<f32>(&device, &out, x.len(), |pass| norm.record(pass, tokens as u32));
                assert_close(got.into_iter().map(f64::from), &expected, 1e-10, &format!("{width} wide, {:?}", device.tier()));
            }
        }
    }
}
