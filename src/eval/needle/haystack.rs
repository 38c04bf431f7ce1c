//! The text that things are hidden in: as many of its sentences as there is room for, and others
//! between them.

use super::ROOM;
use super::riddle::Riddle;
use crate::checkpoint::{ChatTemplate, Tokenizer};
use crate::{Error, Result};

/// Sentences to hide others between.
pub struct Haystack<'a> {
    sentences: Vec<String>,
    /// Their tokens.
    sizes: Vec<usize>,
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
}

/// What a model reads of a riddle, in tokens.
pub struct Reading {
    /// Each turn.
    pub turns: Vec<Vec<u32>>,
    /// How many of the first one are the text.
    pub text: usize,
    /// The last one's answer.
    pub answer: Vec<u32>,
}

impl<'a> Haystack<'a> {
    pub fn new(filler: &str, tokenizer: &'a Tokenizer, template: Option<&'a ChatTemplate>) -> Result<Haystack<'a>> {
        let sentences = sentences(filler);
        if sentences.is_empty() {
            return Err(Error::Argument { name: "text".into(), message: "it is empty; what is asked for has to be hidden in something".into() });
        }
        let sizes = sentences.iter().map(|sentence| Ok(tokenizer.encode(sentence, false)?.len())).collect::<Result<_>>()?;
        Ok(Haystack { sentences, sizes, tokenizer, template })
    }

    /// How many sentences it has.
    pub fn sentences(&self) -> usize {
        self.sentences.len()
    }

    /// One text for all `riddles`, which hide the same.
    ///
    /// It begins with sentence `start`, and each has room in `length` tokens.
    pub fn hide(&self, riddles: &[Riddle], start: usize, length: usize) -> Result<Vec<Reading>> {
        // Of the riddle that needs most.
        let needed = |text: &str| {
            let needed = riddles.iter().map(|riddle| Ok(needed(&self.turns(&riddle.read(text, self.template)?)?)));
            Ok::<usize, Error>(needed.collect::<Result<Vec<_>>>()?.into_iter().max().unwrap_or(0))
        };
        let least = needed(&self.text(&riddles[0], &[]))?;
        let Some(mut budget) = length.checked_sub(least) else {
            let message = format!("{length} tokens have no room for a question, which takes {least}");
            return Err(Error::Argument { name: "needle-lengths".into(), message });
        };
        loop {
            let chosen = self.fill(start, budget);
            if chosen.is_empty() {
                let message =
                    format!("the sentence {:?}… has no room in {length} tokens", self.sentences[start].chars().take(30).collect::<String>());
                return Err(Error::Argument { name: "text".into(), message });
            }
            let text = self.text(&riddles[0], &chosen);
            let needed = needed(&text)?;
            if needed <= length {
                return riddles.iter().map(|riddle| self.reading(riddle, text.trim_end())).collect();
            }
            // Joined, sentences may have more tokens than each on its own.
            budget = budget.saturating_sub(needed - length);
        }
    }

    fn reading(&self, riddle: &Riddle, text: &str) -> Result<Reading> {
        // A tokenizer might draw the last characters of what comes first together with what
        // follows.
        let common = |a: &[u32], b: &[u32]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
        let mut read = riddle.read(text, self.template)?;
        let mut turns = self.turns(&read)?;
        // None where a template writes it otherwise.
        let end = read[0].find(text).map_or(0, |at| at + text.len());
        let text = common(&self.turns(&[read[0][..end].into()])?[0], &turns[0]);
        if let Some(last) = read.last_mut() {
            *last += &format!(" {}", riddle.number());
        }
        let answered = self.turns(&read)?.pop().unwrap_or_default();
        let asked = turns.pop().unwrap_or_default();
        let (asked, answer) = answered.split_at(common(&asked, &answered));
        turns.push(asked.into());
        Ok(Reading { turns, text, answer: answer.into() })
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

    /// The chosen sentences, and what is hidden between them.
    fn text(&self, riddle: &Riddle, chosen: &[usize]) -> String {
        let hidden: Vec<(usize, &str)> = riddle.hidden.iter().map(|hidden| (self.boundary(chosen, hidden.percent), &*hidden.sentence)).collect();
        let mut text = String::new();
        for before in 0..=chosen.len() {
            hidden.iter().filter(|(place, _)| *place == before).for_each(|(_, sentence)| text += &format!("{sentence} "));
            text += chosen.get(before).map_or("", |&at| &self.sentences[at]);
        }
        text
    }

    /// How many of the chosen sentences stand before what is hidden at `percent`.
    fn boundary(&self, chosen: &[usize], percent: f64) -> usize {
        let total: usize = chosen.iter().map(|&at| self.sizes[at]).sum();
        let wanted = total as f64 * percent / 100.0;
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

    /// Each turn's tokens. What the tokenizer puts before a text stands before the first; a
    /// template has it already.
    fn turns(&self, read: &[String]) -> Result<Vec<Vec<u32>>> {
        read.iter().enumerate().map(|(index, text)| self.tokenizer.encode(text, index == 0 && self.template.is_none())).collect()
    }
}

/// Tokens for all turns and their answers.
fn needed(turns: &[Vec<u32>]) -> usize {
    turns.iter().map(|turn| turn.len() + ROOM).sum()
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
}
