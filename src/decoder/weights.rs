//! A checkpoint's weights on the device, laid out as the kernels read them.

use crate::cache::{Layout, Side};
use crate::checkpoint::{Checkpoint, Config};
use crate::gpu::{Device, Matrix, pad};
use crate::kernels::{merge, values};
use crate::{Error, Result};
use half::f16;

/// Rows of a matrix that must stay in one part: a block of the widest kernel.
const ALIGN: usize = 128;

/// One layer.
pub(super) struct Layer {
    pub layout: Layout,
    pub attention_gain: wgpu::Buffer,
    /// Query heads, key row and value row, `[stride][D]`.
    pub projection: Matrix,
    /// What is added to the projection at once: the query's bias, and the key's and value's where these are stored whole.
    pub projection_bias: Option<wgpu::Buffer>,
    /// QK-norm's gains `[2][head_dim]`, and the key's alone.
    pub gains: Option<[wgpu::Buffer; 2]>,
    pub key_up: Option<KeyUp>,
    pub value_groups: wgpu::Buffer,
    pub query_heads: wgpu::Buffer,
    pub value_up: Option<ValueUp>,
    /// `[D][H·head_dim]`, or with the values' up-projection folded in.
    pub output: Matrix,
    pub output_bias: Option<wgpu::Buffer>,
    pub mlp_gain: wgpu::Buffer,
    /// Rows in pairs: gate, up.
    pub gate_up: Matrix,
    pub down: Matrix,
}

/// What rebuilds keys from latent rows.
pub(super) struct KeyUp {
    pub heads: wgpu::Buffer,
    pub up: wgpu::Buffer,
    pub bias: Option<wgpu::Buffer>,
}

/// What takes summed latent values up to heads.
pub(super) struct ValueUp {
    pub up: wgpu::Buffer,
    pub bias: Option<wgpu::Buffer>,
}

fn padded(mut v: Vec<f32>) -> Vec<f32> {
    v.resize(pad(v.len()), 0.0);
    v
}

/// Up-projections of a side by key/value head, `[head_dim][width]` each, end to end. A group's tensor is `[heads·head_dim, rank]`.
fn up_projection(checkpoint: &Checkpoint, prefix: &str, side: &Side, head_dim: usize) -> Result<Vec<f16>> {
    let mut up = Vec::new();
    for (g, slice) in side.slices.iter().enumerate() {
        let data = checkpoint.f16(&format!("{prefix}.{g}.weight"), &[slice.kv_heads * head_dim, slice.rank])?;
        for row in data.chunks_exact(slice.rank) {
            widen(&mut up, row, std::iter::once((slice.rank, slice.width)), 1, f16::ZERO);
        }
    }
    Ok(up)
}

/// From `[head_dim][width]` to `[width / 4][head_dim]` vectors, head by head.
fn transposed(up: &[f16], side: &Side, head_dim: usize) -> Vec<f16> {
    let mut out = Vec::with_capacity(up.len());
    let mut at = 0;
    for slice in &side.slices {
        for _ in 0..slice.kv_heads {
            for v in 0..slice.width / 4 {
                for dim in 0..head_dim {
                    out.extend_from_slice(&up[at + dim * slice.width + 4 * v..][..4]);
                }
            }
            at += head_dim * slice.width;
        }
    }
    out
}

/// Appends `numbers` in runs: the first `rank` of each pair's, then zeros up to its `width`; each number stands for `unit` of them.
fn widen<T: Copy>(to: &mut Vec<T>, numbers: &[T], runs: impl Iterator<Item = (usize, usize)>, unit: usize, zero: T) {
    let mut from = 0;
    for (rank, width) in runs {
        to.extend_from_slice(&numbers[from * unit..(from + rank) * unit]);
        to.resize(to.len() + (width - rank) * unit, zero);
        from += rank;
    }
}

/// A side's slices as runs.
fn slices(side: &Side) -> impl Iterator<Item = (usize, usize)> {
    side.slices.iter().map(|s| (s.rank, s.width))
}

/// A layer's attention: its projection, and what factors add to it.
struct Attention<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a Config,
    layout: &'a Layout,
    prefix: String,
}

