//! Tables of RoPE: how fast the pairs of a head rotate, and how that is stretched beyond the
//! context that a model was first trained for.
//!
//! A head's pairs are in half-split layout here whatever the files' own, those that rotate first:
//! what a family leaves alone is a pair that does not rotate.

use std::f64::consts::PI;

/// One table of RoPE. A model may have several: its layers say which is theirs.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Rope {
    /// Its base, `θ`.
    pub theta: f64,
    /// Numbers of a head that it rotates, even; 0 where a layer has no positions (NoPE).
    pub dims: usize,
    /// How it is stretched.
    pub scaling: RopeScaling,
    /// Where attention grows sharper with the position of a query, how.
    pub temperature: Option<Temperature>,
}

/// How positions are stretched beyond the trained context.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every position divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths longer than the original context divided by this are divided by `factor`.
        low_freq_factor: f64,
        /// Wavelengths shorter than the original context divided by this are kept.
        high_freq_factor: f64,
        /// The context that the frequencies were trained for.
        original_max_position_embeddings: f64,
    },
    /// A base that grows with the context, where that is longer than the trained one.
    Dynamic {
        /// How much longer a context may be.
        factor: f64,
        /// The trained context.
        trained: f64,
    },
    /// YaRN (Peng et al., arXiv 2309.00071): frequencies that turn seldom in the original context
    /// are divided by `factor`, those that turn often are kept.
    Yarn {
        /// The divisor.
        factor: f64,
        /// Frequencies that turn more often than this are kept.
        beta_fast: f64,
        /// Frequencies that turn less often than this are divided by `factor`.
        beta_slow: f64,
        /// Whether the ramp between begins and ends at whole pairs.
        truncate: bool,
        /// The original context.
        original_max_position_embeddings: f64,
        /// What rotated queries and keys are multiplied by.
        attention_factor: f64,
    },
    /// LongRoPE (Ding et al., arXiv 2402.13753): a divisor for each frequency.
    Longrope {
        /// Those of contexts up to the original one, `[dims / 2]`.
        short: Vec<f64>,
        /// Those of longer ones.
        long: Vec<f64>,
        /// The original context.
        original_max_position_embeddings: f64,
        /// What rotated queries and keys are multiplied by.
        attention_factor: f64,
    },
    /// The lowest frequencies are zero (Gemma 4): of `dims / 2` only some rotate.
    Proportional {
        /// The divisor of all of them.
        factor: f64,
        /// Pairs that rotate.
        rotating: usize,
    },
}

/// The query at position `p` is multiplied by `1 + beta·ln(1 + ⌊p / period⌋)` (Llama 4).
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Temperature {
    /// How much.
    pub beta: f64,
    /// The original context.
    pub period: f64,
}

impl Rope {
    /// A table of this base that rotates `dims` numbers of a head.
    pub fn new(theta: f64, dims: usize) -> Rope {
        Rope { theta, dims, scaling: RopeScaling::None, temperature: None }
    }

    /// That of a layer without positions.
    pub fn none() -> Rope {
        Rope::new(1e4, 0)
    }

