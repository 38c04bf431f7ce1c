//! The plan of one token, or of a few: every kernel of every layer that no cache belongs to, bound
//! once for all sequences of a model.

use super::Model;
use super::attention::AttentionPlan;
use super::coding::Coding;
use super::scratch::Scratch;
use crate::Result;
use crate::gpu::{Pass, Tensor};
use crate::kernels::Fusion;
use crate::kernels::argmax::Argmax;
use crate::kernels::embed::Embed;
use crate::kernels::matvec::Matvec;
use crate::kernels::norm::RmsNorm;
use crate::kv::Call;

struct LayerPlan {
    projection: Matvec,
    output: Matvec,
    gate_up: Matvec,
    down: Matvec,
}

/// A token, or a few, through the model, by matrix-vector products.
pub(super) struct DecodePlan {
    embed: Embed,
    layers: Vec<LayerPlan>,
    head: Matvec,
    argmax: Argmax,
}

impl DecodePlan {
    /// For up to `columns` tokens, whose logits and likeliest next ones are left in these tensors,
    /// f32 `[columns][vocab]` and u32 `[columns][1]`.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu) where the driver refuses a kernel.
    pub fn plan(model: &Model, s: &Scratch, [logits, found]: [&Tensor; 2], columns: u32) -> Result<DecodePlan> {
        let (device, c) = (&*model.device, &model.config);
        let norm = |gain| Fusion { norm: Some(RmsNorm { gain, epsilon: c.rms_norm_eps }), ..Default::default() };
        let onto = |bias| Fusion { residual: true, bias, ..Default::default() };
        let layers = model.layers.iter().map(|layer| {
            Ok(LayerPlan {
                projection: Matvec::plan(device, &layer.projection, &s.x, &s.attention.projected, norm(&layer.attention_gain), columns)?,
                output: Matvec::plan(device, &layer.output, &s.attention.attended, &s.x, onto(layer.output_bias.as_ref()), columns)?,
                gate_up: Matvec::plan(device, &layer.gate_up, &s.x, &s.gated, Fusion { gated: true, ..norm(&layer.mlp_gain) }, columns)?,
                down: Matvec::plan(device, &layer.down, &s.gated, &s.x, onto(None), columns)?,
            })
        });
        let head = model.ends.head();
        Ok(DecodePlan {
            embed: Embed::plan(device, &model.ends.embedding, &s.tokens, &s.x)?,
            layers: layers.collect::<Result<_>>()?,
            head: Matvec::plan(device, head, &s.x, logits, norm(&model.ends.final_gain), columns)?,
            argmax: Argmax::plan(device, logits, found, Some((&s.attention.queries, s.attention.record)))?,
        })
    }

    /// The tokens in `tokens`, those of `call`, which attend as `attention` says.
    pub fn record(&self, pass: &mut Pass, attention: &AttentionPlan, coding: &Coding, call: &Call) {
        let tokens = call.tokens.len() as u32;
        self.embed.record(pass, tokens);
        for (index, layer) in self.layers.iter().enumerate() {
            layer.projection.record(pass, tokens);
            attention.record(pass, index, coding, call);
            layer.output.record(pass, tokens);
            layer.gate_up.record(pass, tokens);
            layer.down.record(pass, tokens);
        }
        self.end(pass, tokens);
    }

    /// What follows the last layer: logits, and the largest.
    pub fn end(&self, pass: &mut Pass, tokens: u32) {
        self.head.record(pass, tokens);
        self.argmax.record(pass, tokens);
    }
}
