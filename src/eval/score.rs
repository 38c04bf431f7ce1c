//! What one prediction is worth: its surprise at the token that came, and its distance from what another model predicted.
//!
//! All of it in f64 from f32 logits: `log p(t) = x[t] - m - ln Σ exp(x[i] - m)` with `m` the largest logit.

use crate::session::argmax;
use crate::{Error, Result};
use rayon::prelude::*;

/// A prediction's normaliser, `ln Σ exp(x[i])`.
///
/// # Errors
/// [`Error::Numeric`] where a logit is no number.
fn log_sum_exp(logits: &[f32]) -> Result<f64> {
    let largest = logits[argmax(logits)? as usize] as f64;
    let sum: f64 = logits.iter().map(|&x| (x as f64 - largest).exp()).sum();
    Ok(largest + sum.ln())
}

/// How two predictions for the same place differ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Divergence {
    /// `Σ p (ln p - ln q)` in nats, `p` being the reference's probabilities.
    pub kl: f64,
    /// Whether both find the same token likeliest.
    pub agree: bool,
}

/// `-ln p(target)`.
fn surprise(logits: &[f32], target: u32) -> Result<f64> {
    let logit = logits.get(target as usize).ok_or_else(|| Error::Argument {
        name: "text".into(),
        message: format!("token {target} is outside of a vocabulary of {}; was the text tokenised for another model?", logits.len()),
    })?;
    Ok(log_sum_exp(logits)? - *logit as f64)
}

fn divergence(reference: &[f32], logits: &[f32]) -> Result<Divergence> {
    let (reference_norm, norm) = (log_sum_exp(reference)?, log_sum_exp(logits)?);
    let kl: f64 = reference
        .iter()
        .zip(logits)
        .map(|(&r, &x)| {
            let log_p = r as f64 - reference_norm;
            let p = log_p.exp();
            // A probability that is nothing adds nothing, whatever the other model thinks of it.
            if p == 0.0 { 0.0 } else { p * (log_p - (x as f64 - norm)) }
        })
        .sum();
    if !kl.is_finite() {
        let message = "one model finds impossible what the other does not".to_string();
        return Err(Error::Numeric { what: "KL divergence".into(), message });
    }
    // It is never negative but for rounding.
    Ok(Divergence { kl: kl.max(0.0), agree: argmax(reference)? == argmax(logits)? })
}

/// All scores of one model on a text, in the text's order.
#[derive(Debug, Clone, Default)]
pub struct Scores {
    surprise: Vec<f64>,
    divergence: Vec<Divergence>,
}

impl Scores {
    /// Scores consecutive predictions. `logits` is `[targets][vocab]`, and so is the `reference`'s.
    ///
    /// # Errors
    /// [`Error::Numeric`] for logits that are no numbers, [`Error::Argument`] for vocabularies that differ or a target outside of them.
    pub fn add(&mut self, logits: &[f32], targets: &[u32], reference: Option<&[f32]>) -> Result<()> {
        let Some(vocab) = logits.len().checked_div(targets.len()).filter(|&vocab| vocab > 0) else { return Ok(()) };
        let rows = || logits.par_chunks_exact(vocab);
        let scored: Vec<f64> = rows().zip(targets).map(|(row, &target)| surprise(row, target)).collect::<Result<_>>()?;
        self.surprise.extend(scored);
        if let Some(reference) = reference {
            if reference.len() != logits.len() {
                let message = format!("its vocabulary of {} is not that of the model, {vocab}", reference.len() / targets.len());
                return Err(Error::Argument { name: "against".into(), message });
            }
            let compared: Vec<_> = reference.par_chunks_exact(vocab).zip(rows()).map(|(r, x)| divergence(r, x)).collect::<Result<_>>()?;
            self.divergence.extend(compared);
        }
        Ok(())
    }

    /// Predictions scored.
    pub fn tokens(&self) -> usize {
        self.surprise.len()
    }

    /// `exp` of the mean surprise.
    pub fn perplexity(&self) -> f64 {
        mean(self.surprise.iter().copied()).exp()
    }

