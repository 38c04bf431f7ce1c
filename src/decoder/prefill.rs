//! The plan of a chunk of tokens, as a prompt is read: the same attention, matrix products in place
//! of matrix-vector products.

use super::Model;
use super::attention::Attention;
use super::coding::Coding;
use super::latents::Latents;
use super::scratch::Buffers;
use crate::Result;
use crate::cache::Cache;
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
    attention: Attention,
    output: Matmul,
    mlp_norm: Norm,
    gate_up: Matmul,
    down: Matmul,
}

/// Many tokens through the model.
pub(super) struct PrefillPlan {
    embed: Embed,
    layers: Vec<LayerPlan>,
    block: u32,
    window: Option<usize>,
}

impl PrefillPlan {
    pub fn plan(model: &Model, coded: Option<&Latents>, cache: &Cache, b: &Buffers) -> Result<PrefillPlan> {
        let (device, c) = (&*model.device, &model.config);
        let norm = |gain| Norm::plan(device, &b.x, RmsNorm { gain, epsilon: c.rms_norm_eps }, &b.normed);
        let layers = model.layers.iter().enumerate().map(|(index, layer)| {
            let onto = |bias| Fusion { residual: true, bias, ..Default::default() };
            let gated = Fusion { gated: true, ..Default::default() };
            Ok(LayerPlan {
                attention_norm: norm(&layer.attention_gain)?,
                projection: Matmul::plan(device, &layer.projection, &b.normed, &b.attention.projected, Fusion::default())?,
                attention: Attention::plan(model, index, coded.map(|coded| &coded.layers[index]), cache, b, true)?,
                output: Matmul::plan(device, &layer.output, &b.attention.attended, &b.x, onto(layer.output_bias.as_ref()))?,
                mlp_norm: norm(&layer.mlp_gain)?,
                gate_up: Matmul::plan(device, &layer.gate_up, &b.normed, &b.gated, gated)?,
                down: Matmul::plan(device, &layer.down, &b.gated, &b.x, onto(None))?,
            })
        });
        Ok(PrefillPlan {
            embed: Embed::plan(device, &model.ends.embedding, &b.tokens, &b.x)?,
            layers: layers.collect::<Result<_>>()?,
            block: b.block as u32,
            window: c.sliding_window,
        })
    }

    /// The tokens in `tokens`, those of `call`, through some of the layers.
    ///
    /// The first of them begins with the embedding.
    pub fn record(&self, pass: &mut Pass, layers: Range<usize>, coding: &Coding, call: &Call) {
        let (first, tokens) = (call.tokens.start as u32, call.tokens.len() as u32);
        if layers.start == 0 {
            self.embed.record(pass, tokens);
        }
        for index in layers {
            let layer = &self.layers[index];
            layer.attention_norm.record(pass, tokens);
            layer.projection.record(pass, tokens);
            layer.attention.prepare(pass, first, tokens);
            coding.record(pass, index, call, true);
            layer.attention.attend(pass, self.block, self.window, call);
            coding.record(pass, index, call, false);
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
    pub fn plan(model: &Model, b: &Buffers, tokens: usize) -> Result<AllLogits> {
        let (device, c) = (&*model.device, &model.config);
        let row = c.vocab_size as u64 * 4;
        let tokens = tokens.min((device.max_binding() / row) as usize).max(1);
        let logits = Tensor::zeroed(device, "logits of a chunk", ElementType::F32, Shape::dense(tokens, c.vocab_size))?;
        let head = model.ends.head.as_ref().unwrap_or(&model.ends.embedding);
        Ok(AllLogits {
            norm: Norm::plan(device, &b.x, RmsNorm { gain: &model.ends.final_gain, epsilon: c.rms_norm_eps }, &b.normed)?,
            head: Matmul::plan(device, head, &b.normed, &logits, Fusion::default())?,
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
