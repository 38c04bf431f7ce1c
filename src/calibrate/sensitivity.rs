//! What a disturbance of keys and values does to the output, in full: second moments of the loss's
//! gradients.
//!
//! To second order, a disturbance `δ` of a layer's keys moves the distribution that the model
//! predicts by a KL divergence of `½ δᵀFδ`, where `F` is the Fisher information: the mean of
//! `g gᵀ`, `g` the gradient of `−log p(label)` with labels drawn from the prediction itself (Amari,
//! *Natural gradient works efficiently in learning*, 1998; Kunstner et al., arXiv 1905.12558, on
//! why the labels must not be the text's). One backward pass for a window gives `g` for all layers.

use super::moments::add;
use super::options::Options;
use super::statistics::Sensitivity;
use crate::Result;
use crate::checkpoint::Config;
use crate::cpu::LayerGradients;
use crate::linalg::{check_finite, gram};
use nalgebra::DMatrix;
use std::time::Instant;

/// One layer's sums over windows.
pub(super) struct Gradients {
    layer: usize,
    loss_from: usize,
    keys: DMatrix<f64>,
    values: DMatrix<f64>,
    /// Sums of squares by entry of the projection's weight.
    key_weight: DMatrix<f32>,
    value_weight: DMatrix<f32>,
    /// Positions whose loss counted.
    positions: usize,
    windows: usize,
    /// Time spent here.
    pub(super) seconds: f64,
}

impl Gradients {
    pub(super) fn new(config: &Config, options: &Options, layer: usize) -> Gradients {
        let n = config.num_key_value_heads * config.head_dim;
        let (square, weight) = (|| DMatrix::zeros(n, n), || DMatrix::zeros(config.hidden_size, n));
        Gradients {
            layer,
            loss_from: options.loss_from,
            keys: square(),
            values: square(),
            key_weight: weight(),
            value_weight: weight(),
            positions: 0,
            windows: 0,
            seconds: 0.0,
        }
    }

    /// Adds those of one window of `tokens` tokens.
    pub(super) fn add(&mut self, gradients: &LayerGradients, tokens: usize) {
        let start = Instant::now();
        for (sum, gradient) in [(&mut self.keys, &gradients.keys), (&mut self.values, &gradients.values)] {
            add(sum, &gram(gradient), 1.0);
        }
        // The loss of a window is its mean, as a training loss is.
        let counted = (tokens - self.loss_from) as f32;
        for (sum, gradient) in [(&mut self.key_weight, &gradients.key_weight), (&mut self.value_weight, &gradients.value_weight)] {
            sum.zip_apply(gradient, |sum, x| *sum += (x / counted).powi(2));
        }
        self.positions += tokens - self.loss_from;
        self.windows += 1;
        self.seconds += start.elapsed().as_secs_f64();
    }

    /// The sensitivity and the Fisher information of keys and values.
    ///
    /// # Errors
    /// [`crate::Error::Numeric`] where one is not finite.
    pub(super) fn finish(self) -> Result<(Sensitivity, [f32; 2])> {
        let (positions, windows) = (self.positions as f64, self.windows as f64);
        let mean = |what: &str, sum: DMatrix<f64>| {
            let mean = sum.map(|x| (x / positions) as f32);
            check_finite(&format!("the sensitivity of the {what} of layer {}", self.layer), &mean)?;
            Ok::<_, crate::Error>(mean)
        };
        let fisher = |squares: &DMatrix<f32>| (squares.iter().map(|&x| (f64::from(x) / windows).sqrt()).sum::<f64>() / squares.len() as f64) as f32;
        let sensitivity = Sensitivity { keys: mean("keys", self.keys)?, values: mean("values", self.values)? };
        Ok((sensitivity, [fisher(&self.key_weight), fisher(&self.value_weight)]))
    }
}

/// Puts in place of `logits` the gradient of `−log p(label)`, where `draw`, uniform in 0 to 1,
/// chooses the label from the prediction `p`.
pub(super) fn sampled_loss(logits: &mut [f32], draw: f64) {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    for logit in logits.iter_mut() {
        *logit = (*logit - highest).exp();
        total += f64::from(*logit);
    }
    let (mut below, mut label) = (0.0, 0);
    for (token, weight) in logits.iter().enumerate() {
        // Where rounding leaves `draw` beyond the last, the last that is possible at all.
        if *weight > 0.0 && below <= draw * total {
            label = token;
        }
        below += f64::from(*weight);
    }
    logits.iter_mut().for_each(|weight| *weight = (f64::from(*weight) / total) as f32);
    logits[label] -= 1.0;
}

#[cfg(test)]
mod tests {
    use super::sampled_loss;

    #[test]
    fn labels_come_as_often_as_they_are_predicted_and_the_gradient_is_that_of_the_log() {
        let p = [0.5f32, 0.0, 0.125, 0.375];
        let mut counts = [0; 4];
        for i in 0..1000 {
            let mut logits = p.map(f32::ln);
            sampled_loss(&mut logits, (i as f64 + 0.5) / 1000.0);
            let label = (0..4).find(|&i| logits[i] < 0.0).unwrap();
            counts[label] += 1;
            for (i, gradient) in logits.iter().enumerate() {
                assert!((gradient - (p[i] - f32::from(i == label))).abs() < 1e-6);
            }
        }
        assert_eq!(counts, [500, 0, 125, 375]);
    }
}
