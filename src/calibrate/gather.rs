//! Statistics from the decoder on the CPU.

use super::cut::cut;
use super::moments::{Forward, Gathered};
use super::scalar::scalar_sensitivity;
use super::sensitivity::Backward;
use super::{LayerStatistics, Statistics, source_digest, text_digest};
use crate::checkpoint::Checkpoint;
use crate::cpu::{Model, Residuals, RowType};
use crate::linalg::Moments;
use crate::sequence::{Logits, Sequence};
use crate::task::{OnProgress, report};
use crate::{Error, Result};
use std::sync::Arc;
use std::time::Instant;

/// How text is run, and what is asked of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Tokens that are run together, each such window from an empty cache: the fewest.
    ///
    /// Others are twice as long, four times, and so on.
    pub window: usize,
    /// Tokens of the longest windows, at most. Memory grows with them, and time for each token.
    pub longest: usize,
    /// At most this many tokens, rounded up to whole windows and spread evenly over the text.
    ///
    /// `None` for all.
    pub tokens: Option<usize>,
    /// Positions at the start of each window that are left out of all sums.
    ///
    /// Caches keep them exactly. The first tokens attract about half of all attention whatever they
    /// say ("attention sinks", Xiao et al., arXiv 2309.17453) and have activations unlike any
    /// other's.
    pub sinks: usize,
    /// Caches keep the rows of so many newest tokens exactly.
    ///
    /// Gradients reach a key or value only from queries at least this far behind it.
    pub recent: usize,
    /// Consecutive layers whose keys and values are correlated with each other: 1, 2 or 4.
    pub span: usize,
    /// How it is found out what a disturbance of keys and values does to the output.
    pub sensitivity: SensitivityKind,
    /// The first position whose prediction counts for sensitivity.
    ///
    /// Before it, hardly any key or value is not exact.
    pub loss_from: usize,
    /// Windows that scalar sensitivity is measured on, fewer where there are not as many.
    pub scalar_windows: usize,
    /// The seed of labels and noise.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            window: 512,
            longest: 4096,
            tokens: None,
            sinks: 4,
            recent: 32,
            span: 1,
            sensitivity: SensitivityKind::Full,
            loss_from: 40,
            scalar_windows: 1,
            seed: 0,
        }
    }
}

/// Strengths of sensitivity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SensitivityKind {
    /// None.
    None,
    /// [`LayerStatistics::scalar`], from two forward passes for every layer.
    Scalar,
    /// [`LayerStatistics::sensitivity`] and [`LayerStatistics::fisher`], from a backward pass for
    /// every window.
    Full,
}

/// Wall-clock seconds by stage.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Seconds {
    /// Running the model.
    pub forward: f64,
    /// Running the loss back through it.
    pub backward: f64,
    /// Disturbing it.
    pub disturb: f64,
    /// Summing up what both find.
    pub moments: f64,
}

/// Tokenises `texts` as they stand, without a token that starts them.
///
/// # Errors
/// Those of the tokenizer.
pub fn encode<T: AsRef<str>>(checkpoint: &Checkpoint, texts: &[T]) -> Result<Vec<Vec<u32>>> {
    let tokenizer = checkpoint.tokenizer()?;
    texts.iter().map(|text| tokenizer.encode(text.as_ref(), false)).collect()
}

/// [Gathers](gather) statistics of `model` from `texts` [as they stand](encode).
///
/// `checkpoint`: what the model was loaded from.
///
/// # Errors
/// As [`gather`] and [`encode`].
pub fn run<T: AsRef<str>>(
    checkpoint: &Checkpoint,
    model: &Arc<Model>,
    texts: &[T],
    options: Options,
    on_progress: OnProgress<'_>,
) -> Result<(Statistics, Seconds)> {
    gather(model, &encode(checkpoint, texts)?, source_digest(checkpoint)?, text_digest(texts), options, on_progress)
}

