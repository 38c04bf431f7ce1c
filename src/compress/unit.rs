//! What a method answers with: the vectors that share a row, and the basis it would code them in.
//! How many bits they get is the plan's.

use super::basis::Basis;
use super::positions::Positions;
use super::{Part, Ranks};
use crate::calibrate::{LayerStatistics, Sample, Sensitivity, Statistics};
use crate::checkpoint::Checkpoint;
use crate::kv::{Budget, Format, KvSide, LatentKind, LatentSpec};
use crate::{Error, Result};
use nalgebra::{DMatrix, DVector};

/// What a method works from.
pub(super) struct Context<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) statistics: &'a Statistics,
    /// Key/value heads.
    pub(super) heads: usize,
    pub(super) head_dim: usize,
}

impl Context<'_> {
    /// The bias of a layer's key or value projection, `[H_kv·d]`; zero where it has none. With
    /// QK-norm what is cached is no longer linear in the input, and the point to be linear about is
    /// zero.
    pub(super) fn bias(&self, layer: usize, side: KvSide) -> Result<DVector<f64>> {
        let width = self.heads * self.head_dim;
        let part = if side == KvSide::Keys { "k_proj" } else { "v_proj" };
        let name = format!("model.layers.{layer}.self_attn.{part}.bias");
        if !self.checkpoint.has(&name) || side == KvSide::Keys && self.checkpoint.config().design.qk_norm.is_some() {
            return Ok(DVector::zeros(width));
        }
        Ok(DVector::from_vec(self.checkpoint.f32(&name, &[width])?).map(f64::from))
    }

    /// The share of the dense cache that a budget keeps.
    pub(super) fn keep(&self, budget: Budget) -> Result<f64> {
        let dense = self.checkpoint.config().dense_kv_bytes_per_token();
        Ok(budget.bytes(dense)? as f64 / dense as f64)
    }

    /// What scales the losses of one side of a layer to those of another.
    fn weight(&self, rule: Ranks, layer: usize, side: KvSide) -> Result<f64> {
        let side = usize::from(side == KvSide::Values);
        let statistics = &self.statistics.layers[layer];
        let missing = |what: &str| {
            let message = format!("hold no {what} of layer {layer}; gather them anew with full sensitivity");
            Error::Argument { name: "statistics".into(), message }
        };
        match (rule, &statistics.sensitivity) {
            (Ranks::Fisher, _) => Ok(f64::from(statistics.fisher.ok_or_else(|| missing("Fisher information"))?[side])),
            (Ranks::Spectrum, Some(Sensitivity { keys, values, .. })) => Ok(f64::from([keys, values][side].trace()) / keys.nrows() as f64),
            (Ranks::Spectrum, None) => Ok(f64::from(statistics.scalar.ok_or_else(|| missing("sensitivity"))?[side])),
            (Ranks::Uniform | Ranks::Energy, _) => Ok(1.0),
        }
    }
}

/// A row without its format.
pub(super) struct Unit {
    pub(super) first_layer: usize,
    pub(super) layers: usize,
    pub(super) kind: LatentKind,
    pub(super) first_head: usize,
    pub(super) kv_heads: usize,
    pub(super) basis: Basis,
}

impl Unit {
    /// The row, packed as `format`.
    pub(super) fn spec(&self, format: Format) -> LatentSpec {
        let Unit { first_layer, layers, kind, first_head, kv_heads, .. } = *self;
        LatentSpec { first_layer, layers, kind, first_head, kv_heads, format }
    }

    /// What it holds of the sample's tokens, `[w, tokens]`; keys after RoPE as if they stood
    /// anywhere in the context.
    pub(super) fn sample(&self, layers: &[LayerStatistics], head_dim: usize, positions: &Positions) -> DMatrix<f32> {
        let (first, height) = (self.first_head * head_dim, self.kv_heads * head_dim);
        let layers = &layers[self.first_layer..self.first_layer + self.layers];
        let parts: Vec<_> = layers
            .iter()
            .flat_map(|layer| {
                let Sample { rows, post_rope_keys } = &layer.sample;
                let (keys, values) = (rows.rows(first, height), rows.rows(post_rope_keys.nrows() + first, height));
                match self.kind {
                    LatentKind::PreRopeKeys | LatentKind::PostRopeKeys => vec![keys],
                    LatentKind::Values => vec![values],
                    LatentKind::Both => vec![keys, values],
                }
            })
            .collect();
        let mut all = DMatrix::zeros(parts.len() * height, layers[0].sample.rows.ncols());
        for (index, part) in parts.iter().enumerate() {
            all.rows_mut(index * height, height).copy_from(part);
        }
        if self.kind == LatentKind::PostRopeKeys {
            // About a mean that rotates with them: as if it stood still.
            let mean = self.basis.mean.map(|x| x as f32);
            all.column_iter_mut().for_each(|mut column| column -= &mean);
            positions.rotate(&mut all);
            all.column_iter_mut().for_each(|mut column| column += &mean);
        }
        all
    }

