//! What was said, and the model's session.
//!
//! All of it is rendered anew for every answer; what the session has in its cache is not read
//! again. Where the context is full the oldest turns may be left out.

use super::turns::{OnFull, Turns};
use crate::cli::answer::{Answer, Teller};
use crate::cli::console::Console;
use crate::cli::template::template;
use crate::cli::thinking::Thinking;
use lowkey::checkpoint::{ChatTemplate, Message, Tokenizer};
use lowkey::session::{Finish, Summary};
use lowkey::{Model, Prompt, Result, Session, SessionOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

/// A conversation with a model.
pub struct Conversation {
    session: Session,
    tokenizer: Arc<Tokenizer>,
    /// `None` for a model without one: it continues what was said as one text.
    template: Option<ChatTemplate>,
    turns: Turns,
    on_full: OnFull,
    /// The longest answer.
    most: usize,
    /// How many messages the user knows to be left out.
    known: usize,
}

/// How a conversation is held.
pub struct Manner {
    /// What the model is told before everything else.
    pub system: Option<String>,
    /// Without the chat template.
    pub raw: bool,
    pub on_full: OnFull,
}

impl Conversation {
    /// One that begins.
    ///
    /// # Errors
    /// Those of [`template`] and [`Model::session`].
    pub fn new(model: &Model, manner: Manner, options: SessionOptions, console: &Console) -> Result<Conversation> {
        let template = if manner.raw { None } else { template(model, manner.system.is_some(), console)? };
        let most = options.max_tokens.unwrap_or(usize::MAX);
        let mut session = model.session(options)?;
        session.set_cancel(console.cancel().clone());
        let (tokenizer, turns) = (model.tokenizer()?, Turns::new(manner.system));
        Ok(Conversation { session, tokenizer, template, turns, on_full: manner.on_full, most, known: 0 })
    }

    /// The model's state.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Asks, and shows the answer as it comes.
    ///
    /// Where there is none, it is as if nothing had been asked.
    ///
    /// # Errors
    /// Those of the template and of [`Session::generate`].
    pub fn ask(&mut self, question: &str, console: &Console) -> Result<Answer> {
        self.turns.push(Message::new("user", question));
        let answer = self.answer(console);
        match &answer {
            Ok(answer) if answer.summary.tokens > 0 => self.turns.push(Message::new("assistant", &*answer.text)),
            _ => self.turns.pop(),
        }
        answer
    }

    fn answer(&mut self, console: &Console) -> Result<Answer> {
        let mut bar = console.bar();
        bar.show("read", 0, None)?;
        let mut prompt = self.fitting("", console)?;
        let thinking = if self.template.is_some() { Thinking::after(&prompt) } else { Thinking::none() };
        let mut teller = Teller::new(console, bar, thinking);
        let mut told = Summary::default();
        loop {
            let prompt_or_text = if self.template.is_some() { Prompt::Rendered(&prompt) } else { Prompt::Text(&prompt) };
            let summary = teller.tell(self.session.generate(prompt_or_text)?, self.most)?;
            // The prompt is what was asked, and not what an answer goes on from.
            told =
                if told.tokens == 0 { summary } else { Summary { prompt_tokens: told.prompt_tokens, reused_tokens: told.reused_tokens, ..summary } };
            let full = summary.finish == Some(Finish::Context) && self.on_full == OnFull::Shift;
            if !full || !self.turns.forget_oldest() {
                return teller.answer(told, self.session.capacity());
            }
            prompt = self.fitting(&teller.said, console)?;
        }
    }

    /// The conversation as a prompt, with what the model has begun to answer; without the oldest
    /// turns where it does not fit otherwise, and may be without them.
    fn fitting(&mut self, begun: &str, console: &Console) -> Result<String> {
        let capacity = self.session.capacity();
        // Room for something of an answer.
        let room = (capacity / 4).min(self.most);
        loop {
            let prompt = self.prompt()? + begun;
            let tokens = self.tokenizer.encode(&prompt, self.template.is_none())?.len();
            if self.on_full == OnFull::Stop || tokens + room <= capacity || !self.turns.forget_oldest() {
                let forgotten = self.turns.forgotten();
                if forgotten > std::mem::replace(&mut self.known, forgotten) {
                    // Not in the midst of a line.
                    if !begun.is_empty() {
                        console.note("");
                    }
                    console.remark(&format!("(the context of {capacity} tokens is full: the oldest {forgotten} messages are left out from now on)"));
                }
                return Ok(prompt);
            }
        }
    }

    fn prompt(&self) -> Result<String> {
        let told = self.turns.told();
        match &self.template {
            Some(template) => template.render(&told, true),
            None => Ok(told.iter().map(|message| message.content.as_str()).collect::<Vec<_>>().join("\n")),
        }
    }

    /// Forgets what was said.
    pub fn reset(&mut self) {
        self.session.reset();
        self.turns.reset();
        self.known = 0;
    }

    /// Writes what was said to a file, which must not exist.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn save(&self, path: &Path) -> std::io::Result<()> {
        let mut file = std::fs::File::create_new(path)?;
        self.turns.all().try_for_each(|message| write!(file, "{}:\n{}\n\n", message.role, message.content.trim()))
    }
}
