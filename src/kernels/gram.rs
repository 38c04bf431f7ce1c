//! `gram.wgsl`: second moments of what rows are made from.

use super::spec;
use crate::Result;
use crate::gpu::{Access, Device, ElementType, Kernel, Pass, Shape, Spec, Tensor, Work, pad};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    tokens: u32,
    width: u32,
    stride: u32,
}

/// Adds products of numbers up over tokens.
pub struct Gram {
    kernel: Kernel,
    params: Params,
}

fn variant() -> Spec {
    spec("gram.wgsl", &[], &[], &[(0, Access::Read), (1, Access::Write)])
}

impl Gram {
    /// `x`: `[n][width]`; `sums`: `[width + 1][width]`, products and then the numbers themselves.
    /// f32.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, x: &Tensor, sums: &Tensor) -> Result<Gram> {
        let width = x.shape.cols;
        x.expect_padded("gram", ElementType::F32, width);
        sums.expect("gram", ElementType::F32, width);
        assert!(sums.shape == Shape::dense(width + 1, width), "gram: {sums} of {x}");
        let params = Params { tokens: 0, width: width as u32, stride: pad(width) as u32 };
        Ok(Gram { kernel: device.kernel(variant(), &[x, sums])?, params })
    }

    /// Adds those of the first `tokens`.
    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        const TILE: u32 = 32;
        let tiles = |lines: u32| lines.div_ceil(TILE);
        let [n, width] = [tokens, self.params.width].map(u64::from);
        let work = Work { bytes: 4 * n * width + 8 * width * (width + 1), flops: 2 * n * width * (width + 1) };
        self.kernel.record(pass, &Params { tokens, ..self.params }, [tiles(self.params.width), tiles(self.params.width + 1), 1], work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{assert_close, devices, numbers, run};

    /// Twice, of different numbers of tokens, of a width that is no multiple of anything.
    #[test]
    fn products_are_summed_over_calls() {
        let width = 70;
        let x = numbers(1, 40 * pad(width));
        let mut expected = vec![0.0; (width + 1) * width];
        for tokens in [40, 17] {
            for (t, i, j) in (0..tokens).flat_map(|t| (0..=width).flat_map(move |i| (0..width).map(move |j| (t, i, j)))) {
                let number = |i: usize| if i == width { 1.0 } else { f64::from(x[t * pad(width) + i]) };
                expected[i * width + j] += number(i) * number(j);
            }
        }
        for device in devices(None) {
            let from = Tensor::vector(&device, "x", &x).unwrap().view(Shape::padded(40, width));
            let sums = Tensor::zeroed(&device, "sums", ElementType::F32, Shape::dense(width + 1, width)).unwrap();
            let gram = Gram::plan(&device, &from, &sums).unwrap();
            let got = run::<f32>(&device, &sums, expected.len(), |pass| [40, 17].iter().for_each(|&tokens| gram.record(pass, tokens)));
            assert_close(got.into_iter().map(f64::from), &expected, 1e-11, &format!("{:?}", device.tier()));
        }
    }
}
