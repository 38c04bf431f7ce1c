//! One layer of the residual stream: attention, then the gated MLP, each behind an RMSNorm.

use super::Observer;
use super::attention::Attention;
use super::cache::Cache;
use super::linear::{Linear, RmsNorm, Source};
use super::rope::Rope;
use super::weight::Weight;
use crate::Result;
use crate::kv::Call;
use nalgebra::DMatrix;
use rayon::prelude::*;

/// `x ← x + attention(norm(x)); x ← x + mlp(norm(x))`.
pub(super) struct Layer {
    pub(super) attention_norm: RmsNorm,
    pub(super) attention: Attention,
    pub(super) mlp_norm: RmsNorm,
    pub(super) mlp: Mlp,
}

/// A run of tokens through all layers: which they are, what is read, and how keys rotate.
#[derive(Clone, Copy)]
pub(super) struct ForwardPass<'a> {
    pub(super) call: &'a Call,
    pub(super) rope: &'a Rope,
}

impl Layer {
    pub(super) fn load(source: Source, index: usize) -> Result<Layer> {
        let checkpoint = source.checkpoint;
        let hidden = checkpoint.config().hidden_size;
        let name = format!("model.layers.{index}");
        Ok(Layer {
            attention_norm: RmsNorm::load(checkpoint, &format!("{name}.input_layernorm"), hidden)?,
            attention: Attention::load(source, index)?,
            mlp_norm: RmsNorm::load(checkpoint, &format!("{name}.post_attention_layernorm"), hidden)?,
            mlp: Mlp::load(source, &format!("{name}.mlp"))?,
        })
    }

    /// Its matrices.
    pub(super) fn weights(&self) -> [&Weight; 7] {
        let (attention, mlp) = (&self.attention, &self.mlp);
        [&attention.query, &attention.key, &attention.value, &attention.output, &mlp.gate, &mlp.up, &mlp.down].map(|linear| &linear.weight)
    }

    /// Runs `x: [hidden, tokens]` through layer `index`, this one, in place. The observer is told.
    pub(super) fn apply(&self, x: &mut DMatrix<f32>, index: usize, cache: &mut Cache, pass: ForwardPass, observer: Option<&mut dyn Observer>) {
        let ForwardPass { call, rope } = pass;
        let position = call.tokens.start;
        let input = self.attention_norm.apply(x);
        let mut attend = |[queries, keys, values]: [DMatrix<f32>; 3]| {
            cache.append(index, position, &keys, &values);
            cache.code(index, call, true, rope);
            let columns = cache.read(index, call, &queries, rope);
            let (attended, received) = self.attention.attend(&queries, position, &columns);
            cache.accumulate(index, call, &columns, &received);
            cache.code(index, call, false, rope);
            attended
        };
        if let Some(observer) = observer {
            observer.residual(2 * index, position, x);
            *x += attend(self.attention.project(&input, position, rope, Some(&mut |heads| observer.heads(index, position, heads))));
            observer.residual(2 * index + 1, position, x);
        } else {
            *x += attend(self.attention.project(&input, position, rope, None));
        }
        *x += self.mlp.apply(&self.mlp_norm.apply(x));
    }
}

/// `down(silu(gate(x)) · up(x))` (Shazeer, arXiv 2002.05202).
pub(super) struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Mlp {
    fn load(source: Source, name: &str) -> Result<Mlp> {
        let (hidden, inner) = (source.checkpoint.config().hidden_size, source.checkpoint.config().intermediate_size);
        Ok(Mlp {
            gate: Linear::load(source, &format!("{name}.gate_proj"), [inner, hidden], false)?,
            up: Linear::load(source, &format!("{name}.up_proj"), [inner, hidden], false)?,
            down: Linear::load(source, &format!("{name}.down_proj"), [hidden, inner], false)?,
        })
    }

    /// `x: [hidden, tokens]`.
    pub(super) fn apply(&self, x: &DMatrix<f32>) -> DMatrix<f32> {
        let mut inner = self.gate.apply(x);
        inner.zip_apply(&self.up.apply(x), |gate, up| *gate *= up / (1.0 + (-*gate).exp()));
        self.down.apply(&inner)
    }

    /// The gradient with respect to `x`, from that with respect to what [`apply`](Self::apply)
    /// makes of it.
    pub(super) fn backward(&self, x: &DMatrix<f32>, upstream: &DMatrix<f32>) -> DMatrix<f32> {
        let (mut gate, mut up) = (self.gate.apply(x), self.up.apply(x));
        let inner = self.down.backward(upstream);
        gate.as_mut_slice().par_iter_mut().zip(up.as_mut_slice()).zip(inner.as_slice()).with_min_len(1 << 14).for_each(|((gate, up), inner)| {
            let sigmoid = 1.0 / (1.0 + (-*gate).exp());
            let silu = *gate * sigmoid;
            (*gate, *up) = (inner * *up * (sigmoid + silu * (1.0 - sigmoid)), inner * silu);
        });
        self.gate.backward(&gate) + self.up.backward(&up)
    }
}
