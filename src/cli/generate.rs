//! `lowkey generate`: one answer, streamed.

use super::cache::CacheArgs;
use super::console::{Console, read_text};
use super::device::untrained;
use super::locate::ModelArgs;
use super::sampling::SamplingArgs;
use super::table::{bytes, number};
use lowkey::checkpoint::{ChatTemplate, Message};
use lowkey::session::{Finish, Summary};
use lowkey::{Error, Model, Prompt, Result};
use serde::Serialize;
use std::path::PathBuf;

/// Answer one prompt.
///
/// A model that has a chat template is asked as a chat partner, others continue the text.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The prompt.
    #[arg(long, short, required_unless_present = "prompt_file")]
    prompt: Option<String>,
    /// Read the prompt from a file; `-` is stdin.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,
    /// What the model is to be told before the prompt.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Continue the text as it is, without the chat template.
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

#[derive(Serialize)]
struct Report {
    text: String,
    prompt_tokens: usize,
    tokens: usize,
    prefill_tps: f64,
    decode_tps: f64,
    kv_bytes: u64,
    finish: Option<Finish>,
}

impl Args {
    pub fn run(self, console: &Console) -> Result<()> {
        let checkpoint = self.model.open()?;
        let text = match (self.prompt, self.prompt_file) {
            (Some(prompt), _) => prompt,
            (None, Some(file)) => read_text(&file)?,
            (None, None) => return Err(Error::Argument { name: "prompt".into(), message: "there is none".into() }),
        };
        let mut bar = console.bar();
        bar.show("load", 0, None)?;
        let model = console.engine()?.load_checkpoint(checkpoint)?;
        let options = self.sampling.resolve(&self.cache)?;
        if let Some(remark) = options.context.and_then(|context| untrained(&self.model.name(), model.checkpoint(), context)) {
            console.remark(&remark);
        }
        let mut session = model.session(options)?;
        session.set_cancel(console.cancel().clone());

        let template = if self.raw { None } else { template(&model, console) };
        let rendered = match (template, self.system) {
            (Some(template), system) => {
                let system = system.map(|system| Message::new("system", system));
                let messages: Vec<Message> = system.into_iter().chain([Message::new("user", &*text)]).collect();
                Some(template.render(&messages, true)?)
            }
            (None, Some(_)) => {
                let message = format!("{} has no chat template, and so no place for it", model.checkpoint().path().display());
                return Err(Error::Argument { name: "system".into(), message });
            }
            (None, None) => None,
        };
        let prompt = rendered.as_deref().map_or(Prompt::Text(&text), Prompt::Rendered);

        bar.show("read", 0, None)?;
        let mut answer = String::new();
        let mut generation = session.generate(prompt)?;
        for token in generation.by_ref() {
            let token = token?;
            bar.hide();
            if !console.json() {
                console.write(&token.text)?;
            }
            answer += &token.text;
        }
        let summary = generation.summary();
        if summary.finish == Some(Finish::Cancelled) {
            if !console.json() {
                console.write("\n")?;
            }
            return Err(Error::Interrupted);
        }
        if let Some(remark) = session.remark() {
            console.remark(&remark);
        }
        let Summary { prompt_tokens, tokens, prefill_tps, decode_tps, kv_bytes, finish, .. } = summary;
        let report = Report { text: answer, prompt_tokens, tokens, prefill_tps, decode_tps, kv_bytes, finish };
        console.result(&report, |_| "\n".into())?;
        if !console.json() {
            console.remark(&format!(
                "{tokens} tokens, {} per second; {prompt_tokens} of the prompt, {} per second; {} of cache",
                number(Some(decode_tps)),
                number(Some(prefill_tps)),
                bytes(kv_bytes)
            ));
        }
        Ok(())
    }
}

/// The model's chat template; where it has none that works, says so.
fn template(model: &Model, console: &Console) -> Option<ChatTemplate> {
    model.checkpoint().chat_template().inspect_err(|error| console.remark(&format!("continuing the text as it is: {error}"))).ok()
}