    /// Mean KL divergence from the reference, nats per token.
    pub fn kl_mean(&self) -> Option<f64> {
        (!self.divergence.is_empty()).then(|| mean(self.divergence.iter().map(|d| d.kl)))
    }

    /// The KL divergence that 99 % of the predictions do not exceed (nearest rank).
    pub fn kl_p99(&self) -> Option<f64> {
        let mut kl: Vec<f64> = self.divergence.iter().map(|d| d.kl).collect();
        kl.sort_unstable_by(f64::total_cmp);
        kl.get((kl.len() * 99).div_ceil(100).checked_sub(1)?).copied()
    }

    /// The share of predictions whose likeliest token is the reference's.
    pub fn top1_agreement(&self) -> Option<f64> {
        (!self.divergence.is_empty()).then(|| mean(self.divergence.iter().map(|d| if d.agree { 1.0 } else { 0.0 })))
    }
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len();
    values.sum::<f64>() / count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logs(p: &[f64]) -> Vec<f32> {
        // Any constant may be added to logits.
        p.iter().map(|p| p.ln() as f32 + 2.5).collect()
    }

    #[test]
    fn perplexity_and_divergence_have_their_closed_forms() {
        let p = [[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]];
        let q = [[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]];
        let flat = |rows: &[[f64; 3]]| rows.iter().flat_map(|row| logs(row)).collect::<Vec<f32>>();
        let mut scores = Scores::default();
        scores.add(&flat(&q), &[1, 0], Some(&flat(&p))).unwrap();
        assert_eq!(scores.tokens(), 2);
        // Surprises -ln 0.5 and -ln 0.1.
        assert!((scores.perplexity() - (20f64).sqrt()).abs() < 1e-5, "{}", scores.perplexity());
        let first = 0.5 * 2f64.ln() + 0.25 * 0.5f64.ln();
        let second = 0.2 * 2f64.ln() + 0.7 * (0.7f64 / 0.8).ln();
        assert!((scores.kl_mean().unwrap() - (first + second) / 2.0).abs() < 1e-6);
        assert!((scores.kl_p99().unwrap() - first.max(second)).abs() < 1e-6);
        assert_eq!(scores.top1_agreement(), Some(0.5));
    }

    #[test]
    fn a_model_is_at_no_distance_from_itself() {
        let logits: Vec<f32> = (0..4000).map(|i| ((i * 7919) % 101) as f32 / 7.0).collect();
        let mut scores = Scores::default();
        scores.add(&logits, &[1, 2, 3, 4], Some(&logits)).unwrap();
        assert_eq!((scores.kl_mean(), scores.kl_p99(), scores.top1_agreement()), (Some(0.0), Some(0.0), Some(1.0)));
        let mut alone = Scores::default();
        alone.add(&logits, &[1, 2, 3, 4], None).unwrap();
        assert_eq!((alone.kl_mean(), alone.kl_p99(), alone.top1_agreement()), (None, None, None));
        assert_eq!(alone.perplexity(), scores.perplexity());
    }

    #[test]
    fn the_99th_percentile_is_the_nearest_rank() {
        let divergence = |kl| Divergence { kl, agree: true };
        let scores = Scores { surprise: vec![], divergence: (1..=200).rev().map(|i| divergence(i as f64)).collect() };
        assert_eq!(scores.kl_p99(), Some(198.0));
        let few = Scores { surprise: vec![], divergence: vec![divergence(3.0), divergence(1.0)] };
        assert_eq!(few.kl_p99(), Some(3.0));
    }

    #[test]
    fn what_cannot_be_compared_is_an_error() {
        let mut scores = Scores::default();
        assert!(scores.add(&[0.0; 6], &[0, 3], None).unwrap_err().to_string().contains("token 3"));
        assert!(scores.add(&[0.0; 6], &[0, 1], Some(&[0.0; 8])).unwrap_err().to_string().contains("vocabulary of 4"));
        assert!(scores.add(&[0.0, f32::NAN, 0.0], &[0], None).is_err());
    }
}
