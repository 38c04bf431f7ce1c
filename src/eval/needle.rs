//! Needle retrieval (after Kamradt's *Needle in a Haystack*, 2023): whether one fact in a long text can still be told at its end.
//!
//! Perplexity rests on the last few hundred tokens. A cache that loses what lies further back keeps it, and fails here. A fact with a random number stands
//! between two sentences of the text, a question about it after the text, and the answer is begun. What follows is scored twice: whether the first number that
//! the model writes, always taking the likeliest token, is the right one, and how likely it finds the right one's tokens.
//!
//! The facts and the places in the text are drawn once per trial and the same for all lengths, depths and models, so that these can be compared.

use super::{Predictions, Subject};
use crate::checkpoint::{ChatTemplate, Message, Tokenizer};
use crate::progress::{OnProgress, report};
use crate::sequence::Logits;
use crate::session::{Random, argmax};
use crate::{Error, Result};

/// What to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Tokens that a text may have with question and answer.
    pub lengths: Vec<usize>,
    /// Where in the text the fact stands: 0 at its beginning, 100 at its end.
    pub depth_percents: Vec<u32>,
    /// Facts per length and depth.
    pub trials: usize,
    /// What they are drawn from.
    pub seed: u64,
}

impl Default for Task {
    fn default() -> Self {
        Task { lengths: vec![512], depth_percents: vec![0, 25, 50, 75, 100], trials: 3, seed: 0 }
    }
}

/// A text with a fact in it, a question, and its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Tokens that it has room for, of the [`Task`]'s.
    pub length: usize,
    /// Where the fact stands, of the [`Task`]'s.
    pub depth_percent: u32,
    /// The text, the question, and the beginning of the answer.
    pub prompt: Vec<u32>,
    /// The tokens that the answer goes on with, where it is right.
    pub answer: Vec<u32>,
    /// The number that they spell.
    pub number: String,
}

/// One model's answers for one length and depth, and one object of `"needle"` in JSON.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Row {
    /// The model.
    pub model: String,
    /// Its method.
    pub method: String,
    /// How its rows are stored.
    pub layout: String,
    /// Tokens of text, question and answer, at most.
    pub length: usize,
    /// Where the fact stood.
    pub depth_percent: u32,
    /// Facts asked for.
    pub trials: usize,
    /// The share of them that was told.
    pub accuracy: f64,
    /// The mean log-probability of the whole right answer, nats.
    pub log_probability: f64,
}

/// Tokens for an answer, right or wrong.
const ROOM: usize = 16;

const FACTS: [&str; 4] = [
    "The secret number of the THING is NUMBER.",
    "Remember this: the secret number of the THING is NUMBER.",
    "Nobody was meant to know, but the secret number of the THING is NUMBER.",
    "On the back of the card somebody had written that the secret number of the THING is NUMBER.",
];
const QUALITIES: [&str; 8] = ["blue", "old", "quiet", "northern", "narrow", "wooden", "hidden", "white"];
const PLACES: [&str; 8] = ["harbour", "library", "station", "garden", "bridge", "mill", "tower", "orchard"];

/// What a trial draws.
struct Fact {
    wording: &'static str,
    thing: String,
    number: String,
    /// The sentence that the text begins with.
    start: usize,
}

impl Fact {
    fn draw(random: &mut Random, sentences: usize) -> Fact {
        let wording = FACTS[random.below(FACTS.len())];
        let thing = format!("{} {}", QUALITIES[random.below(QUALITIES.len())], PLACES[random.below(PLACES.len())]);
        Fact { wording, thing, number: (10_000 + random.below(90_000)).to_string(), start: random.below(sentences) }
    }

    /// The prompt about `text`, in which [`Fact::stated`] stands: with its special tokens written out where there is a template.
    fn prompt(&self, text: &str, template: Option<&ChatTemplate>) -> Result<String> {
        let question = format!("What is the secret number of the {}?", self.thing);
        let begun = format!("The secret number of the {} is", self.thing);
        let text = text.trim_end();
        Ok(match template {
            Some(template) => {
                let asked = format!("Here is a text, and after it a question.\n\n{text}\n\n{question} Answer with the number.");
                template.render(&[Message::new("user", asked)], true)? + &begun
            }
            None => format!("{text}\n\nQuestion: {question}\nAnswer: {begun}"),
        })
    }

    fn stated(&self) -> String {
        self.wording.replace("THING", &self.thing).replace("NUMBER", &self.number) + " "
    }
}

