//! A checkpoint's weights on the device, laid out as the kernels read them.

use super::experts;
use super::feed_forward::FeedForward;
use super::stored::{Source, Stored, stack};
use crate::checkpoint::{Checkpoint, Config, NormKind, QkNormOver};
use crate::gpu::{Device, Matrix, Tensor, pad};
use crate::kernels::values;
use crate::{Error, Result};

/// One layer.
pub(super) struct Layer {
    pub attention_norm: Option<NormTensors>,
    pub after_attention: Option<NormTensors>,
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
    /// A score for every head that stands for no key, `[H]`.
    pub head_sinks: Option<wgpu::Buffer>,
    pub mlp_norm: Option<NormTensors>,
    pub after_mlp: Option<NormTensors>,
    pub feed_forward: FeedForward,
}

/// What a norm multiplies by and adds, `[D]` each.
pub(super) struct NormTensors {
    pub gain: Tensor,
    pub bias: Option<Tensor>,
}

impl NormTensors {
    fn load(device: &Device, checkpoint: &Checkpoint, name: &str) -> Result<NormTensors> {
        let (weight, bias, width) = (format!("{name}.weight"), format!("{name}.bias"), checkpoint.config().hidden_size);
        let there = checkpoint.config().design.norm == NormKind::Layer && checkpoint.has(&bias);
        let bias = there.then(|| Tensor::vector(device, &bias, &checkpoint.f32(&bias, &[width])?)).transpose()?;
        Ok(NormTensors { gain: Tensor::vector(device, &weight, &checkpoint.gain(&weight, width)?)?, bias })
    }
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

    /// QK-norm's gains, then the biases of the projection's rows; and whether there
    /// are any of these.
    fn added(&self) -> Result<(Vec<f32>, bool)> {
        let dim = self.config.head_dim;
        let (mut added, mut biases, mut any) = (Vec::new(), Vec::new(), false);
        if let Some(norm) = self.config.design.qk_norm {
            let whole = norm.over == QkNormOver::Projection;
            for (name, heads) in norm.names.into_iter().zip([self.config.num_attention_heads, self.config.num_key_value_heads]) {
                let gain = self.source.checkpoint.gain(&self.name(&format!("{name}.weight")), if whole { heads * dim } else { dim })?;
                added.extend(if whole { widen(&gain, dim) } else { gain });
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
        let hidden = c.hidden_size;
        let prefix = format!("model.layers.{l}");
        let at = |rest: &str| format!("{prefix}.{rest}");
        let label = |what: &str| format!("layer {l}'s {what}");
        let norm = |name: Option<&str>| name.map(|name| NormTensors::load(device, checkpoint, &at(name))).transpose();
        let shape = &super::attention_shape(c);
        let attention = Attention { source, config: c, prefix: at("self_attn") };

        let projection = attention.projection(device, &label("projection"))?;
        let (added, bias) = attention.added()?;
        let output = attention.output(device, &label("output projection"))?;
        let norms = &c.design.norms;
        let sinks = c.design.sinks.then(|| checkpoint.f32(&attention.name("sinks"), &[c.num_attention_heads])).transpose()?;
        let output_bias = attention.bias("o_proj.bias", hidden)?.map(|b| Tensor::vector(device, &label("output bias"), &b)).transpose()?;
        Ok(Layer {
            attention_norm: norm(norms.attention)?,
            after_attention: norm(norms.after_attention)?,
            projection,
            added: if added.is_empty() { None } else { Some(device.upload(&label("norms and biases"), &added)?) },
            bias,
            value_groups: device.upload(&label("value groups"), &values::groups(shape, None, false).0)?,
            output,
            output_bias,
            head_sinks: sinks.map(|sinks| device.upload(&label("attention sinks"), &sinks)).transpose()?,
            mlp_norm: norm(norms.mlp)?,
            after_mlp: norm(norms.after_mlp)?,
            feed_forward: FeedForward::load(device, source, l)?,
        })
    }

    /// Its matrices.
    pub fn matrices(&self) -> [&Matrix; 4] {
        let [gate_up, down] = self.feed_forward.matrices();
        [&self.projection, &self.output, gate_up, down]
    }

    /// Bytes of them that one token reads.
    pub fn read_bytes(&self) -> u64 {
        let parts = [&self.projection, &self.output].into_iter().flat_map(|matrix| &matrix.parts);
        parts.map(|part| part.bytes()).sum::<u64>() + self.feed_forward.read_bytes()
    }
}

/// The embedding table, final norm and head.
pub(super) struct Ends {
    pub embedding: Matrix,
    pub final_norm: NormTensors,
    /// `None` where the head is the embedding table.
    pub head: Option<Matrix>,
}

impl Ends {
    pub fn load(device: &Device, source: Source) -> Result<Ends> {
        let c = source.checkpoint.config();
        let shape = [c.vocab_size, c.hidden_size];
        let table = |name: &str| Matrix::of(device, name, &[source.matrix(name, shape)?.rows(c.hidden_size)], c.hidden_size);
        Ok(Ends {
            embedding: table("model.embed_tokens.weight")?,
            final_norm: NormTensors::load(device, source.checkpoint, "model.norm")?,
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
    let (path, head_dim) = (checkpoint.path().to_path_buf(), checkpoint.config().head_dim);
    if let Some(what) = experts::unsupported(checkpoint.config()) {
        return Err(Error::Unsupported { path, message: format!("{what} on a GPU; --device cpu runs it") });
    }
    if head_dim <= 512 {
        return Ok(());
    }
    let message = format!("heads are {head_dim} numbers wide; the GPU kernels take up to 512. --device cpu runs it");
    Err(Error::Unsupported { path, message })
}
