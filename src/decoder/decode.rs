//! The plan of one token: every kernel of every layer, bound once.

use super::Model;
use super::attention::Attention;
use super::coding::Coding;
use super::latents::Latents;
use super::scratch::Buffers;
use crate::Result;
use crate::cache::Cache;
use crate::gpu::Pass;
use crate::kernels::Fusion;
use crate::kernels::argmax::Argmax;
use crate::kernels::embed::Embed;
use crate::kernels::matvec::Matvec;
use crate::kernels::norm::RmsNorm;
use crate::kv::Call;

struct LayerPlan {
    projection: Matvec,
    attention: Attention,
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
    window: Option<usize>,
}

impl DecodePlan {
    pub fn plan(model: &Model, coded: Option<&Latents>, cache: &Cache, b: &Buffers) -> Result<DecodePlan> {
        let (device, c) = (&*model.device, &model.config);
        let norm = |gain| Fusion { norm: Some(RmsNorm { gain, epsilon: c.rms_norm_eps }), ..Default::default() };
        let onto = |bias| Fusion { residual: true, bias, ..Default::default() };
        let layers = model.layers.iter().enumerate().map(|(index, layer)| {
            Ok(LayerPlan {
                projection: Matvec::plan(device, &layer.projection, &b.x, &b.attention.projected, norm(&layer.attention_gain))?,
                attention: Attention::plan(model, index, coded.map(|coded| &coded.layers[index]), cache, b, false)?,
                output: Matvec::plan(device, &layer.output, &b.attention.attended, &b.x, onto(layer.output_bias.as_ref()))?,
                gate_up: Matvec::plan(device, &layer.gate_up, &b.x, &b.gated, Fusion { gated: true, ..norm(&layer.mlp_gain) })?,
                down: Matvec::plan(device, &layer.down, &b.gated, &b.x, onto(None))?,
            })
        });
        let head = model.ends.head.as_ref().unwrap_or(&model.ends.embedding);
        Ok(DecodePlan {
            embed: Embed::plan(device, &model.ends.embedding, &b.tokens, &b.x)?,
            layers: layers.collect::<Result<_>>()?,
            head: Matvec::plan(device, head, &b.x, &b.logits, norm(&model.ends.final_gain))?,
            argmax: Argmax::plan(device, &b.logits, &b.token)?,
            window: c.sliding_window,
        })
    }

    /// The token in `tokens[0]`, that of `call`.
    pub fn record(&self, pass: &mut Pass, coding: &Coding, call: &Call) {
        self.embed.record(pass, 1);
        for (index, layer) in self.layers.iter().enumerate() {
            layer.projection.record(pass);
            layer.attention.prepare(pass, call.tokens.start as u32, 1);
            coding.record(pass, index, call, true);
            layer.attention.attend(pass, 1, self.window, call);
            coding.record(pass, index, call, false);
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
