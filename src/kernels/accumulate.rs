//! `accumulate.wgsl`: the attention that exact rows, candidates and buckets receive, by which they
//! compete.

use super::attention::AttentionBuffers;
use super::columns::Block;
use super::exact::ExactRows;
use super::values::splits;
use super::{AttentionShape, WORKGROUP, spec};
use crate::Result;
use crate::gpu::Tuning;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work};
use crate::kv::HALF_LIFE;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    first: u32,
    tokens: u32,
    exact: u32,
    held: u32,
    buckets: u32,
    fixed: u32,
    near: u32,
    stride: u32,
    splits: u32,
    sinks: u32,
    ring: u32,
    places: u32,
    received: u32,
}

/// Adds up what one layer's columns receive.
pub struct Accumulate {
    kernel: Kernel,
    heads: u64,
    evicted_columns: u32,
    tuning: Tuning,
    params: Params,
}

fn variant(attention: &AttentionShape, head_sinks: bool) -> Spec {
    let constants = [("WORKGROUP", WORKGROUP), ("HEADS", attention.heads as u32), ("HALF_LIFE", HALF_LIFE as u32)];
    let bindings = [(0, Access::Read), (1, Access::Read), (2, Access::Write), (3, Access::Read)];
    let (flags, bindings) = if head_sinks { (&["HEAD_SINKS"][..], &bindings[..]) } else { (&[][..], &bindings[..3]) };
    spec("accumulate.wgsl", flags, &constants, bindings)
}

impl Accumulate {
    /// Reads `scores` and `weights` of `b`; of a layer that has something beside, `None` for
    /// others.
    pub(crate) fn plan(device: &Device, attention: &AttentionShape, b: &AttentionBuffers, cache: &ExactRows) -> Result<Option<Accumulate>> {
        let (Some(eviction), slots) = (&cache.eviction, cache.slots) else { return Ok(None) };
        let buffers: Vec<&wgpu::Buffer> = [&b.scores, &b.weights, &eviction.marks].into_iter().chain(&b.head_sinks).collect();
        Ok(Some(Accumulate {
            kernel: device.kernel(variant(attention, b.head_sinks.is_some()), &buffers)?,
            heads: attention.heads as u64,
            evicted_columns: eviction.stores.evicted_columns() as u32,
            tuning: device.tuning(),
            params: Params {
                buckets: eviction.stores.buckets as u32,
                stride: b.columns as u32,
                sinks: slots.sinks,
                ring: slots.ring,
                places: eviction.places as u32,
                received: eviction.received as u32,
                ..bytemuck::Zeroable::zeroed()
            },
        }))
    }