impl Attention<'_> {
    fn name(&self, rest: &str) -> String {
        format!("{}.{rest}", self.prefix)
    }

    fn bias(&self, rest: &str, width: usize) -> Result<Option<Vec<f32>>> {
        let name = self.name(rest);
        if self.checkpoint.has(&name) { self.checkpoint.f32(&name, &[width]).map(Some) } else { Ok(None) }
    }

    /// Query heads as runs.
    fn heads(&self) -> impl Iterator<Item = (usize, usize)> {
        std::iter::repeat_n((self.config.head_dim, pad(self.config.head_dim)), self.config.num_attention_heads)
    }

    /// Query heads, key row, value row, each slice with zero rows up to its stored width.
    fn projection(&self) -> Result<Vec<f16>> {
        let (c, layout) = (self.config, self.layout);
        let hidden = c.hidden_size;
        let read = |name: &str, rows: usize| self.checkpoint.f16(&self.name(name), &[rows, hidden]);
        let rank = |side: &Side| side.slices.iter().map(|s| s.rank).sum::<usize>();
        let mut rows = Vec::new();
        widen(&mut rows, &read("q_proj.weight", c.num_attention_heads * c.head_dim)?, self.heads(), hidden, f16::ZERO);
        let keys = if layout.direct { "k_proj.weight" } else { "k_down.weight" };
        widen(&mut rows, &read(keys, rank(&layout.keys))?, slices(&layout.keys), hidden, f16::ZERO);
        widen(&mut rows, &read("v_proj.weight", rank(&layout.values))?, slices(&layout.values), hidden, f16::ZERO);
        Ok(rows)
    }

    /// The bias of the projection's rows. A latent row has none: its bias is added where it is rebuilt or taken up.
    fn projection_bias(&self) -> Result<Option<Vec<f32>>> {
        let (c, layout) = (self.config, self.layout);
        let (query, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let Some(q) = self.bias("q_proj.bias", query)? else { return Ok(None) };
        let mut bias = Vec::new();
        widen(&mut bias, &q, self.heads(), 1, 0.0);
        for (name, side) in [("k_proj.bias", &layout.keys), ("v_proj.bias", &layout.values)] {
            match self.bias(name, kv)?.filter(|_| layout.direct) {
                Some(b) => widen(&mut bias, &b, slices(side), 1, 0.0),
                None => bias.resize(bias.len() + side.row, 0.0),
            }
        }
        Ok(Some(bias))
    }

    /// `[D, H·head_dim]` where values were taken up to whole heads. Else it takes the sums as they are, whole heads or latent rows, padded as they are stored.
    fn output(&self, device: &Device, label: &str) -> Result<Matrix> {
        let (c, layout) = (self.config, self.layout);
        let (name, hidden) = (self.name("o_proj.weight"), c.hidden_size);
        if layout.up {
            let width = c.num_attention_heads * c.head_dim;
            return Matrix::upload(device, label, &self.checkpoint.f16(&name, &[hidden, width])?, hidden, width, ALIGN);
        }
        let runs: Vec<_> = (0..c.num_attention_heads).map(|h| layout.values.of_head(h / c.group_size())).map(|s| (s.rank, s.width)).collect();
        let rank = runs.iter().map(|(rank, _)| rank).sum();
        let mut wide = Vec::new();
        for row in self.checkpoint.f16(&name, &[hidden, rank])?.chunks_exact(rank) {
            widen(&mut wide, row, runs.iter().copied(), 1, f16::ZERO);
        }
        Matrix::upload(device, label, &wide, hidden, layout.sums(c).1, ALIGN)
    }
}

