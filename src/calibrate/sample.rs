//! Text that the model writes itself, for whoever has no other.
//!
//! What a model says by itself is what it finds likely: calibration without any data, as others
//! have used it to retrain quantised models (Liu et al., *LLM-QAT*, arXiv 2305.17888).

use crate::checkpoint::Checkpoint;
use crate::cpu::{Model, RowType};
use crate::logits::{Sampler, Sampling};
use crate::sequence::{Logits, Sequence};
use crate::task::{OnProgress, report};
use crate::{Error, Result};
use std::sync::Arc;

/// Draws `count` texts of `length` tokens from `model` at temperature 1.
///
/// `checkpoint`: what the model was loaded from. The same `seed` gives the same texts.
///
/// Each begins with the token that starts a text, or else one that ends it, or else a line break. A
/// token that ends a text is followed by what the model expects next, as in training.
///
/// # Errors
/// [`Error::Argument`] where there is no token to begin with or no room for a text,
/// [`Error::Interrupted`] where `on_progress` says so, and the decoder's.
pub fn sample(
    checkpoint: &Checkpoint,
    model: &Arc<Model>,
    count: usize,
    length: usize,
    seed: u64,
    on_progress: OnProgress<'_>,
) -> Result<Vec<Vec<u32>>> {
    let tokenizer = checkpoint.tokenizer()?;
    let line_break = || tokenizer.encode("\n", false).ok()?.first().copied();
    let Some(start) = tokenizer.bos().or_else(|| tokenizer.eos_ids().first().copied()).or_else(line_break) else {
        let message = "the model's tokenizer has no token that a text could begin with; give a file".into();
        return Err(Error::Argument { name: "calibration".into(), message });
    };
    let mut sampler = Sampler::new(Sampling { temperature: 1.0, seed, ..Sampling::default() })?;
    let mut sequence = model.sequence(length, RowType::F32)?;
    let mut texts = Vec::new();
    for index in 0..count {
        sequence.truncate(0);
        let mut text = vec![start];
        while text.len() < length {
            let mut logits = sequence.forward(&text[text.len() - 1..], Logits::Last)?;
            text.push(sampler.sample(&mut logits, &[])?);
            report(on_progress, "sample", index * length + text.len(), count * length)?;
        }
        texts.push(text);
    }
    Ok(texts)
}
