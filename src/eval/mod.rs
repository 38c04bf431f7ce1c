//! How well a compressed model still is the model: perplexity on a text, and KL divergence and
//! agreement with the dense model on the same text.
//!
//! Perplexity alone flatters: a model may change its mind on every second token and keep it. KL
//! divergence compares whole predictions. Both models read each window side by side, chunk by
//! chunk, so that no more than one chunk's logits of each are in memory, and nothing is written to
//! disk.

pub mod continuation;
mod depth;
mod exact;
mod label;
pub mod needle;
#[cfg(feature = "report")]
pub mod report;
mod score;
mod windows;

pub use depth::Depths;
pub use label::Label;
pub use score::{ENOUGH, Scores};
pub use windows::{Piece, Window, Windowing};

use crate::kv::Exact;
use crate::logits::Predictions;
use crate::sequence::{Logits, Sequence};
use crate::task::{self, OnProgress};
use crate::{Error, Result};

/// A model to be evaluated.
pub struct Subject {
    /// What to call it in the table.
    pub model: String,
    /// Its method: `dense`, `recalkv`, …
    pub method: String,
    /// How its rows are stored.
    pub layout: String,
    /// Which tokens stay exact beside latents.
    ///
    /// `None` for a cache that has none of these and is exact throughout.
    pub exact: Option<Exact>,
    /// An empty sequence with room for one window.
    pub sequence: Box<dyn Sequence>,
}

impl Subject {
    /// What its rows are headed by.
    pub fn label(&self) -> Label {
        Label {
            model: self.model.clone(),
            method: self.method.clone(),
            layout: self.layout.clone(),
            sinks: self.exact.map(|exact| exact.sinks),
            recent: self.exact.map(|exact| exact.recent),
        }
    }
}

/// One model's line in the table, and one object of `"rows"` in JSON.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Row {
    /// Which model, and how its cache was kept.
    #[serde(flatten)]
    pub label: Label,
    /// The model that it is compared with; absent where there is none.
    pub reference: Option<String>,
    /// The text.
    pub text: String,
    /// Tokens of a window.
    pub window: usize,
    /// Windows scored.
    pub windows: usize,
    /// The first position in a window whose prediction is scored.
    ///
    /// It has read so many tokens, and one more.
    pub first_position: usize,
    /// The last one.
    pub last_position: usize,
    /// Predictions scored.
    pub tokens: usize,
    /// `exp` of the mean surprise.
    pub perplexity: f64,
    /// Mean KL divergence from the reference, nats per token; absent without a reference.
    pub kl_mean: Option<f64>,
    /// Its standard error over the windows; absent where there is only one.
    pub kl_stderr: Option<f64>,
    /// Its 99th percentile.
    pub kl_p99: Option<f64>,
    /// Its 99.9th percentile; absent where fewer than a thousand predictions were scored.
    pub kl_p999: Option<f64>,
    /// The largest.
    pub kl_max: Option<f64>,
    /// The share of predictions whose likeliest token is the reference's.
    pub top1_agreement: Option<f64>,
    /// Bytes the cache grows by per token.
    pub kv_bytes_per_token: u64,
    /// Bytes that do not grow.
    pub kv_fixed_bytes: u64,
}

/// All that was measured, as `lowkey eval --json` prints it.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct Report {
    /// The models' distance from the reference, on each text.
    pub rows: Vec<Row>,
    /// What they wrote; left out where nothing was to be written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub continuations: Vec<continuation::Row>,
    /// What they found in long texts; left out where nothing was asked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub needle: Vec<needle::Row>,
}

/// A text to evaluate on.
pub struct Text {
    /// What to call it in the table.
    pub name: String,
    /// Its tokens.
    pub tokens: Vec<u32>,
}

/// What to evaluate on.
pub struct Task<'a> {
    /// The texts, each evaluated on its own.
    pub texts: &'a [Text],
    /// Takes the place of each window's first token, where the tokenizer begins texts so.
    pub bos: Option<u32>,
    /// How each text is cut.
    pub windowing: Windowing,
    /// Whether the first subject is the reference that the others (and itself) are compared with.
    pub first_is_reference: bool,
}

