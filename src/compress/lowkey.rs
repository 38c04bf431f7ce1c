//! lowkey's own method: transform coding of what keys and values share, weighed by what the model's output feels.
//!
//! Key (before RoPE, all heads) and value (all heads) of a token in a layer are linear in the same hidden state, and neighbouring layers' are close to it: they are coded as one
//! row `y`. Its basis is principal components in the metric `M` of the *sensitivity*: the Gram matrix of the loss's gradient with respect to keys and values, so that
//! `E[δᵀMδ]/2` is, to second order, the KL divergence that a disturbance `δ` causes. In that basis a coordinate's eigenvalue says what it costs to drop it, in nats, in whatever layer it stands, and one
//! budget of bits is water-filled over all of them (`bands.rs`). Scales for every row are bought from the same budget (`scales.rs`).
//!
//! - **small**: a row holds keys before RoPE and values, of one layer or of a span of consecutive ones. Keys are rebuilt when they are read.
//! - **fast**: keys after RoPE and values, in rows of their own, each over all heads. Nothing is rebuilt: a query is taken to the row's coordinates once, and values are summed as they are
//!   stored. Keys are coded about a mean that turns, in a basis for every position of the context that the plan is for (`turned.rs`). RoPE smears what heads have in common over its phases, but not all of it: the slow frequencies, and what the mean position leaves. Rows over all heads lose less than half of what rows by
//!   head do at equal bytes (docs/rejected.md).
//!
//! With scalar sensitivity `M` is the identity times one number for each side and layer.

use super::Sensing;
use super::basis::{Basis, Roots, about};
use super::unit::{Context, Unit};
use crate::calibrate::LayerStatistics;
use crate::rows::{Holds, Side};
use crate::{Error, Result};
use nalgebra::DMatrix;
use std::ops::Range;

/// The rows of the `small` layout for the layers of one span.
pub(super) fn small(context: &Context, layers: Range<usize>) -> Result<Vec<Unit>> {
    let what = format!("keys and values of layers {} to {}", layers.start, layers.end - 1);
    let moments = context.statistics.rows(layers.clone())?;
    let metrics: Vec<Roots> =
        layers.clone().flat_map(|layer| [Side::Keys, Side::Values].map(|side| metric(context, layer, side, false))).collect::<Result<_>>()?;
    let basis = Basis::principal(&what, &moments, moments.mean.map(f64::from), Some(&Roots::blocks(&metrics)))?;
    Ok(vec![Unit { first_layer: layers.start, layers: layers.len(), holds: Holds::Both, first_head: 0, kv_heads: context.heads, basis }])
}

/// The rows of the `fast` layout for one layer: keys and values, each over all heads.
pub(super) fn fast(context: &Context, layer: usize) -> Result<Vec<Unit>> {
    let n = context.heads * context.head_dim;
    let unit = |holds, basis| Unit { first_layer: layer, layers: 1, holds, first_head: 0, kv_heads: context.heads, basis };
    let before = context.statistics.rows(layer..layer + 1)?.part(0..n);
    let mean = before.mean.map(f64::from);
    let second = context.positions.second(&about(&before, &mean));
    let keys = Basis::components(&format!("the turned keys of layer {layer}"), mean, second, Some(&metric(context, layer, Side::Keys, true)?))?;
    let moments = context.statistics.rows(layer..layer + 1)?.part(n..2 * n);
    let metric = metric(context, layer, Side::Values, false)?;
    let values = Basis::principal(&format!("the values of layer {layer}"), &moments, moments.mean.map(f64::from), Some(&metric))?;
    Ok(vec![unit(Holds::TurnedKeys, keys), unit(Holds::Values, values)])
}

fn metric(context: &Context, layer: usize, side: Side, turned: bool) -> Result<Roots> {
    Roots::of(&format!("the sensitivity of layer {layer}"), &gram(context, layer, side, turned)?)
}

/// `M` of one side of a layer, `[H_kv·d, H_kv·d]`.
fn gram(context: &Context, layer: usize, side: Side, turned: bool) -> Result<DMatrix<f64>> {
    let n = context.heads * context.head_dim;
    let missing = |kind: &str| {
        let message = format!("hold no {kind} sensitivity of layer {layer}; gather them with --sensitivity {kind}");
        Error::Argument { name: "statistics".into(), message }
    };
    let LayerStatistics { sensitivity, scalar, .. } = &context.statistics.layers[layer];
    match context.plan.sensing {
        Sensing::Full => {
            let full = sensitivity.as_ref().ok_or_else(|| missing("full"))?;
            let gram = match (side, turned) {
                (Side::Keys, false) => &full.keys,
                (Side::Keys, true) => return Ok(context.positions.second(&full.keys.map(f64::from))),
                (Side::Values, _) => &full.values,
            };
            Ok(gram.map(f64::from))
        }
        Sensing::Scalar => {
            let [keys, values] = scalar.ok_or_else(|| missing("scalar"))?;
            let number = f64::from(if side == Side::Keys { keys } else { values });
            Ok(DMatrix::from_diagonal_element(n, n, number))
        }
    }
}
