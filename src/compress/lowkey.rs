//! lowkey's own method: transform coding of what keys and values share, weighed by what the model's
//! output feels.
//!
//! Key (before RoPE, all heads) and value (all heads) of a token in a layer are linear in the same
//! hidden state, and neighbouring layers' are close to it: they are coded as one row `y`. Its basis
//! is principal components in the metric `M` of the *sensitivity*: the Gram matrix of the loss's
//! gradient with respect to keys and values, so that `E[δᵀMδ]/2` is, to second order, the KL
//! divergence that a disturbance `δ` causes. In that basis a coordinate's eigenvalue says what it
//! costs to drop it, in nats, in whatever layer it stands, and one budget of bits is water-filled
//! over all of them (`bands.rs`). Scales for every row are bought from the same budget
//! (`scales.rs`).
//!
//! - **small**: a row holds keys before RoPE and values, of one layer or of a span of consecutive
//!   ones. Keys are rebuilt when they are read.
//! - **fast**: keys after RoPE and values, in rows of their own, over all heads or over a few: then
//!   every head multiplies fewer numbers. Nothing is rebuilt: a query absorbs the row's basis once,
//!   and values are summed as they are stored. Keys are coded about a mean that rotates, in a basis
//!   for every position of the context that the plan is for (`positions.rs`). RoPE smears what
//!   heads have in common over its phases, but not all of it: the slow frequencies, and what the
//!   mean position leaves. Rows over all heads lose a sixth of what rows by head do at equal bytes,
//!   and half of what rows over pairs do (docs/results/2026-11-27-columns.md).
//!
//! With scalar sensitivity `M` is the identity times one number for each side and layer.

use super::basis::{Basis, Roots, about};
use super::method::{Layout, LowKey, Scales, Sensing};
use super::positions::Positions;
use super::unit::{Context, Unit};
use super::{bands, scales};
use crate::calibrate::LayerStatistics;
use crate::kv::{Format, KvSide, LatentKind, Scale};
use crate::{Error, Result};
use nalgebra::DMatrix;
use std::ops::Range;

/// The work of one plan.
pub(super) struct Solver<'a> {
    context: &'a Context<'a>,
    options: LowKey,
    /// Where tokens stand, by layer.
    positions: Vec<Positions>,
}

