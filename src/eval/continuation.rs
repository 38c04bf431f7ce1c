//! Long greedy generation: what a model writes with its own cache, as the exact model sees it.
//!
//! Each model continues the same prompt, always with the likeliest token, from the cache that it
//! fills itself: an error in it is read again by every later token. Then the reference reads what
//! was written and says how likely it finds it ([`Row::perplexity`]), as it does of its own
//! continuation. A model that repeats itself is easy to predict, so a perplexity below the
//! reference's is not a good sign by itself: beside it stands how much of the continuation is not
//! repeated ([`Row::distinct_4grams`]), and for how long it is the reference's own
//! ([`Row::agreed_tokens`]).
//!
//! Tokens that end a text are written as any other, so that all continuations are equally long.

use super::{Label, Subject, Text};
use crate::logits::{Predictions, argmax};
use crate::sequence::{Logits, Sequence};
use crate::task::{OnProgress, report};
use crate::{Error, Result};
use std::collections::HashSet;

/// Tokens of which repetitions are counted together.
const GRAM: usize = 4;

/// What to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Task {
    /// How many tokens of a text are the prompt, from its beginning on.
    pub prompt: usize,
    /// How many tokens to write after it.
    pub tokens: usize,
}

impl Default for Task {
    fn default() -> Self {
        Task { prompt: 512, tokens: 1000 }
    }
}

/// One model's continuation of one text, and one object of `"continuations"` in JSON.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Row {
    /// Which model, and how its cache was kept.
    #[serde(flatten)]
    pub label: Label,
    /// The model that reads what was written.
    pub reference: String,
    /// The text that was continued.
    pub text: String,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens written.
    pub tokens: usize,
    /// The reference's perplexity of them.
    pub perplexity: f64,
    /// Tokens before the first that is not the reference's own; all of them where there is none.
    pub agreed_tokens: usize,
    /// Of the runs of four tokens in what was written, the share that is different ones.
    ///
    /// 1 where none comes twice, near 0 in a loop. Absent for fewer than four tokens.
    pub distinct_4grams: Option<f64>,
    /// Bytes the cache grows by per token.
    pub kv_bytes_per_token: u64,
    /// Bytes that do not grow.
    pub kv_fixed_bytes: u64,
}

impl Task {
    /// Tokens that a sequence has to have room for.
    pub fn length(&self) -> usize {
        self.prompt.saturating_add(self.tokens)
    }

    /// Whether texts are long enough.
    ///
    /// # Errors
    /// [`Error::Argument`] where one is not, or there is nothing to continue or to write.
    pub fn check(&self, texts: &[Text]) -> Result<()> {
        let refuse = |name: &str, message: String| Err(Error::Argument { name: name.into(), message });
        if self.tokens == 0 {
            return refuse("generate", "0 tokens are no continuation; at least 1 is needed".into());
        }
        if self.prompt == 0 {
            return refuse("generate-prompt", "there is nothing to continue after 0 tokens; at least 1 is needed".into());
        }
        match texts.iter().find(|text| text.tokens.len() < self.prompt) {
            Some(Text { name, tokens }) => refuse(
                "text",
                format!("{name} has {} tokens, and the prompt takes {}; give a longer text, or a shorter prompt", tokens.len(), self.prompt),
            ),
            None => Ok(()),
        }
    }
}