    /// As the rules for ranks see it. [`Ranks::Spectrum`] takes from the method how its loss is
    /// spread over the coordinates, and from the sensitivity what it is altogether.
    pub(super) fn part(&self, context: &Context, rule: Ranks) -> Result<Part> {
        let side = if self.kind == LatentKind::Values { KvSide::Values } else { KvSide::Keys };
        let Basis { down, up, variance, loss, .. } = &self.basis;
        let mut weight = context.weight(rule, self.first_layer, side)?;
        if rule == Ranks::Spectrum {
            let energy: f64 = up.row_iter().zip(variance).map(|(row, variance)| row.norm_squared() * variance).sum();
            let all = self.basis.tail(0);
            weight *= if all > 0.0 { energy / all } else { 0.0 };
        }
        Ok(Part { width: down.nrows(), module: 2 * self.first_layer + usize::from(side == KvSide::Values), weight, loss: loss.as_slice().to_vec() })
    }
}

/// Rows of their own for every head of a layer: keys after RoPE, and values. `keys` and `values`
/// make a basis from what they are called, their head, and their second moment about zero,
/// `[d, d]`.
pub(super) fn by_head(
    context: &Context,
    layer: usize,
    keys: impl Fn(&str, usize, &DMatrix<f64>) -> Result<Basis>,
    values: impl Fn(&str, usize, &DMatrix<f64>) -> Result<Basis>,
) -> Result<Vec<Unit>> {
    let (heads, d) = (context.heads, context.head_dim);
    let rotated = &context.statistics.layers[layer].post_rope_keys;
    let untouched = context.statistics.rows(layer..layer + 1)?.part(heads * d..2 * heads * d);
    let mut units = Vec::new();
    for head in 0..heads {
        let basis = keys(&format!("the keys of layer {layer}, head {head}"), head, &rotated.part(head * d..(head + 1) * d).second.map(f64::from))?;
        units.push(Unit { first_layer: layer, layers: 1, kind: LatentKind::PostRopeKeys, first_head: head, kv_heads: 1, basis });
    }
    for head in 0..heads {
        let basis =
            values(&format!("the values of layer {layer}, head {head}"), head, &untouched.part(head * d..(head + 1) * d).second.map(f64::from))?;
        units.push(Unit { first_layer: layer, layers: 1, kind: LatentKind::Values, first_head: head, kv_heads: 1, basis });
    }
    Ok(units)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Moments;

    /// The samples of three layers of two heads of two numbers, put together as
    /// [`LatentSpec::offset`] says.
    #[test]
    fn a_rows_sample_is_laid_out_as_the_row() {
        let (heads, d, tokens) = (2, 2, 4);
        let layer = |layer: usize| {
            let columns = |height, kind: usize| DMatrix::from_fn(height, tokens, |i, token| (1000 * kind + 100 * layer + 10 * i + token) as f32);
            let post_rope_keys = Moments { mean: DVector::zeros(heads * d), second: DMatrix::zeros(heads * d, heads * d) };
            let sample = Sample { rows: columns(2 * heads * d, 1), post_rope_keys: columns(heads * d, 2) };
            LayerStatistics { post_rope_keys, sample, queries: Vec::new(), scalar: None, fisher: None, sensitivity: None }
        };
        let layers: Vec<_> = (0..3).map(layer).collect();
        let none = || DMatrix::zeros(0, 0);
        // At a single position nothing is rotated.
        let positions = Positions::up_to(1, vec![0.1]);
        for kind in [LatentKind::PreRopeKeys, LatentKind::PostRopeKeys, LatentKind::Values, LatentKind::Both] {
            for (first_layer, count, first_head, kv_heads) in [(0, 1, 0, 2), (1, 1, 1, 1), (1, 2, 0, 2), (0, 3, 1, 1)] {
                let basis = Basis {
                    mean: DVector::zeros(count * kv_heads * d),
                    down: none(),
                    up: none(),
                    variance: DVector::zeros(0),
                    loss: DVector::zeros(0),
                };
                let unit = Unit { first_layer, layers: count, kind, first_head, kv_heads, basis };
                let (found, spec) = (unit.sample(&layers, d, &positions), unit.spec(Format::half(1)));
                assert_eq!(found.shape(), (spec.width(d), tokens));
                for (layer, LayerStatistics { sample, .. }) in layers.iter().enumerate().skip(first_layer).take(count) {
                    for (side, below) in [(KvSide::Keys, 0), (KvSide::Values, heads * d)] {
                        let Some(offset) = spec.offset(layer, side, d) else { continue };
                        assert_eq!(
                            found.rows(offset, kv_heads * d),
                            sample.rows.rows(below + first_head * d, kv_heads * d),
                            "{kind:?}, {layer}, {side:?}"
                        );
                    }
                }
            }
        }
    }
}
