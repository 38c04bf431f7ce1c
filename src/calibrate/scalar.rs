//! What a disturbance of keys and values does to the output, as one number for each layer and side:
//! from forward passes alone.
//!
//! Gaussian noise of the same strength in every dimension is added to the keys, or the values, of
//! one layer, where a cache would not keep them exactly, and the KL divergence from the undisturbed
//! prediction is measured. To second order its mean is `½ E[δᵀFδ] = ½ σ² tr F` for noise of
//! variance `σ²` per dimension, `F` being the full sensitivity; what is reported is `tr F / n`, the
//! mean diagonal entry.

use crate::cpu::{Disturbance, Model, Residuals, RowType};
use crate::kv::Exact;
use crate::linalg::Random;
use crate::logits::Predictions;
use crate::sequence::Logits;
use crate::task::{OnProgress, report};
use crate::{Error, Result};
use nalgebra::DMatrix;
use std::sync::Arc;

/// The noise's root mean square, relative to that of what it is added to: little enough for the
/// second order, enough for a divergence far above rounding.
const STRENGTH: f32 = 0.05;
/// Tokens of a window that are run, beside the first ones, for which a cache keeps everything
/// exactly. The time is in proportion, and fewer say less of what the model makes of a long text.
const TOKENS: usize = 216;
/// Of the predictions that count one in so many is made: with a large vocabulary all of them take
/// as long as a dozen layers.
const SPACING: usize = 4;

/// Measures all layers on `windows`; `squares` are the mean squares of a layer's keys' and values'
/// entries.
///
/// # Errors
/// [`Error::Numeric`] where something is not finite, [`Error::Interrupted`] where `on_progress`
/// says so, and the decoder's.
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
        let window = &window[..window.len().min(exact.sinks.saturating_add(exact.recent).max(options.loss_from).saturating_add(TOKENS))];
        let mut residuals = Residuals::new(config, window.len());
        model.sequence(window.len(), RowType::F32)?.observe(window, Logits::None, &mut residuals)?;
        let undisturbed = predict(model, residuals.output(), options.loss_from)?;
        for (layer, (found, squares)) in found.iter_mut().zip(squares).enumerate() {
            for side in 0..2 {
                report(on_progress, "disturb", (index * squares.len() + layer) * 2 + side, total)?;
                let strength = STRENGTH * squares[side].sqrt();
                let noise = DMatrix::from_fn(n, window.len(), |_, _| strength * random.gaussian() as f32);
                let disturbance = if side == 0 { Disturbance::Keys(&noise) } else { Disturbance::Values(&noise) };
                let disturbed = model.disturbed(&residuals, layer, disturbance, exact)?;
                let divergences = undisturbed.divergence(&predict(model, &disturbed, options.loss_from)?)?;
                let divergence = divergences.iter().map(|one| one.kl).sum::<f64>() / divergences.len() as f64;
                // Sides that are zero everywhere cannot be disturbed in proportion, and nobody
                // needs them.
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

/// What `model` predicts at every fourth position from `first` on, of `output`, what leaves its
/// last layer.
fn predict(model: &Model, output: &DMatrix<f32>, first: usize) -> Result<Predictions> {
    let columns: Vec<usize> = (first..output.ncols()).step_by(SPACING).collect();
    let logits: Vec<f32> = model.head(&output.select_columns(&columns)).data.into();
    Predictions::new(logits, columns.len())
}