impl Layer {
    pub fn load(device: &Device, checkpoint: &Checkpoint, l: usize) -> Result<Layer> {
        let c = checkpoint.config();
        let layout = Layout::new(c, checkpoint.factored().map(|f| &f.layers[l]));
        let (hidden, ffn, kv) = (c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_dim);
        let prefix = format!("model.layers.{l}");
        let at = |rest: &str| format!("{prefix}.{rest}");
        let label = |what: &str| format!("layer {l}'s {what}");
        let gain = |rest: &str, width: usize| device.upload(&at(rest), &padded(checkpoint.f32(&at(rest), &[width])?));
        let attention = Attention { checkpoint, config: c, layout: &layout, prefix: at("self_attn") };

        let floats = |what: &str, data: Option<Vec<f32>>| data.map(|b| device.upload(&label(what), &padded(b))).transpose();
        let projection = attention.projection()?;
        let rows = c.num_attention_heads * pad(c.head_dim) + layout.keys.row + layout.values.row;
        let gains = if c.qk_norm {
            let q = checkpoint.f32(&at("self_attn.q_norm.weight"), &[c.head_dim])?;
            let k = checkpoint.f32(&at("self_attn.k_norm.weight"), &[c.head_dim])?;
            Some([device.upload(&label("QK-norm"), &[q, k.clone()].concat())?, device.upload(&label("key norm"), &k)?])
        } else {
            None
        };

        let key_up = if layout.direct {
            None
        } else {
            let vectors = merge::up_vectors(&layout.keys, c);
            let head = |h: usize| {
                let slice = layout.keys.of_head(h);
                [slice.at / 4, slice.width / 4, vectors[h], 0].map(|n| n as u32)
            };
            let heads: Vec<u32> = (0..c.num_key_value_heads).flat_map(head).collect();
            let up = up_projection(checkpoint, &at("self_attn.k_up"), &layout.keys, c.head_dim)?;
            Some(KeyUp {
                heads: device.upload(&label("key slices"), &heads)?,
                up: device.upload(&label("key up-projection"), &transposed(&up, &layout.keys, c.head_dim))?,
                bias: floats("key bias", attention.bias("k_proj.bias", kv)?)?,
            })
        };
        let value_up = if layout.up {
            Some(ValueUp {
                up: device.upload(&label("value up-projection"), &up_projection(checkpoint, &at("self_attn.v_up"), &layout.values, c.head_dim)?)?,
                bias: floats("value bias", attention.bias("v_proj.bias", kv)?)?,
            })
        } else {
            None
        };

        let output = attention.output(device, &label("output projection"))?;
        let gate = checkpoint.f16(&at("mlp.gate_proj.weight"), &[ffn, hidden])?;
        let up = checkpoint.f16(&at("mlp.up_proj.weight"), &[ffn, hidden])?;
        let pairs: Vec<f16> = gate.chunks_exact(hidden).zip(up.chunks_exact(hidden)).flat_map(|(g, u)| g.iter().chain(u).copied()).collect();
        let down = checkpoint.f16(&at("mlp.down_proj.weight"), &[hidden, ffn])?;
        let projection_bias = floats("projection bias", attention.projection_bias()?)?;
        let output_bias = floats("output bias", attention.bias("o_proj.bias", hidden)?)?;
        Ok(Layer {
            attention_gain: gain("input_layernorm.weight", hidden)?,
            projection: Matrix::upload(device, &label("projection"), &projection, rows, hidden, ALIGN)?,
            projection_bias,
            gains,
            key_up,
            value_groups: device.upload(&label("value slices"), &values::groups(c, &layout))?,
            query_heads: device.upload(&label("query heads"), &merge::heads(c, &layout))?,
            value_up,
            output,
            output_bias,
            mlp_gain: gain("post_attention_layernorm.weight", hidden)?,
            gate_up: Matrix::upload(device, &label("gate and up projection"), &pairs, 2 * ffn, hidden, ALIGN)?,
            down: Matrix::upload(device, &label("down projection"), &down, hidden, ffn, ALIGN)?,
            layout,
        })
    }
}

/// The embedding table, final norm and head.
pub(super) struct Ends {
    pub embedding: Matrix,
    pub final_gain: wgpu::Buffer,
    /// `None` where the head is the embedding table.
    pub head: Option<Matrix>,
}

impl Ends {
    pub fn load(device: &Device, checkpoint: &Checkpoint) -> Result<Ends> {
        let c = checkpoint.config();
        let table = |name: &str| {
            let data = checkpoint.f16(name, &[c.vocab_size, c.hidden_size])?;
            Matrix::upload(device, name, &data, c.vocab_size, c.hidden_size, ALIGN)
        };
        Ok(Ends {
            embedding: table("model.embed_tokens.weight")?,
            final_gain: device.upload("model.norm.weight", &padded(checkpoint.f32("model.norm.weight", &[c.hidden_size])?))?,
            head: if c.tie_word_embeddings { None } else { Some(table("lm_head.weight")?) },
        })
    }
}

/// What the kernels cannot be made for, said before weights are read.
pub(super) fn check(checkpoint: &Checkpoint) -> Result<()> {
    let head_dim = checkpoint.config().head_dim;
    if head_dim > 512 {
        let message = format!("heads are {head_dim} numbers wide; the GPU kernels take up to 512. --device cpu runs it");
        return Err(Error::Unsupported { path: checkpoint.path().to_path_buf(), message });
    }
    Ok(())
}
