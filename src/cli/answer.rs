//! An answer, as `generate` and `chat` give it: shown as it comes, and told in numbers.

use super::console::Console;
use super::progress::Bar;
use super::table::{bytes, number};
use super::thinking::{Added, Thinking};
use lowkey::session::{Finish, Generation, Summary};
use lowkey::{Error, Result, peak_memory};
use serde::Serialize;

/// What a model has said.
#[derive(Debug, Default)]
pub struct Answer {
    /// What it has answered.
    pub text: String,
    /// What it has thought before that, where it does.
    pub thinking: Option<String>,
    pub summary: Summary,
    /// Tokens that the context has room for.
    pub capacity: usize,
}

#[derive(Serialize)]
struct Report {
    text: String,
    thinking: Option<String>,
    prompt_tokens: usize,
    /// Those of them that were not read, because they were in the cache already.
    reused_tokens: usize,
    tokens: usize,
    drafted_tokens: usize,
    accepted_tokens: usize,
    prefill_tps: f64,
    decode_tps: f64,
    kv_bytes: u64,
    finish: Option<Finish>,
    remarks: Vec<String>,
    /// Until the model was loaded.
    load_seconds: f64,
    /// Of main memory, as far as the system tells.
    peak_rss_bytes: Option<u64>,
}

/// Shows an answer as it comes, which may come in several parts.
///
/// Where the result is to be JSON, it is not shown.
pub struct Teller<'a> {
    console: &'a Console,
    bar: Bar,
    thinking: Thinking,
    /// All that the model wrote, tags and all.
    pub said: String,
    thought: Option<String>,
    text: String,
    /// Tokens until now.
    pub tokens: usize,
}

impl<'a> Teller<'a> {
    /// One in the place of `bar`.
    pub fn new(console: &'a Console, bar: Bar, thinking: Thinking) -> Teller<'a> {
        Teller { console, bar, thinking, said: String::new(), thought: None, text: String::new(), tokens: 0 }
    }

    /// Runs `generation` to its end, or until the answer has `most` tokens.
    ///
    /// # Errors
    /// Those of the generation, and of writing.
    pub fn tell(&mut self, mut generation: Generation, most: usize) -> Result<Summary> {
        for token in generation.by_ref() {
            let token = token?;
            self.bar.hide();
            self.said += &token.text;
            let added = self.thinking.push(&token.text);
            self.show(added)?;
            self.tokens += 1;
            if self.tokens >= most {
                break;
            }
        }
        self.bar.hide();
        let summary = generation.summary();
        // What ends at the same token for another reason has that.
        let cut = (self.tokens >= most).then_some(Finish::Length);
        Ok(Summary { finish: summary.finish.or(cut), ..summary })
    }

    fn show(&mut self, added: Added) -> Result<()> {
        if !added.thought.is_empty() {
            self.console.think(&added.thought);
            *self.thought.get_or_insert_default() += &added.thought;
        }
        if added.answer.is_empty() {
            return Ok(());
        }
        if self.text.is_empty() && self.thought.is_some() {
            self.console.think("\n");
        }
        self.text += &added.answer;
        if self.console.json() { Ok(()) } else { self.console.write(&added.answer) }
    }

    /// The answer, of which `summary` is the last part's, in a context of `capacity` tokens.
    ///
    /// # Errors
    /// Those of writing.
    pub fn answer(mut self, summary: Summary, capacity: usize) -> Result<Answer> {
        let added = self.thinking.finish();
        self.show(added)?;
        let thinking = self.thought.map(|thought| thought.trim().to_string());
        Ok(Answer { text: self.text, thinking, summary: Summary { tokens: self.tokens, ..summary }, capacity })
    }
}

impl Answer {
    /// What to say of an answer that ended because the context is full.
    pub fn full(&self) -> Option<String> {
        let full = self.summary.finish == Some(Finish::Context);
        full.then(|| format!("the answer ends here because the context of {} tokens is full; --context makes it larger", self.capacity))
    }

    /// A command's result: the end of the line, or JSON; then `remark` and what it took, after
    /// `load_seconds` of loading.
    ///
    /// # Errors
    /// [`Error::Interrupted`] where the user stopped it, and those of writing.
    pub fn result(self, console: &Console, load_seconds: f64, remark: Option<String>) -> Result<()> {
        let full = self.full();
        let Summary { prompt_tokens, reused_tokens, tokens, drafted_tokens, accepted_tokens, prefill_tps, decode_tps, kv_bytes, finish, .. } =
            self.summary;
        if finish == Some(Finish::Cancelled) {
            if !console.json() {
                console.write("\n")?;
            }
            return Err(Error::Interrupted);
        }
        if !console.json() {
            console.write("\n")?;
        }
        remark.into_iter().chain(full).for_each(|remark| console.remark(&remark));
        let (Answer { text, thinking, .. }, peak_rss_bytes) = (self, peak_memory());
        let report = Report {
            text,
            thinking,
            prompt_tokens,
            reused_tokens,
            tokens,
            drafted_tokens,
            accepted_tokens,
            prefill_tps,
            decode_tps,
            kv_bytes,
            finish,
            remarks: console.remarks(),
            load_seconds,
            peak_rss_bytes,
        };
        console.result(&report, |_| String::new())?;
        if !console.json() {
            let came_true = if drafted_tokens > 0 { format!(", {accepted_tokens} of {drafted_tokens} drafts came true") } else { String::new() };
            let reused = if reused_tokens > 0 { format!(" ({reused_tokens} not read again)") } else { String::new() };
            console.note(&format!(
                "{tokens} tokens, {} per second{came_true}; {prompt_tokens} of the prompt{reused}, {} per second; {} of cache",
                number(Some(decode_tps)),
                number(Some(prefill_tps)),
                bytes(kv_bytes)
            ));
        }
        Ok(())
    }
}
