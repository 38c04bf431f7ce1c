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
    /// Positions at the start of each window that are left out. The first tokens attract attention whatever they say and have activations unlike any
    /// other's ("attention sinks", Xiao et al., arXiv 2309.17453): a handful of them would weigh as much as thousands of ordinary ones.
    pub skip: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { window: 512, windows: None, skip: 4 }
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
    if options.window <= options.skip {
        return refuse("window", format!("windows of {} tokens of which {} are left out hold nothing", options.window, options.skip));
    }
    if window <= options.skip {
        return refuse("calibration", format!("the text has {} tokens; at least {} are needed", tokens.len(), options.skip + 1));
    }
    let whole = tokens.len() / window;
    let windows = options.windows.unwrap_or(whole).min(whole);
    if windows == 0 {
        return refuse("windows", "none is too few; ask for at least one".into());
    }

    let mut sequence = model.sequence(window, RowType::F32)?;
    let (layers, hidden) = (model.config().num_hidden_layers, model.config().hidden_size);
    let mut sums = Sums { skip: options.skip, grams: vec![DMatrix::zeros(hidden, hidden); layers] };
    report(on_progress, "calibrate", 0, windows * window)?;
    for index in 0..windows {
        let start = index * whole / windows * window;
        sequence.truncate(0);
        sequence.observe(&tokens[start..start + window], Logits::None, &mut sums)?;
        report(on_progress, "calibrate", (index + 1) * window, windows * window)?;
    }

    let counted = windows * (window - options.skip);
    let grams = sums.grams.into_iter().map(|sum| sum.map(|x| (x / counted as f64) as f32)).collect::<Vec<_>>();
    for (layer, gram) in grams.iter().enumerate() {
        linalg::check_finite(&format!("the second moment of what enters layer {layer}'s attention"), gram)?;
    }
    Ok(Statistics { source, text, tokens: counted, window, skip: options.skip, attention_inputs: grams })
}

/// Sums of `xxᵀ` by layer.
struct Sums {
    skip: usize,
    grams: Vec<DMatrix<f64>>,
}

impl Observer for Sums {
    fn attention_input(&mut self, layer: usize, position: usize, input: &DMatrix<f32>) {
        let skipped = self.skip.saturating_sub(position).min(input.ncols());
        let counted = linalg::gram(&input.columns(skipped, input.ncols() - skipped).into_owned());
        self.grams[layer].zip_apply(&counted, |sum, x| *sum += f64::from(x));
    }
}
