//! `score.wgsl`: how well every cached key answers every query, from keys that are stored whole or rebuilt tile by tile.

use super::{WORKGROUP, spec};
use crate::Result;
use crate::cache::{LayerCache, Layout};
use crate::checkpoint::{Architecture, Config, FactoredLayer, Group, RopeScaling};
use crate::gpu::{Access, Device, Kernel, Pass, Spec};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    first: u32,
    tokens: u32,
    at: u32,
    start: u32,
    stride: u32,
    span: u32,
    window: u32,
    scale: f32,
    epsilon: f32,
}

/// A run of tokens whose queries are scored at once, and the keys that they are scored against.
#[derive(Debug, Clone, Copy)]
pub struct Block {
    /// Position of the first token.
    pub first: u32,
    /// Tokens.
    pub tokens: u32,
    /// The first token's place in the chunk.
    pub at: u32,
    /// The first key: those before it lie outside every window.
    pub start: u32,
}

impl Block {
    /// Keys scored.
    pub fn keys(&self) -> u32 {
        self.first + self.tokens - self.start
    }
}

/// What rebuilt keys need beside their rows.
#[derive(Clone, Copy)]
pub(crate) struct Up<'a> {
    /// RoPE's tables.
    pub turns: &'a wgpu::Buffer,
    /// `[H_kv]` of (vector at which the slice begins, its vectors, vector at which the head's rows of `up` begin, 0).
    pub heads: &'a wgpu::Buffer,
    /// By head, `[width / 4][head_dim]` vectors of f16.
    pub up: &'a wgpu::Buffer,
    /// `[H_kv][head_dim]` f32.
    pub bias: Option<&'a wgpu::Buffer>,
    /// `[head_dim]` f32: QK-norm's for keys.
    pub gain: Option<&'a wgpu::Buffer>,
}

/// Scores one layer's keys.
pub struct Score {
    kernel: Kernel,
    tile: u32,
    span: Option<u32>,
    kv_heads: u32,
    group: u32,
    window: u32,
    scale: f32,
    epsilon: f32,
    stride: u32,
}

/// Keys per tile: as many as fit, in f32, into half of the least workgroup memory that any device has. QK-norm of rebuilt keys takes half as much again.
fn tile(head_dim: usize) -> u32 {
    [32, 16, 8].into_iter().find(|t| head_dim * t * 4 <= 8 << 10).unwrap_or(4) as u32
}

/// The most keys that one dispatch scores: a grid has at most 65,535 tiles on the least of devices.
pub(crate) fn most_keys(head_dim: usize) -> usize {
    u16::MAX as usize * tile(head_dim) as usize
}

fn variant(config: &Config, layout: &Layout, bias: bool, rows: u32) -> Spec {
    let mut flags = vec![if layout.direct { "DIRECT" } else { "REBUILT" }];
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Write)];
    if config.sliding_window.is_some() {
        flags.push("WINDOW");
    }
    if !layout.direct {
        bindings.extend([(3, Access::Read), (4, Access::Read), (5, Access::Read)]);
        if bias {
            flags.push("BIAS");
            bindings.push((6, Access::Read));
        }
        if config.qk_norm {
            flags.push("QK_NORM");
            bindings.push((7, Access::Read));
        }
    }
    let pairs = (config.head_dim / 2) as u32;
    let constants = [
        ("WORKGROUP", WORKGROUP),
        ("PAIRS", pairs),
        ("TILE", tile(config.head_dim)),
        ("ROWS", rows),
        ("KV_HEADS", config.num_key_value_heads as u32),
        ("GROUP", config.group_size() as u32),
        ("KEY_ROW", layout.keys.row as u32),
    ];
    spec("score.wgsl", &flags, &constants, &bindings)
}

/// Shapes as they occur: direct and rebuilt, with and without norm and window.
pub(super) fn shapes() -> Vec<(Config, Layout)> {
    let config = |qk_norm, sliding_window, heads, kv_heads, head_dim| Config {
        architecture: Architecture::Llama,
        hidden_size: heads * head_dim,
        intermediate_size: 1536,
        num_hidden_layers: 1,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        vocab_size: 1000,
        max_position_embeddings: 8192,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: true,
        attention_bias: true,
        qk_norm,
        sliding_window,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    };
    let mut shapes = Vec::new();
    for config in [
        config(false, None, 9, 3, 64),
        config(true, Some(100), 6, 3, 12),
        config(true, None, 32, 8, 128),
        config(false, Some(4096), 32, 32, 128),
        config(true, None, 8, 2, 512),
    ] {
        shapes.push((config.clone(), Layout::new(&config, None)));
        for fused in [true, false] {
            let groups = vec![Group { kv_heads: config.num_key_value_heads, rank: config.num_key_value_heads * config.head_dim / 2 }];
            let factors = FactoredLayer { key_groups: groups.clone(), value_groups: groups, fused };
            let layout = Layout::new(&config, Some(&factors));
            shapes.push((config.clone(), layout));
        }
    }
    shapes
}

pub(super) fn variants() -> Vec<Spec> {
    shapes().iter().flat_map(|(config, layout)| [true, false].map(|bias| variant(config, layout, bias, 4))).collect()
}

impl Score {
    /// `queries`: `[n][H][pad(head_dim)]` f32; `scores`: `[block tokens][H][stride]` f32. `many`: for blocks of many tokens, else of one.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn plan(
        device: &Device,
        config: &Config,
        layout: &Layout,
        queries: &wgpu::Buffer,
        cache: &LayerCache,
        scores: &wgpu::Buffer,
        stride: usize,
        up: Option<Up>,
        many: bool,
    ) -> Result<Score> {
        let tile = tile(config.head_dim);
        let (teams, group) = (WORKGROUP / tile, config.group_size() as u32);
        let rows = if many { 8 } else { group.div_ceil(teams).min(8) };
        let mut buffers = vec![queries, &cache.keys, scores];
        let mut bias = false;
        if let Some(up) = up {
            buffers.extend([up.turns, up.heads, up.up]);
            buffers.extend(up.bias);
            buffers.extend(up.gain);
            bias = up.bias.is_some();
        }
        Ok(Score {
            kernel: device.kernel(variant(config, layout, bias, rows), &buffers)?,
            tile,
            // A rebuilt tile serves all rows of the block; a stored one is cheap to load again.
            span: layout.direct.then_some(teams * rows * 2),
            kv_heads: config.num_key_value_heads as u32,
            group,
            window: config.sliding_window.unwrap_or(0) as u32,
            scale: 1.0 / (config.head_dim as f32).sqrt(),
            epsilon: config.rms_norm_eps,
            stride: stride as u32,
        })
    }

    /// One workgroup per tile and key/value head, and per span of rows where keys are stored whole.
    pub fn record(&self, pass: &mut Pass, block: Block) {
        let rows = block.tokens * self.group;
        let span = self.span.unwrap_or(rows);
        let step = Step {
            first: block.first,
            tokens: block.tokens,
            at: block.at,
            start: block.start,
            stride: self.stride,
            span,
            window: self.window,
            scale: self.scale,
            epsilon: self.epsilon,
        };
        self.kernel.record(pass, &step, [block.keys().div_ceil(self.tile), self.kv_heads, rows.div_ceil(span)]);
    }
}