/// Runs `texts`, as tokens, through `model` in windows and sums up statistics.
///
/// These are of what enters attention, and how the loss depends on it. `source` and `text` are the
/// digests to be recorded ([`source_digest`](super::source_digest),
/// [`text_digest`](super::text_digest)).
///
/// Windows are of several lengths, from [`Options::window`] to [`Options::longest`], with as many
/// tokens of each: a length is used where one window of it is no more than its share. No window has
/// tokens of two texts; the remainder of a text after its last whole window is left out. A single
/// text shorter than a window is one window.
///
/// # Errors
/// [`Error::Argument`] where a text is too short, the options contradict each other, or the model
/// is factored; [`Error::Interrupted`] where `on_progress` says so; [`Error::Numeric`] where
/// something is not finite; and the decoder's.
pub fn gather(
    model: &Arc<Model>,
    texts: &[Vec<u32>],
    source: String,
    text: String,
    options: Options,
    on_progress: OnProgress<'_>,
) -> Result<(Statistics, Seconds)> {
    let refuse = |name: &str, message: String| Err(Error::Argument { name: name.into(), message });
    if model.rows().is_some() {
        return refuse("model", "is factored; gather the statistics of the checkpoint that it was made from".into());
    }
    if ![1, 2, 4].contains(&options.span) {
        return refuse("span", format!("{} layers is not 1, 2 or 4", options.span));
    }
    let full = options.sensitivity == SensitivityKind::Full;
    let loss_from = if options.sensitivity == SensitivityKind::None { 0 } else { options.loss_from };
    let least = options.sinks.max(options.recent).max(loss_from).saturating_add(1);
    let chosen = cut(texts, &options, least)?;
    let (longest, total) = (chosen.iter().map(|window| window.len()).max().unwrap_or(0), chosen.iter().map(|window| window.len()).sum());

    let config = model.config();
    let mut sequence = model.sequence(longest, RowType::F32)?;
    let mut forward = Forward::new(config, &options, &chosen);
    let mut backward = full.then(|| Backward::new(config, &options));
    let mut seconds = Seconds::default();
    let mut done = 0;
    report(on_progress, "calibrate", done, total)?;
    for tokens in &chosen {
        let start = Instant::now();
        sequence.truncate(0);
        forward.residuals = full.then(|| Residuals::new(config, tokens.len()));
        sequence.observe(tokens, Logits::None, &mut forward)?;
        seconds.forward += start.elapsed().as_secs_f64();
        if let (Some(backward), Some(residuals)) = (&mut backward, &forward.residuals) {
            let start = Instant::now();
            backward.add(model, residuals, tokens.len())?;
            seconds.backward += start.elapsed().as_secs_f64();
        }
        done += tokens.len();
        report(on_progress, "calibrate", done, total)?;
    }
    let summing = backward.as_ref().map_or(0.0, |backward| backward.seconds);
    seconds.forward -= forward.seconds;
    seconds.backward -= summing;
    seconds.moments = forward.seconds + summing;

    let Gathered { moments, post_rope_keys, samples, queries } = forward.finish()?;
    let start = Instant::now();
    let scalars = match options.sensitivity {
        SensitivityKind::Scalar if options.scalar_windows > 0 => {
            let squares: Vec<[f32; 2]> = moments.iter().flat_map(|group| mean_squares(group, config.num_key_value_heads * config.head_dim)).collect();
            let some = &chosen[..options.scalar_windows.min(chosen.len())];
            Some(scalar_sensitivity(model, some, &squares, &options, on_progress)?)
        }
        SensitivityKind::Scalar => return refuse("scalar-windows", "none is too few; ask for at least one".into()),
        _ => None,
    };
    seconds.disturb = start.elapsed().as_secs_f64();
    let mut found = backward.map(Backward::finish).transpose()?.map(Vec::into_iter);
    let layers = post_rope_keys.into_iter().zip(samples).zip(queries).enumerate().map(|(layer, ((post_rope_keys, sample), queries))| {
        let scalar = scalars.as_ref().map(|scalars| scalars[layer]);
        let (sensitivity, fisher) = found.as_mut().and_then(Iterator::next).unzip();
        LayerStatistics { post_rope_keys, sample, queries, scalar, fisher, sensitivity }
    });
    let statistics = Statistics {
        source,
        text,
        tokens: total,
        longest,
        sinks: options.sinks,
        recent: options.recent,
        span: options.span,
        moments,
        layers: layers.collect(),
    };
    Ok((statistics, seconds))
}

/// The mean square of an entry of the keys (each `[n]`), and of the values, of each layer in a
/// group.
fn mean_squares(group: &Moments, n: usize) -> Vec<[f32; 2]> {
    let squares = group.second.diagonal();
    (0..squares.len()).step_by(2 * n).map(|first| [first, first + n].map(|first| squares.rows(first, n).mean())).collect()
}
