//! What follows the projection of queries and of keys: their norm where the family has one, RoPE,
//! and what queries are scaled by.
//!
//! Scores are `q·k/√head_dim` everywhere else: a family that scales them otherwise scales its
//! queries ([`Config::query_scales`]).

use super::linear::Norm;
use super::rope::{Rope, Ropes};
use crate::Result;
use crate::checkpoint::{Checkpoint, Config, QkNormOver, Temperature};
use nalgebra::DMatrix;

/// What is done to one side's heads, all of them stacked in a column.
pub(super) struct Turn {
    layer: usize,
    head_dim: usize,
    norm: Option<Norm>,
    /// Whether that is done after the rotation.
    rotated: bool,
    scaling: Option<Scaling>,
}

/// What queries are multiplied by after all else.
struct Scaling {
    /// Numbers that rotate, and the others.
    scales: [f32; 2],
    /// Pairs of a head that rotate.
    pairs: usize,
    temperature: Option<Temperature>,
}

impl Turn {
    /// That of a layer's queries, `side` 0, or keys, 1.
    pub(super) fn load(checkpoint: &Checkpoint, layer: usize, side: usize) -> Result<Turn> {
        let config = checkpoint.config();
        let (head_dim, norm) = (config.head_dim, config.design.qk_norm);
        let width = match norm.map(|norm| norm.over) {
            Some(QkNormOver::Projection) => [config.num_attention_heads, config.num_key_value_heads][side] * head_dim,
            _ => head_dim,
        };
        let load = |name: &str| Norm::rms(checkpoint, &format!("model.layers.{layer}.self_attn.{name}"), width);
        Ok(Turn {
            layer,
            head_dim,
            norm: norm.map(|norm| load(norm.names[side])).transpose()?,
            rotated: norm.is_some_and(|norm| norm.over == QkNormOver::RotatedHeads),
            scaling: if side == 0 { Scaling::of(config, layer) } else { None },
        })
    }

    /// Heads as attention takes them, `[heads·d, tokens]`, of what was projected; the first token
    /// stands at `first`.
    pub(super) fn apply(&self, mut heads: DMatrix<f32>, ropes: &Ropes, first: usize) -> DMatrix<f32> {
        self.normalise(&mut heads, false);
        self.rotate(heads, ropes, first)
    }

    /// Heads before RoPE, as latents are made of them, and as attention takes them.
    pub(super) fn apply_both(&self, mut heads: DMatrix<f32>, ropes: &Ropes, first: usize) -> [DMatrix<f32>; 2] {
        self.normalise(&mut heads, false);
        let before = heads.clone();
        let after = self.rotate(heads, ropes, first);
        if !self.rotated {
            return [before, after];
        }
        let mut before = after.clone();
        ropes.of(self.layer).rotate_back(&mut before, first);
        [before, after]
    }

    /// The gradient with respect to what was `projected`, of tokens from position 0 on, from that
    /// with respect to what [`apply`](Self::apply) made of it.
    pub(super) fn backward(&self, projected: &DMatrix<f32>, mut gradient: DMatrix<f32>, ropes: &Ropes) -> DMatrix<f32> {
        let rope = ropes.of(self.layer);
        if let Some(scaling) = &self.scaling {
            scaling.apply(&mut gradient, self.head_dim, 0);
        }
        match &self.norm {
            None => {
                rope.rotate_back(&mut gradient, 0);
                gradient
            }
            Some(norm) if self.rotated => {
                let mut gradient = norm.backward(&rotated(projected.clone(), rope), gradient);
                rope.rotate_back(&mut gradient, 0);
                gradient
            }
            Some(norm) => {
                rope.rotate_back(&mut gradient, 0);
                norm.backward(projected, gradient)
            }
        }
    }

    /// Takes a gradient, or a disturbance, of heads from position 0 on back to before RoPE.
    pub(super) fn rotate_back(&self, heads: &mut DMatrix<f32>, ropes: &Ropes) {
        ropes.of(self.layer).rotate_back(heads, 0);
    }

    /// Rotates heads from position 0 on, and nothing else.
    pub(super) fn rotate_only(&self, heads: &mut DMatrix<f32>, ropes: &Ropes) {
        ropes.of(self.layer).rotate(heads, 0);
    }

    fn rotate(&self, mut heads: DMatrix<f32>, ropes: &Ropes, first: usize) -> DMatrix<f32> {
        ropes.of(self.layer).rotate(&mut heads, first);
        self.normalise(&mut heads, true);
        if let Some(scaling) = &self.scaling {
            scaling.apply(&mut heads, self.head_dim, first);
        }
        heads
    }

    /// The norm, where that is done after the rotation as `rotated` says.
    fn normalise(&self, heads: &mut DMatrix<f32>, rotated: bool) {
        if let Some(norm) = self.norm.as_ref().filter(|_| self.rotated == rotated) {
            norm.apply_to_runs(heads);
        }
    }
}

fn rotated(mut heads: DMatrix<f32>, rope: &Rope) -> DMatrix<f32> {
    rope.rotate(&mut heads, 0);
    heads
}

impl Scaling {
    /// `None` where there is nothing to be scaled.
    fn of(config: &Config, layer: usize) -> Option<Scaling> {
        let (scales, rope) = (config.query_scales(layer), &config.ropes[config.layers[layer].rope]);
        let any = scales != [1.0; 2] || rope.temperature.is_some();
        any.then_some(Scaling { scales, pairs: rope.dims / 2, temperature: rope.temperature })
    }

    fn apply(&self, heads: &mut DMatrix<f32>, head_dim: usize, first: usize) {
        for (index, mut column) in heads.column_iter_mut().enumerate() {
            let temperature = self.temperature.map_or(1.0, |temperature| temperature.at(first + index) as f32);
            for half in column.as_mut_slice().chunks_exact_mut(head_dim / 2) {
                let (rotating, still) = half.split_at_mut(self.pairs);
                rotating.iter_mut().for_each(|x| *x *= self.scales[0] * temperature);
                still.iter_mut().for_each(|x| *x *= self.scales[1] * temperature);
            }
        }
    }
}
