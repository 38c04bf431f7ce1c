//! One layer of the residual stream: attention, then the MLP, with norms before or after each.

use super::Observer;
use super::attention::{Attention, Heads};
use super::cache::Cache;
use super::feed_forward::FeedForward;
use super::linear::{Norm, Source};
use super::rope::Ropes;
use super::weight::Weight;
use crate::Result;
use crate::kv::Call;
use nalgebra::DMatrix;

/// `x ← x + s·after(attention(before(x)))`, then the same with the MLP; norms that a family does
/// not have leave what they are given.
pub(super) struct Layer {
    pub(super) attention_norm: Option<Norm>,
    pub(super) attention: Attention,
    pub(super) after_attention: Option<Norm>,
    pub(super) mlp_norm: Option<Norm>,
    pub(super) mlp: FeedForward,
    pub(super) after_mlp: Option<Norm>,
    /// `s`.
    pub(super) scale: f32,
}

/// A run of tokens through all layers: which they are, what is read, and how keys rotate.
#[derive(Clone, Copy)]
pub(super) struct ForwardPass<'a> {
    pub(super) call: &'a Call,
    pub(super) ropes: &'a Ropes,
}

impl Layer {
    pub(super) fn load(source: Source, index: usize) -> Result<Layer> {
        let checkpoint = source.checkpoint;
        let (hidden, design) = (checkpoint.config().hidden_size, &checkpoint.config().design);
        let norm = |name: Option<&str>| name.map(|name| Norm::load(checkpoint, &format!("model.layers.{index}.{name}"), hidden)).transpose();
        Ok(Layer {
            attention_norm: norm(design.norms.attention)?,
            attention: Attention::load(source, index)?,
            after_attention: norm(design.norms.after_attention)?,
            mlp_norm: norm(design.norms.mlp)?,
            mlp: FeedForward::load(source, &format!("model.layers.{index}.mlp"))?,
            after_mlp: norm(design.norms.after_mlp)?,
            scale: design.residual_scale,
        })
    }

    /// Its matrices.
    pub(super) fn weights(&self) -> impl Iterator<Item = &Weight> {
        let attention = &self.attention;
        let linears = [&attention.query, &attention.key, &attention.value, &attention.output];
        linears.into_iter().chain(self.mlp.linears()).map(|linear| &linear.weight)
    }

    /// Bytes of them that one token reads.
    pub(super) fn read_bytes(&self) -> u64 {
        let all: usize = self.weights().map(|weight| weight.bytes()).sum();
        (all - self.mlp.unread_bytes()) as u64
    }

    /// Runs `x: [hidden, tokens]` through this layer, number `index` of the cache, in place. The
    /// observer is told.
    pub(super) fn apply(&self, x: &mut DMatrix<f32>, index: usize, cache: &mut Cache, pass: ForwardPass, observer: Option<&mut dyn Observer>) {
        let position = pass.call.tokens.start;
        match observer {
            Some(observer) => {
                observer.residual(2 * index, position, x);
                let made = self.attended(x, index, cache, pass, Some(&mut |heads| observer.heads(index, position, heads)));
                self.add(x, made, &self.after_attention);
                observer.residual(2 * index + 1, position, x);
            }
            None => {
                let made = self.attended(x, index, cache, pass, None);
                self.add(x, made, &self.after_attention);
            }
        }
        self.add(x, self.mlp.apply(&before(&self.mlp_norm, x)), &self.after_mlp);
    }

    /// What attention makes of `x`, before it is normalised and added.
    pub(super) fn attended(
        &self,
        x: &DMatrix<f32>,
        index: usize,
        cache: &mut Cache,
        ForwardPass { call, ropes }: ForwardPass,
        look: Option<&mut dyn FnMut(&Heads)>,
    ) -> DMatrix<f32> {
        let position = call.tokens.start;
        let [queries, keys, values] = self.attention.project(&before(&self.attention_norm, x), position, ropes, look);
        cache.append(index, position, &keys, &values);
        cache.code(index, call, true, ropes);
        let columns = cache.read(index, call, &queries, ropes);
        let absorbed = cache.absorbed(index, call, ropes);
        let (attended, received) = self.attention.attend(&queries, position, &columns, absorbed.as_ref());
        cache.accumulate(index, call, columns, &received);
        cache.code(index, call, false, ropes);
        attended
    }

    /// Adds what attention or MLP made to the residual stream.
    pub(super) fn add(&self, x: &mut DMatrix<f32>, made: DMatrix<f32>, after: &Option<Norm>) {
        let mut made = match after {
            Some(norm) => norm.apply(&made),
            None => made,
        };
        if self.scale != 1.0 {
            made *= self.scale;
        }
        *x += made;
    }

    /// The gradient with respect to what attention or MLP made, of which `made` tells, from that
    /// with respect to the residual stream that it was added to.
    pub(super) fn add_backward(&self, gradient: &DMatrix<f32>, after: &Option<Norm>, made: impl FnOnce() -> DMatrix<f32>) -> DMatrix<f32> {
        let gradient = if self.scale == 1.0 { gradient.clone() } else { gradient * self.scale };
        match after {
            Some(norm) => norm.backward(&made(), gradient),
            None => gradient,
        }
    }
}

/// What enters attention or MLP.
pub(super) fn before(norm: &Option<Norm>, x: &DMatrix<f32>) -> DMatrix<f32> {
    norm.as_ref().map_or_else(|| x.clone(), |norm| norm.apply(x))
}

/// The gradient with respect to the residual stream, from that with respect to what
/// [`before`] made of it.
pub(super) fn before_backward(norm: &Option<Norm>, x: &DMatrix<f32>, gradient: DMatrix<f32>) -> DMatrix<f32> {
    match norm {
        Some(norm) => norm.backward(x, gradient),
        None => gradient,
    }
}
