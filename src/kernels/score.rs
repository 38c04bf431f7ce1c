//! `score.wgsl`: how well every cached key answers every query, from keys that are stored whole or rebuilt tile by tile.

use super::{NEAR, WORKGROUP, spec};
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
        ("NEAR", NEAR),
        ("TILE", tile(config.head_dim)),
        ("ROWS", rows),
        ("KV_HEADS", config.num_key_value_heads as u32),
        ("GROUP", config.group_size() as u32),
        ("KEY_ROW", layout.keys.row as u32),
    ];
    spec("score.wgsl", &flags, &constants, &bindings)
}

/// A model's geometry, as far as attention knows it.
pub(super) fn config(qk_norm: bool, sliding_window: Option<usize>, heads: usize, kv_heads: usize, head_dim: usize) -> Config {
    Config {
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
    }
}

/// Shapes as they occur: direct and rebuilt, with and without norm and window.
pub(super) fn shapes() -> Vec<(Config, Layout)> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::pad;
    use crate::kernels::merge::up_vectors;
    use crate::kernels::oracle::{assert_close, devices, halves, numbers, run, turned};
    use crate::kernels::turns;

    /// Blocks of one token and of several, from the beginning and from within, against keys that are stored whole or rebuilt with all that a family adds.
    #[test]
    fn every_key_answers_every_query() {
        let group = |kv_heads, rank| Group { kv_heads, rank };
        let factors = |key_groups| FactoredLayer { key_groups, value_groups: vec![group(1, 4)], fused: true };
        let uneven = factors(vec![group(2, 21), group(2, 9), group(1, 13)]);
        let wide = factors(vec![group(1, 33)]);
        let block = |first, tokens, at, start| Block { first, tokens, at, start };
        let cases = [
            (config(false, Some(40), 10, 5, 14), None, vec![block(101, 1, 0, 62), block(90, 5, 2, 51)]),
            (config(true, Some(40), 10, 5, 14), Some(&uneven), vec![block(101, 1, 0, 62), block(90, 5, 2, 51), block(0, 37, 0, 0)]),
            (config(true, None, 3, 1, 512), Some(&wide), vec![block(18, 1, 0, 0)]),
        ];
        for device in devices(None) {
            for (c, factors, blocks) in &cases {
                let layout = Layout::new(c, *factors);
                let (head, query, heads, capacity) = (c.head_dim, pad(c.head_dim), c.num_attention_heads, 110);
                let queries: Vec<f32> =
                    numbers(1, 40 * heads * query).into_iter().enumerate().map(|(i, x)| if i % query < head { x } else { 0.0 }).collect();
                let rows = halves(2, capacity * layout.keys.row);
                let (vectors, bias, gain) = (up_vectors(&layout.keys, c), numbers(4, c.num_key_value_heads * head), numbers(5, head));
                let up = halves(3, layout.keys.slices.iter().map(|s| s.kv_heads * s.width * head).sum::<usize>().max(4));
                let slice = |kv: usize| [layout.keys.of_head(kv).at / 4, layout.keys.of_head(kv).width / 4, vectors[kv], 0].map(|n| n as u32);
                let table: Vec<u32> = (0..c.num_key_value_heads).flat_map(slice).collect();
                let key = |kv: usize, position: usize| {
                    let s = layout.keys.of_head(kv);
                    let row = &rows[position * layout.keys.row + s.at..][..s.width];
                    if layout.direct {
                        return row[..head].iter().map(|x| x.to_f64()).collect();
                    }
                    let at = |dim: usize, i: usize| up[4 * (vectors[kv] + i / 4 * head + dim) + i % 4].to_f64();
                    let dim = |d: usize| bias[kv * head + d] as f64 + row.iter().enumerate().map(|(i, z)| z.to_f64() * at(d, i)).sum::<f64>();
                    turned(c, &(0..head).map(dim).collect::<Vec<_>>(), Some(&gain), position)
                };
                let keys: Vec<Vec<Vec<f64>>> = (0..c.num_key_value_heads).map(|kv| (0..capacity).map(|p| key(kv, p)).collect()).collect();

                let cache = LayerCache { keys: device.upload("keys", &rows).unwrap(), values: device.buffer("values", 4).unwrap() };
                let [from, bias, gain, turns] =
                    [&queries, &bias, &gain, turns(&c.rope_frequencies(), capacity).as_flattened()].map(|v| device.upload("numbers", v).unwrap());
                let (table, up) = (device.upload("slices", &table).unwrap(), device.upload("up", &up).unwrap());
                let up = Up { turns: &turns, heads: &table, up: &up, bias: Some(&bias), gain: Some(&gain) };
                for b in blocks {
                    let (tokens, count) = (b.tokens as usize, b.keys() as usize);
                    let out = device.buffer("scores", (tokens * heads * capacity * 4) as u64).unwrap();
                    let up = (!layout.direct).then_some(up);
                    let score = Score::plan(&device, c, &layout, &from, &cache, &out, capacity, up, tokens > 1).unwrap();
                    let got = run::<f32>(&device, &out, tokens * heads * capacity, |pass| score.record(pass, *b));
                    let (mut seen, mut expected) = (Vec::new(), Vec::new());
                    for (line, got) in got.chunks_exact(capacity).enumerate() {
                        let (t, h) = (line / heads, line % heads);
                        let position = b.first as usize + t;
                        let q = &queries[((b.at as usize + t) * heads + h) * query..][..head];
                        for (column, got) in got.iter().enumerate() {
                            let key = b.start as usize + column;
                            if column >= count {
                                assert_eq!(*got, 0.0, "{b:?}: nothing is written past the keys");
                            } else if key > position || c.sliding_window.is_some_and(|w| key + w <= position) {
                                assert!(*got < -3e38, "{b:?}: token {t} may not see key {key}: {got}");
                            } else {
                                seen.push(*got as f64);
                                let dot: f64 = q.iter().zip(&keys[h / c.group_size()][key]).map(|(q, k)| *q as f64 * k).sum();
                                expected.push(dot / (head as f64).sqrt());
                            }
                        }
                    }
                    assert_close(seen, &expected, 1e-10, &format!("{b:?}, direct: {}, {:?}", layout.direct, device.tier()));
                }
            }
        }
    }
}
