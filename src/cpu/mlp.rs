//! An MLP.

use super::activation::{activate, clamped_swiglu};
use super::linear::{Linear, Source};
use crate::Result;
use crate::checkpoint::{Activation, ClampedSwiglu};
use nalgebra::DMatrix;
use rayon::prelude::*;

/// `down(σ(gate(x)) · up(x))` (Shazeer, arXiv 2002.05202), or without a gate `down(σ(up(x)))`.
pub(super) struct Mlp {
    activation: Activation,
    swiglu: Option<ClampedSwiglu>,
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
}

impl Mlp {
    /// With so many numbers between its matrices.
    pub(super) fn load(source: Source, name: &str, inner: usize) -> Result<Mlp> {
        let config = source.checkpoint.config();
        let (hidden, spec) = (config.hidden_size, config.design.mlp);
        let linear = |part: &str, shape| Linear::load(source, &format!("{name}.{part}"), shape, spec.bias);
        Ok(Mlp {
            activation: spec.activation,
            swiglu: config.design.experts.and_then(|experts| experts.swiglu),
            gate: spec.gate.map(|gate| linear(gate, [inner, hidden])).transpose()?,
            up: linear(spec.up, [inner, hidden])?,
            down: linear(spec.down, [hidden, inner])?,
        })
    }

    /// Its linear maps.
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        [&self.up, &self.down].into_iter().chain(&self.gate)
    }

    /// What gate and up become, and its slopes with respect to both.
    fn gated(&self, gate: f32, up: f32) -> (f32, [f32; 2]) {
        match self.swiglu {
            Some(spec) => clamped_swiglu(spec, gate, up),
            None => {
                let (activated, slope) = activate(self.activation, gate);
                (activated * up, [up * slope, activated])
            }
        }
    }

    /// `x: [hidden, tokens]`.
    pub(super) fn apply(&self, x: &DMatrix<f32>) -> DMatrix<f32> {
        let (mut inner, activation) = (self.up.apply(x), self.activation);
        match &self.gate {
            Some(gate) => inner.zip_apply(&gate.apply(x), |up, gate| *up = self.gated(gate, *up).0),
            None => inner.apply(|x| *x = activate(activation, *x).0),
        }
        self.down.apply(&inner)
    }

    /// The gradient with respect to `x`, from that with respect to what [`apply`](Self::apply)
    /// makes of it.
    pub(super) fn backward(&self, x: &DMatrix<f32>, upstream: &DMatrix<f32>) -> DMatrix<f32> {
        let (mut up, activation) = (self.up.apply(x), self.activation);
        let inner = self.down.backward(upstream);
        let Some(gate_map) = &self.gate else {
            up.zip_apply(&inner, |up, inner| *up = inner * activate(activation, *up).1);
            return self.up.backward(&up);
        };
        let mut gate = gate_map.apply(x);
        gate.as_mut_slice().par_iter_mut().zip(up.as_mut_slice()).zip(inner.as_slice()).with_min_len(1 << 14).for_each(|((gate, up), inner)| {
            let [by_gate, by_up] = self.gated(*gate, *up).1;
            (*gate, *up) = (inner * by_gate, inner * by_up);
        });
        gate_map.backward(&gate) + self.up.backward(&up)
    }
}
