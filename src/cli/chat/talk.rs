//! A conversation on a terminal: questions and commands until the user has had enough.

use super::conversation::Conversation;
use super::editor::Editor;
use super::line::{HELP, Line};
use crate::cli::console::Console;
use crate::cli::table::bytes;
use lowkey::session::{Finish, Summary};
use lowkey::{Error, Result};
use std::path::Path;

/// A conversation, and what it has taken until now.
pub struct Talk<'a> {
    conversation: Conversation,
    console: &'a Console,
    dense_bytes_per_token: u64,
    answers: usize,
    tokens: usize,
    /// Steps of the model after each answer's first token, and what they took.
    steps: usize,
    seconds: f64,
}

impl Talk<'_> {
    /// A conversation that begins, beside what a dense cache would take.
    pub fn new(conversation: Conversation, dense_bytes_per_token: u64, console: &Console) -> Talk<'_> {
        Talk { conversation, console, dense_bytes_per_token, answers: 0, tokens: 0, steps: 0, seconds: 0.0 }
    }

    /// Goes on until `/quit` or Ctrl-D.
    ///
    /// # Errors
    /// Those that end a conversation: of the terminal, of the device.
    pub fn run(mut self) -> Result<()> {
        let mut editor = Editor::open()?;
        while let Some(typed) = editor.next(self.console)? {
            match Line::parse(&typed) {
                Line::Nothing => {}
                Line::Question(question) => self.ask(question)?,
                Line::Help => self.console.write(&format!("{HELP}\n"))?,
                Line::Stats => self.console.write(&self.stats())?,
                Line::Reset => {
                    self.conversation.reset();
                    self.console.remark("(forgotten)");
                }
                Line::Save(None) => self.console.remark("(/save FILE)"),
                Line::Save(Some(file)) => self.save(file),
                Line::Unknown(word) => self.console.remark(&format!("(there is no {word}; {HELP})")),
                Line::Quit => break,
            }
        }
        Ok(())
    }

    /// Asks the model, and says what its answer took.
    fn ask(&mut self, question: &str) -> Result<()> {
        let answer = self.conversation.ask(question, self.console);
        self.console.cancel().clear();
        let summary = match answer {
            Ok(answer) => answer.summary,
            Err(Error::Context { needed, capacity }) => {
                let message = format!("(that would be {needed} tokens, and the context has room for {capacity}: /reset starts a new conversation)");
                self.console.remark(&message);
                return Ok(());
            }
            // What was typed cannot be put to this model; something else may.
            Err(error @ Error::Tokenizer { .. }) => {
                self.console.remark(&format!("({error})"));
                return Ok(());
            }
            Err(Error::Interrupted) => Summary::default(),
            Err(error) => return Err(error),
        };
        if summary.tokens == 0 {
            self.console.remark("(stopped)");
            return Ok(());
        }
        self.console.write("\n")?;
        self.count(&summary);
        self.console.remark(&self.line(&summary));
        let session = self.conversation.session();
        if let Some(remark) = session.remark() {
            self.console.remark(&format!("({remark})"));
        }
        if summary.finish == Some(Finish::Context) {
            self.console.remark("(the context is full: /reset starts a new conversation, and --on-full shift leaves out the oldest turns)");
        }
        Ok(())
    }

    fn count(&mut self, summary: &Summary) {
        self.answers += 1;
        self.tokens += summary.tokens;
        // The first token comes with the prompt and is not part of the speed.
        let steps = summary.tokens.saturating_sub(1);
        if summary.decode_tps > 0.0 {
            self.steps += steps;
            self.seconds += steps as f64 / summary.decode_tps;
        }
    }

    /// Speed, context and memory, in brackets.
    fn line(&self, summary: &Summary) -> String {
        let stopped = if summary.finish == Some(Finish::Cancelled) { "stopped after " } else { "" };
        let Summary { tokens, decode_tps, prefill_tps, .. } = summary;
        let read = summary.prompt_tokens - summary.reused_tokens;
        format!("[{stopped}{tokens} tokens at {decode_tps:.1}/s · {read} new of the prompt at {prefill_tps:.1}/s · {}]", self.memory())
    }

    fn memory(&self) -> String {
        let session = self.conversation.session();
        let (position, memory) = (session.position() as u64, session.memory());
        format!(
            "context {position} of {} · cache {}, dense {}",
            session.capacity(),
            bytes(position * memory.kv_bytes_per_token + memory.kv_fixed_bytes),
            bytes(position * self.dense_bytes_per_token)
        )
    }

    fn stats(&self) -> String {
        let memory = self.conversation.session().memory();
        let rate = if self.seconds > 0.0 { self.steps as f64 / self.seconds } else { 0.0 };
        format!(
            "{} answers, {} tokens, {rate:.1} per second\n{}\n{} bytes of cache per token (dense {}), {} allocated\n",
            self.answers,
            self.tokens,
            self.memory(),
            memory.kv_bytes_per_token,
            self.dense_bytes_per_token,
            bytes(memory.allocated_bytes)
        )
    }

    fn save(&self, file: &Path) {
        match self.conversation.save(file) {
            Ok(()) => self.console.remark("(saved)"),
            Err(error) => self.console.remark(&format!("(cannot write {}: {error})", file.display())),
        }
    }
}
