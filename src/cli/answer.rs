//! An answer, as `generate` and `chat` give it: shown as it comes, and told in numbers.

use super::console::Console;
use super::progress::Bar;
use super::table::{bytes, number};
use lowkey::session::{Finish, Generation, Summary};
use lowkey::{Error, Result, peak_memory};
use serde::Serialize;

/// What a model has said.
pub struct Answer {
    pub text: String,
    pub summary: Summary,
}

#[derive(Serialize)]
struct Report {
    text: String,
    prompt_tokens: usize,
    tokens: usize,
    drafted_tokens: usize,
    accepted_tokens: usize,
    prefill_tps: f64,
    decode_tps: f64,
    kv_bytes: u64,
    finish: Option<Finish>,
    /// Until the model was loaded.
    load_seconds: f64,
    /// Of main memory, as far as the system tells.
    peak_rss_bytes: Option<u64>,
}

impl Answer {
    /// Runs `generation` to its end, and shows its text as it comes, in the place of `bar`.
    ///
    /// Where the result is to be JSON, it is not shown.
    ///
    /// # Errors
    /// Those of the generation, and of writing.
    pub fn stream(mut generation: Generation, console: &Console, bar: &mut Bar) -> Result<Answer> {
        let mut text = String::new();
        for token in generation.by_ref() {
            let token = token?;
            bar.hide();
            if !console.json() {
                console.write(&token.text)?;
            }
            text += &token.text;
        }
        bar.hide();
        Ok(Answer { text, summary: generation.summary() })
    }

    /// A command's result: the end of the line, or JSON; then `remark` and what it took, after
    /// `load_seconds` of loading.
    ///
    /// # Errors
    /// [`Error::Interrupted`] where the user stopped it, and those of writing.
    pub fn result(self, console: &Console, load_seconds: f64, remark: Option<String>) -> Result<()> {
        let Summary { prompt_tokens, tokens, drafted_tokens, accepted_tokens, prefill_tps, decode_tps, kv_bytes, finish, .. } = self.summary;
        if finish == Some(Finish::Cancelled) {
            if !console.json() {
                console.write("\n")?;
            }
            return Err(Error::Interrupted);
        }
        let (text, peak_rss_bytes) = (self.text, peak_memory());
        let report = Report {
            text,
            prompt_tokens,
            tokens,
            drafted_tokens,
            accepted_tokens,
            prefill_tps,
            decode_tps,
            kv_bytes,
            finish,
            load_seconds,
            peak_rss_bytes,
        };
        console.result(&report, |_| "\n".into())?;
        if let Some(remark) = remark {
            console.remark(&remark);
        }
        if !console.json() {
            let came_true = if drafted_tokens > 0 { format!(", {accepted_tokens} of {drafted_tokens} drafts came true") } else { String::new() };
            console.remark(&format!(
                "{tokens} tokens, {} per second{came_true}; {prompt_tokens} of the prompt, {} per second; {} of cache",
                number(Some(decode_tps)),
                number(Some(prefill_tps)),
                bytes(kv_bytes)
            ));
        }
        Ok(())
    }
}