impl Task {
    /// All questions: for each length and depth as many as there are trials. The text is sentences of `filler`, from the beginning again at its end. A model
    /// with a chat template is asked as a chat partner.
    ///
    /// # Errors
    /// [`Error::Argument`] where nothing would be asked, a length has no room for a question, or no sentence is short enough; those of tokenizer and template.
    pub fn questions(&self, filler: &str, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> Result<Vec<Question>> {
        let refuse = |name: &str, message: &str| Err(Error::Argument { name: name.into(), message: message.into() });
        if self.trials == 0 {
            return refuse("needle-trials", "0 trials ask nothing");
        }
        if self.lengths.is_empty() || self.depth_percents.is_empty() {
            return refuse("needle-lengths", "without a length and a depth nothing is asked");
        }
        if let Some(percent) = self.depth_percents.iter().find(|&&percent| percent > 100) {
            return refuse("needle-depths", &format!("{percent} % is beyond the end of the text"));
        }
        let sentences = sentences(filler);
        if sentences.is_empty() {
            return refuse("text", "it is empty; the fact has to be hidden in something");
        }
        let sizes = sentences.iter().map(|sentence| Ok(tokenizer.encode(sentence, false)?.len())).collect::<Result<Vec<_>>>()?;
        let mut random = Random::new(self.seed);
        let facts: Vec<Fact> = (0..self.trials).map(|_| Fact::draw(&mut random, sentences.len())).collect();
        let mut questions = Vec::new();
        for &length in &self.lengths {
            for &depth_percent in &self.depth_percents {
                for fact in &facts {
                    let haystack = Haystack { sentences: &sentences, sizes: &sizes, tokenizer, template };
                    questions.push(haystack.hide(fact, length, depth_percent)?);
                }
            }
        }
        Ok(questions)
    }
}

/// Ends of sentences and of lines; each sentence keeps the space after it.
fn sentences(text: &str) -> Vec<String> {
    let text = format!("{}\n\n", text.trim());
    let mut found = Vec::new();
    let mut start = 0;
    let mut ended = false;
    let mut spaced = false;
    for (at, c) in text.char_indices() {
        if spaced && !c.is_whitespace() {
            found.push(text[start..at].to_string());
            start = at;
            (ended, spaced) = (false, false);
        }
        match c {
            '\n' => spaced = true,
            c if c.is_whitespace() => spaced |= ended,
            '.' | '!' | '?' => ended = true,
            // Still the end of what they close.
            '"' | '\'' | ')' | '”' | '’' | '»' => (),
            _ => ended = false,
        }
    }
    found.push(text[start..].to_string());
    found.retain(|sentence| !sentence.trim().is_empty());
    found
}

struct Haystack<'a> {
    sentences: &'a [String],
    /// Their tokens.
    sizes: &'a [usize],
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
}

impl Haystack<'_> {
    fn hide(&self, fact: &Fact, length: usize, depth_percent: u32) -> Result<Question> {
        let least = self.encode(&fact.prompt(&fact.stated(), self.template)?)?.len() + ROOM;
        let Some(mut budget) = length.checked_sub(least) else {
            let message = format!("{length} tokens have no room for a question, which takes {least}");
            return Err(Error::Argument { name: "needle-lengths".into(), message });
        };
        loop {
            let chosen = self.fill(fact.start, budget);
            if chosen.is_empty() {
                let message =
                    format!("the sentence {:?}… has no room in {length} tokens", self.sentences[fact.start].chars().take(30).collect::<String>());
                return Err(Error::Argument { name: "text".into(), message });
            }
            let before = self.boundary(&chosen, depth_percent);
            let text = |sentences: &[usize]| sentences.iter().map(|&at| &*self.sentences[at]).collect::<String>();
            let prompt = fact.prompt(&(text(&chosen[..before]) + &fact.stated() + &text(&chosen[before..])), self.template)?;
            let unanswered = self.encode(&prompt)?;
            let answered = self.encode(&format!("{prompt} {}", fact.number))?;
            if unanswered.len() + ROOM > length {
                // Joined, sentences may have more tokens than each on its own.
                budget = budget.saturating_sub(unanswered.len() + ROOM - length);
                continue;
            }
            // A tokenizer might draw the answer's first characters and the prompt's last ones together.
            let common = unanswered.iter().zip(&answered).take_while(|(a, b)| a == b).count();
            let (prompt, answer) = answered.split_at(common);
            return Ok(Question { length, depth_percent, prompt: prompt.into(), answer: answer.into(), number: fact.number.clone() });
        }
    }

    /// As many sentences from `start` on as `budget` tokens have room for.
    fn fill(&self, start: usize, budget: usize) -> Vec<usize> {
        let mut left = budget;
        let mut chosen = Vec::new();
        for at in (0..self.sentences.len()).cycle().skip(start) {
            // An empty sentence would go on for ever.
            match left.checked_sub(self.sizes[at].max(1)) {
                Some(rest) => left = rest,
                None => break,
            }
            chosen.push(at);
        }
        chosen
    }

    /// How many of the chosen sentences stand before the fact.
    fn boundary(&self, chosen: &[usize], depth_percent: u32) -> usize {
        let total: usize = chosen.iter().map(|&at| self.sizes[at]).sum();
        let wanted = total as f64 * f64::from(depth_percent) / 100.0;
        let mut tokens = 0;
        let mut best = (wanted, 0);
        for (index, &at) in chosen.iter().enumerate() {
            tokens += self.sizes[at];
            let miss = (tokens as f64 - wanted).abs();
            if miss <= best.0 {
                best = (miss, index + 1);
            }
        }
        best.1
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(text, self.template.is_none())
    }
}