impl Solver<'_> {
    pub(super) fn new<'a>(context: &'a Context<'a>, options: LowKey) -> Solver<'a> {
        // Keys before RoPE stand nowhere.
        let longest = if let Layout::Fast { context, .. } = options.layout { context } else { 1 };
        let config = context.checkpoint.config();
        let of_layer = |layer| Positions::up_to(longest, config.rope_frequencies(layer, longest));
        Solver { context, options, positions: (0..config.num_hidden_layers).map(of_layer).collect() }
    }

    /// The rows of some layers: all that share a row.
    pub(super) fn units(&self, layers: Range<usize>) -> Result<Vec<Unit>> {
        match self.options.layout {
            Layout::Small { .. } => self.small(layers),
            Layout::Fast { row_heads, .. } => self.fast(layers.start, row_heads.unwrap_or(self.context.heads)),
        }
    }

    /// What the budget buys for the rows of all layers.
    ///
    /// # Errors
    /// [`Error::Argument`] where it is too small.
    pub(super) fn formats(&self, units: &[Unit]) -> Result<Vec<Format>> {
        let Context { checkpoint, statistics, head_dim, .. } = *self.context;
        let budget = self.options.budget.bytes(checkpoint.config().dense_kv_bytes_per_token())?;
        let bases: Vec<&Basis> = units.iter().map(|unit| &unit.basis).collect();
        let alike = |scale| bands::water_fill(&bases, &vec![scale; bases.len()], budget).formats;
        let formats = match self.options.scales {
            Scales::Fixed => alike(Scale::Fixed),
            Scales::Band => alike(Scale::Band),
            Scales::Chosen => {
                let samples: Vec<_> = units.iter().map(|unit| unit.sample(&statistics.layers, head_dim, &self.positions[unit.first_layer])).collect();
                scales::choose(&bases, &samples, budget)
            }
        };
        let least = bands::bytes(&formats);
        if least > budget {
            let message = format!("{budget} bytes per token are too few for the rows of this layout, which take at least {least}; allow more");
            return Err(Error::Argument { name: "budget".into(), message });
        }
        Ok(formats)
    }

    /// The rows of the `small` layout for the layers of one span.
    fn small(&self, layers: Range<usize>) -> Result<Vec<Unit>> {
        let what = format!("keys and values of layers {} to {}", layers.start, layers.end - 1);
        let moments = self.context.statistics.rows(layers.clone())?;
        let metrics: Vec<Roots> =
            layers.clone().flat_map(|layer| [KvSide::Keys, KvSide::Values].map(move |side| self.metric(layer, side))).collect::<Result<_>>()?;
        let basis = Basis::principal(&what, &moments, moments.mean.map(f64::from), Some(&Roots::blocks(&metrics)))?;
        Ok(vec![Unit { first_layer: layers.start, layers: layers.len(), kind: LatentKind::Both, first_head: 0, kv_heads: self.context.heads, basis }])
    }

    /// The rows of the `fast` layout for one layer: keys and values, each over so many heads.
    fn fast(&self, layer: usize, row_heads: usize) -> Result<Vec<Unit>> {
        let (heads, d) = (self.context.heads, self.context.head_dim);
        let moments = self.context.statistics.rows(layer..layer + 1)?;
        let [of_keys, of_values] = [self.gram(layer, KvSide::Keys, true)?, self.gram(layer, KvSide::Values, false)?];
        let mut units = Vec::new();
        for first in (0..heads).step_by(row_heads) {
            let kv_heads = row_heads.min(heads - first);
            let (at, width) = (first * d, kv_heads * d);
            let metric =
                |gram: &DMatrix<f64>| Roots::of(&format!("the sensitivity of layer {layer}"), &gram.view((at, at), (width, width)).into_owned());
            let unit = |kind, basis| Unit { first_layer: layer, layers: 1, kind, first_head: first, kv_heads, basis };
            let before = moments.part(at..at + width);
            let mean = before.mean.map(f64::from);
            let second = self.positions[layer].second(&about(&before, &mean));
            let keys = Basis::components(&format!("the keys after RoPE of layer {layer}"), mean, second, Some(&metric(&of_keys)?))?;
            let values = moments.part(heads * d + at..heads * d + at + width);
            let mean = values.mean.map(f64::from);
            let values = Basis::principal(&format!("the values of layer {layer}"), &values, mean, Some(&metric(&of_values)?))?;
            units.extend([unit(LatentKind::PostRopeKeys, keys), unit(LatentKind::Values, values)]);
        }
        Ok(units)
    }

    /// A root of `M` of one side of a layer.
    fn metric(&self, layer: usize, side: KvSide) -> Result<Roots> {
        Roots::of(&format!("the sensitivity of layer {layer}"), &self.gram(layer, side, false)?)
    }

    /// `M` of one side of a layer, `[H_kv·d, H_kv·d]`, of keys after RoPE where they are `rotated`.
    fn gram(&self, layer: usize, side: KvSide, rotated: bool) -> Result<DMatrix<f64>> {
        let n = self.context.heads * self.context.head_dim;
        let missing = |kind: &str| {
            let message = format!("hold no {kind} sensitivity of layer {layer}; gather them anew with it");
            Error::Argument { name: "statistics".into(), message }
        };
        let LayerStatistics { sensitivity, scalar, .. } = &self.context.statistics.layers[layer];
        match self.options.sensing {
            Sensing::Full => {
                let full = sensitivity.as_ref().ok_or_else(|| missing("full"))?;
                let gram = match (side, rotated) {
                    (KvSide::Keys, false) => &full.keys,
                    (KvSide::Keys, true) => return Ok(self.positions[layer].second(&full.keys.map(f64::from))),
                    (KvSide::Values, _) => &full.values,
                };
                Ok(gram.map(f64::from))
            }
            Sensing::Scalar => {
                let [keys, values] = scalar.ok_or_else(|| missing("scalar"))?;
                let number = f64::from(if side == KvSide::Keys { keys } else { values });
                Ok(DMatrix::from_diagonal_element(n, n, number))
            }
        }
    }
}
