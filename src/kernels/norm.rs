//! `norm.wgsl`: RMSNorm, or LayerNorm, of many tokens.

use super::{WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, ElementType, Kernel, Pass, Spec, Tensor, Work, pad};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    width: u32,
    count: u32,
    epsilon: f32,
    scale: f32,
}

/// By what numbers are normalised: their root mean square, and a gain.
#[derive(Clone, Copy)]
pub(crate) struct RmsNorm<'a> {
    /// `[width]` f32.
    pub gain: &'a Tensor,
    /// Added to the mean of squares.
    pub epsilon: f32,
}

/// What a norm does beside that.
#[derive(Clone, Copy, Default)]
pub(crate) struct More<'a> {
    /// LayerNorm: the mean is subtracted first.
    pub centred: bool,
    /// Added at last, `[width]` f32.
    pub bias: Option<&'a Tensor>,
    /// It is multiplied by this and added to what is there.
    pub onto: Option<f32>,
}

/// Normalises rows.
pub struct Norm {
    kernel: Kernel,
    params: Params,
}

pub(super) fn variant(flags: &[&'static str]) -> Spec {
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Write)];
    bindings.extend(flags.contains(&"BIASED").then_some((3, Access::Read)));
    spec("norm.wgsl", flags, &[("WORKGROUP", WORKGROUP)], &bindings)
}

impl Norm {
    /// `x`, `out`: `[n][width]` f32.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, x: &Tensor, RmsNorm { gain, epsilon }: RmsNorm, more: More, out: &Tensor) -> Result<Norm> {
        let width = x.shape.cols;
        [x, gain, out].into_iter().chain(more.bias).for_each(|tensor| tensor.expect_padded("norm", ElementType::F32, width));
        let flags = [(more.centred, "CENTRED"), (more.bias.is_some(), "BIASED"), (more.onto.is_some(), "ONTO")];
        let flags: Vec<_> = flags.into_iter().filter_map(|(on, flag)| on.then_some(flag)).collect();
        let mut buffers: Vec<&wgpu::Buffer> = vec![x, gain, out];
        buffers.extend(more.bias.map(|bias| &**bias));
        let params = Params { width: (pad(width) / 4) as u32, count: width as u32, epsilon, scale: more.onto.unwrap_or(1.0) };
        Ok(Norm { kernel: device.kernel(variant(&flags), &buffers)?, params })
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
    fn every_row_by_its_own_moments() {
        for device in devices(None) {
            for (width, tokens, centred, biased, onto) in
                [(301, 3, false, false, None), (3, 2, false, false, None), (301, 2, true, true, None), (70, 3, false, false, Some(0.3))]
            {
                let stride = pad(width);
                let padded = |seed, rows| numbers(seed, rows * stride).into_iter().enumerate().map(|(i, x)| if i % stride < width { x } else { 0.0 });
                let [x, gain, bias, before] = [(1, tokens), (2, 1), (3, 1), (4, tokens)].map(|(seed, rows)| padded(seed, rows).collect::<Vec<f32>>());
                let row = |(token, row): (usize, &[f32])| {
                    let mean = if centred { row.iter().map(|x| *x as f64).sum::<f64>() / width as f64 } else { 0.0 };
                    let square: f64 = row[..width].iter().map(|x| (*x as f64 - mean).powi(2)).sum();
                    let scale = 1.0 / (square / width as f64 + 1e-3f32 as f64).sqrt();
                    let number = |i: usize| {
                        let y = (row[i] as f64 - mean) * scale * gain[i] as f64 + if biased { bias[i] as f64 } else { 0.0 };
                        if i >= width { 0.0 } else { onto.map_or(y, |scale: f32| before[token * stride + i] as f64 + scale as f64 * y) }
                    };
                    (0..stride).map(number).collect::<Vec<_>>()
                };
                let expected: Vec<f64> = x.chunks_exact(stride).enumerate().flat_map(row).collect();
                let [from, gain, bias, out] =
                    [&x, &gain, &bias, &before].map(|v| Tensor::vector(&device, "numbers", v).unwrap().view(Shape::padded(v.len() / stride, width)));
                let more = More { centred, bias: biased.then_some(&bias), onto };
                let norm = Norm::plan(&device, &from, RmsNorm { gain: &gain, epsilon: 1e-3 }, more, &out).unwrap();
                let got = run::<f32>(&device, &out, x.len(), |pass| norm.record(pass, tokens as u32));
                assert_close(got.into_iter().map(f64::from), &expected, 1e-10, &format!("{width} wide, {:?}", device.tier()));
            }
        }
    }
}
