//! What stands around a layer's products, as the family has it: norms, activation, scales.

use super::Model;
use super::feed_forward::MlpTensors;
use super::scratch::Scratch;
use super::weights::NormTensors;
use crate::Result;
use crate::checkpoint::{self, NormKind};
use crate::gpu::Tensor;
use crate::kernels::embed::Embed;
use crate::kernels::norm::{More, Norm, RmsNorm};
use crate::kernels::{Activation, Fusion};

/// A model's, between the buffers of its scratch.
#[derive(Clone, Copy)]
pub(super) struct Norms<'a> {
    pub model: &'a Model,
    pub s: &'a Scratch,
}

impl<'a> Norms<'a> {
    /// Whether a product of one token can take the norm before it along.
    pub fn fuses(&self) -> bool {
        self.model.config.design.norm == NormKind::Rms
    }

    /// A norm that a product takes along.
    pub fn rms<'b>(&self, norm: &'b NormTensors) -> RmsNorm<'b> {
        RmsNorm { gain: &norm.gain, epsilon: self.model.config.norm_eps }
    }

    /// From the residual stream into `normed`.
    pub fn before(&self, norm: &NormTensors) -> Result<Norm> {
        let more = More { centred: !self.fuses(), bias: norm.bias.as_ref(), onto: None };
        Norm::plan(&self.model.device, &self.s.x, self.rms(norm), more, &self.s.normed)
    }

    /// From `normed`, which what attention or MLP made has been written to, onto the residual
    /// stream.
    pub fn after(&self, norm: Option<&NormTensors>) -> Result<Option<Norm>> {
        let plan = |norm: &NormTensors| {
            let more = More { centred: !self.fuses(), bias: norm.bias.as_ref(), onto: Some(self.model.config.design.residual_scale) };
            Norm::plan(&self.model.device, &self.s.normed, self.rms(norm), more, &self.s.x)
        };
        norm.map(plan).transpose()
    }

    /// How the last product of attention or MLP ends, and where: on the residual stream, or where
    /// `after` takes it up.
    pub fn onto(&self, after: Option<&NormTensors>, bias: Option<&'a Tensor>) -> (Fusion<'a>, &'a Tensor) {
        let scale = self.model.config.design.residual_scale;
        match after {
            Some(_) => (Fusion { bias, ..Default::default() }, &self.s.normed),
            None => (Fusion { residual: true, bias, scale: (scale != 1.0).then_some(scale), ..Default::default() }, &self.s.x),
        }
    }

    /// The activation of the family's MLPs.
    pub fn activation(&self) -> Activation {
        match self.model.config.design.mlp.activation {
            checkpoint::Activation::Silu => Activation::Silu,
            checkpoint::Activation::Gelu => Activation::Gelu,
            checkpoint::Activation::GeluTanh => Activation::GeluTanh,
            checkpoint::Activation::Relu2 => Activation::Relu2,
        }
    }

    /// How the first product of an MLP ends.
    pub fn inner(&self, mlp: &'a MlpTensors) -> Fusion<'a> {
        let gated = self.model.config.design.mlp.gate.is_some();
        Fusion { gated, activation: Some(self.activation()), bias: mlp.gate_up_bias.as_ref(), ..Default::default() }
    }

    /// How the head ends.
    pub fn logits(&self) -> Fusion<'a> {
        let design = &self.model.config.design;
        Fusion { scale: (design.logit_scale != 1.0).then_some(design.logit_scale), cap: design.logit_cap, ..Default::default() }
    }

    /// From tokens to the residual stream.
    pub fn embed(&self) -> Result<Embed> {
        let (model, s) = (self.model, self.s);
        Embed::plan(&model.device, &model.ends.embedding, &s.tokens, &s.x, model.config.design.embedding_scale)
    }
}
