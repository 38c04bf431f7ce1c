//! A checkpoint's weights on the device, laid out as the kernels read them.

use super::stored::{Source, Stored, interleave, stack};
use crate::checkpoint::{Checkpoint, Config};
use crate::gpu::{Device, Matrix, Tensor, pad};
use crate::kernels::values;
use crate::{Error, Result};

/// One layer.
pub(super) struct Layer {
    pub attention_gain: Tensor,
    /// Query heads, key heads and value heads, each padded to four rows, from `D`.
    pub projection: Matrix,
    /// QK-norm's gains and the projection's biases, where the family has either.
    pub added: Option<wgpu::Buffer>,
    pub bias: bool,
    /// The table by which values are summed in a dense cache.
    pub value_groups: wgpu::Buffer,
    /// `[D][H·pad(head_dim)]`.
    pub output: Matrix,
    pub output_bias: Option<Tensor>,
    pub mlp_gain: Tensor,
    /// Rows in pairs: gate, up.
    pub gate_up: Matrix,
    pub down: Matrix,
}

/// `numbers` in runs of `width`, each padded to four.
fn widen<T: Copy + Default>(numbers: &[T], width: usize) -> Vec<T> {
    let mut wide = Vec::with_capacity(numbers.len() / width * pad(width));
    for run in numbers.chunks_exact(width) {
        wide.extend_from_slice(run);
        wide.resize(wide.len() + pad(width) - width, T::default());
    }
    wide
}

/// The tensors of a layer's attention.
struct Attention<'a> {
    source: Source<'a>,
    config: &'a Config,
    prefix: String,
}

