//! `merge.wgsl`: joins the splits of one attention and, where values are latent rows, takes them up to whole heads.

use super::score::Block;
use super::values::{SPLITS, splits};
use super::{WORKGROUP, spec};
use crate::Result;
use crate::cache::Layout;
use crate::checkpoint::Config;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, pad};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    splits: u32,
    at: u32,
    stride: u32,
}

/// What latent values need.
#[derive(Clone, Copy)]
pub(crate) struct Up<'a> {
    /// By key/value head, `[head_dim][width]` f16.
    pub up: &'a wgpu::Buffer,
    /// `[H_kv][head_dim]` f32.
    pub bias: Option<&'a wgpu::Buffer>,
}

/// Joins one layer's splits.
pub struct Merge {
    kernel: Kernel,
    heads: u32,
    stride: u32,
}

fn variant(config: &Config, layout: &Layout, bias: bool) -> Spec {
    let mut flags = Vec::new();
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Read), (3, Access::Write)];
    if layout.up {
        flags.push("UP");
        bindings.push((4, Access::Read));
        if bias {
            flags.push("BIAS");
            bindings.push((5, Access::Read));
        }
    }
    let head = config.head_dim as u32;
    let constants = [
        ("WORKGROUP", WORKGROUP),
        ("HEADS", config.num_attention_heads as u32),
        ("HEAD", head),
        ("OUTPUTS", head.div_ceil(WORKGROUP)),
        ("SPLITS", SPLITS),
        ("SUMS", layout.sums(config).1 as u32),
    ];
    spec("merge.wgsl", &flags, &constants, &bindings)
}

pub(super) fn variants() -> Vec<Spec> {
    super::score::shapes().iter().flat_map(|(config, layout)| [true, false].map(|bias| variant(config, layout, bias))).collect()
}

/// The shader's table of query heads, four numbers each: vector at which the head's sum begins, its vectors, vector of `up` at which its key/value head begins, that head.
pub(crate) fn heads(config: &Config, layout: &Layout) -> Vec<u32> {
    let (at, _) = layout.sums(config);
    let up = up_vectors(&layout.values, config);
    let head = |h: usize| {
        let kv = h / config.group_size();
        [at[h] / 4, layout.values.of_head(kv).width / 4, up[kv], kv].map(|n| n as u32)
    };
    (0..config.num_attention_heads).flat_map(head).collect()
}

/// Where each key/value head's rows of an up-projection begin, in vectors, when all are laid end to end as `[head_dim][width]`.
pub(crate) fn up_vectors(side: &crate::cache::Side, config: &Config) -> Vec<usize> {
    let mut at = 0;
    let head = |kv| {
        let begin = at;
        at += config.head_dim * side.of_head(kv).width / 4;
        begin
    };
    (0..config.num_key_value_heads).map(head).collect()
}