    /// Angular frequencies `[head_dim / 2]` in a sequence with room for `context` tokens: position
    /// `p` rotates pair `i` by `p · f[i]`.
    ///
    /// transformers changes those of dynamic and of LongRoPE when a text grows beyond the trained
    /// context, and keeps the keys that it has rotated otherwise. Here the room that is asked for
    /// decides, for the whole text.
    pub fn frequencies(&self, head_dim: usize, context: usize) -> Vec<f64> {
        let (dims, context) = (self.dims as f64, context as f64);
        let theta = match self.scaling {
            RopeScaling::Dynamic { factor, trained } if context > trained => {
                self.theta * (factor * context / trained - (factor - 1.0)).powf(dims / (dims - 2.0))
            }
            _ => self.theta,
        };
        let scaled = |i: usize| {
            let f = theta.powf(-2.0 * i as f64 / dims);
            match &self.scaling {
                RopeScaling::None | RopeScaling::Dynamic { .. } => f,
                RopeScaling::Linear { factor } => f / factor,
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                    let turns = original_max_position_embeddings * f / (2.0 * PI);
                    let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    f * keep + f / factor * (1.0 - keep)
                }
                RopeScaling::Yarn { factor, beta_fast, beta_slow, truncate, original_max_position_embeddings, .. } => {
                    // The pair that turns so often in the original context.
                    let pair = |turns: &f64| dims * (original_max_position_embeddings / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
                    let (low, high) = (pair(beta_fast), pair(beta_slow));
                    let (low, high) = if *truncate { (low.floor(), high.ceil()) } else { (low, high) };
                    let (low, high) = (low.max(0.0), high.min(dims - 1.0));
                    let divide = ((i as f64 - low) / (high - low).max(1e-3)).clamp(0.0, 1.0);
                    f / factor * divide + f * (1.0 - divide)
                }
                RopeScaling::Longrope { short, long, original_max_position_embeddings, .. } => {
                    f / if context > *original_max_position_embeddings { long[i] } else { short[i] }
                }
                RopeScaling::Proportional { factor, rotating } => {
                    if i < *rotating {
                        f / factor
                    } else {
                        0.0
                    }
                }
            }
        };
        (0..head_dim / 2).map(|i| if i < self.dims / 2 { scaled(i) } else { 0.0 }).collect()
    }

    /// What a query's and a key's rotated numbers are multiplied by, both.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::Longrope { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// Whether frequencies depend on how long a context is.
    pub fn depends_on_context(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. } | RopeScaling::Longrope { .. })
    }

    /// What is wrong with it, for heads of `head_dim`.
    pub(super) fn fault(&self, head_dim: usize) -> Option<String> {
        let positive = |x: f64| x.is_finite() && x > 0.0;
        if !(self.theta >= 1.0 && self.theta <= 1e12) {
            return Some(format!("rope_theta is {}; a number from 1 to 1e12 is expected", self.theta));
        }
        if self.dims > head_dim || !self.dims.is_multiple_of(2) {
            return Some(format!("RoPE rotates {} of a head's {head_dim} numbers; an even part of them is expected", self.dims));
        }
        let all = |numbers: &[f64]| numbers.iter().copied().all(positive);
        match &self.scaling {
            RopeScaling::None => None,
            RopeScaling::Linear { factor } | RopeScaling::Proportional { factor, .. } => {
                (!positive(*factor)).then(|| format!("rope_scaling's factor is {factor}; a number above 0 is expected"))
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let sound =
                    all(&[*factor, *low_freq_factor, *high_freq_factor, *original_max_position_embeddings]) && low_freq_factor < high_freq_factor;
                (!sound).then(|| "rope_scaling: factors above 0 are expected, and low_freq_factor below high_freq_factor".into())
            }
            RopeScaling::Dynamic { factor, trained } => {
                let sound = all(&[*factor, *trained]) && self.dims > 2 && *factor >= 1.0;
                (!sound).then(|| format!("rope_scaling's factor is {factor}; a number from 1 on is expected, and heads of more than one pair"))
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_position_embeddings, attention_factor, .. } => {
                let sound = all(&[*factor, *beta_fast, *beta_slow, *original_max_position_embeddings, *attention_factor]) && self.theta > 1.0;
                (!sound).then(|| "rope_scaling: factors above 0 are expected, and a base above 1".into())
            }
            RopeScaling::Longrope { short, long, original_max_position_embeddings, attention_factor } => {
                if [short, long].iter().any(|list| list.len() != self.dims / 2) {
                    return Some(format!("rope_scaling: {} short and {} long factors for {} frequencies", short.len(), long.len(), self.dims / 2));
                }
                let sound = all(short) && all(long) && all(&[*original_max_position_embeddings, *attention_factor]);
                (!sound).then(|| "rope_scaling: factors above 0 are expected".into())
            }
        }
    }
}

impl Temperature {
    /// What the query at a position is multiplied by.
    pub fn at(&self, position: usize) -> f64 {
        1.0 + self.beta * (1.0 + (position as f64 / self.period).floor()).ln()
    }
}
