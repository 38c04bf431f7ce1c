//! The plan of one token, or of a few: every kernel of every layer that no cache belongs to, bound
//! once for all sequences of a model.

use super::Model;
use super::attention::AttentionPlan;
use super::coding::Coding;
use super::expert_plan::ExpertsPlan;
use super::feed_forward::FeedForward;
use super::norms::Norms;
use super::scratch::Scratch;
use super::weights::NormTensors;
use crate::Result;
use crate::gpu::{Pass, Tensor};
use crate::kernels::Fusion;
use crate::kernels::argmax::Argmax;
use crate::kernels::embed::Embed;
use crate::kernels::matvec::Matvec;
use crate::kernels::norm::Norm;
use crate::kv::Call;

struct LayerPlan {
    attention_norm: Option<Norm>,
    projection: Matvec,
    output: Matvec,
    after_attention: Option<Norm>,
    feed_forward: FeedForwardPlan,
    after_mlp: Option<Norm>,
}

/// From the residual stream, and onto it but for a norm behind it.
enum FeedForwardPlan {
    Mlp { norm: Option<Norm>, gate_up: Matvec, down: Matvec },
    Experts(Box<ExpertsPlan>),
}

/// A token, or a few, through the model, by matrix-vector products.
pub(super) struct DecodePlan {
    embed: Embed,
    layers: Vec<LayerPlan>,
    final_norm: Option<Norm>,
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
        let (device, norms) = (&*model.device, Norms { model, s });
        // A product takes RMSNorm along; another norm, or one beside a bias, is done before it.
        let normed = |norm: Option<&NormTensors>, matrix, out, fusion: Fusion| {
            let apart = norm.filter(|_| fusion.bias.is_some() || !norms.fuses());
            let fused = norm.filter(|_| apart.is_none()).map(|norm| norms.rms(norm));
            let from = if apart.is_some() { &s.normed } else { &s.x };
            let product = Matvec::plan(device, matrix, from, out, Fusion { norm: fused, ..fusion }, columns)?;
            Ok::<_, crate::Error>((apart.map(|norm| norms.before(norm)).transpose()?, product))
        };
        let layers = model.layers.iter().map(|layer| {
            let (attention_norm, projection) = normed(layer.attention_norm.as_ref(), &layer.projection, &s.attention.projected, Fusion::default())?;
            let (onto_attention, attention_out) = norms.onto(layer.after_attention.as_ref(), layer.output_bias.as_ref());
            let feed_forward = match &layer.feed_forward {
                FeedForward::Experts(experts) => FeedForwardPlan::Experts(Box::new(ExpertsPlan::plan(norms, layer.mlp_norm.as_ref(), experts)?)),
                FeedForward::Mlp(mlp) => {
                    let (norm, gate_up) = normed(layer.mlp_norm.as_ref(), &mlp.gate_up, &s.gated, norms.inner(mlp))?;
                    let (onto, out) = norms.onto(layer.after_mlp.as_ref(), mlp.down_bias.as_ref());
                    FeedForwardPlan::Mlp { norm, gate_up, down: Matvec::plan(device, &mlp.down, &s.gated, out, onto, columns)? }
                }
            };
            Ok(LayerPlan {
                attention_norm,
                projection,
                output: Matvec::plan(device, &layer.output, &s.attention.attended, attention_out, onto_attention, columns)?,
                after_attention: norms.after(layer.after_attention.as_ref())?,
                feed_forward,
                after_mlp: norms.after(layer.after_mlp.as_ref())?,
            })
        });
        let (final_norm, head) = normed(Some(&model.ends.final_norm), model.ends.head(), logits, norms.logits())?;
        Ok(DecodePlan {
            embed: norms.embed()?,
            layers: layers.collect::<Result<_>>()?,
            final_norm,
            head,
            argmax: Argmax::plan(device, logits, found, Some((&s.attention.queries, s.attention.record)))?,
        })
    }

    /// The tokens in `tokens`, those of `call`, which attend as `attention` says.
    pub fn record(&self, pass: &mut Pass, attention: &AttentionPlan, coding: &Coding, call: &Call) {
        let tokens = call.tokens.len() as u32;
        self.embed.record(pass, tokens);
        for (index, layer) in self.layers.iter().enumerate() {
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
        self.end(pass, tokens);
    }

    /// What follows the last layer: logits, and the largest.
    pub fn end(&self, pass: &mut Pass, tokens: u32) {
        self.final_norm.iter().for_each(|norm| norm.record(pass, tokens));
        self.head.record(pass, tokens);
        self.argmax.record(pass, tokens);
    }
}
