//! Asking, and what the answers are worth.

use super::{Question, ROOM, Row};
use crate::checkpoint::Tokenizer;
use crate::eval::{Predictions, Subject};
use crate::progress::{OnProgress, report};
use crate::sequence::{Logits, Sequence};
use crate::session::argmax;
use crate::{Error, Result};

/// Asks `subject` all `questions`: a row for each kind, length and depth, in the questions' order. `on_progress` hears of the tokens that are read.
///
/// # Errors
/// [`Error::Context`] for a sequence too small for a question, [`Error::Interrupted`] where `on_progress` says so; the tokenizer's and the sequence's own.
pub fn run(questions: &[Question], subject: &mut Subject, tokenizer: &Tokenizer, on_progress: OnProgress<'_>) -> Result<Vec<Row>> {
    let read = |question: &Question| question.turns.iter().map(Vec::len).sum::<usize>();
    let total = questions.iter().map(read).sum();
    let mut done = 0;
    let mut rows: Vec<Row> = Vec::new();
    for question in questions {
        report(on_progress, "needle", done, total)?;
        let (told, log_probability) = ask(question, subject.sequence.as_mut(), tokenizer)?;
        let place = (question.kind, question.length, question.depth_percent);
        match rows.iter_mut().find(|row| (row.kind, row.length, row.depth_percent) == place) {
            Some(row) => {
                // Sums for now.
                row.trials += 1;
                row.accuracy += f64::from(told);
                row.log_probability += log_probability;
            }
            None => rows.push(Row {
                model: subject.model.clone(),
                method: subject.method.clone(),
                layout: subject.layout.clone(),
                kind: question.kind,
                length: question.length,
                depth_percent: question.depth_percent,
                trials: 1,
                accuracy: f64::from(told),
                log_probability,
            }),
        }
        done += read(question);
    }
    report(on_progress, "needle", total, total)?;
    for row in &mut rows {
        row.accuracy /= row.trials as f64;
        row.log_probability /= row.trials as f64;
    }
    Ok(rows)
}

/// Whether the model tells the number, and how likely it finds it.
fn ask(question: &Question, sequence: &mut dyn Sequence, tokenizer: &Tokenizer) -> Result<(bool, f64)> {
    sequence.truncate(0);
    let mut logits = Vec::new();
    let mut told = String::new();
    let mut asked = 0;
    for turn in &question.turns {
        // It follows on the answer before, whatever that was: both stay in the cache, and the text is read once.
        logits = sequence.forward(turn, Logits::Last)?;
        asked = sequence.position();
        told = answer(&logits, sequence, tokenizer)?;
    }
    sequence.truncate(asked);
    let (_, given) = question.answer.split_last().ok_or_else(|| Error::Argument { name: "answer".into(), message: "it has no tokens".into() })?;
    for &token in given {
        // One by one, as they are written: a cache that chooses among its rows does so for single tokens.
        logits.extend(sequence.forward(&[token], Logits::Last)?);
    }
    let surprise = Predictions::new(logits, question.answer.len())?.surprise(&question.answer)?;
    Ok((told == question.number, -surprise.iter().sum::<f64>()))
}

/// The first number in what the model writes, always taking the likeliest token. It has written enough once a further token leaves the number as it is.
fn answer(logits: &[f32], sequence: &mut dyn Sequence, tokenizer: &Tokenizer) -> Result<String> {
    let mut told = String::new();
    let mut written = Vec::new();
    let mut next = argmax(logits)?;
    while written.len() < ROOM && !tokenizer.eos_ids().contains(&next) {
        written.push(next);
        let longer = first_number(&tokenizer.decode(&written)?).to_string();
        if !told.is_empty() && told == longer {
            break;
        }
        told = longer;
        next = sequence.step(next)?;
    }
    Ok(told)
}

/// The first run of digits.
fn first_number(text: &str) -> &str {
    let from = text.trim_start_matches(|c: char| !c.is_ascii_digit());
    &from[..from.find(|c: char| !c.is_ascii_digit()).unwrap_or(from.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_number_counts_and_only_whole() {
        assert_eq!(
            ["48213.", " is **48213**", "4821", "482130", "1 or 48213", "none"].map(first_number),
            ["48213", "48213", "4821", "482130", "1", ""]
        );
    }
}
