//! What a model's predictions on a text come to: perplexity, divergence from another's, and how
//! sure that is.

use crate::Result;
use crate::logits::{Divergence, Predictions};

/// Predictions from which on the 99.9th percentile is not simply the largest value.
pub const ENOUGH: usize = 1000;

/// All scores of one model on a text, in the text's order.
#[derive(Debug, Clone, Default)]
pub struct Scores {
    surprise: Vec<f64>,
    divergence: Vec<Divergence>,
    /// Where in both each window ends.
    ends: Vec<usize>,
}

impl Scores {
    /// Scores consecutive predictions, one for each target.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for vocabularies that differ or a target outside
    /// of them, [`Error::Numeric`](crate::Error::Numeric) where there is no divergence.
    pub fn add(&mut self, predictions: &Predictions, targets: &[u32], reference: Option<&Predictions>) -> Result<()> {
        self.surprise.extend(predictions.surprise(targets)?);
        if let Some(reference) = reference {
            self.divergence.extend(reference.divergence(predictions)?);
        }
        Ok(())
    }

    /// Ends a window: what is added later belongs to the next.
    pub fn end_window(&mut self) {
        self.ends.push(self.surprise.len());
    }

    /// Predictions scored.
    pub fn tokens(&self) -> usize {
        self.surprise.len()
    }

    /// Windows that they were made in.
    pub fn windows(&self) -> usize {
        self.ends.len()
    }

    /// `exp` of the mean surprise.
    pub fn perplexity(&self) -> f64 {
        mean(self.surprise.iter().copied()).exp()
    }

    /// Mean KL divergence from the reference, nats per token.
    pub fn kl_mean(&self) -> Option<f64> {
        (!self.divergence.is_empty()).then(|| mean(self.divergence.iter().map(|d| d.kl)))
    }

    /// The standard error of [`kl_mean`](Self::kl_mean), from how much the windows' own means `m_w`
    /// of `n_w` predictions differ (those within a window depend on each other):
    /// `√(W/(W-1) · Σ (n_w/n)² (m_w - m)²)` over `W` windows. `None` for fewer than two.
    pub fn kl_stderr(&self) -> Option<f64> {
        let all = self.kl_mean()?;
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let windows = starts.zip(&self.ends).filter_map(|(start, &end)| self.divergence.get(start..end).filter(|w| !w.is_empty()));
        let squares: Vec<f64> = windows
            .map(|window| {
                let deviation = mean(window.iter().map(|d| d.kl)) - all;
                (window.len() as f64 / self.divergence.len() as f64 * deviation).powi(2)
            })
            .collect();
        let count = squares.len() as f64;
        (count >= 2.0).then(|| (count / (count - 1.0) * squares.iter().sum::<f64>()).sqrt())
    }

    /// The KL divergence in nats that 99 % of the predictions do not exceed (nearest rank).
    pub fn kl_p99(&self) -> Option<f64> {
        self.kl_quantile(990)
    }

    /// The KL divergence in nats that 99.9 % of the predictions do not exceed (nearest rank).
    ///
    /// `None` for fewer than a thousand predictions, of which it is the [largest](Self::kl_max).
    pub fn kl_p999(&self) -> Option<f64> {
        self.kl_quantile(999).filter(|_| self.divergence.len() >= ENOUGH)
    }

    /// The largest KL divergence, nats.
    pub fn kl_max(&self) -> Option<f64> {
        self.kl_quantile(1000)
    }

    fn kl_quantile(&self, per_mille: usize) -> Option<f64> {
        let mut kl: Vec<f64> = self.divergence.iter().map(|d| d.kl).collect();
        kl.sort_unstable_by(f64::total_cmp);
        kl.get((kl.len() * per_mille).div_ceil(1000).checked_sub(1)?).copied()
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

    fn predictions(rows: &[[f64; 3]]) -> Predictions {
        // Any constant may be added to logits.
        let logits = rows.iter().flatten().map(|p| p.ln() as f32 + 2.5).collect();
        Predictions::new(logits, rows.len()).unwrap()
    }

    fn diverging(kl: impl IntoIterator<Item = f64>, ends: &[usize]) -> Scores {
        let divergence: Vec<_> = kl.into_iter().map(|kl| Divergence { kl, agree: true }).collect();
        Scores { surprise: vec![0.0; divergence.len()], divergence, ends: ends.into() }
    }

    #[test]
    fn perplexity_and_divergence_have_their_closed_forms() {
        let p = [[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]];
        let q = [[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]];
        let mut scores = Scores::default();
        scores.add(&predictions(&q), &[1, 0], Some(&predictions(&p))).unwrap();
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
    fn a_small_divergence_between_confident_models_is_not_lost() {
        // p and q = p (1 ± ε) over a vocabulary of which one token has nearly everything: KL ≈ Σ p
        // ε² / 2.
        let (vocab, epsilon) = (49_152, 3e-3);
        let p: Vec<f64> = (0..vocab).map(|i| if i == 7 { 0.9 } else { 0.1 / (vocab - 1) as f64 }).collect();
        let q: Vec<f64> = p.iter().enumerate().map(|(i, p)| p * if i % 2 == 0 { 1.0 + epsilon } else { 1.0 - epsilon }).collect();
        let total: f64 = q.iter().sum();
        let exact: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / (q / total)).ln()).sum();
        let make = |p: &[f64], shift: f32| Predictions::new(p.iter().map(|p| p.ln() as f32 + shift).collect(), 1).unwrap();
        let mut scores = Scores::default();
        scores.add(&make(&q, 11.0), &[7], Some(&make(&p, -3.0))).unwrap();
        let found = scores.kl_mean().unwrap();
        assert!(exact < 1e-6 && (found - exact).abs() < 0.02 * exact, "{found} for {exact}");
    }

