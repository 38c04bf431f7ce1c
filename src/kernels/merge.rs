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
