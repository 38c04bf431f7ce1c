//! Statistics from the decoder on the CPU.

use super::cut::cut;
use super::layers::{Layers, need as need_of};
use super::options::{Need, Options, Seconds, SensitivityKind};
use super::scalar::scalar_sensitivity;
use super::{Statistics, source_digest, text_digest};
use crate::checkpoint::Checkpoint;
use crate::cpu::Model;
use crate::linalg::Moments;
use crate::task::OnProgress;
use crate::{Error, Result};
use std::sync::Arc;
use std::time::Instant;

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
    options: &Options,
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
/// All tokens go through a layer before the next layer is looked at, on the way back too.
///
/// # Errors
/// [`Error::Argument`] where a text is too short, the options contradict each other, or the model
/// is factored; [`Error::Interrupted`] where `on_progress` says so; [`Error::Numeric`] where
/// something is not finite; [`Error::Io`] where the disk has no room for the residual streams; and
/// the decoder's.
pub fn gather(
    model: &Arc<Model>,
    texts: &[Vec<u32>],
    source: String,
    text: String,
    options: &Options,
    on_progress: OnProgress<'_>,
) -> Result<(Statistics, Seconds)> {
    let windows = windows(model, texts, options)?;
    let (longest, tokens) = (windows.iter().map(|window| window.len()).max().unwrap_or(0), windows.iter().map(|window| window.len()).sum());
    let mut layers = Layers::new(model, &windows, options, &[&source, &text])?;
    layers.run(on_progress)?;
    let mut seconds = layers.seconds;
    let (moments, mut layers) = layers.finish()?;

    let start = Instant::now();
    if options.sensitivity == SensitivityKind::Scalar {
        let config = model.config();
        let squares: Vec<[f32; 2]> = moments.iter().flat_map(|group| mean_squares(group, config.num_key_value_heads * config.head_dim)).collect();
        let some = &windows[..options.scalar_windows.min(windows.len())];
        let scalars = scalar_sensitivity(model, some, &squares, options, on_progress)?;
        layers.iter_mut().zip(scalars).for_each(|(layer, scalar)| layer.scalar = Some(scalar));
        seconds.disturb = start.elapsed().as_secs_f64();
    }
    let Options { sinks, recent, span, .. } = *options;
    Ok((Statistics { source, text, tokens, longest, sinks, recent, span, moments, layers }, seconds))
}

/// What [`gather`] will need, which it does not look at.
///
/// # Errors
/// Those of [`gather`] that are known before anything is run.
pub fn need(model: &Model, texts: &[Vec<u32>], options: &Options) -> Result<Need> {
    Ok(need_of(model, &windows(model, texts, options)?, options))
}

/// The windows that are run.
fn windows<'a>(model: &Model, texts: &'a [Vec<u32>], options: &Options) -> Result<Vec<&'a [u32]>> {
    let refuse = |name: &str, message: String| Err(Error::Argument { name: name.into(), message });
    if model.rows().is_some() {
        return refuse("model", "is factored; gather the statistics of the checkpoint that it was made from".into());
    }
    if ![1, 2, 4].contains(&options.span) {
        return refuse("span", format!("{} layers is not 1, 2 or 4", options.span));
    }
    if options.sensitivity == SensitivityKind::Scalar && options.scalar_windows == 0 {
        return refuse("scalar-windows", "none is too few; ask for at least one".into());
    }
    let loss_from = if options.sensitivity == SensitivityKind::None { 0 } else { options.loss_from };
    let least = options.sinks.max(options.recent).max(loss_from).saturating_add(1);
    cut(texts, options, least)
}

/// The mean square of an entry of the keys (each `[n]`), and of the values, of each layer in a
/// group.
fn mean_squares(group: &Moments, n: usize) -> Vec<[f32; 2]> {
    let squares = group.second.diagonal();
    (0..squares.len()).step_by(2 * n).map(|first| [first, first + n].map(|first| squares.rows(first, n).mean())).collect()
}
