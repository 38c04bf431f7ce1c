//! How well a compressed model still is the model: perplexity on a text, and KL divergence and agreement with the dense model on the same text.
//!
//! Perplexity alone flatters: a model may change its mind on every second token and keep it. KL divergence compares whole predictions. Both models read
//! each window side by side, chunk by chunk, so that no more than one chunk's logits of each are in memory, and nothing is written to disk.

mod score;
mod windows;

pub use score::{Divergence, Scores};
pub use windows::{Window, Windowing};

use crate::progress::{OnProgress, report};
use crate::sequence::{Logits, Sequence};
use crate::{Error, Result};

/// A model to be evaluated.
pub struct Subject {
    /// What to call it in the table.
    pub model: String,
    /// Its method: `dense`, `recalkv`, …
    pub method: String,
    /// How its rows are stored.
    pub layout: String,
    /// An empty sequence with room for one window.
    pub sequence: Box<dyn Sequence>,
}

/// One model's line in the table, and one object of `"rows"` in JSON.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Row {
    /// The model.
    pub model: String,
    /// Its method.
    pub method: String,
    /// How its rows are stored.
    pub layout: String,
    /// Predictions scored.
    pub tokens: usize,
    /// `exp` of the mean surprise.
    pub perplexity: f64,
    /// Mean KL divergence from the reference, nats per token; absent without a reference.
    pub kl_mean: Option<f64>,
    /// Its 99th percentile.
    pub kl_p99: Option<f64>,
    /// The share of predictions whose likeliest token is the reference's.
    pub top1_agreement: Option<f64>,
    /// Bytes the cache grows by per token.
    pub kv_bytes_per_token: u64,
    /// Bytes that do not grow.
    pub kv_fixed_bytes: u64,
}

/// What to evaluate on.
pub struct Task<'a> {
    /// The text's tokens.
    pub text: &'a [u32],
    /// What stands in place of each window's first token, where the tokenizer starts texts with something.
    pub bos: Option<u32>,
    /// How the text is cut.
    pub windowing: Windowing,
    /// Whether the first subject is the reference that the others (and itself) are compared with.
    pub first_is_reference: bool,
}

/// Scores all `subjects` on the same windows. `on_progress` hears of tokens.
///
/// # Errors
/// [`Error::Argument`] for a windowing that scores nothing, [`Error::Context`] for a sequence too small for a window,
/// [`Error::Interrupted`] where `on_progress` says so; the sequences' own.
pub fn run(task: &Task, subjects: &mut [Subject], on_progress: OnProgress<'_>) -> Result<Vec<Row>> {
    let windows = task.windowing.cut(task.text.len())?;
    let longest = windows.iter().map(Window::len).max().unwrap_or(0);
    if let Some(small) = subjects.iter().map(|s| s.sequence.capacity()).min().filter(|&capacity| capacity < longest) {
        return Err(Error::Context { needed: longest, capacity: small });
    }
    let total = windows.iter().map(Window::len).sum();
    let mut done = 0;
    let mut scores = vec![Scores::default(); subjects.len()];
    for window in &windows {
        let mut tokens = task.text[window.tokens.clone()].to_vec();
        let targets = tokens[1..].to_vec();
        if let Some(bos) = task.bos {
            tokens[0] = bos;
        }
        subjects.iter_mut().for_each(|subject| subject.sequence.truncate(0));
        for chunk in Chunks::of(&tokens, window.score_from, subjects) {
            score_chunk(&tokens, &targets, &chunk, subjects, &mut scores, task.first_is_reference)?;
            done += chunk.range.len();
            report(on_progress, "evaluate", done, total)?;
        }
        // The last token predicts nothing that could be scored, so it is not run.
        done += 1;
    }
    report(on_progress, "evaluate", total, total)?;
    Ok(subjects.iter().zip(&scores).map(|(subject, scores)| row(subject, scores)).collect())
}

/// Consecutive tokens of a window that either all make predictions that count, or none does.
struct Chunk {
    range: std::ops::Range<usize>,
    scored: bool,
}

/// Cuts a window so that every chunk suits all sequences.
struct Chunks {
    next: usize,
    score_from: usize,
    end: usize,
    size: usize,
}

impl Chunks {
    fn of(tokens: &[u32], score_from: usize, subjects: &[Subject]) -> Chunks {
        let size = subjects.iter().map(|s| s.sequence.chunk()).min().unwrap_or(1).max(1);
        Chunks { next: 0, score_from, end: tokens.len() - 1, size }
    }
}

impl Iterator for Chunks {
    type Item = Chunk;

    fn next(&mut self) -> Option<Chunk> {
        let start = self.next;
        let scored = start >= self.score_from;
        let limit = if scored { self.end } else { self.score_from };
        self.next = limit.min(start + self.size);
        (start < self.end).then_some(Chunk { range: start..self.next, scored })
    }
}

fn score_chunk(
    tokens: &[u32],
    targets: &[u32],
    chunk: &Chunk,
    subjects: &mut [Subject],
    scores: &mut [Scores],
    first_is_reference: bool,
) -> Result<()> {
    let wanted = if chunk.scored { Logits::All } else { Logits::None };
    let mut reference: Option<Vec<f32>> = None;
    for (index, (subject, scores)) in subjects.iter_mut().zip(scores).enumerate() {
        let logits = subject.sequence.forward(&tokens[chunk.range.clone()], wanted)?;
        if !chunk.scored {
            continue;
        }
        let targets = &targets[chunk.range.clone()];
        if index == 0 && first_is_reference {
            scores.add(&logits, targets, Some(&logits))?;
            reference = Some(logits);
        } else {
            scores.add(&logits, targets, reference.as_deref())?;
        }
    }
    Ok(())
}

fn row(subject: &Subject, scores: &Scores) -> Row {
    let memory = subject.sequence.memory();
    Row {
        model: subject.model.clone(),
        method: subject.method.clone(),
        layout: subject.layout.clone(),
        tokens: scores.tokens(),
        perplexity: scores.perplexity(),
        kl_mean: scores.kl_mean(),
        kl_p99: scores.kl_p99(),
        top1_agreement: scores.top1_agreement(),
        kv_bytes_per_token: memory.kv_bytes_per_token,
        kv_fixed_bytes: memory.kv_fixed_bytes,
    }
}
