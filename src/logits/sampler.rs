//! From logits to a token.
//!
//! The steps, in this order (that of Hugging Face's `generate`): repetition penalty on the logits,
//! temperature, then three cuts, each on what the one before left: the `top_k` most likely; the
//! smallest set of most likely tokens that holds `top_p` of the probability; those at least `min_p`
//! times as likely as the likeliest. What remains is normalised and drawn from.
//!
//! At temperature 0 and without a penalty the choice is the device's own argmax, and no logits need
//! leave it: see [`Sampler::is_greedy`].

use crate::linalg::Random;
use crate::{Error, Result};

/// How the next token is chosen. The default takes the likeliest, always.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits; `0` takes the likeliest token.
    pub temperature: f32,
    /// Only this many of the likeliest tokens; `0` for all.
    pub top_k: usize,
    /// Only the smallest set of likeliest tokens that together have this probability; `1` for all.
    pub top_p: f32,
    /// Only tokens at least this many times as likely as the likeliest; `0` for all.
    pub min_p: f32,
    /// Repetition penalty (Keskar et al., *CTRL*, 2019); `1` for none.
    ///
    /// Logits of tokens that occurred lately are divided by it where positive and multiplied where
    /// negative.
    pub repetition_penalty: f32,
    /// How many of the last tokens count as lately.
    pub repetition_window: usize,
    /// The seed of all draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, repetition_window: 64, seed: 0 }
    }
}

impl Sampling {
    fn check(&self) -> Result<()> {
        let refuse =
            |name: &str, value: f32, accepted: &str| Err(Error::Argument { name: name.into(), message: format!("{value} is not {accepted}") });
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return refuse("temperature", self.temperature, "a number from 0 up");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top-p", self.top_p, "above 0 and at most 1");
        }
        if !(self.min_p >= 0.0 && self.min_p <= 1.0) {
            return refuse("min-p", self.min_p, "between 0 and 1");
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return refuse("repetition-penalty", self.repetition_penalty, "a number above 0");
        }
        Ok(())
    }
}

/// A token that may come next.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// The token.
    pub id: u32,
    /// Its probability; over all candidates they sum to 1.
    pub probability: f64,
}

/// [`Sampling`] at work: its random stream and a buffer that is reused from token to token.
pub struct Sampler {
    sampling: Sampling,
    random: Random,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler at the beginning of its random stream.
    ///
    /// # Errors
    /// [`Error::Argument`] for an option out of its range.
    pub fn new(sampling: Sampling) -> Result<Sampler> {
        sampling.check()?;
        let random = Random::new(sampling.seed);
        Ok(Sampler { sampling, random, candidates: Vec::new() })
    }

    /// Where its random stream began, and how far that has come.
    pub(crate) fn stream(&self) -> [u64; 2] {
        let Sampler { sampling, random, candidates: _ } = self;
        [sampling.seed, random.counter()]
    }

    /// Goes on with the stream of another sampler that began with the same seed; a seed of its own
    /// is a stream of its own.
    pub(crate) fn go_on(&mut self, [seed, counter]: [u64; 2]) {
        if seed == self.sampling.seed {
            self.random = Random::new(counter);
        }
    }

    /// Whether the choice is the argmax of the untouched logits.
    ///
    /// Then [`crate::sequence::Sequence::step`] can make it.
    pub fn is_greedy(&self) -> bool {
        self.sampling.temperature == 0.0 && self.sampling.repetition_penalty == 1.0
    }

    /// Chooses the next token from `logits` `[vocab]`, which are overwritten.
    ///
    /// `context` is all tokens before it.
    ///
    /// # Errors
    /// [`Error::Numeric`] for logits that are not numbers.
    pub fn sample(&mut self, logits: &mut [f32], context: &[u32]) -> Result<u32> {
        self.penalise(logits, context);
        if self.sampling.temperature == 0.0 {
            return argmax(logits);
        }
        self.weigh(logits)?;
        let mut left = self.random.unit();
        for candidate in &self.candidates {
            left -= candidate.probability;
            if left < 0.0 {
                return Ok(candidate.id);
            }
        }
        // Rounding may leave a last crumb of probability to nobody; it is the last candidate's.
        Ok(self.candidates[self.candidates.len() - 1].id)
    }