    /// For a block that has been attended to.
    pub fn record(&self, pass: &mut Pass, block: &Block) {
        let [(exact, _), (coded, _)] = splits(block, &self.tuning);
        let params = Params {
            first: block.first,
            tokens: block.tokens,
            exact: block.exact(),
            held: block.beside - self.evicted_columns,
            fixed: block.fixed,
            near: block.near,
            splits: exact + coded,
            ..self.params
        };
        let columns = params.exact + params.held + params.buckets;
        let work = Work { bytes: 4 * u64::from(columns) * (u64::from(params.tokens) * self.heads + 2), flops: 0 };
        self.kernel.record(pass, &params, [columns.div_ceil(WORKGROUP), 1, 1], work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::exact::ExactRows;
    use crate::kernels::oracle::{assert_close, buffers, devices, numbers, run, stores};
    use crate::kv::{Evicted, Exact, Slots, fade};

    /// What columns receive is the sum of their softmax weights over queries and heads, the earlier
    /// the less: added to what is left of what they had, but for those whose rows are new. Splits
    /// of one token, and one for several.
    #[test]
    fn everyone_receives_what_queries_give() {
        let c = AttentionShape::of(false, None, 6, 2, 14);
        let (heads, stride) = (6, 400);
        let slots = Slots { sinks: 3, ring: 300 };
        let exact = Exact { sinks: 3, recent: 200 };
        let devices = devices(None);
        for evicted_as in [Evicted::None, Evicted::Mean, Evicted::Shrunk] {
            let stores = stores(&c, evicted_as);
            // Scores for nothing, in one of the cases: one above all others.
            let head_sinks = (evicted_as == Evicted::Mean).then_some([-9f32, 4.0, 7.0, 12.0, 0.0, 8.0]);
            for (first, tokens) in [(290, 1), (150, 40)] {
                let held = 7;
                let reach = exact.reach(first, tokens, false, 0);
                let block = Block::new(first as u32, tokens as u32, 0, None, Some(reach)).beside((held + stores.evicted_columns()) as u32).listed(0);
                let plain = block.plain() as usize;
                let mut scores: Vec<f32> = numbers(1, tokens * heads * stride).into_iter().map(|x| 5.0 * x).collect();
                // Queries do not look ahead.
                for (t, column) in (0..tokens).flat_map(|t| (0..block.exact()).map(move |column| (t, column))) {
                    if block.exact_key(column) as usize > first + t {
                        (0..heads).for_each(|h| scores[(t * heads + h) * stride + column as usize] = -3.4028234e38);
                    }
                }
                let [(splits, length), _] = splits(&block, &devices[0].tuning());
                let (mut weights, mut given) = (Vec::new(), vec![0.0; plain]);
                for t in 0..tokens {
                    for s in 0..splits as usize {
                        for h in 0..heads {
                            let line = &scores[(t * heads + h) * stride..][..plain];
                            let part = &line[s * length as usize..plain.min((s + 1) * length as usize)];
                            let largest = part.iter().copied().fold(f32::MIN, f32::max);
                            weights.extend([largest, part.iter().map(|x| (x - largest).exp()).sum()]);
                        }
                    }
                    for h in 0..heads {
                        let line = &scores[(t * heads + h) * stride..][..plain];
                        let all: f64 = line.iter().chain(head_sinks.iter().map(|sinks| &sinks[h])).map(|x| f64::from(*x).exp()).sum();
                        given.iter_mut().zip(line).for_each(|(given, x)| *given += f64::from(*x).exp() / all * f64::from(fade(tokens - 1 - t)));
                    }
                }
                for device in &devices {
                    let cache = ExactRows::beside(device, &c, "test", slots, stores).unwrap();
                    let eviction = cache.eviction.as_ref().unwrap();
                    let words = (eviction.received + slots.count()).next_multiple_of(4);
                    let before: Vec<f32> = (0..words).map(|word| (word % 7) as f32).collect();
                    device.queue.write_buffer(&eviction.marks, 0, bytemuck::cast_slice(&before));
                    let [from, parts] = [&scores, &weights].map(|numbers| device.upload("numbers", numbers).unwrap());
                    let head_sinks = head_sinks.map(|sinks| device.upload("scores for nothing", &sinks).unwrap());
                    let through = AttentionBuffers { scores: from, weights: parts, head_sinks, ..buffers(device, stride) };
                    let accumulate = Accumulate::plan(device, &c, &through, &cache).unwrap().unwrap();
                    let got = run::<f32>(device, &eviction.marks, words, |pass| accumulate.record(pass, &block));
                    let mut expected: Vec<f64> = before.iter().map(|x| f64::from(*x)).collect();
                    for (column, given) in given.iter().enumerate() {
                        let own = block.exact() as usize;
                        let word = match column {
                            column if column < own => eviction.received + slots.of(block.exact_key(column as u32) as usize),
                            column if column < own + held => eviction.places + 2 * (column - own) + 1,
                            column if evicted_as == Evicted::Shrunk => 4 * ((column - own - held) / 2) + 3,
                            _ => continue,
                        };
                        let new = column < own && block.exact_key(column as u32) as usize >= first;
                        // The second column of a bucket adds to what the first has made of it.
                        let again = column >= own + held && (column - own - held) % 2 == 1;
                        let left = if new { 0.0 } else { f64::from(fade(if again { 0 } else { tokens })) };
                        expected[word] = given + expected[word] * left;
                    }
                    assert_close(got.into_iter().map(f64::from), &expected, 1e-11, &format!("{evicted_as:?}, {first}, {:?}", device.tier()));
                }
            }
        }
    }
}
