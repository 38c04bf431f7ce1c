//! What was said, and the model's session.
//!
//! All of it is rendered anew for every answer; what the session has in its cache is not read
//! again.

use crate::cli::answer::Answer;
use crate::cli::console::Console;
use crate::cli::template::template;
use lowkey::checkpoint::{ChatTemplate, Message};
use lowkey::{Model, Prompt, Result, Session, SessionOptions};
use std::io::Write;
use std::path::Path;

/// A conversation with a model.
pub struct Conversation {
    session: Session,
    /// `None` for a model without one: it continues what was said as one text.
    template: Option<ChatTemplate>,
    system: Option<String>,
    messages: Vec<Message>,
}

impl Conversation {
    /// One that begins, with what the model is told before everything else.
    ///
    /// # Errors
    /// Those of [`template`] and [`Model::session`].
    pub fn new(model: &Model, system: Option<String>, options: SessionOptions, console: &Console) -> Result<Conversation> {
        let template = template(model, system.is_some(), console)?;
        let mut session = model.session(options)?;
        session.set_cancel(console.cancel().clone());
        let mut conversation = Conversation { session, template, system, messages: Vec::new() };
        conversation.reset();
        Ok(conversation)
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
        self.messages.push(Message::new("user", question));
        let answer = self.answer(console);
        match &answer {
            Ok(answer) if answer.summary.tokens > 0 => self.messages.push(Message::new("assistant", &*answer.text)),
            _ => drop(self.messages.pop()),
        }
        answer
    }

    fn answer(&mut self, console: &Console) -> Result<Answer> {
        let prompt = match &self.template {
            Some(template) => template.render(&self.messages, true)?,
            None => self.messages.iter().map(|message| message.content.as_str()).collect::<Vec<_>>().join("\n"),
        };
        let prompt = if self.template.is_some() { Prompt::Rendered(&prompt) } else { Prompt::Text(&prompt) };
        let mut bar = console.bar();
        bar.show("read", 0, None)?;
        Answer::stream(self.session.generate(prompt)?, console, &mut bar)
    }

    /// Forgets what was said.
    pub fn reset(&mut self) {
        self.session.reset();
        self.messages = self.system.iter().map(|system| Message::new("system", system.as_str())).collect();
    }

    /// Writes what was said to a file, which must not exist.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn save(&self, path: &Path) -> std::io::Result<()> {
        let mut file = std::fs::File::create_new(path)?;
        self.messages.iter().try_for_each(|message| write!(file, "{}:\n{}\n\n", message.role, message.content.trim()))
    }
}
