//! What a disturbance of keys and values does to the output, as one number for each layer and side: from forward passes alone.
//!
//! Gaussian noise of the same strength in every dimension is added to the keys, or the values, of one layer, where a cache would not keep them exactly, and the KL
//! divergence from the undisturbed prediction is measured. To second order its mean is `½ E[δᵀFδ] = ½ σ² tr F` for noise of variance `σ²` per dimension, `F` being
//! the full sensitivity; what is reported is `tr F / n`, the mean diagonal entry.

use crate::cpu::{Disturbance, Model, Residuals, RowType};
use crate::eval::Predictions;
use crate::progress::{OnProgress, report};
use crate::random::Random;
use crate::rows::Exact;
use crate::sequence::Logits;
use crate::{Error, Result};
use nalgebra::DMatrix;
use std::sync::Arc;

/// The noise's root mean square, relative to that of what it is added to: little enough for the second order, enough for a divergence far above rounding.
const STRENGTH: f32 = 0.05;
/// Predictions compared at once.
const BLOCK: usize = 128;

/// Measures all layers on `windows`; `squares` are the mean squares of a layer's keys' and values' entries.
///
/// # Errors
/// [`Error::Numeric`] where something is not finite, [`Error::Interrupted`] where `on_progress` says so, and the decoder's.
pub(super) fn scalar_sensitivity(
    model: &Arc<Model>,
    windows: &[&[u32]],
    squares: &[[f32; 2]],
    options: &super::Options,
    on_progress: OnProgress<'_>,
) -> Result<Vec<[f32; 2]>> {
    let config = model.config();
    let n = config.num_key_value_heads * config.head_dim;
    let exact = Exact { sinks: options.sinks, recent: options.recent };
    let mut random = Random::new(options.seed);
    let mut found = vec![[0.0; 2]; squares.len()];
    let total = windows.len() * squares.len() * 2;
    for (index, &window) in windows.iter().enumerate() {
        let mut residuals = Residuals::new(config, window.len());
        model.sequence(window.len(), RowType::F32)?.observe(window, Logits::None, &mut residuals)?;
        let undisturbed = blocks(residuals.output(), options.loss_from).map(|x| predict(model, &x)).collect::<Result<Vec<_>>>()?;
        for (layer, (found, squares)) in found.iter_mut().zip(squares).enumerate() {
            for side in 0..2 {
                report(on_progress, "disturb", (index * squares.len() + layer) * 2 + side, total)?;
                let strength = STRENGTH * squares[side].sqrt();
                let noise = DMatrix::from_fn(n, window.len(), |_, _| strength * random.gaussian() as f32);
                let disturbance = if side == 0 { Disturbance::Keys(&noise) } else { Disturbance::Values(&noise) };
                let disturbed = model.disturbed(&residuals, layer, disturbance, exact)?;
                let mut divergence = 0.0;
                for (reference, x) in undisturbed.iter().zip(blocks(&disturbed, options.loss_from)) {
                    divergence += reference.divergence(&predict(model, &x)?)?.iter().map(|one| one.kl).sum::<f64>();
                }
                divergence /= (window.len() - options.loss_from) as f64;
                // Sides that are zero everywhere cannot be disturbed in proportion, and nobody needs them.
                let square = f64::from(strength).powi(2);
                found[side] += if square > 0.0 { (2.0 * divergence / (square * n as f64 * windows.len() as f64)) as f32 } else { 0.0 };
            }
        }
    }
    report(on_progress, "disturb", total, total)?;
    match found.iter().flatten().find(|x| !x.is_finite()) {
        Some(x) => Err(Error::Numeric { what: "the sensitivity of a layer".into(), message: format!("is {x}") }),
        None => Ok(found),
    }
}

/// The columns from `first` on, some at a time.
fn blocks(output: &DMatrix<f32>, first: usize) -> impl Iterator<Item = DMatrix<f32>> {
    (first..output.ncols()).step_by(BLOCK).map(|start| output.columns(start, BLOCK.min(output.ncols() - start)).into_owned())
}

fn predict(model: &Model, x: &DMatrix<f32>) -> Result<Predictions> {
    let logits: Vec<f32> = model.head(x).data.into();
    Predictions::new(logits, x.ncols())
}
