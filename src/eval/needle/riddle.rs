//! What one trial hides in its text, and what it asks.

use crate::checkpoint::{ChatTemplate, Message};
use crate::{Error, Result};
use std::iter::repeat;

/// A sentence to hide.
pub struct Hidden {
    pub sentence: String,
    /// Where: 0 is the beginning of the text, 100 its end.
    pub percent: f64,
}

/// A question.
pub struct Turn {
    pub question: String,
    /// How its answer begins.
    pub begun: String,
    /// How it goes on.
    pub number: String,
}

/// Sentences, and questions about them, of which the last one counts.
pub struct Riddle {
    pub hidden: Vec<Hidden>,
    pub turns: Vec<Turn>,
}

impl Riddle {
    /// The right answer to the question that counts.
    pub fn number(&self) -> &str {
        self.turns.last().map_or("", |turn| &turn.number)
    }

    /// What is read in each turn about `text`, in which all that is hidden stands.
    ///
    /// With its special tokens written out where there is a template.
    pub fn read(&self, text: &str, template: Option<&ChatTemplate>) -> Result<Vec<String>> {
        let text = text.trim_end();
        match template {
            Some(template) => self.conversation(text, template),
            None => Ok([text].into_iter().chain(repeat("")).zip(&self.turns).map(|(before, turn)| turn.after(before)).collect()),
        }
    }

    /// Each turn as it follows on the one before, which has been answered.
    fn conversation(&self, text: &str, template: &ChatTemplate) -> Result<Vec<String>> {
        let mut messages = Vec::new();
        let mut answered = String::new();
        let mut read = Vec::new();
        for turn in &self.turns {
            let before = if read.is_empty() { format!("Here is a text, and after it a question.\n\n{text}\n\n") } else { String::new() };
            messages.push(Message::new("user", format!("{before}{} Answer with the number.", turn.question)));
            let rendered = template.render(&messages, true)? + &turn.begun;
            let further = rendered.strip_prefix(&answered).ok_or_else(|| Error::Argument {
                name: "needle".into(),
                message: "multi-turn: the model's chat template changes what has been said when a conversation goes on; leave this kind out".into(),
            })?;
            read.push(further.to_string());
            answered = format!("{rendered} {}", turn.number);
            messages.push(Message::new("assistant", format!("{} {}", turn.begun, turn.number)));
        }
        Ok(read)
    }
}

impl Turn {
    /// For a model that continues texts: `before` is what the question follows on, if it has not
    /// been read yet.
    fn after(&self, before: &str) -> String {
        format!("{before}\n\nQuestion: {}\nAnswer: {}", self.question, self.begun)
    }
}
