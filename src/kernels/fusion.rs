//! What projections do beside the product, before or after it, and what they are bound to.

use super::norm::RmsNorm;
use crate::gpu::{Access, ElementType, Matrix, Part, Tensor, WeightType};

/// What a projection does beside the product.
#[derive(Clone, Copy, Default)]
pub(crate) struct Fusion<'a> {
    /// Before it, of one token: many are normalised by [`super::norm`].
    pub norm: Option<RmsNorm<'a>>,
    /// The matrix' rows are pairs of gate and up: `σ(gate) · up` is written.
    pub gated: bool,
    /// `σ`; without pairs it is done to every number.
    pub activation: Option<Activation>,
    /// What numbers are multiplied by after bias and activation.
    pub scale: Option<f32>,
    /// `c` of `c·tanh(y / c)`, which is done after that.
    pub cap: Option<f32>,
    /// Added to what is there.
    pub residual: bool,
    /// A bias, `[rows]`; not with a norm.
    pub bias: Option<&'a Tensor>,
}

/// What an MLP makes of a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    /// `x / (1 + exp(−x))`.
    Silu,
    /// `x·Φ(x)`.
    Gelu,
    /// Its approximation by a tanh.
    GeluTanh,
    /// `max(x, 0)²`.
    Relu2,
}

impl Activation {
    pub(super) fn flag(self) -> &'static str {
        match self {
            Activation::Silu => "SILU",
            Activation::Gelu => "GELU",
            Activation::GeluTanh => "GELU_TANH",
            Activation::Relu2 => "RELU2",
        }
    }
}

impl Fusion<'_> {
    /// The flags that both projection shaders know.
    pub(super) fn flags(&self) -> Vec<&'static str> {
        let pairs = [(self.norm.is_some(), "NORM"), (self.gated, "GATED"), (self.residual, "RESIDUAL"), (self.bias.is_some(), "BIAS")];
        let mut flags: Vec<_> = pairs.into_iter().filter_map(|(on, flag)| on.then_some(flag)).collect();
        // The gate of most families, without a bias, is what the shaders have without more words.
        let usual = self.gated && self.bias.is_none() && self.activation.is_none_or(|activation| activation == Activation::Silu);
        let activation = if self.gated { Some(self.activation.unwrap_or(Activation::Silu)) } else { self.activation };
        if let Some(activation) = activation.filter(|_| !usual) {
            flags.push(activation.flag());
        }
        let more = [(!self.gated && self.activation.is_some(), "ACTIVATED"), (self.scale.is_some(), "SCALED"), (self.cap.is_some(), "CAPPED")];
        let before = flags.len();
        flags.extend(more.into_iter().filter_map(|(on, flag)| on.then_some(flag)));
        if flags.len() > before || activation.is_some() && !usual {
            flags.push("MORE");
        }
        flags
    }

    /// What the shaders have for [`scale`](Self::scale) and [`cap`](Self::cap).
    pub(super) fn numbers(&self) -> [f32; 2] {
        [self.scale.unwrap_or(1.0), self.cap.unwrap_or(1.0)]
    }

    /// Holds everything against the weights.
    ///
    /// `x`: `[n][cols]`; `out`: `[n][rows]`, or half of that where gated. All f32.
    pub(super) fn check(&self, kernel: &str, weights: &Matrix, x: &Tensor, out: &Tensor) {
        x.expect_padded(kernel, ElementType::F32, weights.cols);
        out.expect(kernel, ElementType::F32, weights.rows / if self.gated { 2 } else { 1 });
        assert!(self.norm.is_none() || self.bias.is_none(), "{kernel}: {x} is normalised and {out} has a bias");
        if let Some(RmsNorm { gain, .. }) = self.norm {
            gain.expect_padded(kernel, ElementType::F32, weights.cols);
        }
        if let Some(bias) = self.bias {
            bias.expect(kernel, ElementType::F32, weights.rows);
        }
    }

    /// What [`bindings`] are bound to.
    pub(super) fn buffers<'a>(&'a self, part: &'a Part, x: &'a Tensor, out: &'a Tensor) -> Vec<&'a wgpu::Buffer> {
        let mut buffers: Vec<&wgpu::Buffer> = vec![&part.weights, x, out];
        buffers.extend(self.norm.map(|norm| &**norm.gain));
        buffers.extend(self.bias.map(|bias| &**bias));
        buffers.extend(part.beside.iter().map(|plane| &**plane));
        buffers
    }
}

/// Weights, input, output, what is multiplied or added besides, and what is beside the weights.
pub(super) fn bindings(weights: WeightType, flags: &[&'static str]) -> Vec<(u32, Access)> {
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Write)];
    if flags.contains(&"NORM") || flags.contains(&"BIAS") {
        bindings.push((3, Access::Read));
    }
    bindings.extend((4..4 + weights.beside()).map(|binding| (binding, Access::Read)));
    bindings
}