impl Merge {
    /// `sums`, `weights` as [`super::values`] writes them; `heads`: [`heads`]'s table; `out`: `[n][pad(H·head_dim)]`, or `[n][Σ widths]` without `up`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn plan(
        device: &Device,
        config: &Config,
        layout: &Layout,
        sums: &wgpu::Buffer,
        weights: &wgpu::Buffer,
        heads: &wgpu::Buffer,
        out: &wgpu::Buffer,
        up: Option<Up>,
    ) -> Result<Merge> {
        let mut buffers = vec![sums, weights, heads, out];
        let mut bias = false;
        if let Some(up) = up {
            buffers.push(up.up);
            buffers.extend(up.bias);
            bias = up.bias.is_some();
        }
        let stride = if layout.up { pad(config.num_attention_heads * config.head_dim) } else { layout.sums(config).1 };
        Ok(Merge { kernel: device.kernel(variant(config, layout, bias), &buffers)?, heads: config.num_attention_heads as u32, stride: stride as u32 })
    }

    /// One workgroup per query head and token.
    pub fn record(&self, pass: &mut Pass, block: Block) {
        let step = Step { splits: splits(block).0, at: block.at, stride: self.stride };
        self.kernel.record(pass, &step, [self.heads, block.tokens, 1]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::LayerCache;
    use crate::checkpoint::{FactoredLayer, Group};
    use crate::kernels::oracle::{assert_close, devices, halves, numbers, run};
    use crate::kernels::score::config;
    use crate::kernels::values::{Values, groups};

    /// Softmax over 5,000 keys and the sum of their values, once in splits of several tiles (one token) and once in a single pass (the same token twice): both are
    /// the definition, and each other. Values are whole heads, or latent rows of uneven groups: one wider than a block of the sum and a slab of the merge.
    #[test]
    fn splits_equal_one_pass_and_the_definition() {
        let group = |kv_heads, rank| Group { kv_heads, rank };
        let factors = |fused| FactoredLayer { key_groups: vec![group(3, 4)], value_groups: vec![group(2, 1030), group(1, 9)], fused };
        let (start, keys, capacity) = (7, 5000, 5011);
        for factors in [None, Some(factors(true)), Some(factors(false))] {
            let c = config(false, None, 6, 3, 14);
            let layout = Layout::new(&c, factors.as_ref());
            let (heads, row, vectors) = (c.num_attention_heads, layout.values.row, up_vectors(&layout.values, &c));
            // Scores far apart, so that splits differ in what they add.
            let scores: Vec<f32> = numbers(1, heads * capacity).into_iter().map(|x| 12.0 * x).collect();
            let rows = halves(2, (start + keys) * row);
            let up = halves(3, layout.values.slices.iter().map(|s| s.kv_heads * s.width * c.head_dim).sum());
            let bias = numbers(4, c.num_key_value_heads * c.head_dim);

            let head = |h: usize| {
                let (kv, line) = (h / c.group_size(), &scores[h * capacity..][..keys]);
                let slice = layout.values.of_head(kv);
                let total: f64 = line.iter().map(|s| (*s as f64).exp()).sum();
                let mut sum = vec![0.0; slice.width];
                for (k, s) in line.iter().enumerate() {
                    let p = (*s as f64).exp() / total;
                    let value = &rows[(start + k) * row + slice.at..][..slice.width];
                    sum.iter_mut().zip(value).for_each(|(u, v)| *u += p * v.to_f64());
                }
                if !layout.up {
                    return sum;
                }
                let at = |dim: usize, i: usize| up[4 * vectors[kv] + dim * slice.width + i].to_f64();
                (0..c.head_dim).map(|d| bias[kv * c.head_dim + d] as f64 + sum.iter().enumerate().map(|(i, u)| u * at(d, i)).sum::<f64>()).collect()
            };
            let expected: Vec<f64> = (0..heads).flat_map(head).collect();

            for device in devices(None) {
                let scores = device.upload("scores", &[&scores[..], &scores].concat()).unwrap();
                let cache = LayerCache { keys: device.buffer("keys", 4).unwrap(), values: device.upload("values", &rows).unwrap() };
                let table = device.upload("slices", &groups(&c, &layout)).unwrap();
                let sums = device.buffer("sums", SPLITS as u64 * layout.sums(&c).1 as u64 * 4).unwrap();
                let weights = device.buffer("weights", SPLITS as u64 * heads as u64 * 8).unwrap();
                let values = Values::plan(&device, &c, &layout, &scores, capacity, &cache, &table, &sums, &weights).unwrap();
                let (table, up, bias) = (
                    device.upload("heads", &super::heads(&c, &layout)).unwrap(),
                    device.upload("up", &up).unwrap(),
                    device.upload("bias", &bias).unwrap(),
                );
                let out = device.buffer("out", 3 * pad(expected.len()) as u64 * 4).unwrap();
                let up = layout.up.then_some(Up { up: &up, bias: Some(&bias) });
                let merge = Merge::plan(&device, &c, &layout, &sums, &weights, &table, &out, up).unwrap();
                let attend = |tokens: u32, at: u32| {
                    let block = Block { first: (start + keys) as u32 - tokens, tokens, at, start: start as u32 };
                    assert_eq!(splits(block).0, if tokens == 1 { 20 } else { 1 });
                    let got = run::<f32>(&device, &out, 3 * pad(expected.len()), |pass| {
                        values.record(pass, block);
                        merge.record(pass, block);
                    });
                    got.chunks_exact(pad(expected.len()))
                        .skip(at as usize)
                        .take(tokens as usize)
                        .flat_map(|t| t[..expected.len()].to_vec())
                        .map(f64::from)
                        .collect::<Vec<_>>()
                };
                let what = |way: &str| format!("{way}, {:?} of {} numbers, {:?}", layout.up, layout.sums(&c).1, device.tier());
                let once = attend(1, 2);
                assert_close(once.iter().copied(), &expected, 1e-10, &what("splits"));
                assert_close(attend(2, 0), &[&once[..], &once].concat(), 1e-10, &what("one pass"));
            }
        }
    }
}
