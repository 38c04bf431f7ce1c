//! The plan of a chunk of tokens, as a prompt is read: matrix products in place of matrix-vector
//! products, bound once for all sequences of a model.

use super::Model;
use super::attention::AttentionPlan;
use super::coding::Coding;
use super::expert_plan::ExpertsPlan;
use super::feed_forward::FeedForward;
use super::norms::Norms;
use super::scratch::Scratch;
use super::weights::NormTensors;
use crate::Result;
use crate::gpu::{ElementType, Pass, Shape, Tensor};
use crate::kernels::Fusion;
use crate::kernels::embed::Embed;
use crate::kernels::matmul::Matmul;
use crate::kernels::norm::Norm;
use crate::kv::Call;
use std::ops::Range;

struct LayerPlan {
    attention_norm: Option<Norm>,
    projection: Matmul,
    output: Matmul,
    after_attention: Option<Norm>,
    feed_forward: FeedForwardPlan,
    after_mlp: Option<Norm>,
}

/// As a step's, but that experts take tokens one by one.
enum FeedForwardPlan {
    Mlp { norm: Option<Norm>, gate_up: Matmul, down: Matmul },
    Experts(Box<ExpertsPlan>),
}

/// Many tokens through the model.
pub(super) struct PrefillPlan {
    embed: Embed,
    layers: Vec<LayerPlan>,
}

impl PrefillPlan {
    pub fn plan(model: &Model, s: &Scratch) -> Result<PrefillPlan> {
        let (device, norms) = (&*model.device, Norms { model, s });
        let layers = model.layers.iter().map(|layer| {
            // What a norm has made, or the residual stream itself.
            let input = |norm: &Option<NormTensors>| if norm.is_some() { &s.normed } else { &s.x };
            let before = |norm: &Option<NormTensors>| norm.as_ref().map(|norm| norms.before(norm)).transpose();
            let (onto_attention, attention_out) = norms.onto(layer.after_attention.as_ref(), layer.output_bias.as_ref());
            let feed_forward = match &layer.feed_forward {
                FeedForward::Experts(experts) => FeedForwardPlan::Experts(Box::new(ExpertsPlan::plan(norms, layer.mlp_norm.as_ref(), experts)?)),
                FeedForward::Mlp(mlp) => {
                    let (onto, out) = norms.onto(layer.after_mlp.as_ref(), mlp.down_bias.as_ref());
                    FeedForwardPlan::Mlp {
                        norm: before(&layer.mlp_norm)?,
                        gate_up: Matmul::plan(device, &mlp.gate_up, input(&layer.mlp_norm), &s.gated, norms.inner(mlp))?,
                        down: Matmul::plan(device, &mlp.down, &s.gated, out, onto)?,
                    }
                }
            };
            Ok(LayerPlan {
                attention_norm: before(&layer.attention_norm)?,
                projection: Matmul::plan(device, &layer.projection, input(&layer.attention_norm), &s.attention.projected, Fusion::default())?,
                output: Matmul::plan(device, &layer.output, &s.attention.attended, attention_out, onto_attention)?,
                after_attention: norms.after(layer.after_attention.as_ref())?,
                feed_forward,
                after_mlp: norms.after(layer.after_mlp.as_ref())?,
            })
        });
        Ok(PrefillPlan { embed: norms.embed()?, layers: layers.collect::<Result<_>>()? })
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
            let norm = |pass: &mut Pass, norm: &Option<Norm>| norm.iter().for_each(|norm| norm.record(pass, tokens));
            norm(pass, &layer.attention_norm);
            layer.projection.record(pass, tokens);
            attention.record(pass, index, coding, call);
            layer.output.record(pass, tokens);
            norm(pass, &layer.after_attention);
            match &layer.feed_forward {
                FeedForwardPlan::Experts(experts) => experts.record(pass, tokens),
                FeedForwardPlan::Mlp { norm: before, gate_up, down } => {
                    norm(pass, before);
                    gate_up.record(pass, tokens);
                    down.record(pass, tokens);
                }
            }
            norm(pass, &layer.after_mlp);
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
        let (device, c, norms) = (&*model.device, &model.config, Norms { model, s });
        let row = c.vocab_size as u64 * 4;
        let tokens = tokens.min((device.max_binding() / row) as usize).max(1);
        let logits = Tensor::zeroed(device, "logits of a chunk", ElementType::F32, Shape::dense(tokens, c.vocab_size))?;
        let head = model.ends.head();
        Ok(AllLogits {
            norm: norms.before(&model.ends.final_norm)?,
            head: Matmul::plan(device, head, &s.normed, &logits, norms.logits())?,
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
