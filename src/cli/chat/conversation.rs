//! What was said, and the model's session.
//!
//! All of it is rendered anew for every answer; what the session has in its cache is not read
//! again. Where the context is full the oldest turns may be left out.

use super::turns::{OnFull, Turns};
use crate::cli::answer::{Answer, Teller};
use crate::cli::console::Console;
use crate::cli::prefixes::{begin, with};
use crate::cli::template::{render, template};
use crate::cli::thinking::Thinking;
use lowkey::checkpoint::{ChatTemplate, Message, Tokenizer};
use lowkey::session::{Begun, Finish, PrefixCache, Summary};
use lowkey::{Error, Model, Prompt, Result, Session, SessionOptions};
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
    /// What the user wants the model to be told first, whatever is loaded.
    system: Option<Message>,
    prefixes: Option<PrefixCache>,
}

/// How a conversation is held.
pub struct Manner {
    /// What the model is told before everything else.
    pub system: Option<String>,
    /// Without the chat template.
    pub raw: bool,
    pub on_full: OnFull,
    /// Where what conversations begin with is kept.
    pub prefixes: Option<PrefixCache>,
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
        let Manner { on_full, prefixes, .. } = manner;
        Ok(Conversation { session, tokenizer, template, system: turns.system().cloned(), turns, on_full, most, known: 0, prefixes })
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
        let begun = self.begin(&prompt)?;
        loop {
            let prompt_or_text = if self.template.is_some() { Prompt::Rendered(&prompt) } else { Prompt::Text(&prompt) };
            let summary = teller.tell(self.session.generate(prompt_or_text)?, self.most)?;
            // The prompt is what was asked, and not what an answer goes on from.
            told =
                if told.tokens == 0 { summary } else { Summary { prompt_tokens: told.prompt_tokens, reused_tokens: told.reused_tokens, ..summary } };
            let full = summary.finish == Some(Finish::Context) && self.on_full == OnFull::Shift;
            if !full || !self.turns.forget_oldest() {
                return teller.answer(with(told, begun), self.session.capacity());
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

    /// Reads what the conversation begins with, where that is kept and nothing has been read yet.
    fn begin(&mut self, prompt: &str) -> Result<Option<Begun>> {
        let Some(prefixes) = self.prefixes.as_ref().filter(|_| self.session.position() == 0) else { return Ok(None) };
        let (told, template) = (self.turns.told(), self.template.as_ref());
        let prompt = if template.is_some() { Prompt::Rendered(prompt) } else { Prompt::Text(prompt) };
        begin(prefixes, &mut self.session, prompt, &|text| {
            let system = told.first().filter(|message| message.role == "system")?;
            render(template, &[system.clone(), Message::new("user", text)]).ok()
        })
        .map(Some)
    }

    fn prompt(&self) -> Result<String> {
        render(self.template.as_ref(), &self.turns.told())
    }

    /// How many messages there are.
    pub fn messages(&self) -> usize {
        self.turns.len()
    }

    /// Keeps the conversation and the model's cache in a file; returns its bytes.
    ///
    /// # Errors
    /// Those of [`Session::save`].
    pub fn save(&mut self, path: &Path) -> Result<u64> {
        self.session.save(path, &self.turns.note())
    }

    /// Goes on with the conversation in a file; returns how many tokens need not be read again.
    ///
    /// # Errors
    /// Those of [`Session::restore`], and [`Error::Session`] where no chat has saved it.
    pub fn load(&mut self, path: &Path) -> Result<usize> {
        let restored = self.session.restore(path)?;
        let Some(turns) = Turns::noted(&restored.note, self.system.clone()) else {
            // What was said here goes on, and is read anew.
            self.session.reset();
            return Err(Error::Session {
                path: path.into(),
                message: "has no conversation: it was saved by another program than `lowkey chat`".into(),
            });
        };
        (self.known, self.turns) = (turns.forgotten(), turns);
        Ok(restored.tokens)
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
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let mut file = std::fs::File::create_new(path)?;
        self.turns.all().try_for_each(|message| write!(file, "{}:\n{}\n\n", message.role, message.content.trim()))
    }
}
