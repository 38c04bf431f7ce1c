//! The plan of one token: every kernel of every layer that no cache belongs to, bound once for all
//! sequences of a model.

use super::Model;
use super::attention::AttentionPlan;
use super::coding::Coding;
use super::scratch::Scratch;
use crate::Result;
use crate::gpu::Pass;
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

/// One token through the model.
pub(super) struct DecodePlan {
    embed: Embed,
    layers: Vec<LayerPlan>,
    head: Matvec,
    argmax: Argmax,
}

impl DecodePlan {
    pub fn plan(model: &Model, s: &Scratch) -> Result<DecodePlan> {
        let (device, c) = (&*model.device, &model.config);
        let norm = |gain| Fusion { norm: Some(RmsNorm { gain, epsilon: c.rms_norm_eps }), ..Default::default() };
        let onto = |bias| Fusion { residual: true, bias, ..Default::default() };
        let layers = model.layers.iter().map(|layer| {
            Ok(LayerPlan {
                projection: Matvec::plan(device, &layer.projection, &s.x, &s.attention.projected, norm(&layer.attention_gain))?,
                output: Matvec::plan(device, &layer.output, &s.attention.attended, &s.x, onto(layer.output_bias.as_ref()))?,
                gate_up: Matvec::plan(device, &layer.gate_up, &s.x, &s.gated, Fusion { gated: true, ..norm(&layer.mlp_gain) })?,
                down: Matvec::plan(device, &layer.down, &s.gated, &s.x, onto(None))?,
            })
        });
        let head = model.ends.head();
        Ok(DecodePlan {
            embed: Embed::plan(device, &model.ends.embedding, &s.tokens, &s.x)?,
            layers: layers.collect::<Result<_>>()?,
            head: Matvec::plan(device, head, &s.x, &s.logits, norm(&model.ends.final_gain))?,
            argmax: Argmax::plan(device, &s.logits, &s.token)?,
        })
    }

    /// The token in `tokens[0]`, that of `call`, which attends as `attention` says.
    pub fn record(&self, pass: &mut Pass, attention: &AttentionPlan, coding: &Coding, call: &Call) {
        self.embed.record(pass, 1);
        for (index, layer) in self.layers.iter().enumerate() {
            layer.projection.record(pass);
            attention.record(pass, index, coding, call);
            layer.output.record(pass);
            layer.gate_up.record(pass);
            layer.down.record(pass);
        }
        self.end(pass);
    }

    /// What follows the last layer: logits, and the largest.
    pub fn end(&self, pass: &mut Pass) {
        self.head.record(pass);
        self.argmax.record(pass);
    }
}