impl Attention<'_> {
    fn name(&self, rest: &str) -> String {
        format!("{}.{rest}", self.prefix)
    }

    fn bias(&self, rest: &str, width: usize) -> Result<Option<Vec<f32>>> {
        let name = self.name(rest);
        let checkpoint = self.source.checkpoint;
        if checkpoint.has(&name) { checkpoint.f32(&name, &[width]).map(Some) } else { Ok(None) }
    }

    /// Query heads, key heads, value heads: their tensors and numbers.
    fn sides(&self) -> [(&'static str, usize); 3] {
        let c = self.config;
        [("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads), ("v_proj", c.num_key_value_heads)]
    }

    /// All heads, each with zero rows up to a multiple of four.
    fn projection(&self, device: &Device, label: &str) -> Result<Matrix> {
        let (hidden, dim) = (self.config.hidden_size, self.config.head_dim);
        let side = |(side, heads): (&str, usize)| {
            let weight = self.source.matrix(&self.name(&format!("{side}.weight")), [heads * dim, hidden])?;
            Ok(weight.pad_rows(dim, hidden))
        };
        let [q, k, v] = self.sides();
        Matrix::of(device, label, &stack([side(q)?, side(k)?, side(v)?], hidden), hidden)
    }

    /// QK-norm's gains `[2][head_dim]`, then the biases of the projection's rows; and whether there
    /// are any of these.
    fn added(&self) -> Result<(Vec<f32>, bool)> {
        let dim = self.config.head_dim;
        let (mut added, mut biases, mut any) = (Vec::new(), Vec::new(), false);
        if self.config.qk_norm {
            for name in ["q_norm.weight", "k_norm.weight"] {
                added.extend(self.source.checkpoint.f32(&self.name(name), &[dim])?);
            }
        }
        for (side, heads) in self.sides() {
            let bias = self.bias(&format!("{side}.bias"), heads * dim)?;
            any |= bias.is_some();
            biases.extend(widen(&bias.unwrap_or_else(|| vec![0.0; heads * dim]), dim));
        }
        added.extend(biases.into_iter().filter(|_| any));
        Ok((added, any))
    }

    /// `[D][H·pad(head_dim)]`: in f16 where heads are padded, which takes blocks apart.
    fn output(&self, device: &Device, label: &str) -> Result<Matrix> {
        let (c, hidden) = (self.config, self.config.hidden_size);
        let (name, width) = (self.name("o_proj.weight"), c.num_attention_heads * c.head_dim);
        let weight = match c.head_dim == pad(c.head_dim) {
            true => self.source.matrix(&name, [hidden, width])?,
            false => Stored::F16(widen(&self.source.checkpoint.f16(&name, &[hidden, width])?, c.head_dim)),
        };
        let width = c.num_attention_heads * pad(c.head_dim);
        Matrix::of(device, label, &[weight.rows(width)], width)
    }
}

impl Layer {
    pub fn load(device: &Device, source: Source, l: usize) -> Result<Layer> {
        let checkpoint = source.checkpoint;
        let c = checkpoint.config();
        let (hidden, ffn) = (c.hidden_size, c.intermediate_size);
        let prefix = format!("model.layers.{l}");
        let at = |rest: &str| format!("{prefix}.{rest}");
        let label = |what: &str| format!("layer {l}'s {what}");
        let gain = |rest: &str, width: usize| Tensor::vector(device, &at(rest), &checkpoint.f32(&at(rest), &[width])?);
        let shape = &super::attention_shape(c);
        let attention = Attention { source, config: c, prefix: at("self_attn") };

        let projection = attention.projection(device, &label("projection"))?;
        let (added, bias) = attention.added()?;
        let output = attention.output(device, &label("output projection"))?;
        let gate = source.matrix(&at("mlp.gate_proj.weight"), [ffn, hidden])?;
        let up = source.matrix(&at("mlp.up_proj.weight"), [ffn, hidden])?;
        let down = source.matrix(&at("mlp.down_proj.weight"), [hidden, ffn])?;
        let output_bias = attention.bias("o_proj.bias", hidden)?.map(|b| Tensor::vector(device, &label("output bias"), &b)).transpose()?;
        Ok(Layer {
            attention_gain: gain("input_layernorm.weight", hidden)?,
            projection,
            added: if added.is_empty() { None } else { Some(device.upload(&label("norms and biases"), &added)?) },
            bias,
            value_groups: device.upload(&label("value groups"), &values::groups(shape, None, false).0)?,
            output,
            output_bias,
            mlp_gain: gain("post_attention_layernorm.weight", hidden)?,
            gate_up: Matrix::of(device, &label("gate and up projection"), &[interleave(gate, up, hidden).rows(hidden)], hidden)?,
            down: Matrix::of(device, &label("down projection"), &[down.rows(ffn)], ffn)?,
        })
    }

    /// Its matrices.
    pub fn matrices(&self) -> [&Matrix; 4] {
        [&self.projection, &self.output, &self.gate_up, &self.down]
    }
}

/// The embedding table, final norm and head.
pub(super) struct Ends {
    pub embedding: Matrix,
    pub final_gain: Tensor,
    /// `None` where the head is the embedding table.
    pub head: Option<Matrix>,
}

impl Ends {
    pub fn load(device: &Device, source: Source) -> Result<Ends> {
        let c = source.checkpoint.config();
        let (shape, norm) = ([c.vocab_size, c.hidden_size], "model.norm.weight");
        let table = |name: &str| Matrix::of(device, name, &[source.matrix(name, shape)?.rows(c.hidden_size)], c.hidden_size);
        Ok(Ends {
            embedding: table("model.embed_tokens.weight")?,
            final_gain: Tensor::vector(device, norm, &source.checkpoint.f32(norm, &[c.hidden_size])?)?,
            head: if c.tie_word_embeddings { None } else { Some(table("lm_head.weight")?) },
        })
    }

    /// What makes logits.
    pub fn head(&self) -> &Matrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

/// What the kernels cannot be made for, said before weights are read.
pub(super) fn check(checkpoint: &Checkpoint) -> Result<()> {
    let head_dim = checkpoint.config().head_dim;
    if head_dim <= 512 {
        return Ok(());
    }
    let message = format!("heads are {head_dim} numbers wide; the GPU kernels take up to 512. --device cpu runs it");
    Err(Error::Unsupported { path: checkpoint.path().to_path_buf(), message })
}
