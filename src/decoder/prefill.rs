//! The plan of a chunk of tokens, as a prompt is read: matrix products in place of matrix-vector
//! products, bound once for all sequences of a model.

use super::Model;
use super::attention::AttentionPlan;
use super::coding::Coding;
use super::scratch::Scratch;
use crate::Result;
use crate::gpu::{ElementType, Pass, Shape, Tensor};
use crate::kernels::Fusion;
use crate::kernels::embed::Embed;
use crate::kernels::matmul::Matmul;
use crate::kernels::norm::{Norm, RmsNorm};
use crate::kv::Call;
use std::ops::Range;

struct LayerPlan {
    attention_norm: Norm,
    projection: Matmul,
    output: Matmul,
    mlp_norm: Norm,
    gate_up: Matmul,
    down: Matmul,
}

/// Many tokens through the model.
pub(super) struct PrefillPlan {
    embed: Embed,
    layers: Vec<LayerPlan>,
}

impl PrefillPlan {
    pub fn plan(model: &Model, s: &Scratch) -> Result<PrefillPlan> {
        let (device, c) = (&*model.device, &model.config);
        let norm = |gain| Norm::plan(device, &s.x, RmsNorm { gain, epsilon: c.rms_norm_eps }, &s.normed);
        let layers = model.layers.iter().map(|layer| {
            let onto = |bias| Fusion { residual: true, bias, ..Default::default() };
            let gated = Fusion { gated: true, ..Default::default() };
            Ok(LayerPlan {
                attention_norm: norm(&layer.attention_gain)?,
                projection: Matmul::plan(device, &layer.projection, &s.normed, &s.attention.projected, Fusion::default())?,
                output: Matmul::plan(device, &layer.output, &s.attention.attended, &s.x, onto(layer.output_bias.as_ref()))?,
                mlp_norm: norm(&layer.mlp_gain)?,
                gate_up: Matmul::plan(device, &layer.gate_up, &s.normed, &s.gated, gated)?,
                down: Matmul::plan(device, &layer.down, &s.gated, &s.x, onto(None))?,
            })
        });
        Ok(PrefillPlan { embed: Embed::plan(device, &model.ends.embedding, &s.tokens, &s.x)?, layers: layers.collect::<Result<_>>()? })
    }

    /// The tokens in `tokens`, those of `call`, through some of the layers.
    ///
    /// The first of them begins with the embedding.
    pub fn record(&self, pass: &mut Pass, layers: Range<usize>, (attention, coding): (&AttentionPlan, &Coding), call: &Call) {
        let tokens = call.tokens.len() as u32;
        if layers.start == 0 {
            self.embed.record(pass, tokens);
        }
        for index in layers {
            let layer = &self.layers[index];
            layer.attention_norm.record(pass, tokens);
            layer.projection.record(pass, tokens);
            attention.record(pass, index, coding, call);
            layer.output.record(pass, tokens);
            layer.mlp_norm.record(pass, tokens);
            layer.gate_up.record(pass, tokens);
            layer.down.record(pass, tokens);
        }
    }
}

/// Logits after every token of a chunk: final norm and head. Planned the first time that they are
/// asked for, since only evaluation does.
pub(super) struct AllLogits {
    norm: Norm,
    head: Matmul,
    /// `[tokens][vocab]` f32.
    pub logits: Tensor,
    pub readback: wgpu::Buffer,
    /// The most tokens that fit into one buffer.
    pub tokens: usize,
}

impl AllLogits {
    pub fn plan(model: &Model, s: &Scratch, tokens: usize) -> Result<AllLogits> {
        let (device, c) = (&*model.device, &model.config);
        let row = c.vocab_size as u64 * 4;
        let tokens = tokens.min((device.max_binding() / row) as usize).max(1);
        let logits = Tensor::zeroed(device, "logits of a chunk", ElementType::F32, Shape::dense(tokens, c.vocab_size))?;
        let head = model.ends.head();
        Ok(AllLogits {
            norm: Norm::plan(device, &s.x, RmsNorm { gain: &model.ends.final_gain, epsilon: c.rms_norm_eps }, &s.normed)?,
            head: Matmul::plan(device, head, &s.normed, &logits, Fusion::default())?,
            readback: device.readback("logits of a chunk", tokens as u64 * row)?,
            logits,
            tokens,
        })
    }

    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        self.norm.record(pass, tokens);
        self.head.record(pass, tokens);
    }
}
