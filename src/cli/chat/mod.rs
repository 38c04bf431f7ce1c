//! `lowkey chat`: a conversation on a terminal, or one answer to what is piped in.

mod conversation;
mod editor;
mod line;
mod talk;
mod turns;

use super::cache::CacheArgs;
use super::console::{Console, read_text, without_mark};
use super::device::{WeightArgs, untrained};
use super::locate::ModelArgs;
use super::prefixes::PrefixArgs;
use super::sampling::SamplingArgs;
use conversation::{Conversation, Manner};
use lowkey::{Error, Result};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use talk::Talk;
use turns::OnFull;

/// Chat with a model.
///
/// On a terminal a conversation, until /quit or Ctrl-D; /help says what else can be typed. With
/// PROMPT, or with text piped in, one answer; where there are both, the text goes after the prompt.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Ask this, and end.
    #[arg(allow_hyphen_values = true, value_parser = text)]
    prompt: Option<String>,
    /// What the model is told before everything else.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw", allow_hyphen_values = true)]
    system: Option<String>,
    /// Have the model continue what is said as one text, without its chat template.
    #[arg(long)]
    raw: bool,
    /// When the context is full: `stop`, or `shift`, which leaves out the oldest turns and keeps
    /// the system prompt.
    #[arg(long, value_enum, default_value_t = OnFull::Stop, value_name = "WHAT")]
    on_full: OnFull,
    /// Go on with the conversation in FILE, where it is there, and save it there in the end: what
    /// was said and the model's cache, so that nothing is read again.
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
    #[command(flatten)]
    prefixes: PrefixArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    weights: WeightArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

impl Args {
    pub fn run(self, console: &Console) -> Result<()> {
        let (name, checkpoint) = (self.model.name(), self.model.open()?);
        let question = question(self.prompt, console)?;
        if question.is_none() && console.json() {
            let message = "a conversation on a terminal is no JSON object; leave it out, or give a PROMPT".into();
            return Err(Error::Argument { name: "json".into(), message });
        }
        let mut bar = console.bar();
        bar.show("load", 0, None)?;
        let engine = self.weights.of(console.engine()?)?;
        let model = engine.load_telling(checkpoint, &mut |progress| bar.report(progress))?;
        drop(bar);
        let load_seconds = model.load_seconds();
        let options = self.sampling.resolve(&self.cache)?;
        if let Some(remark) = options.context.and_then(|context| untrained(&name, model.checkpoint(), context)) {
            console.remark(&remark);
        }
        model.checkpoint().remarks().iter().for_each(|remark| console.remark(remark));
        let manner = Manner { system: self.system, raw: self.raw, on_full: self.on_full, prefixes: self.prefixes.open()? };
        let mut conversation = Conversation::new(&model, manner, options, console)?;
        if let Some(file) = self.resume.as_ref().filter(|file| file.exists()) {
            let tokens = conversation.load(file)?;
            console.remark(&talk::loaded(&conversation, tokens));
        }
        match question {
            Some(question) => {
                let answer = conversation.ask(&question, console)?;
                if let Some(file) = &self.resume {
                    conversation.save(file)?;
                }
                answer.result(console, load_seconds, conversation.session().remark())
            }
            None => {
                console.remark(&format!("{name} on {}. {}", engine.name(), line::HELP));
                Talk::new(conversation, model.checkpoint().config().dense_kv_bytes_per_token(), self.resume, console).run()
            }
        }
    }
}

/// The one question: `prompt`, and what is piped in. `None` for a conversation.
fn question(prompt: Option<String>, console: &Console) -> Result<Option<String>> {
    let piped = if std::io::stdin().is_terminal() { None } else { Some(console.wait(|| read_text(Path::new("-")))?) };
    let piped = match piped {
        Some(text) if text.trim().is_empty() && prompt.is_none() => {
            let message = "there is none, and nothing to read on stdin, which is no terminal".into();
            return Err(Error::Argument { name: "PROMPT".into(), message });
        }
        piped => piped.filter(|text| !text.trim().is_empty()),
    };
    let prompt = prompt.map(|prompt| without_mark(&prompt).to_string());
    let parts: Vec<String> = prompt.into_iter().chain(piped).collect();
    Ok((!parts.is_empty()).then(|| parts.join("\n\n").trim().to_string()))
}

/// A prompt that may begin with a dash, if it is not what an option looks like.
fn text(argument: &str) -> std::result::Result<String, String> {
    let name = argument.trim_start_matches('-');
    let dashes = argument.len() - name.len();
    let option = (1..=2).contains(&dashes) && !name.is_empty() && !name.contains(char::is_whitespace);
    if option { Err("there is no such option; a prompt that looks like one can be piped in".into()) } else { Ok(argument.into()) }
}