    #[test]
    fn a_model_is_at_no_distance_from_itself() {
        let logits: Vec<f32> = (0..4000).map(|i| ((i * 7919) % 101) as f32 / 7.0).collect();
        let itself = Predictions::new(logits, 4).unwrap();
        let mut scores = Scores::default();
        scores.add(&itself, &[1, 2, 3, 4], Some(&itself)).unwrap();
        assert_eq!((scores.kl_mean(), scores.kl_p99(), scores.top1_agreement()), (Some(0.0), Some(0.0), Some(1.0)));
        let mut alone = Scores::default();
        alone.add(&itself, &[1, 2, 3, 4], None).unwrap();
        assert_eq!((alone.kl_mean(), alone.kl_stderr(), alone.kl_p99(), alone.top1_agreement()), (None, None, None, None));
        assert_eq!(alone.perplexity(), scores.perplexity());
    }

    #[test]
    fn the_99th_percentile_is_the_nearest_rank() {
        assert_eq!(diverging((1..=200).rev().map(f64::from), &[]).kl_p99(), Some(198.0));
        assert_eq!(diverging([3.0, 1.0], &[]).kl_p99(), Some(3.0));
    }

    #[test]
    fn the_99_9th_percentile_needs_a_thousand_predictions() {
        let counted = |count: u32| diverging((1..=count).map(f64::from), &[]);
        assert_eq!((counted(999).kl_p999(), counted(999).kl_max()), (None, Some(999.0)));
        assert_eq!((counted(1000).kl_p999(), counted(1000).kl_max()), (Some(999.0), Some(1000.0)));
        assert_eq!((counted(4000).kl_p999(), counted(4000).kl_p99()), (Some(3996.0), Some(3960.0)));
        assert_eq!((Scores::default().kl_p999(), Scores::default().kl_max()), (None, None));
    }

    #[test]
    fn the_standard_error_is_that_of_the_windows_means() {
        // Means 2, 5, 5: their deviation is √3, and the standard error that over √3.
        let scores = diverging([1.0, 3.0, 5.0, 5.0, 4.0, 6.0], &[2, 4, 6]);
        assert!((scores.kl_stderr().unwrap() - 1.0).abs() < 1e-12);
        // Windows count by what was scored in them: three quarters at 0, one quarter at 4.
        let uneven = diverging([0.0, 0.0, 0.0, 4.0], &[3, 4]);
        assert!((uneven.kl_stderr().unwrap() - (2.0 * (0.75f64 * 1.0).powi(2) + 2.0 * (0.25f64 * 3.0).powi(2)).sqrt()).abs() < 1e-12);
        assert_eq!(diverging([1.0, 3.0], &[2]).kl_stderr(), None);
    }

    #[test]
    fn what_cannot_be_compared_is_an_error() {
        let flat = |vocab: usize| Predictions::new(vec![0.0; 2 * vocab], 2).unwrap();
        let mut scores = Scores::default();
        assert!(scores.add(&flat(3), &[0, 3], None).unwrap_err().to_string().contains("token 3"));
        assert!(scores.add(&flat(3), &[0, 1], Some(&flat(4))).unwrap_err().to_string().contains("vocabulary of 4"));
        assert!(Predictions::new(vec![0.0, f32::NAN, 0.0], 1).is_err());
        let impossible = Predictions::new(vec![0.0, f32::NEG_INFINITY, 0.0], 1).unwrap();
        let possible = Predictions::new(vec![0.0; 3], 1).unwrap();
        assert!(scores.add(&impossible, &[0], Some(&possible)).unwrap_err().to_string().contains("impossible"));
        assert!(scores.add(&possible, &[0], Some(&impossible)).is_ok());
    }
}
