//! `landmark.wgsl`: landmarks of coded tokens, from their exact keys.

use super::{WORKGROUP, spec};
use crate::Result;
use crate::cache::{LandmarkCache, LayerCache, Slots};
use crate::checkpoint::Config;
use crate::gpu::{Access, Device, Kernel, Pass, Spec};
use crate::rows::Selection;
use std::ops::Range;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    chunk: u32,
    first: u32,
    end: u32,
    sinks: u32,
    ring: u32,
    chunks: u32,
}

/// Makes one layer's landmarks.
pub struct Landmark {
    kernel: Kernel,
    kv_heads: u32,
    step: Step,
}

fn variant(config: &Config) -> Spec {
    let constants = [
        ("WORKGROUP", WORKGROUP),
        ("HEAD", config.head_dim as u32),
        ("KV_HEADS", config.num_key_value_heads as u32),
        ("CHUNK", Selection::CHUNK as u32),
    ];
    spec("landmark.wgsl", &[], &constants, &[(0, Access::Read), (1, Access::Write), (2, Access::Write)])
}

pub(super) fn variants() -> Vec<Spec> {
    super::score::configs().iter().map(variant).collect()
}

impl Landmark {
    pub(crate) fn plan(device: &Device, config: &Config, cache: &LayerCache, slots: Slots, landmarks: &LandmarkCache) -> Result<Landmark> {
        let buffers = [&cache.keys, &landmarks.rows.keys, &landmarks.cosines];
        let step = Step { sinks: slots.sinks, ring: slots.ring, chunks: landmarks.chunks as u32, ..bytemuck::Zeroable::zeroed() };
        Ok(Landmark { kernel: device.kernel(variant(config), &buffers)?, kv_heads: config.num_key_value_heads as u32, step })
    }

    /// Those of the chunks that hold `tokens`, which are coded and no sinks.
    pub fn record(&self, pass: &mut Pass, tokens: Range<usize>) {
        if tokens.is_empty() {
            return;
        }
        let chunks = Selection::range(tokens.start, tokens.end);
        let step = Step { chunk: chunks.start as u32, first: tokens.start as u32, end: tokens.end as u32, ..self.step };
        self.kernel.record(pass, &step, [chunks.len() as u32, self.kv_heads, 1]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::pad;
    use crate::kernels::oracle::{assert_close, devices, halves, run};
    use crate::kernels::score::config;
    use half::f16;

    /// Chunks that begin and end within, from a ring, of heads whose width is no multiple of four.
    #[test]
    fn a_landmark_is_the_mean_of_its_keys_and_its_cosine_the_least() {
        let slots = Slots { sinks: 3, ring: 40 };
        for head_dim in [14, 512] {
            let c = config(false, None, 4, 2, head_dim);
            let padded = pad(head_dim);
            let mut keys = halves(3, slots.count() * 2 * padded);
            keys.chunks_exact_mut(padded).for_each(|key| key[head_dim..].fill(f16::ZERO));
            let (tokens, chunks) = (35..60, 9);
            let (mut means, mut cosines) = (Vec::new(), Vec::new());
            for chunk in 4..8 {
                for kv in 0..2 {
                    let within: Vec<Vec<f64>> = (tokens.start.max(8 * chunk)..tokens.end.min(8 * chunk + 8))
                        .map(|t| keys[(slots.of(t) * 2 + kv) * padded..][..padded].iter().map(|x| x.to_f64()).collect())
                        .collect();
                    let mean: Vec<f64> = (0..padded).map(|i| within.iter().map(|key| key[i]).sum::<f64>() / within.len() as f64).collect();
                    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                    let cosine = |key: &Vec<f64>| dot(key, &mean) / (dot(key, key) * dot(&mean, &mean)).sqrt();
                    cosines.push(within.iter().map(cosine).fold(f64::INFINITY, f64::min));
                    means.extend(mean);
                }
            }
            for device in devices(None) {
                let cache = LayerCache { keys: device.upload("keys", &keys).unwrap(), values: device.buffer("values", 4).unwrap(), side: None };
                let landmarks = LandmarkCache::new(&device, &c, 0, 8 * chunks).unwrap();
                let landmark = Landmark::plan(&device, &c, &cache, slots, &landmarks).unwrap();
                let got = run::<f16>(&device, &landmarks.rows.keys, 8 * 2 * padded, |pass| landmark.record(pass, tokens.clone()));
                assert_close(got[4 * 2 * padded..].iter().map(|x| x.to_f64()), &means, 1e-6, &format!("{:?}", device.tier()));
                let got = run::<f32>(&device, &landmarks.cosines, 2 * chunks, |_| ());
                let got = (4..8).flat_map(|chunk| [0, 1].map(|kv| f64::from(got[kv * chunks + chunk])));
                assert_close(got, &cosines, 1e-9, &format!("cosines, {:?}", device.tier()));
            }
        }
    }
}
