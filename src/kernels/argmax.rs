//! `argmax.wgsl`: the most likely token.

use super::spec;
use crate::Result;
use crate::gpu::{Access, Device, ElementType, Kernel, Pass, Spec, Tensor, Work};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    count: u32,
    numbers: u32,
    lot: u32,
}

/// Finds the largest of `vocab` logits.
pub struct Argmax {
    stages: Vec<(Kernel, Params, u32)>,
}

pub(super) fn variant(flags: &[&'static str]) -> Spec {
    spec("argmax.wgsl", flags, &[("WORKGROUP", 256)], &[(0, Access::Read), (1, Access::Write)])
}

impl Argmax {
    /// `logits`: `[1][vocab]` f32; `token`: `[1][1]` u32.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, logits: &Tensor, token: &Tensor) -> Result<Argmax> {
        let vocab = logits.shape.cols as u32;
        logits.expect("argmax", ElementType::F32, logits.shape.cols);
        token.expect("argmax", ElementType::U32, 1);
        let lot = device.tuning().logits;
        let lots = vocab.div_ceil(lot);
        let params = |numbers, lot| Params { count: vocab, numbers, lot };
        if lots <= 1 {
            return Ok(Argmax { stages: vec![(device.kernel(variant(&[]), &[logits, token])?, params(vocab, vocab), 1)] });
        }
        let left = device.buffer("largest logits", u64::from(lots) * 8)?;
        let (leave, choose) = (device.kernel(variant(&["LEAVE"]), &[logits, &left])?, device.kernel(variant(&["CHOOSE"]), &[&left, token])?);
        Ok(Argmax { stages: vec![(leave, params(vocab, lot), lots), (choose, params(lots, lots), 1)] })
    }

    /// One workgroup, or one for each lot and one for what they leave.
    pub fn record(&self, pass: &mut Pass) {
        for (kernel, params, lots) in &self.stages {
            kernel.record(pass, params, [*lots, 1, 1], Work { bytes: 4 * u64::from(params.numbers), flops: 0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Shape;
    use crate::kernels::oracle::{numbers, run, tuned_devices};

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
            (
                numbers(3, 5000).into_iter().map(|x| if x > 0.9 { 2.0 } else { x }).collect(),
                numbers(3, 5000).iter().position(|x| *x > 0.9).unwrap() as u32,
            ),
            (with(&[(3, f32::NAN)]), 1001),
            (with(&[(3, -f32::NAN), (600, f32::INFINITY)]), 1001),
            (with(&[(5, f32::NEG_INFINITY)]), 1001),
            (vec![f32::NEG_INFINITY; 300], 300),
        ];
        for (device, tuning) in tuned_devices(None) {
            for (case, (logits, expected)) in cases.iter().enumerate() {
                let from = Tensor::upload(&device, "logits", logits, Shape::dense(1, logits.len())).unwrap();
                let token = Tensor::zeroed(&device, "token", ElementType::U32, Shape::dense(1, 1)).unwrap();
                let argmax = Argmax::plan(&device, &from, &token).unwrap();
                assert_eq!(run::<u32>(&device, &token, 1, |pass| argmax.record(pass)), [*expected], "case {case}, {:?}, {tuning:?}", device.tier());
            }
        }
    }
}
