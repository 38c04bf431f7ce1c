//! What one prediction is worth: its surprise at the token that came, and its distance from what
//! another model predicted.
//!
//! `log p(t) = x[t] - m - ln Σ exp(x[i] - m)` with `m` the largest logit.

use super::exponential::{exp, sum};
use super::sampler::argmax;
use crate::{Error, Result};
use rayon::prelude::*;

/// What one model predicts after consecutive tokens.
pub struct Predictions {
    /// `[predictions][vocab]`.
    logits: Vec<f32>,
    vocab: usize,
    norms: Vec<Norm>,
}

/// What makes probabilities of one prediction's logits.
#[derive(Clone, Copy)]
struct Norm {
    best: u32,
    largest: f32,
    /// `Σ exp(x[i] - largest)`.
    sum: f64,
}

impl Predictions {
    /// Of `count` predictions; `logits` is `[count][vocab]`.
    ///
    /// # Errors
    /// [`Error::Numeric`] where a logit is no number.
    pub fn new(logits: Vec<f32>, count: usize) -> Result<Predictions> {
        let vocab = logits.len().checked_div(count).unwrap_or(0);
        let norm = |row: &[f32]| {
            let best = argmax(row)?;
            let largest = row[best as usize];
            Ok(Norm { best, largest, sum: sum(row, row, |x, _| exp(x - largest)) })
        };
        let norms = logits.par_chunks_exact(vocab.max(1)).map(norm).collect::<Result<_>>()?;
        Ok(Predictions { logits, vocab, norms })
    }

    /// `-ln p(target)` for each prediction's own target, nats.
    ///
    /// # Errors
    /// [`Error::Argument`] for a target outside of the vocabulary.
    pub fn surprise(&self, targets: &[u32]) -> Result<Vec<f64>> {
        let of = |((logits, norm), &target): ((&[f32], &Norm), &u32)| {
            let logit = logits.get(target as usize).ok_or_else(|| Error::Argument {
                name: "text".into(),
                message: format!("token {target} is outside of a vocabulary of {}; was the text tokenised for another model?", self.vocab),
            })?;
            Ok(norm.sum.ln() - (logit - norm.largest) as f64)
        };
        self.rows().zip(targets).map(of).collect()
    }

    /// How `others`' predictions differ from these, one by one.
    ///
    /// # Errors
    /// [`Error::Argument`] for vocabularies that differ, [`Error::Numeric`] where there is no
    /// divergence.
    pub fn divergence(&self, others: &Predictions) -> Result<Vec<Divergence>> {
        if self.vocab != others.vocab {
            let message = format!("its vocabulary of {} is not that of the model, {}", self.vocab, others.vocab);
            return Err(Error::Argument { name: "against".into(), message });
        }
        let pairs: Vec<_> = self.rows().zip(others.rows()).collect();
        pairs.into_par_iter().map(|(p, q)| Divergence::of(p, q)).collect()
    }

    fn rows(&self) -> impl ExactSizeIterator<Item = (&[f32], &Norm)> {
        self.logits.chunks_exact(self.vocab.max(1)).zip(&self.norms)
    }
}

/// How two predictions for the same place differ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Divergence {
    /// `Σ p (ln p - ln q)` in nats, `p` being the reference's probabilities.
    pub kl: f64,
    /// Whether both find the same token likeliest.
    pub agree: bool,
}

impl Divergence {
    fn of((reference, p): (&[f32], &Norm), (logits, q): (&[f32], &Norm)) -> Result<Divergence> {
        let weighted = sum(reference, logits, |r, x| {
            let log_p = r - p.largest;
            let weight = exp(log_p);
            // A probability that is nothing adds nothing, whatever the other model thinks of it.
            if weight > 0.0 { weight * (log_p - (x - q.largest)) } else { 0.0 }
        });
        let kl = weighted / p.sum - (p.sum.ln() - q.sum.ln());
        if !kl.is_finite() {
            let message = "one model finds impossible what the other does not".to_string();
            return Err(Error::Numeric { what: "KL divergence".into(), message });
        }
        // It is never negative but for rounding.
        Ok(Divergence { kl: kl.max(0.0), agree: p.best == q.best })
    }
}
