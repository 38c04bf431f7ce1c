//! `landmark.wgsl`: landmarks of coded tokens, from their exact keys.

use super::exact::ExactRows;
use super::{AttentionShape, WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, ElementType, Kernel, Pass, Shape, Spec, Tensor, Work};
use crate::kv::Selection;
use crate::kv::Slots;
use std::ops::Range;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    chunk: u32,
    first: u32,
    end: u32,
    sinks: u32,
    ring: u32,
}

/// One layer's landmarks of coded tokens, by which a token chooses what it reads.
pub struct Landmarks {
    /// Packed as [`Selection::format`] says: `[chunks][H_kv · words]` u32.
    pub(crate) words: Tensor,
    /// Chunks that it has room for.
    pub(crate) chunks: usize,
}

impl Landmarks {
    /// Those of `capacity` tokens.
    ///
    /// # Errors
    /// [`OutOfMemory`](crate::Error::OutOfMemory).
    pub fn new(device: &Device, attention: &AttentionShape, layer: usize, capacity: usize) -> Result<Landmarks> {
        let chunks = capacity.div_ceil(Selection::CHUNK);
        let shape = Shape::dense(chunks, attention.kv_heads * Selection::format(attention.head_dim).words());
        let label = format!("layer {layer}'s landmarks for a context of {capacity}");
        Ok(Landmarks { words: Tensor::zeroed(device, &label, ElementType::U32, shape)?, chunks })
    }
}

/// Makes one layer's landmarks.
pub struct Landmark {
    kernel: Kernel,
    kv_heads: u32,
    /// Bytes of a chunk's keys of one head, and of its landmark.
    bytes: u64,
    params: Params,
}

pub(super) fn variant(attention: &AttentionShape) -> Spec {
    let constants =
        [("WORKGROUP", WORKGROUP), ("HEAD", attention.head_dim as u32), ("KV_HEADS", attention.kv_heads as u32), ("CHUNK", Selection::CHUNK as u32)];
    spec("landmark.wgsl", &[], &constants, &[(0, Access::Read), (1, Access::Write)])
}

impl Landmark {
    /// Of the exact rows of a layer, in their `slots`.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, attention: &AttentionShape, cache: &ExactRows, slots: Slots, landmarks: &Landmarks) -> Result<Landmark> {
        let words = Selection::format(attention.head_dim).words();
        landmarks.words.expect("landmark", ElementType::U32, attention.kv_heads * words);
        let params = Params { sinks: slots.sinks, ring: slots.ring, ..bytemuck::Zeroable::zeroed() };
        let bytes = (2 * Selection::CHUNK * attention.head_dim + 4 * words) as u64;
        let kernel = device.kernel(variant(attention), &[&cache.keys, &landmarks.words])?;
        Ok(Landmark { kernel, kv_heads: attention.kv_heads as u32, bytes, params })
    }

    /// Those of the chunks that hold `tokens`, which are coded and no sinks.
    pub fn record(&self, pass: &mut Pass, tokens: Range<usize>) {
        if tokens.is_empty() {
            return;
        }
        let chunks = Selection::range(tokens.start, tokens.end);
        let params = Params { chunk: chunks.start as u32, first: tokens.start as u32, end: tokens.end as u32, ..self.params };
        let work = Work { bytes: chunks.len() as u64 * u64::from(self.kv_heads) * self.bytes, flops: 0 };
        self.kernel.record(pass, &params, [chunks.len() as u32, self.kv_heads, 1], work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::pad;
    use crate::kernels::oracle::{devices, halves, run};
    use half::f16;

    /// Chunks that begin and end within, from a ring, of heads whose width is no multiple of four:
    /// as the specification packs it.
    #[test]
    fn a_landmark_is_the_mean_of_its_keys_packed() {
        let slots = Slots { sinks: 3, ring: 40 };
        for head_dim in [14, 64, 512] {
            let c = AttentionShape::of(false, None, 4, 2, head_dim);
            let (padded, words) = (pad(head_dim), Selection::format(head_dim).words());
            let mut keys = halves(3, slots.count() * 2 * padded);
            keys.chunks_exact_mut(padded).for_each(|key| key[head_dim..].fill(f16::ZERO));
            let tokens = 35..60;
            let chunks = Selection::range(tokens.start, tokens.end);
            let mut expected = Vec::new();
            for chunk in chunks.clone() {
                for kv in 0..2 {
                    let within = tokens.start.max(Selection::CHUNK * chunk)..tokens.end.min(Selection::CHUNK * (chunk + 1));
                    let key = |t: usize| &keys[(slots.of(t) * 2 + kv) * padded..][..head_dim];
                    let count = within.len() as f32;
                    let mean: Vec<f32> = (0..head_dim).map(|i| within.clone().map(|t| key(t)[i].to_f32()).sum::<f32>() / count).collect();
                    let mut packed = vec![0; words];
                    Selection::pack(&mean, &mut packed);
                    expected.extend(packed);
                }
            }
            for device in devices(None) {
                let cache =
                    ExactRows { keys: device.upload("keys", &keys).unwrap(), values: device.buffer("values", 4).unwrap(), slots, eviction: None };
                let landmarks = Landmarks::new(&device, &c, 0, 64).unwrap();
                let landmark = Landmark::plan(&device, &c, &cache, slots, &landmarks).unwrap();
                let got = run::<u32>(&device, &landmarks.words, chunks.end * 2 * words, |pass| landmark.record(pass, tokens.clone()));
                let got = &got[chunks.start * 2 * words..];
                // A driver may round either way: the header's halves, and numbers halfway between
                // two codes.
                let halves = |word: u32| [word & 0xffff, word >> 16];
                let nibbles = |words: &[u32]| words.iter().flat_map(|word| (0..8).map(move |i| word >> (4 * i) & 15)).collect::<Vec<_>>();
                for (got, expected) in got.chunks_exact(words).zip(expected.chunks_exact(words)) {
                    let apart = |a: &[u32], b: &[u32]| a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).collect::<Vec<_>>();
                    assert!(apart(&halves(got[0]), &halves(expected[0])).iter().all(|&apart| apart <= 1), "{head_dim}, {:?}", device.tier());
                    let apart = apart(&nibbles(&got[1..]), &nibbles(&expected[1..]));
                    let count = apart.iter().filter(|&&apart| apart > 0).count();
                    assert!(apart.iter().all(|&apart| apart <= 1) && count <= 1 + head_dim / 64, "{head_dim}, {:?}: {apart:?}", device.tier());
                }
            }
        }
    }
}
