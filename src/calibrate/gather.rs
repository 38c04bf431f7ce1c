//! Statistics from the decoder on the CPU.

use super::{Statistics, source_digest, text_digest};
use crate::checkpoint::Checkpoint;
use crate::cpu::{Model, Observer, RowType};
use crate::linalg;
use crate::progress::{OnProgress, report};
use crate::sequence::{Logits, Sequence};
use crate::{Error, Result};
use nalgebra::DMatrix;
use std::sync::Arc;

/// How text is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Tokens that are run together, each such window from an empty cache.
    pub window: usize,
    /// At most this many windows, spread evenly over the text; `None` for all.
    pub windows: Option<usize>,
    /// Positions at the start of each window that together count as much as all others. The first tokens attract about half of all attention whatever they say
    /// ("attention sinks", Xiao et al., arXiv 2309.17453) and have activations unlike any other's: counted as one token in a hundred, their keys and values are
    /// what a low-rank basis gives up first, and what the model misses most. (SmolLM2-135M, ReCalKV at kept fraction 0.5, 4,096 tokens, KL divergence on
    /// WikiText-2: 0.68 where they are left out, 0.38 so.)
    pub sinks: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { window: 512, windows: None, sinks: 4 }
    }
}

/// Tokenises `text` as it stands, without a token that starts it, and [gathers](gather) statistics of `model`, which was loaded from `checkpoint`.
///
/// # Errors
/// As [`gather`], and those of the tokenizer.
pub fn run(checkpoint: &Checkpoint, model: &Arc<Model>, text: &str, options: Options, on_progress: OnProgress<'_>) -> Result<Statistics> {
    let tokens = checkpoint.tokenizer()?.encode(text, false)?;
    gather(model, &tokens, source_digest(checkpoint)?, text_digest(text), options, on_progress)
}

/// Runs `tokens` through `model` in windows and sums up what enters attention. `source` and `text` are the digests to be recorded
/// ([`source_digest`](super::source_digest), [`text_digest`](super::text_digest)).
///
/// Products are summed in f32 within a chunk of the decoder, and in f64 from chunk to chunk. A text shorter than a window is one window; the remainder after
/// the last whole window is left out.
///
/// # Errors
/// [`Error::Argument`] where the text is too short or the options contradict each other, [`Error::Interrupted`] where `on_progress` says so, and the decoder's.
pub fn gather(model: &Arc<Model>, tokens: &[u32], source: String, text: String, options: Options, on_progress: OnProgress<'_>) -> Result<Statistics> {
    let refuse = |name: &str, message: String| Err(Error::Argument { name: name.into(), message });
    let window = options.window.min(tokens.len());
    if options.window <= options.sinks {
        return refuse("window", format!("windows of {} tokens hold nothing but the first {}", options.window, options.sinks));
    }
    if window <= options.sinks {
        return refuse("calibration", format!("the text has {} tokens; at least {} are needed", tokens.len(), options.sinks + 1));
    }
    let whole = tokens.len() / window;
    let windows = options.windows.unwrap_or(whole).min(whole);
    if windows == 0 {
        return refuse("windows", "none is too few; ask for at least one".into());
    }

    let mut sequence = model.sequence(window, RowType::F32)?;
    let (layers, hidden) = (model.config().num_hidden_layers, model.config().hidden_size);
    // Either kind's weight makes its total one half, or one where it is alone.
    let share = if options.sinks > 0 { 0.5 } else { 1.0 };
    let mut sums = Sums {
        sinks: options.sinks,
        sink_weight: 0.5 / (windows * options.sinks).max(1) as f64,
        weight: share / (windows * (window - options.sinks)) as f64,
        moments: vec![DMatrix::zeros(hidden, hidden); layers],
    };
    report(on_progress, "calibrate", 0, windows * window)?;
    for index in 0..windows {
        let start = index * whole / windows * window;
        sequence.truncate(0);
        sequence.observe(&tokens[start..start + window], Logits::None, &mut sums)?;
        report(on_progress, "calibrate", (index + 1) * window, windows * window)?;
    }

    let moments = sums.moments.into_iter().map(|sum| sum.map(|x| x as f32)).collect::<Vec<_>>();
    for (layer, moment) in moments.iter().enumerate() {
        linalg::check_finite(&format!("the second moment of what enters layer {layer}'s attention"), moment)?;
    }
    Ok(Statistics { source, text, tokens: windows * window, window, sinks: options.sinks, attention_inputs: moments })
}

/// Weighted sums of `xxᵀ` by layer.
struct Sums {
    sinks: usize,
    sink_weight: f64,
    weight: f64,
    moments: Vec<DMatrix<f64>>,
}

impl Observer for Sums {
    fn attention_input(&mut self, layer: usize, position: usize, input: &DMatrix<f32>) {
        let sinks = self.sinks.saturating_sub(position).min(input.ncols());
        for (first, count, weight) in [(0, sinks, self.sink_weight), (sinks, input.ncols() - sinks, self.weight)] {
            if count > 0 {
                let sum = linalg::gram(&input.columns(first, count).into_owned());
                self.moments[layer].zip_apply(&sum, |moment, x| *moment += weight * f64::from(x));
            }
        }
    }
}
