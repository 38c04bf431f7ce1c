//! `stripe.wgsl`: blocks of tokens into packed rows.

use super::blocks::{check, constants};
use super::pack::PackedRow;
use super::{WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Tensor, Work};
use crate::kv::{Blocks, Format};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    first: u32,
    tokens: u32,
    at: u32,
    words: u32,
    bits: u32,
}

/// Packs one row's blocks.
pub struct Stripe {
    kernel: Kernel,
    /// Words of a row, and bytes of a token's coordinates and of its row.
    each: u32,
    bytes: u64,
    params: Params,
}

fn variant(format: &Format, shape: Blocks) -> Spec {
    let (flags, constants) = constants(format, shape);
    spec("stripe.wgsl", &flags, &constants, &[(0, Access::Read), (1, Access::Read), (2, Access::Write)])
}

impl Stripe {
    /// `coordinates`: `[n][rank]` f32; `numbers`: what [`super::blocks`] makes of them.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, format: &Format, shape: Blocks, coordinates: &Tensor, numbers: &Tensor, to: PackedRow) -> Result<Stripe> {
        check("stripe", format, shape, coordinates, numbers);
        to.check("stripe", format);
        let [at, words] = [to.at, to.store.shape.cols].map(|n| n as u32);
        let params = Params { first: 0, tokens: 0, at, words, bits: u32::from(format.bands[0].bits) };
        let kernel = device.kernel(variant(format, shape), &[coordinates, numbers, to.store])?;
        Ok(Stripe { kernel, each: format.words() as u32, bytes: 4 * (format.rank() + format.words()) as u64, params })
    }

    /// Tokens at positions `first`, `first + 1`, …, which are whole blocks.
    pub fn record(&self, pass: &mut Pass, first: u32, tokens: u32) {
        let work = Work { bytes: u64::from(tokens) * self.bytes, flops: 0 };
        self.kernel.record(pass, &Params { first, tokens, ..self.params }, [(tokens * self.each).div_ceil(WORKGROUP), 1, 1], work);
    }
}

#[cfg(test)]
mod tests {
    use super::super::blocks::Blocks as Numbers;
    use super::*;
    use crate::gpu::{ElementType, Shape};
    use crate::kernels::AttentionShape;
    use crate::kernels::oracle::{devices, numbers, run, upload};
    use crate::kv::{Band, Blocks as Layout, RUN, Scale, Steps};

    /// How a model's keys and values are coded in blocks: KIVI's keys, KVarN's keys and values.
    fn formats(attention: &AttentionShape) -> [Format; 3] {
        let heads = attention.kv_heads;
        [(Steps::Channels, 32, 2), (Steps::BalancedChannels, 128, 4), (Steps::BalancedTokens, 128, 2)].map(|(steps, tokens, bits)| Format {
            bands: vec![Band { bits, runs: heads * attention.head_dim.div_ceil(RUN) }],
            scale: Scale::Blocks(Layout { tokens, heads, steps }),
        })
    }

    /// What [`Format::encode`] makes of two or eight blocks, but for numbers that rounding leaves
    /// between two codes; and nothing beside.
    #[test]
    fn blocks_are_packed_as_their_format_says() {
        for c in [AttentionShape::of(false, None, 3, 3, 14), AttentionShape::of(false, None, 9, 3, 64)] {
            for format in formats(&c) {
                let Scale::Blocks(shape) = format.scale else { unreachable!() };
                let (first, tokens, at, rank, own) = (4, 256, 2, format.rank(), format.words());
                let (capacity, words) = (first + tokens + 1, at + own + 1);
                // Channels and tokens of different sizes.
                let size = |i: usize| (1.0 + (i % 7) as f32) * (1.0 + (i / rank % 5) as f32);
                let z: Vec<f32> = numbers(1, tokens * rank).iter().enumerate().map(|(i, z)| z * size(i)).collect();
                let mut expected = vec![0u32; tokens * own];
                for (z, words) in z.chunks_exact(shape.tokens * rank).zip(expected.chunks_exact_mut(shape.tokens * own)) {
                    format.encode(z, words);
                }
                let decode = |words: &[u32]| {
                    let mut z = vec![0.0; tokens * rank];
                    for (words, z) in words.chunks_exact(shape.tokens * own).zip(z.chunks_exact_mut(shape.tokens * rank)) {
                        format.decode(words, z);
                    }
                    z
                };
                let meant = decode(&expected);
                for device in devices(None) {
                    let from = upload(&device, &z, rank);
                    let count = Numbers::numbers(&format, shape, tokens);
                    let scales = Tensor::zeroed(&device, "numbers", ElementType::F32, Shape::dense(1, count)).unwrap();
                    let rows = upload(&device, &vec![7u32; capacity * words], words);
                    let blocks = Numbers::plan(&device, &format, shape, &from, &scales).unwrap();
                    let stripe = Stripe::plan(&device, &format, shape, &from, &scales, PackedRow { store: &rows, at }).unwrap();
                    let got = run::<u32>(&device, &rows, capacity * words, |pass| {
                        blocks.record(pass, tokens as u32);
                        stripe.record(pass, first as u32, tokens as u32);
                    });
                    let mut packed = Vec::new();
                    for (token, row) in got.chunks_exact(words).enumerate() {
                        let beside = if (first..first + tokens).contains(&token) { [&row[..at], &row[at + own..]].concat() } else { row.to_vec() };
                        assert!(beside.iter().all(|word| *word == 7), "{token}: beside the row");
                        if beside.len() < words {
                            packed.extend_from_slice(&row[at..at + own]);
                        }
                    }
                    let (back, what) = (decode(&packed), format!("{format:?}, {:?}", device.tier()));
                    let error = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
                    let [lost, apart, more] = [error(&meant, &z), error(&back, &meant), error(&back, &z)];
                    assert!(apart < 0.05 * lost && more < 1.01 * lost, "{what}: {apart} apart, {more} off where {lost} is meant");
                }
            }
        }
    }
}
