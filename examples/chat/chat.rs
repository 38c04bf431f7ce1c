//! The conversation: what was said, the model's session, and the commands.

use lowkey::checkpoint::{ChatTemplate, Message};
use lowkey::session::{Cancel, Finish, Summary};
use lowkey::{Error, Model, Prompt, Result, Session, SessionOptions};
use std::io::Write;
use std::path::Path;

/// What can be typed besides questions.
pub const HELP: &str = "/reset forgets everything, /save FILE writes the conversation, /stats, /help, /quit. Ctrl-C stops an answer.";

/// A conversation with a model.
pub struct Chat {
    session: Session,
    /// `None` for a model that was not trained for conversations: it continues what was said as one text.
    template: Option<ChatTemplate>,
    system: Option<String>,
    messages: Vec<Message>,
    cancel: Cancel,
    dense_bytes_per_token: u64,
    answers: usize,
    tokens: usize,
    /// Steps of the model after each answer's first token, and what they took.
    steps: usize,
    seconds: f64,
}

impl Chat {
    /// A conversation that begins.
    ///
    /// # Errors
    /// Those of [`Model::session`].
    pub fn new(model: &Model, system: Option<String>, options: SessionOptions, cancel: Cancel) -> Result<Chat> {
        let template = model.checkpoint().chat_template();
        if let Err(error) = &template {
            eprintln!("no conversation, only continued text: {error}");
        }
        let mut session = model.session(options)?;
        session.set_cancel(cancel.clone());
        let mut chat = Chat {
            session,
            template: template.ok(),
            system,
            messages: Vec::new(),
            cancel,
            dense_bytes_per_token: model.checkpoint().config().dense_kv_bytes_per_token(),
            answers: 0,
            tokens: 0,
            steps: 0,
            seconds: 0.0,
        };
        chat.reset();
        Ok(chat)
    }

    /// Takes a line: a command or a question. Returns whether to go on.
    pub fn hear(&mut self, line: &str) -> Result<bool> {
        let (word, rest) = line.split_once(' ').map_or((line, ""), |(word, rest)| (word, rest.trim()));
        match word {
            "" => {}
            "/quit" | "/exit" => return Ok(false),
            "/help" => say(&format!("{HELP}\n"))?,
            "/stats" => self.stats()?,
            "/reset" => {
                self.reset();
                say("(forgotten)\n")?;
            }
            "/save" if rest.is_empty() => say("(/save FILE)\n")?,
            "/save" => match self.save(Path::new(rest)) {
                Ok(()) => say("(saved)\n")?,
                Err(error) => say(&format!("(cannot write {rest}: {error})\n"))?,
            },
            _ if word.starts_with('/') => say(&format!("(there is no {word}; {HELP})\n"))?,
            _ => self.ask(line)?,
        }
        Ok(true)
    }

    /// Asks the model, prints its answer as it comes, and a line about it.
    pub fn ask(&mut self, question: &str) -> Result<()> {
        self.cancel.clear();
        self.messages.push(Message::new("user", question));
        let prompt = match &self.template {
            Some(template) => template.render(&self.messages, true)?,
            None => self.messages.iter().map(|message| message.content.as_str()).collect::<Vec<_>>().join("\n"),
        };
        let prompt = if self.template.is_some() { Prompt::Rendered(&prompt) } else { Prompt::Text(&prompt) };
        let mut generation = match self.session.generate(prompt) {
            Err(Error::Context { needed, capacity }) => {
                self.messages.pop();
                say(&format!("(the conversation would have {needed} tokens, the context has room for {capacity}: /reset starts a new one)\n"))?;
                return Ok(());
            }
            generation => generation?,
        };
        let mut answer = String::new();
        for token in generation.by_ref() {
            let token = token?;
            say(&token.text)?;
            answer += &token.text;
        }
        let summary = generation.summary();
        self.cancel.clear();
        if summary.tokens == 0 {
            // Stopped before the first word: it is as if nothing had been asked.
            self.messages.pop();
            say("(stopped)\n")?;
            return Ok(());
        }
        say("\n")?;
        self.messages.push(Message::new("assistant", answer));
        self.count(&summary);
        say(&format!("{}\n", self.line(&summary)))?;
        if let Some(remark) = self.session.remark() {
            say(&format!("({remark})\n"))?;
        }
        if summary.finish == Some(Finish::Length) && self.session.position() >= self.session.capacity() {
            say("(the context is full: /reset starts a new conversation)\n")?;
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
        let read = summary.prompt_tokens - summary.reused_tokens;
        format!(
            "[{stopped}{} tokens at {:.1}/s · {read} new of the prompt at {:.1}/s · {}]",
            summary.tokens,
            summary.decode_tps,
            summary.prefill_tps,
            self.memory()
        )
    }

    fn memory(&self) -> String {
        let position = self.session.position() as u64;
        let memory = self.session.memory();
        format!(
            "context {position} of {} · cache {}, dense {}",
            self.session.capacity(),
            mebibytes(position * memory.kv_bytes_per_token + memory.kv_fixed_bytes),
            mebibytes(position * self.dense_bytes_per_token)
        )
    }

    fn stats(&self) -> Result<()> {
        let memory = self.session.memory();
        let rate = if self.seconds > 0.0 { self.steps as f64 / self.seconds } else { 0.0 };
        say(&format!(
            "{} answers, {} tokens, {rate:.1} per second\n{}\n{} bytes of cache per token (dense {}), {} allocated\n",
            self.answers,
            self.tokens,
            self.memory(),
            memory.kv_bytes_per_token,
            self.dense_bytes_per_token,
            mebibytes(memory.allocated_bytes)
        ))
    }

    fn reset(&mut self) {
        self.session.reset();
        self.messages = self.system.iter().map(|system| Message::new("system", system.as_str())).collect();
    }

    /// Writes what was said to a file that must not exist.
    fn save(&self, path: &Path) -> std::io::Result<()> {
        let mut file = std::fs::File::create_new(path)?;
        self.messages.iter().try_for_each(|message| write!(file, "{}:\n{}\n\n", message.role, message.content.trim()))
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}

/// Writes to stdout, at once.
pub fn say(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(|source| Error::Io { action: "write", path: "<stdout>".into(), source })
}
