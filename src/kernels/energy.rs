//! `energy.wgsl`: how much of rows' vectors an orthonormal basis holds.

use super::{WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, ElementType, Kernel, Pass, Spec, Tensor, Work, pad};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    tokens: u32,
    width: u32,
    stride: u32,
    rank: u32,
    at: u32,
}

/// Parts of a sum, each a workgroup's own: the reader adds them up.
pub(crate) const LOTS: usize = 32;

/// Adds up one row's squares.
pub struct Energy {
    kernel: Kernel,
    params: Params,
}

fn variant() -> Spec {
    spec("energy.wgsl", &[], &[("WORKGROUP", WORKGROUP), ("LOTS", LOTS as u32)], &[(0, Access::Read), (1, Access::Read), (2, Access::Write)])
}

impl Energy {
    /// Adds to the sums of `row`.
    ///
    /// `y`: `[n][width]`; `z`: `[n][rank]`; `sums`: `[rows][2 · LOTS]`. All f32.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, y: &Tensor, z: &Tensor, sums: &Tensor, row: usize) -> Result<Energy> {
        let (width, rank) = (y.shape.cols, z.shape.cols);
        y.expect_padded("energy", ElementType::F32, width);
        z.expect("energy", ElementType::F32, rank);
        sums.expect("energy", ElementType::F32, 2 * LOTS);
        assert!(row < sums.shape.rows, "energy: row {row} of {sums}");
        let params = Params { tokens: 0, width: width as u32, stride: pad(width) as u32, rank: rank as u32, at: row as u32 };
        Ok(Energy { kernel: device.kernel(variant(), &[y, z, sums])?, params })
    }

    /// Those of the first `tokens`, one at least.
    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        let numbers = u64::from(tokens) * u64::from(self.params.width + self.params.rank);
        let work = Work { bytes: 4 * numbers, flops: 2 * numbers };
        self.kernel.record(pass, &Params { tokens, ..self.params }, [tokens.clamp(1, LOTS as u32), 1, 1], work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Shape;
    use crate::kernels::oracle::{assert_close, devices, numbers, run, upload};

    #[test]
    fn squares_are_summed_over_calls_for_the_row_asked_for() {
        let (width, rank) = (70, 48);
        let (y, z) = (numbers(1, 39 * pad(width)), numbers(2, 39 * rank));
        let squares = |numbers: &[f32], stride: usize, width: usize, tokens: usize| -> f64 {
            numbers.chunks(stride).take(tokens).flat_map(|line| &line[..width]).map(|x| f64::from(*x).powi(2)).sum()
        };
        let expected =
            [squares(&y, pad(width), width, 39) + squares(&y, pad(width), width, 4), squares(&z, rank, rank, 39) + squares(&z, rank, rank, 4)];
        for device in devices(None) {
            let (y, z) = (Tensor::vector(&device, "y", &y).unwrap().view(Shape::padded(39, width)), upload(&device, &z, rank));
            let sums = Tensor::zeroed(&device, "sums", ElementType::F32, Shape::dense(4, 2 * LOTS)).unwrap();
            let energy = Energy::plan(&device, &y, &z, &sums, 2).unwrap();
            let got = run::<f32>(&device, &sums, 4 * 2 * LOTS, |pass| [39, 4].iter().for_each(|&tokens| energy.record(pass, tokens)));
            let (before, rest) = got.split_at(2 * 2 * LOTS);
            let (own, after) = rest.split_at(2 * LOTS);
            assert!(before.iter().chain(after).all(|x| *x == 0.0));
            let total = |side: usize| own.iter().skip(side).step_by(2).map(|x| f64::from(*x)).sum::<f64>();
            assert_close([total(0), total(1)], &expected, 1e-12, &format!("{:?}", device.tier()));
        }
    }
}
