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
    stride: u32,
    record: u32,
}

/// Finds the largest of `vocab` logits, of a token or a few.
pub struct Argmax {
    stages: Vec<(Kernel, Params, u32)>,
}

pub(super) fn variant(flags: &[&'static str]) -> Spec {
    let record = flags.contains(&"RECORD").then_some((2, Access::Read));
    spec("argmax.wgsl", flags, &[("WORKGROUP", 256)], &[(0, Access::Read), (1, Access::Write)].into_iter().chain(record).collect::<Vec<_>>())
}

impl Argmax {
    /// `logits`: `[n][vocab]` f32; `token`: `[n][1]` u32, which is `vocab` where a logit is not
    /// finite, and `vocab + 1` where the number `record` of a buffer is not zero.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, logits: &Tensor, token: &Tensor, record: Option<(&wgpu::Buffer, u32)>) -> Result<Argmax> {
        let vocab = logits.shape.cols as u32;
        logits.expect("argmax", ElementType::F32, logits.shape.cols);
        token.expect("argmax", ElementType::U32, 1);
        let lot = device.tuning().logits;
        let lots = vocab.div_ceil(lot);
        let params = |numbers, lot, stride| Params { count: vocab, numbers, lot, stride, record: record.map_or(0, |(_, at)| at) };
        let last = |flag: Option<&'static str>, from: &wgpu::Buffer| {
            let flags: Vec<_> = flag.into_iter().chain(record.map(|_| "RECORD")).collect();
            let buffers: Vec<&wgpu::Buffer> = [from, &**token].into_iter().chain(record.map(|(buffer, _)| buffer)).collect();
            device.kernel(variant(&flags), &buffers)
        };
        if lots <= 1 {
            return Ok(Argmax { stages: vec![(last(None, logits)?, params(vocab, vocab, logits.shape.stride as u32), 1)] });
        }
        let left = device.buffer("largest logits", logits.shape.rows as u64 * u64::from(lots) * 8)?;
        let (leave, choose) = (device.kernel(variant(&["LEAVE"]), &[logits, &left])?, last(Some("CHOOSE"), &left)?);
        Ok(Argmax { stages: vec![(leave, params(vocab, lot, logits.shape.stride as u32), lots), (choose, params(lots, lots, lots), 1)] })
    }

    /// Of so many tokens: one workgroup, or one for each lot and one for what they leave.
    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        for (kernel, params, lots) in &self.stages {
            kernel.record(pass, params, [*lots, tokens, 1], Work { bytes: 4 * u64::from(tokens * params.numbers), flops: 0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Shape;
    use crate::kernels::oracle::{numbers, run, tuned_devices};

    #[test]
    fn each_token_has_its_own() {
        let logits: Vec<f32> = numbers(4, 3 * 5000);
        let expected: Vec<u32> = logits.chunks(5000).map(|row| crate::logits::argmax(row).unwrap()).collect();
        for (device, tuning) in tuned_devices(None) {
            let from = Tensor::upload(&device, "logits", &logits, Shape::dense(3, 5000)).unwrap();
            let tokens = Tensor::zeroed(&device, "tokens", ElementType::U32, Shape::dense(3, 1)).unwrap();
            let argmax = Argmax::plan(&device, &from, &tokens, None).unwrap();
            assert_eq!(run::<u32>(&device, &tokens, 3, |pass| argmax.record(pass, 3)), expected, "{:?}, {tuning:?}", device.tier());
        }
    }

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
                let record = device.upload("record", &[0f32, 7e4]).unwrap();
                for (record, expected) in [(None, *expected), (Some((&record, 0)), *expected), (Some((&record, 1)), logits.len() as u32 + 1)] {
                    let argmax = Argmax::plan(&device, &from, &token, record).unwrap();
                    let found = run::<u32>(&device, &token, 1, |pass| argmax.record(pass, 1));
                    assert_eq!(found, [expected], "case {case}, {record:?}, {:?}, {tuning:?}", device.tier());
                }
            }
        }
    }
}