    /// The distribution that [`sample`](Self::sample) would draw from.
    ///
    /// The likeliest first where a cut had to order them.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn distribution(&mut self, logits: &mut [f32], context: &[u32]) -> Result<&[Candidate]> {
        self.penalise(logits, context);
        if self.sampling.temperature == 0.0 {
            let id = argmax(logits)?;
            self.candidates.clear();
            self.candidates.push(Candidate { id, probability: 1.0 });
        } else {
            self.weigh(logits)?;
        }
        Ok(&self.candidates)
    }

    fn penalise(&self, logits: &mut [f32], context: &[u32]) {
        let penalty = self.sampling.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut recent = context[context.len().saturating_sub(self.sampling.repetition_window)..].to_vec();
        recent.sort_unstable();
        recent.dedup();
        for id in recent {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    /// Fills `candidates` with the tokens that remain after all cuts. Until the end, `probability`
    /// holds weights that are not normalised: the likeliest token's is 1.
    fn weigh(&mut self, logits: &[f32]) -> Result<()> {
        let best = logits[argmax(logits)? as usize];
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates
            .extend(logits.iter().zip(0..).map(|(&logit, id)| Candidate { id, probability: ((logit - best) as f64 / temperature as f64).exp() }));
        let likelier = |a: &Candidate, b: &Candidate| b.probability.total_cmp(&a.probability).then(a.id.cmp(&b.id));
        let total = |candidates: &[Candidate]| candidates.iter().map(|c| c.probability).sum::<f64>();

        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, likelier);
            candidates.truncate(top_k);
        }
        if top_p < 1.0 {
            let all = total(candidates);
            // Tokens below this weight have less than 1 - top_p together, so none of them belongs
            // to the set: only the rest needs sorting.
            let floor = (1.0 - top_p as f64) * all / candidates.len() as f64;
            candidates.retain(|c| c.probability >= floor);
            candidates.sort_unstable_by(likelier);
            let mut sum = 0.0;
            let needed = candidates.iter().take_while(|c| {
                let open = sum < top_p as f64 * all;
                sum += c.probability;
                open
            });
            let count = needed.count();
            candidates.truncate(count);
        }
        if min_p > 0.0 {
            candidates.retain(|c| c.probability >= min_p as f64);
        }
        let sum = total(candidates);
        candidates.iter_mut().for_each(|c| c.probability /= sum);
        Ok(())
    }
}