/// Has `reference` and then `others` continue each text: a row for each of them, text by text.
///
/// Each of `others` is made when it is its turn; sequences have room for [`Task::length`] tokens.
/// `on_progress` hears of tokens written and read.
///
/// # Errors
/// Those of [`Task::check`], [`Error::Context`] for a sequence too small, [`Error::Interrupted`]
/// where `on_progress` says so; the sequences' own.
pub fn run<I>(task: &Task, texts: &[Text], reference: &mut Subject, others: impl Fn() -> I, on_progress: OnProgress<'_>) -> Result<Vec<Row>>
where
    I: Iterator<Item = Result<Subject>>,
{
    task.check(texts)?;
    let mut rows = Vec::new();
    for text in texts {
        let prompt = &text.tokens[..task.prompt];
        let own = write(reference.sequence.as_mut(), prompt, task.tokens, on_progress)?;
        let perplexity = perplexity(reference.sequence.as_mut(), prompt, &own, on_progress)?;
        let name = reference.model.clone();
        rows.push(row(reference, (&name, text), prompt.len(), [&own, &own], perplexity));
        for subject in others() {
            let mut subject = subject?;
            let written = write(subject.sequence.as_mut(), prompt, task.tokens, on_progress)?;
            let perplexity = self::perplexity(reference.sequence.as_mut(), prompt, &written, on_progress)?;
            rows.push(row(&subject, (&name, text), prompt.len(), [&own, &written], perplexity));
        }
    }
    Ok(rows)
}

/// `own`: what the reference, which is called so, has written after the prompt of the text.
fn row(subject: &Subject, (reference, text): (&str, &Text), prompt_tokens: usize, [own, written]: [&[u32]; 2], perplexity: f64) -> Row {
    let memory = subject.sequence.memory();
    Row {
        label: subject.label(),
        reference: reference.into(),
        text: text.name.clone(),
        prompt_tokens,
        tokens: written.len(),
        perplexity,
        agreed_tokens: written.iter().zip(own).take_while(|(a, b)| a == b).count(),
        distinct_4grams: distinct(written),
        kv_bytes_per_token: memory.kv_bytes_per_token,
        kv_fixed_bytes: memory.kv_fixed_bytes,
    }
}

/// The likeliest `count` tokens after `prompt`, each after those before it.
fn write(sequence: &mut dyn Sequence, prompt: &[u32], count: usize, on_progress: OnProgress<'_>) -> Result<Vec<u32>> {
    sequence.truncate(0);
    let mut next = argmax(&read(sequence, prompt, Logits::Last)?)?;
    let mut written = vec![next];
    while written.len() < count {
        report(on_progress, "generate", written.len(), count)?;
        next = sequence.step(next)?;
        written.push(next);
    }
    report(on_progress, "generate", count, count)?;
    Ok(written)
}

/// Of `written`, for a model that reads it after `prompt`.
fn perplexity(sequence: &mut dyn Sequence, prompt: &[u32], written: &[u32], on_progress: OnProgress<'_>) -> Result<f64> {
    // What comes before the last token of the prompt may be in the cache already; its prediction is
    // that of the first token written.
    sequence.truncate(prompt.len() - 1);
    let kept = sequence.position();
    read(sequence, &prompt[kept..prompt.len() - 1], Logits::None)?;
    let tokens = [&prompt[prompt.len() - 1..], &written[..written.len() - 1]].concat();
    let size = sequence.chunk().max(1);
    let (mut surprise, mut done) = (0.0, 0);
    for (tokens, targets) in tokens.chunks(size).zip(written.chunks(size)) {
        report(on_progress, "score", done, written.len())?;
        let predictions = Predictions::new(sequence.forward(tokens, Logits::All)?, tokens.len())?;
        surprise += predictions.surprise(targets)?.iter().sum::<f64>();
        done += tokens.len();
    }
    report(on_progress, "score", done, written.len())?;
    Ok((surprise / written.len() as f64).exp())
}

/// Appends `tokens` in pieces that suit `sequence`. Returns the logits after the last of them where
/// they are `wanted`.
fn read(sequence: &mut dyn Sequence, tokens: &[u32], wanted: Logits) -> Result<Vec<f32>> {
    let size = sequence.chunk().max(1);
    let mut logits = Vec::new();
    for (index, piece) in tokens.chunks(size).enumerate() {
        let last = (index + 1) * size >= tokens.len();
        logits = sequence.forward(piece, if last { wanted } else { Logits::None })?;
    }
    Ok(logits)
}

/// The share of runs of four tokens that is different ones.
fn distinct(tokens: &[u32]) -> Option<f64> {
    let runs = tokens.windows(GRAM);
    let count = runs.len();
    (count > 0).then(|| runs.collect::<HashSet<_>>().len() as f64 / count as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_has_few_distinct_runs() {
        assert_eq!(distinct(&[1, 2, 3]), None);
        assert_eq!(distinct(&[1, 2, 3, 4, 5]), Some(1.0));
        assert_eq!(distinct(&[7; 103]), Some(0.01));
        // A loop of three tokens has three.
        assert_eq!(distinct(&[1, 2, 3].repeat(5)), Some(3.0 / 12.0));
    }

    #[test]
    fn what_cannot_be_continued_is_refused_by_name() {
        let text = [Text { name: "the text".into(), tokens: vec![0; 10] }];
        let message = |prompt, tokens| Task { prompt, tokens }.check(&text).unwrap_err().to_string();
        assert!(message(11, 5).starts_with("text: the text has 10 tokens"));
        assert!(message(0, 5).starts_with("generate-prompt: "));
        assert!(message(5, 0).starts_with("generate: "));
        assert!(Task { prompt: 10, tokens: 5 }.check(&text).is_ok());
    }
}
