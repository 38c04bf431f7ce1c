//! Needle retrieval (after Kamradt's *Needle in a Haystack*, 2023, and RULER, Hsieh et al., arXiv
//! 2404.06654): whether what stands in a long text can still be told at its end.
//!
//! Perplexity rests on the last few hundred tokens. A cache that loses what lies further back keeps
//! it, and fails here. Sentences with random numbers stand between those of the text, a question
//! about one of them after it, and the answer is begun. What follows is scored twice: whether the
//! first number that the model writes, always taking the likeliest token, is the right one, and how
//! likely it finds the right one's tokens.
//!
//! There are four [`Kind`]s of question. What is hidden is drawn once per trial and the same for
//! all lengths, depths and models, so that these can be compared.

mod draw;
mod haystack;
mod riddle;
mod score;
mod things;
mod tracking;

pub use score::run;

use super::Label;
use crate::checkpoint::{ChatTemplate, Tokenizer};
use crate::linalg::Random;
use crate::{Error, Result};
use haystack::{Haystack, Reading};
use std::str::FromStr;

/// A kind of question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// One fact.
    Single,
    /// One of five facts, about different things: one at each depth, which are asked for one after
    /// another.
    MultiKey,
    /// A number that one thing has, and another has from there, as values are assigned from
    /// variable to variable; the last one's is asked for.
    Tracking,
    /// Two facts. The second question is put when the first has been answered, as a conversation
    /// goes on: the text is not read again.
    MultiTurn,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 4] = [Kind::Single, Kind::MultiKey, Kind::Tracking, Kind::MultiTurn];

    /// What it is called in options and tables.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Single => "single",
            Kind::MultiKey => "multi-key",
            Kind::Tracking => "tracking",
            Kind::MultiTurn => "multi-turn",
        }
    }

    /// What it asks for, in a few words.
    pub fn about(self) -> &'static str {
        match self {
            Kind::Single => "one fact",
            Kind::MultiKey => "one of five facts, about different things",
            Kind::Tracking => "a thing's number, which was handed on to it from another",
            Kind::MultiTurn => "a second fact, when a first one has been asked for; the text is not read again",
        }
    }
}

impl FromStr for Kind {
    type Err = Error;
    fn from_str(s: &str) -> Result<Kind> {
        let known = Kind::ALL.into_iter().find(|kind| kind.name() == s);
        known.ok_or_else(|| Error::Argument { name: "needle".into(), message: format!("{s:?} is none of {}", Kind::ALL.map(Kind::name).join(", ")) })
    }
}

/// What to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Kinds of question.
    pub kinds: Vec<Kind>,
    /// Tokens that a text may have with questions and answers.
    pub lengths: Vec<usize>,
    /// Where in the text what is asked for stands: 0 at its beginning, 100 at its end.
    ///
    /// No more than eight.
    pub depth_percents: Vec<u32>,
    /// Questions per kind, length and depth.
    pub trials: usize,
    /// What they are drawn from.
    pub seed: u64,
}

impl Default for Task {
    fn default() -> Self {
        Task { kinds: vec![Kind::Single], lengths: vec![512], depth_percents: vec![0, 25, 50, 75, 100], trials: 3, seed: 0 }
    }
}

/// A text with something hidden in it, what is asked about it, and the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Its kind.
    pub kind: Kind,
    /// Tokens that it has room for, of the [`Task`]'s.
    pub length: usize,
    /// Where what is asked for stands, of the [`Task`]'s.
    pub depth_percent: u32,
    /// What the model reads, each turn up to the beginning of its answer.
    ///
    /// The text with a question and, where the conversation goes on, further questions.
    pub turns: Vec<Vec<u32>>,
    /// How many tokens of the first turn are the text.
    ///
    /// It is read before the question is known, and once where several questions are about it.
    pub text: usize,
    /// The tokens that the last answer goes on with, where it is right.
    pub answer: Vec<u32>,
    /// The number that they spell.
    pub number: String,
}

impl Question {
    /// The tokens of the text.
    pub fn text(&self) -> &[u32] {
        &self.turns[0][..self.text]
    }
}

/// One model's answers for one kind, length and depth, and one object of `"needle"` in JSON.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Row {
    /// Which model, and how its cache was kept.
    #[serde(flatten)]
    pub label: Label,
    /// What kind of question.
    pub kind: Kind,
    /// Tokens of text, questions and answers, at most.
    pub length: usize,
    /// Where what was asked for stood.
    pub depth_percent: u32,
    /// Questions asked.
    pub trials: usize,
    /// The share of them that was answered rightly.
    pub accuracy: f64,
    /// The mean log-probability of the whole right answer, nats.
    pub log_probability: f64,
}

/// Tokens for an answer, right or wrong.
const ROOM: usize = 16;

impl Task {
    /// All questions: for each kind, length and depth as many as there are trials.
    ///
    /// The text is sentences of `filler`, from the beginning again at its end. A model with a chat
    /// template is asked as a chat partner.
    ///
    /// # Errors
    /// [`Error::Argument`] where nothing would be asked, there are too many depths, a length has no
    /// room for a question, no sentence is short enough, or the template cannot go on with a
    /// conversation; those of tokenizer and template.
    pub fn questions(&self, filler: &str, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> Result<Vec<Question>> {
        let refuse = |name: &str, message: &str| Err(Error::Argument { name: name.into(), message: message.into() });
        if self.kinds.is_empty() {
            return refuse("needle", "without a kind of question nothing is asked");
        }
        if self.trials == 0 {
            return refuse("needle-trials", "0 trials ask nothing");
        }
        if self.lengths.is_empty() || self.depth_percents.is_empty() {
            return refuse("needle-lengths", "without a length and a depth nothing is asked");
        }
        if let Some(percent) = self.depth_percents.iter().find(|&&percent| percent > 100) {
            return refuse("needle-depths", &format!("{percent} % is beyond the end of the text"));
        }
        if self.depth_percents.len() > things::MOST {
            return refuse("needle-depths", &format!("there are things for {} depths, not for {}", things::MOST, self.depth_percents.len()));
        }
        let haystack = Haystack::new(filler, tokenizer, template)?;
        let mut questions = Vec::new();
        for &kind in &self.kinds {
            for &length in &self.lengths {
                // From the beginning: each length has the same trials, and in a trial the same is
                // drawn for each depth.
                let mut random = Random::new(self.seed);
                for _ in 0..self.trials {
                    let texts = draw::draw(kind, &self.depth_percents, &mut random);
                    let start = random.below(haystack.sentences());
                    let readings = texts.iter().map(|riddles| haystack.hide(riddles, start, length)).collect::<Result<Vec<_>>>()?;
                    let asked = texts.iter().flatten().zip(readings.into_iter().flatten());
                    for ((riddle, Reading { turns, text, answer }), &depth_percent) in asked.zip(&self.depth_percents) {
                        questions.push(Question { kind, length, depth_percent, turns, text, answer, number: riddle.number().into() });
                    }
                }
            }
        }
        Ok(questions)
    }
}
