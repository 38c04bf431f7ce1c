//! What calibration found, and its file.

use crate::checkpoint::{Checkpoint, Config};
use crate::linalg::Moments;
use crate::{Error, Result};
use nalgebra::DMatrix;
use std::ops::Range;

/// Sums over calibration tokens, independent of any plan.
///
/// The [module](super) says what `y`, `n`, `d` are.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    /// SHA-256 of the source checkpoint's weights.
    pub source: String,
    /// SHA-256 of the text.
    pub text: String,
    /// Tokens that were run.
    pub tokens: usize,
    /// Tokens that were run together, at most.
    pub longest: usize,
    /// Positions at the start of each window that are left out of all sums.
    pub sinks: usize,
    /// Gradients reach a key or value only from queries at least this far behind it.
    pub recent: usize,
    /// Consecutive layers whose rows `y` are moments together; the last group may be smaller.
    pub span: usize,
    /// By group of `span` layers: moments of its layers' rows `y`, one under the other.
    pub moments: Vec<Moments>,
    /// What is known of each layer by itself.
    pub layers: Vec<LayerStatistics>,
}

/// Some tokens' keys and values themselves, spread evenly over the text.
///
/// A column for each, the same tokens in every layer. They tell what no moment does, as how much
/// energies vary from token to token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The rows `y`, `[2n, tokens]`.
    pub rows: DMatrix<f32>,
    /// Keys after RoPE, `[n, tokens]`.
    pub post_rope_keys: DMatrix<f32>,
}

/// One layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerStatistics {
    /// Keys after RoPE, `[n]`.
    pub post_rope_keys: Moments,
    /// Some tokens of those that the sums are over.
    pub sample: Sample,
    /// By key/value head, `[d, d]`.
    ///
    /// The mean over tokens (from position `recent` on) of `Σ q qᵀ` over the head's queries, after
    /// RoPE.
    pub queries: Vec<DMatrix<f32>>,
    /// Mean diagonal entry of the sensitivity of keys and of values.
    ///
    /// Estimated from forward passes alone.
    pub scalar: Option<[f32; 2]>,
    /// Mean root of the loss's squared gradient with respect to key and value weights.
    ///
    /// The mean is over the projection's entries, the mean square over windows.
    pub fisher: Option<[f32; 2]>,
    /// The sensitivity in full.
    pub sensitivity: Option<Sensitivity>,
}

/// Sums over tokens of `g gᵀ`, for each position whose loss counted: `[n, n]`, symmetric.
///
/// `g` is the gradient of the loss of all positions in a window.
#[derive(Debug, Clone, PartialEq)]
pub struct Sensitivity {
    /// With respect to keys before RoPE.
    pub keys: DMatrix<f32>,
    /// With respect to values.
    pub values: DMatrix<f32>,
}

/// What one layer's activations come to.
pub(super) struct ForwardStatistics {
    pub(super) post_rope_keys: Moments,
    pub(super) sample: Sample,
    pub(super) queries: Vec<DMatrix<f32>>,
}

impl Moments {
    /// Those of the numbers in `range` alone.
    ///
    /// # Panics
    /// Where there are fewer numbers.
    pub fn part(&self, range: Range<usize>) -> Moments {
        Moments {
            mean: self.mean.rows_range(range.clone()).into_owned(),
            second: self.second.view((range.start, range.start), (range.len(), range.len())).into_owned(),
        }
    }
}

impl Statistics {
    /// Moments of the rows `y` of consecutive `layers`, one under the other.
    ///
    /// They may have been gathered over any span.
    ///
    /// # Errors
    /// [`Error::Argument`] where these layers were not correlated with each other, or do not exist.
    pub fn rows(&self, layers: Range<usize>) -> Result<Moments> {
        let group = layers.start / self.span;
        let first = group * self.span;
        let end = (first + self.span).min(self.layers.len());
        if layers.is_empty() || layers.end > end {
            let message = format!(
                "the statistics, over spans of {}, do not relate layers {} to {} to each other; gather them anew over a longer span",
                self.span,
                layers.start,
                layers.end.saturating_sub(1)
            );
            return Err(Error::Argument { name: "span".into(), message });
        }
        let moments = &self.moments[group];
        let width = moments.mean.len() / (end - first);
        Ok(moments.part((layers.start - first) * width..(layers.end - first) * width))
    }

    /// Whether these are statistics of `checkpoint`, whose digest is `source`.
    ///
    /// # Errors
    /// [`Error::Argument`] where they are another model's.
    pub fn check(&self, checkpoint: &Checkpoint, source: &str) -> Result<()> {
        let Config { num_hidden_layers: layers, hidden_size: hidden, num_key_value_heads: heads, head_dim: d, .. } = *checkpoint.config();
        let alike = self.layers.len() == layers
            && self.layers.iter().all(|layer| layer.queries.len() == heads && layer.post_rope_keys.mean.len() == heads * d);
        let message = if !alike {
            format!("were gathered from a model of another shape than {} ({layers} layers, {hidden} wide)", checkpoint.path().display())
        } else if self.source != source {
            format!("were gathered from other weights than those of {}", checkpoint.path().display())
        } else {
            return Ok(());
        };
        Err(Error::Argument { name: "statistics".into(), message: format!("{message}; gather them anew") })
    }
}