/// Scores all `subjects` on the same windows: for each text a row per subject, in their order.
///
/// `on_progress` hears of tokens.
///
/// # Errors
/// [`Error::Argument`] for a windowing that scores nothing, [`Error::Context`] for a sequence too
/// small for a window, [`Error::Interrupted`] where `on_progress` says so; the sequences' own.
pub fn run(task: &Task, subjects: &mut [Subject], on_progress: OnProgress<'_>) -> Result<Vec<Row>> {
    let windows = task.texts.iter().map(|text| task.windowing.cut(text.tokens.len())).collect::<Result<Vec<_>>>()?;
    let longest = windows.iter().flatten().map(Window::len).max().unwrap_or(0);
    if let Some(small) = subjects.iter().map(|s| s.sequence.capacity()).min().filter(|&capacity| capacity < longest) {
        return Err(Error::Context { needed: longest, capacity: small });
    }
    let total = windows.iter().flatten().map(Window::len).sum();
    let mut done = 0;
    let mut rows = Vec::new();
    for (text, windows) in task.texts.iter().zip(&windows) {
        let mut scores = vec![Scores::default(); subjects.len()];
        for window in windows {
            let mut tokens = text.tokens[window.tokens.clone()].to_vec();
            let targets = tokens[1..].to_vec();
            if let Some(bos) = task.bos {
                tokens[0] = bos;
            }
            subjects.iter_mut().for_each(|subject| subject.sequence.truncate(0));
            let size = subjects.iter().map(|s| s.sequence.chunk()).chain(task.windowing.chunk).min().unwrap_or(1);
            for piece in window.pieces(size) {
                score_piece(&tokens, &targets, &piece, subjects, &mut scores, task.first_is_reference)?;
                done += piece.range.len();
                task::report(on_progress, "evaluate", done, total)?;
            }
            // The last token was not run.
            done += 1;
            scores.iter_mut().for_each(Scores::end_window);
        }
        let reference = subjects.first().filter(|_| task.first_is_reference).map(|subject| &*subject.model);
        rows.extend(subjects.iter().zip(&scores).map(|(subject, scores)| row(subject, reference, &text.name, windows, scores)));
    }
    task::report(on_progress, "evaluate", total, total)?;
    Ok(rows)
}

fn score_piece(
    tokens: &[u32],
    targets: &[u32],
    piece: &Piece,
    subjects: &mut [Subject],
    scores: &mut [Scores],
    first_is_reference: bool,
) -> Result<()> {
    let (tokens, targets) = (&tokens[piece.range.clone()], &targets[piece.range.clone()]);
    let mut reference: Option<Predictions> = None;
    for (index, (subject, scores)) in subjects.iter_mut().zip(scores).enumerate() {
        if !piece.scored {
            subject.sequence.forward(tokens, Logits::None)?;
            continue;
        }
        let predictions = Predictions::new(subject.sequence.forward(tokens, Logits::All)?, tokens.len())?;
        if index == 0 && first_is_reference {
            scores.add(&predictions, targets, Some(&predictions))?;
            reference = Some(predictions);
        } else {
            scores.add(&predictions, targets, reference.as_ref())?;
        }
    }
    Ok(())
}

fn row(subject: &Subject, reference: Option<&str>, text: &str, windows: &[Window], scores: &Scores) -> Row {
    let memory = subject.sequence.memory();
    Row {
        label: subject.label(),
        reference: reference.map(Into::into),
        text: text.into(),
        window: windows.iter().map(Window::len).max().unwrap_or(0),
        windows: scores.windows(),
        first_position: windows.iter().map(|window| window.score_from).min().unwrap_or(0),
        last_position: windows.iter().map(|window| window.len() - 2).max().unwrap_or(0),
        tokens: scores.tokens(),
        perplexity: scores.perplexity(),
        kl_mean: scores.kl_mean(),
        kl_stderr: scores.kl_stderr(),
        kl_p99: scores.kl_p99(),
        kl_p999: scores.kl_p999(),
        kl_max: scores.kl_max(),
        top1_agreement: scores.top1_agreement(),
        kv_bytes_per_token: memory.kv_bytes_per_token,
        kv_fixed_bytes: memory.kv_fixed_bytes,
    }
}