/// The likeliest token, the lowest id among equals.
///
/// # Errors
/// [`Error::Numeric`] where a logit is NaN or `+∞`, or none is finite.
pub fn argmax(logits: &[f32]) -> Result<u32> {
    let mut best = (f32::NEG_INFINITY, 0);
    for (&logit, id) in logits.iter().zip(0..) {
        if logit.is_nan() || logit == f32::INFINITY {
            best = (f32::INFINITY, id);
            break;
        }
        if logit > best.0 {
            best = (logit, id);
        }
    }
    if best.0.is_finite() {
        return Ok(best.1);
    }
    let message = if logits.is_empty() { "there are none".into() } else { format!("that of token {} is {}", best.1, logits[best.1 as usize]) };
    Err(Error::Numeric { what: "logits".into(), message })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits whose probabilities at temperature 1 are 1/2, 1/4, 1/8, 1/16, 1/16, in a shuffled
    /// order of ids.
    fn halves() -> Vec<f32> {
        [0.0625f32, 0.5, 0.125, 0.0625, 0.25].iter().map(|p| p.ln() + 3.0).collect()
    }

    fn distribution(sampling: Sampling, mut logits: Vec<f32>, context: &[u32]) -> Vec<(u32, f64)> {
        let mut sampler = Sampler::new(sampling).unwrap();
        let mut all: Vec<(u32, f64)> = sampler.distribution(&mut logits, context).unwrap().iter().map(|c| (c.id, c.probability)).collect();
        all.sort_by_key(|a| a.0);
        all
    }

    fn assert_close(found: &[(u32, f64)], expected: &[(u32, f64)]) {
        assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), expected.iter().map(|e| e.0).collect::<Vec<_>>(), "{found:?}");
        assert!(found.iter().zip(expected).all(|(f, e)| (f.1 - e.1).abs() < 1e-6), "{found:?} is not {expected:?}");
    }

    #[test]
    fn cuts_leave_the_closed_forms() {
        let warm = Sampling { temperature: 1.0, ..Sampling::default() };
        assert_close(&distribution(warm.clone(), halves(), &[]), &[(0, 0.0625), (1, 0.5), (2, 0.125), (3, 0.0625), (4, 0.25)]);
        assert_close(&distribution(Sampling { top_k: 2, ..warm.clone() }, halves(), &[]), &[(1, 2.0 / 3.0), (4, 1.0 / 3.0)]);
        assert_close(&distribution(Sampling { top_p: 0.8, ..warm.clone() }, halves(), &[]), &[(1, 4.0 / 7.0), (2, 1.0 / 7.0), (4, 2.0 / 7.0)]);
        assert_close(&distribution(Sampling { min_p: 0.3, ..warm.clone() }, halves(), &[]), &[(1, 2.0 / 3.0), (4, 1.0 / 3.0)]);
        // Of equals at the edge of the cut, the lowest id stays.
        assert_close(
            &distribution(Sampling { top_k: 4, ..warm.clone() }, halves(), &[]),
            &[(0, 1.0 / 15.0), (1, 8.0 / 15.0), (2, 2.0 / 15.0), (4, 4.0 / 15.0)],
        );
        // The cut by probability works on what the cut by number left: 2/3 and 1/3.
        assert_close(&distribution(Sampling { top_k: 2, top_p: 0.6, ..warm }, halves(), &[]), &[(1, 1.0)]);
        // At temperature 1/2 probabilities are squared: 64 : 16 : 4 : 1 : 1, over 86.
        let cold = Sampling { temperature: 0.5, ..Sampling::default() };
        assert_close(&distribution(cold, halves(), &[]), &[(0, 1.0 / 86.0), (1, 64.0 / 86.0), (2, 4.0 / 86.0), (3, 1.0 / 86.0), (4, 16.0 / 86.0)]);
    }

    #[test]
    fn penalty_touches_recent_tokens_once_each() {
        let sampling = Sampling { repetition_penalty: 2.0, repetition_window: 3, ..Sampling::default() };
        let mut sampler = Sampler::new(sampling).unwrap();
        assert!(!sampler.is_greedy());
        let mut logits = vec![1.0, 4.0, -1.0, 3.0];
        // Token 3 is too long ago to count; 1 occurs twice and is halved once; 2 is negative and
        // grows; 9 is in no vocabulary.
        assert_eq!(sampler.sample(&mut logits, &[3, 1, 2, 1]).unwrap(), 3);
        assert_eq!(logits, [1.0, 2.0, -2.0, 3.0]);
        assert_eq!(sampler.sample(&mut [0.0, 1.0], &[9]).unwrap(), 1);
    }

    #[test]
    fn draws_follow_the_distribution_and_the_seed() {
        let sampling = Sampling { temperature: 1.0, top_p: 0.99, seed: 42, ..Sampling::default() };
        let draw = |sampling: &Sampling, n: usize| -> Vec<u32> {
            let mut sampler = Sampler::new(sampling.clone()).unwrap();
            (0..n).map(|_| sampler.sample(&mut halves(), &[]).unwrap()).collect()
        };
        let drawn = draw(&sampling, 20_000);
        for (id, p) in [(0u32, 0.0625), (1, 0.5), (2, 0.125), (3, 0.0625), (4, 0.25)] {
            let share = drawn.iter().filter(|&&d| d == id).count() as f64 / 20_000.0;
            let deviation = (p * (1.0 - p) / 20_000.0f64).sqrt();
            assert!((share - p).abs() < 5.0 * deviation, "token {id}: {share} drawn, {p} expected");
        }
        assert_eq!(draw(&sampling, 50), drawn[..50]);
        assert_ne!(draw(&Sampling { seed: 43, ..sampling }, 50), drawn[..50]);
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals_and_refuses_what_is_no_number() {
        assert!(Sampler::new(Sampling::default()).unwrap().is_greedy());
        assert_eq!(argmax(&[1.0, 5.0, 5.0, f32::NEG_INFINITY]).unwrap(), 1);
        assert!(argmax(&[1.0, f32::NAN]).unwrap_err().to_string().contains("token 1 is NaN"));
        assert!(argmax(&[f32::INFINITY, 0.0]).is_err());
        assert!(argmax(&[f32::NEG_INFINITY; 3]).is_err());
        assert!(argmax(&[]).is_err());
    }

    #[test]
    fn options_out_of_range_are_refused_by_name() {
        let name = |sampling: Sampling| match Sampler::new(sampling) {
            Err(Error::Argument { name, .. }) => name,
            _ => "accepted".into(),
        };
        assert_eq!(name(Sampling { temperature: -1.0, ..Sampling::default() }), "temperature");
        assert_eq!(name(Sampling { temperature: f32::NAN, ..Sampling::default() }), "temperature");
        assert_eq!(name(Sampling { top_p: 0.0, ..Sampling::default() }), "top-p");
        assert_eq!(name(Sampling { min_p: 1.5, ..Sampling::default() }), "min-p");
        assert_eq!(name(Sampling { repetition_penalty: 0.0, ..Sampling::default() }), "repetition-penalty");
        assert_eq!(name(Sampling { top_p: 1.0, min_p: 1.0, ..Sampling::default() }), "accepted");
    }
}
