//! `lowkey generate`: one answer, streamed.

use super::answer::Teller;
use super::cache::CacheArgs;
use super::console::{Console, read_text, without_mark};
use super::device::{WeightArgs, untrained};
use super::locate::ModelArgs;
use super::prefixes::{PrefixArgs, begin, with};
use super::sampling::SamplingArgs;
use super::template::template;
use super::thinking::Thinking;
use lowkey::checkpoint::Message;
use lowkey::{Error, Prompt, Result};
use std::path::PathBuf;

/// Answer one prompt.
///
/// A model that has a chat template is asked as a chat partner, others continue the text.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The prompt.
    #[arg(long, short, required_unless_present = "prompt_file", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Read the prompt from a file; `-` is stdin.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,
    /// What the model is to be told before the prompt.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw", allow_hyphen_values = true)]
    system: Option<String>,
    /// Continue the text as it is, without the chat template.
    #[arg(long)]
    raw: bool,
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
        let checkpoint = self.model.open()?;
        let text = match (self.prompt, self.prompt_file) {
            (Some(prompt), _) => without_mark(&prompt).into(),
            (None, Some(file)) => read_text(&file)?,
            (None, None) => return Err(Error::Argument { name: "prompt".into(), message: "there is none".into() }),
        };
        let mut bar = console.bar();
        bar.show("load", 0, None)?;
        let model = self.weights.of(console.engine()?)?.load_telling(checkpoint, &mut |progress| bar.report(progress))?;
        model.checkpoint().remarks().iter().for_each(|remark| console.remark(remark));
        let most = self.sampling.max_tokens();
        let options = self.sampling.resolve(&self.cache)?;
        if let Some(remark) = options.context.and_then(|context| untrained(&self.model.name(), model.checkpoint(), context)) {
            console.remark(&remark);
        }
        let mut session = model.session(options)?;
        session.set_cancel(console.cancel().clone());

        let template = if self.raw { None } else { template(&model, self.system.is_some(), console)? };
        let system = self.system.map(|system| Message::new("system", system));
        let messages = |text: &str| system.iter().cloned().chain([Message::new("user", text)]).collect::<Vec<_>>();
        let rendered = template.as_ref().map(|template| template.render(&messages(&text), true)).transpose()?;
        let prompt = rendered.as_deref().map_or(Prompt::Text(&text), Prompt::Rendered);

        bar.show("read", 0, None)?;
        let thinking = rendered.as_deref().map_or_else(Thinking::none, Thinking::after);
        let mut teller = Teller::new(console, bar, thinking);
        let begun = match self.prefixes.open()? {
            // Other questions begin with the same system prompt.
            Some(prefixes) => Some(begin(&prefixes, &mut session, prompt, &|text| {
                system.as_ref().and_then(|_| template.as_ref()?.render(&messages(text), true).ok())
            })?),
            None => None,
        };
        let summary = teller.tell(session.generate(prompt)?, most)?;
        let answer = teller.answer(with(summary, begun), session.capacity())?;
        answer.result(console, model.load_seconds(), session.remark())
    }
}
