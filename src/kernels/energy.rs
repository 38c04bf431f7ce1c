//! `energy.wgsl`: how much of rows' vectors an orthonormal basis holds.

use super::{WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work, pad};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    tokens: u32,
    width: u32,
    stride: u32,
    rank: u32,
    at: u32,
}

/// Adds up one row's squares.
pub struct Energy {
    kernel: Kernel,
    step: Step,
}

fn variant() -> Spec {
    spec("energy.wgsl", &[], &[("WORKGROUP", WORKGROUP)], &[(0, Access::Read), (1, Access::Read), (2, Access::Write)])
}

pub(super) fn variants() -> Vec<Spec> {
    vec![variant()]
}

impl Energy {
    /// `y`: `[n][pad(width)]`; `z`: `[n][rank]`; `sums`: `[rows][2]`, of which this adds to those of `row`. f32.
    pub(crate) fn plan(
        device: &Device,
        (y, width): (&wgpu::Buffer, usize),
        (z, rank): (&wgpu::Buffer, usize),
        sums: &wgpu::Buffer,
        row: usize,
    ) -> Result<Energy> {
        let step = Step { tokens: 0, width: width as u32, stride: pad(width) as u32, rank: rank as u32, at: 2 * row as u32 };
        Ok(Energy { kernel: device.kernel(variant(), &[y, z, sums])?, step })
    }

    /// Those of the first `tokens`.
    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        let numbers = u64::from(tokens) * u64::from(self.step.width + self.step.rank);
        self.kernel.record(pass, &Step { tokens, ..self.step }, [1, 1, 1], Work { bytes: 4 * numbers, flops: 2 * numbers });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{assert_close, devices, numbers, run};

    #[test]
    fn squares_are_summed_over_calls_for_the_row_asked_for() {
        let (width, rank) = (70, 48);
        let (y, z) = (numbers(1, 9 * pad(width)), numbers(2, 9 * rank));
        let squares = |numbers: &[f32], stride: usize, width: usize, tokens: usize| -> f64 {
            numbers.chunks(stride).take(tokens).flat_map(|line| &line[..width]).map(|x| f64::from(*x).powi(2)).sum()
        };
        let expected =
            [squares(&y, pad(width), width, 9) + squares(&y, pad(width), width, 4), squares(&z, rank, rank, 9) + squares(&z, rank, rank, 4)];
        for device in devices(None) {
            let [y, z] = [&y, &z].map(|numbers| device.upload("numbers", numbers).unwrap());
            let sums = device.buffer("sums", 32).unwrap();
            let energy = Energy::plan(&device, (&y, width), (&z, rank), &sums, 2).unwrap();
            let got = run::<f32>(&device, &sums, 8, |pass| [9, 4].iter().for_each(|&tokens| energy.record(pass, tokens)));
            assert_eq!((&got[..4], &got[6..]), (&[0.0; 4][..], &[0.0; 2][..]));
            assert_close(got[4..6].iter().map(|x| f64::from(*x)), &expected, 1e-12, &format!("{:?}", device.tier()));
        }
    }
}
