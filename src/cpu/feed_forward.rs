//! What stands behind attention in a layer: an MLP, or a mixture of them.

use super::experts::Experts;
use super::linear::{Linear, Source};
use super::mlp::Mlp;
use crate::Result;
use nalgebra::DMatrix;

/// One MLP, or experts.
pub(super) enum FeedForward {
    Mlp(Box<Mlp>),
    Experts(Box<Experts>),
}

impl FeedForward {
    pub(super) fn load(source: Source, name: &str) -> Result<FeedForward> {
        let config = source.checkpoint.config();
        Ok(match &config.design.experts {
            None => FeedForward::Mlp(Box::new(Mlp::load(source, name, config.intermediate_size)?)),
            Some(spec) => FeedForward::Experts(Box::new(Experts::load(source, name, spec)?)),
        })
    }

    /// `x: [hidden, tokens]`.
    pub(super) fn apply(&self, x: &DMatrix<f32>) -> DMatrix<f32> {
        match self {
            FeedForward::Mlp(mlp) => mlp.apply(x),
            FeedForward::Experts(experts) => experts.apply(x),
        }
    }

    /// The gradient with respect to `x`, from that with respect to what [`apply`](Self::apply)
    /// makes of it.
    pub(super) fn backward(&self, x: &DMatrix<f32>, upstream: &DMatrix<f32>) -> DMatrix<f32> {
        match self {
            FeedForward::Mlp(mlp) => mlp.backward(x, upstream),
            FeedForward::Experts(experts) => experts.backward(x, upstream),
        }
    }

    /// Bytes of those experts that a token does not go through.
    pub(super) fn unread_bytes(&self) -> usize {
        match self {
            FeedForward::Mlp(_) => 0,
            FeedForward::Experts(experts) => experts.unread_bytes(),
        }
    }

    /// Its linear maps.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        match self {
            FeedForward::Mlp(mlp) => mlp.linears().collect(),
            FeedForward::Experts(experts) => experts.linears().collect(),
        }
    }
}
