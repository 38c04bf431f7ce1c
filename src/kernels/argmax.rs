//! `argmax.wgsl`: the most likely token.

use super::spec;
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    count: u32,
}

/// Finds the largest of `vocab` logits.
pub struct Argmax {
    kernel: Kernel,
    vocab: u32,
}

pub(super) fn variant() -> Spec {
    spec("argmax.wgsl", &[], &[("WORKGROUP", 256)], &[(0, Access::Read), (1, Access::Write)])
}

pub(super) fn variants() -> Vec<Spec> {
    vec![variant()]
}

impl Argmax {
    /// `logits`: `[vocab]` f32; `token`: `[1]` u32.
    pub(crate) fn plan(device: &Device, logits: &wgpu::Buffer, token: &wgpu::Buffer, vocab: u32) -> Result<Argmax> {
        Ok(Argmax { kernel: device.kernel(variant(), &[logits, token])?, vocab })
    }

    /// One workgroup.
    pub fn record(&self, pass: &mut Pass) {
        let work = Work { bytes: 4 * u64::from(self.vocab), flops: 0 };
        self.kernel.record(pass, &Step { count: self.vocab }, [1, 1, 1], work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{devices, numbers, run};

    #[test]
    fn the_lowest_of_the_largest_or_count_where_one_is_not_finite() {
        let with = |changes: &[(usize, f32)]| {
            let mut logits = numbers(1, 1001);
            changes.iter().for_each(|(i, x)| logits[*i] = *x);
            logits
        };
        let cases = [
            (with(&[(1000, 2.0)]), 1000),
            (with(&[(700, 2.0), (699, 2.0), (900, 2.0)]), 699),
            (with(&[(256, 2.0), (0, 2.0)]), 0),
            (numbers(2, 777).into_iter().map(|x| x - 9.0).chain([-7.5]).collect(), 777),
            (vec![-0.25], 0),
            (with(&[(3, f32::NAN)]), 1001),
            (with(&[(3, -f32::NAN), (600, f32::INFINITY)]), 1001),
            (with(&[(5, f32::NEG_INFINITY)]), 1001),
            (vec![f32::NEG_INFINITY; 300], 300),
        ];
        for device in devices(None) {
            for (case, (logits, expected)) in cases.iter().enumerate() {
                let (from, token) = (device.upload("logits", logits).unwrap(), device.buffer("token", 4).unwrap());
                let argmax = Argmax::plan(&device, &from, &token, logits.len() as u32).unwrap();
                assert_eq!(run::<u32>(&device, &token, 1, |pass| argmax.record(pass)), [*expected], "case {case}, {:?}", device.tier());
            }
        }
    }
}
