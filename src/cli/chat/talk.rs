//! A conversation on a terminal: questions and commands until the user has had enough.

use super::conversation::Conversation;
use super::editor::Editor;
use super::line::{HELP, Line};
use crate::cli::console::Console;
use crate::cli::table::bytes;
use lowkey::session::{Finish, Summary};
use lowkey::{Error, Result};
use std::path::{Path, PathBuf};

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
    /// The file that it goes on from and is saved to in the end.
    resume: Option<PathBuf>,
    /// The file that it was saved to or loaded from last.
    known: Option<PathBuf>,
}

impl Talk<'_> {
    /// A conversation that begins, or goes on from what was saved at `resume`, beside what a dense
    /// cache would take.
    pub fn new(conversation: Conversation, dense_bytes_per_token: u64, resume: Option<PathBuf>, console: &Console) -> Talk<'_> {
        Talk { conversation, console, dense_bytes_per_token, answers: 0, tokens: 0, steps: 0, seconds: 0.0, known: resume.clone(), resume }
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
                Line::Save(file) => self.save(file),
                Line::Load(file) => self.load(file)?,
                Line::Write(None) => self.console.remark("(/write FILE)"),
                Line::Write(Some(file)) => self.write(file),
                Line::Unknown(word) => self.console.remark(&format!("(there is no {word}; {HELP})")),
                Line::Quit => break,
            }
        }
        // What was resumed goes on from here the next time.
        match &self.resume {
            Some(file) => self.conversation.save(file).map(|_| ()),
            None => Ok(()),
        }
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

    fn write(&self, file: &Path) {
        match self.conversation.write(file) {
            Ok(()) => self.console.remark("(written)"),
            Err(error) => self.console.remark(&format!("(cannot write {}: {error})", file.display())),
        }
    }

    /// Saves to `file`, or to the one that is known. Another one must not exist.
    fn save(&mut self, file: Option<&Path>) {
        let Some(file) = file.or(self.known.as_deref()).map(Path::to_path_buf) else {
            self.console.remark("(/save FILE)");
            return;
        };
        let saved = match self.known.as_ref() != Some(&file) && file.symlink_metadata().is_ok() {
            true => Err(Error::Exists { path: file.clone() }),
            false => self.conversation.save(&file),
        };
        match saved {
            Ok(size) => {
                self.console.remark(&format!("(saved: {} messages, {})", self.conversation.messages(), bytes(size)));
                self.known = Some(file);
            }
            Err(error) => self.console.remark(&format!("({error})")),
        }
    }

    /// Goes on with the conversation in `file`.
    fn load(&mut self, file: Option<&Path>) -> Result<()> {
        let Some(file) = file else {
            self.console.remark("(/load FILE)");
            return Ok(());
        };
        match self.conversation.load(file) {
            Ok(tokens) => {
                self.console.remark(&loaded(&self.conversation, tokens));
                self.known = Some(file.to_path_buf());
            }
            // What is in the file is not for this model; the conversation goes on.
            Err(error @ (Error::Session { .. } | Error::Io { .. } | Error::Context { .. })) => self.console.remark(&format!("({error})")),
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// What to say of a conversation that has been loaded.
pub fn loaded(conversation: &Conversation, tokens: usize) -> String {
    format!("(loaded: {} messages; {tokens} tokens need not be read again)", conversation.messages())
}
