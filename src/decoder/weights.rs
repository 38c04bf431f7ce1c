//! A checkpoint's weights on the device, laid out as the kernels read them.

use crate::checkpoint::{Checkpoint, Config};
use crate::gpu::{Device, Matrix, Tensor, pad};
use crate::kernels::values;
use crate::{Error, Result};
use half::f16;

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

/// Appends `numbers` in runs of `width`, each padded to four; each number stands for `unit` of
/// them.
fn widen<T: Copy>(to: &mut Vec<T>, numbers: &[T], width: usize, unit: usize, zero: T) {
    for run in numbers.chunks_exact(width * unit) {
        to.extend_from_slice(run);
        to.resize(to.len() + (pad(width) - width) * unit, zero);
    }
}

/// The tensors of a layer's attention.
struct Attention<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a Config,
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

    /// Query heads, key heads, value heads: their tensors and numbers.
    fn sides(&self) -> [(&'static str, usize); 3] {
        let c = self.config;
        [("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads), ("v_proj", c.num_key_value_heads)]
    }

    /// All heads, each with zero rows up to a multiple of four.
    fn projection(&self) -> Result<Vec<f16>> {
        let (hidden, dim) = (self.config.hidden_size, self.config.head_dim);
        let mut rows = Vec::new();
        for (side, heads) in self.sides() {
            let weight = self.checkpoint.f16(&self.name(&format!("{side}.weight")), &[heads * dim, hidden])?;
            widen(&mut rows, &weight, dim, hidden, f16::ZERO);
        }
        Ok(rows)
    }

    /// QK-norm's gains `[2][head_dim]`, then the biases of the projection's rows; and whether there
    /// are any of these.
    fn added(&self) -> Result<(Vec<f32>, bool)> {
        let dim = self.config.head_dim;
        let (mut added, mut biases, mut any) = (Vec::new(), Vec::new(), false);
        if self.config.qk_norm {
            for name in ["q_norm.weight", "k_norm.weight"] {
                added.extend(self.checkpoint.f32(&self.name(name), &[dim])?);
            }
        }
        for (side, heads) in self.sides() {
            let bias = self.bias(&format!("{side}.bias"), heads * dim)?;
            any |= bias.is_some();
            widen(&mut biases, &bias.unwrap_or_else(|| vec![0.0; heads * dim]), dim, 1, 0.0);
        }
        added.extend(biases.into_iter().filter(|_| any));
        Ok((added, any))
    }

    /// `[D][H·pad(head_dim)]`.
    fn output(&self, device: &Device, label: &str) -> Result<Matrix> {
        let (c, hidden) = (self.config, self.config.hidden_size);
        let mut wide = Vec::new();
        let weight = self.checkpoint.f16(&self.name("o_proj.weight"), &[hidden, c.num_attention_heads * c.head_dim])?;
        widen(&mut wide, &weight, c.head_dim, 1, f16::ZERO);
        Matrix::upload(device, label, &wide, [hidden, c.num_attention_heads * pad(c.head_dim)])
    }
}

impl Layer {
    pub fn load(device: &Device, checkpoint: &Checkpoint, l: usize) -> Result<Layer> {
        let c = checkpoint.config();
        let (hidden, ffn) = (c.hidden_size, c.intermediate_size);
        let prefix = format!("model.layers.{l}");
        let at = |rest: &str| format!("{prefix}.{rest}");
        let label = |what: &str| format!("layer {l}'s {what}");
        let gain = |rest: &str, width: usize| Tensor::vector(device, &at(rest), &checkpoint.f32(&at(rest), &[width])?);
        let shape = &super::attention_shape(c);
        let attention = Attention { checkpoint, config: c, prefix: at("self_attn") };

        let projection = attention.projection()?;
        let (added, bias) = attention.added()?;
        let output = attention.output(device, &label("output projection"))?;
        let gate = checkpoint.f16(&at("mlp.gate_proj.weight"), &[ffn, hidden])?;
        let up = checkpoint.f16(&at("mlp.up_proj.weight"), &[ffn, hidden])?;
        let pairs: Vec<f16> = gate.chunks_exact(hidden).zip(up.chunks_exact(hidden)).flat_map(|(g, u)| g.iter().chain(u).copied()).collect();
        let down = checkpoint.f16(&at("mlp.down_proj.weight"), &[hidden, ffn])?;
        let output_bias = attention.bias("o_proj.bias", hidden)?.map(|b| Tensor::vector(device, &label("output bias"), &b)).transpose()?;
        Ok(Layer {
            attention_gain: gain("input_layernorm.weight", hidden)?,
            projection: Matrix::upload(device, &label("projection"), &projection, [shape.projection_row(), hidden])?,
            added: if added.is_empty() { None } else { Some(device.upload(&label("norms and biases"), &added)?) },
            bias,
            value_groups: device.upload(&label("value groups"), &values::groups(shape, None, false).0)?,
            output,
            output_bias,
            mlp_gain: gain("post_attention_layernorm.weight", hidden)?,
            gate_up: Matrix::upload(device, &label("gate and up projection"), &pairs, [2 * ffn, hidden])?,
            down: Matrix::upload(device, &label("down projection"), &down, [hidden, ffn])?,
        })
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
    pub fn load(device: &Device, checkpoint: &Checkpoint) -> Result<Ends> {
        let c = checkpoint.config();
        let table = |name: &str| {
            let data = checkpoint.f16(name, &[c.vocab_size, c.hidden_size])?;
            Matrix::upload(device, name, &data, [c.vocab_size, c.hidden_size])
        };
        Ok(Ends {
            embedding: table("model.embed_tokens.weight")?,
            final_gain: Tensor::vector(device, "model.norm.weight", &checkpoint.f32("model.norm.weight", &[c.hidden_size])?)?,
            head: if c.tie_word_embeddings { None } else { Some(table("lm_head.weight")?) },
        })
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