/// Asks `subject` all `questions`: a row for each length and depth, in the questions' order. `on_progress` hears of prompt tokens.
///
/// # Errors
/// [`Error::Context`] for a sequence too small for a question, [`Error::Interrupted`] where `on_progress` says so; the tokenizer's and the sequence's own.
pub fn run(questions: &[Question], subject: &mut Subject, tokenizer: &Tokenizer, on_progress: OnProgress<'_>) -> Result<Vec<Row>> {
    let total = questions.iter().map(|question| question.prompt.len()).sum();
    let mut done = 0;
    let mut rows: Vec<Row> = Vec::new();
    for question in questions {
        report(on_progress, "needle", done, total)?;
        let (told, log_probability) = ask(question, subject, tokenizer)?;
        let same = |row: &&mut Row| (row.length, row.depth_percent) == (question.length, question.depth_percent);
        match rows.iter_mut().find(same) {
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
                length: question.length,
                depth_percent: question.depth_percent,
                trials: 1,
                accuracy: f64::from(told),
                log_probability,
            }),
        }
        done += question.prompt.len();
    }
    report(on_progress, "needle", total, total)?;
    for row in &mut rows {
        row.accuracy /= row.trials as f64;
        row.log_probability /= row.trials as f64;
    }
    Ok(rows)
}

/// Whether `subject` tells the number, and how likely it finds it.
fn ask(question: &Question, subject: &mut Subject, tokenizer: &Tokenizer) -> Result<(bool, f64)> {
    let sequence = &mut subject.sequence;
    sequence.truncate(0);
    let first = sequence.forward(&question.prompt, Logits::Last)?;
    let mut next = argmax(&first)?;
    let mut written = Vec::new();
    while written.len() < ROOM && !tokenizer.eos_ids().contains(&next) {
        written.push(next);
        next = sequence.step(next)?;
    }
    let told = first_number(&tokenizer.decode(&written)?) == question.number;

    sequence.truncate(question.prompt.len());
    let (_, given) = question.answer.split_last().ok_or_else(|| Error::Argument { name: "answer".into(), message: "it has no tokens".into() })?;
    let mut logits = first;
    logits.extend(sequence.forward(given, Logits::All)?);
    let surprise = Predictions::new(logits, question.answer.len())?.surprise(&question.answer)?;
    Ok((told, -surprise.iter().sum::<f64>()))
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
    fn sentences_end_where_they_do_and_lose_nothing() {
        let text = "One. \"Two!\" said\nthree (3.5 of them). Four";
        assert_eq!(sentences(text), ["One. ", "\"Two!\" ", "said\n", "three (3.5 of them). ", "Four\n\n"]);
        assert_eq!(sentences(text).concat(), format!("{text}\n\n"));
        assert!(sentences(" \n ").is_empty());
    }

    #[test]
    fn only_the_first_number_counts_and_only_whole() {
        assert_eq!(
            ["48213.", " is **48213**", "4821", "482130", "1 or 48213", "none"].map(first_number),
            ["48213", "48213", "4821", "482130", "1", ""]
        );
    }
}
