//! Asking, and what the answers are worth.

use super::{Question, ROOM, Row};
use crate::checkpoint::Tokenizer;
use crate::eval::Subject;
use crate::logits::{Predictions, argmax};
use crate::sequence::{Logits, Sequence};
use crate::task::{OnProgress, report};
use crate::{Error, Result};

/// Asks `subject` all `questions`: a row for each kind, length and depth, in the questions' order.
///
/// `on_progress` hears of the tokens that are read.
///
/// # Errors
/// [`Error::Context`] for a sequence too small for a question, [`Error::Interrupted`] where
/// `on_progress` says so; the tokenizer's and the sequence's own.
pub fn run(questions: &[Question], subject: &mut Subject, tokenizer: &Tokenizer, on_progress: OnProgress<'_>) -> Result<Vec<Row>> {
    let read = |index: usize| {
        let question = &questions[index];
        let again = index > 0 && questions[index - 1].text() == question.text();
        question.turns.iter().map(Vec::len).sum::<usize>() - if again { question.text().len() } else { 0 }
    };
    let total = (0..questions.len()).map(read).sum();
    let mut done = 0;
    let mut rows: Vec<Row> = Vec::new();
    let mut text: &[u32] = &[];
    for (index, question) in questions.iter().enumerate() {
        report(on_progress, "needle", done, total)?;
        if text != question.text() {
            text = question.text();
            subject.sequence.truncate(0);
            // Thousands of tokens, perhaps: whoever waits sees them go, and can stop them.
            for piece in text.chunks(subject.sequence.chunk().max(1)) {
                report(on_progress, "needle", done + subject.sequence.position(), total)?;
                subject.sequence.forward(piece, Logits::None)?;
            }
        }
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
                label: subject.label(),
                kind: question.kind,
                length: question.length,
                depth_percent: question.depth_percent,
                trials: 1,
                accuracy: f64::from(told),
                log_probability,
            }),
        }
        done += read(index);
    }
    report(on_progress, "needle", total, total)?;
    for row in &mut rows {
        row.accuracy /= row.trials as f64;
        row.log_probability /= row.trials as f64;
    }
    Ok(rows)
}

/// Whether the model, which has read the text, tells the number, and how likely it finds it.
fn ask(question: &Question, sequence: &mut dyn Sequence, tokenizer: &Tokenizer) -> Result<(bool, f64)> {
    sequence.truncate(question.text);
    let mut asked = question.text;
    let mut told = Told::default();
    for (index, turn) in question.turns.iter().enumerate() {
        // It follows on the answer before, whatever that was: both stay in the cache, and the text
        // is read once.
        let logits = sequence.forward(&turn[if index == 0 { question.text } else { 0 }..], Logits::Last)?;
        asked = sequence.position();
        told = answer(logits, sequence, tokenizer)?;
    }
    let (_, given) = question.answer.split_last().ok_or_else(|| Error::Argument { name: "answer".into(), message: "it has no tokens".into() })?;
    // As far as it has said what is right, its predictions are known.
    let agreed = told.tokens.iter().zip(given).take_while(|(said, right)| said == right).count();
    let Told { number, mut logits, .. } = told;
    logits.truncate(agreed + 1);
    sequence.truncate(asked + agreed);
    for &token in &given[agreed..] {
        // One by one, as they are written: a cache that chooses among its rows does so for single
        // tokens.
        logits.push(sequence.forward(&[token], Logits::Last)?);
    }
    let surprise = Predictions::new(logits.concat(), question.answer.len())?.surprise(&question.answer)?;
    Ok((number == question.number, -surprise.iter().sum::<f64>()))
}

/// What a model writes.
#[derive(Default)]
struct Told {
    /// The first number in it.
    number: String,
    /// The tokens that it has read again, and the predictions before the first and after each of
    /// them.
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

/// What the model writes after `logits`, always taking the likeliest token. It has written enough
/// once a further token leaves the first number as it is.
fn answer(logits: Vec<f32>, sequence: &mut dyn Sequence, tokenizer: &Tokenizer) -> Result<Told> {
    let mut told = Told::default();
    let mut next = argmax(&logits)?;
    told.logits.push(logits);
    while told.tokens.len() < ROOM && !tokenizer.eos_ids().contains(&next) {
        told.tokens.push(next);
        let longer = first_number(&tokenizer.decode(&told.tokens)?).to_string();
        if !told.number.is_empty() && told.number == longer {
            told.tokens.pop();
            break;
        }
        told.number = longer;
        let logits = sequence.forward(&[next], Logits::Last)?;
        next = argmax(&logits)?;
        told.logits.push(logits);
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
