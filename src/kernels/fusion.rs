//! What projections do beside the product, before or after it, and what they are bound to.

use super::norm::RmsNorm;
use crate::gpu::{Access, ElementType, Matrix, Part, Tensor, WeightType};

/// What a projection does beside the product.
#[derive(Clone, Copy, Default)]
pub(crate) struct Fusion<'a> {
    /// Before it, of one token: many are normalised by [`super::norm`].
    pub norm: Option<RmsNorm<'a>>,
    /// The matrix' rows are pairs of gate and up: `silu(gate) · up` is written.
    pub gated: bool,
    /// Added to what is there.
    pub residual: bool,
    /// A bias, `[rows]`; not with a norm.
    pub bias: Option<&'a Tensor>,
}

impl Fusion<'_> {
    /// The flags that both projection shaders know.
    pub(super) fn flags(&self) -> Vec<&'static str> {
        let pairs = [(self.norm.is_some(), "NORM"), (self.gated, "GATED"), (self.residual, "RESIDUAL"), (self.bias.is_some(), "BIAS")];
        pairs.into_iter().filter_map(|(on, flag)| on.then_some(flag)).collect()
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
