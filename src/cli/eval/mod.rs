//! `lowkey eval`: what compression cost in quality.

mod tables;

use super::cache::CacheArgs;
use super::console::{Console, read_text};
use super::device::{WeightArgs, untrained};
use super::several;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use lowkey::checkpoint::{Checkpoint, Tokenizer};
use lowkey::eval::needle::{self, Kind};
use lowkey::eval::report::Directory;
use lowkey::eval::{Depths, Report, Subject, Task, Text, Windowing, continuation, run};
use lowkey::kv::Exact;
use lowkey::sequence::SequenceOptions;
use lowkey::{Error, Model, Result};
use std::path::PathBuf;
use tables::Columns;

/// Measure perplexity, and distance from the dense model, on a text.
///
/// The text is cut into windows, each read from an empty cache. A window of N tokens has N-1
/// predictions; --score-from leaves out the first ones. llama.cpp's perplexity of the same window
/// is had with --score-from of half the window.
///
/// With --depths, windows are as long as that, and their last 512 tokens are scored: the same
/// tokens of the text at every depth.
#[derive(clap::Args)]
pub struct Args {
    /// Directory, .gguf file, fetched name, or .lowkey file; any number of them, with the same
    /// tokenizer.
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<String>,
    /// The model to compare with, which is evaluated first [default: the first MODEL, if it is
    /// dense, or the one that it was made for, if it is a .lowkey file]. One that is given here has
    /// its weights as they are stored, whatever --weights says of the others.
    #[arg(long, value_name = "DENSE")]
    against: Option<String>,
    /// A text; `-` is stdin. May be given several times: each text has a row per model.
    #[arg(long, value_name = "FILE", required = true)]
    text: Vec<PathBuf>,
    /// Tokens the model sees at once [default: 512 and the prompt, or the model's context where
    /// that is shorter].
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Tokens from one window's start to the next's. Below the window, each prediction is scored
    /// once, with the longer past [default: the window].
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// The first position in a window whose prediction is scored.
    #[arg(long, value_name = "N", default_value_t = 0)]
    score_from: usize,
    /// Read the first tokens of each window in one go, as a prompt, and score only what comes after
    /// them.
    #[arg(long, value_name = "N", default_value_t = 0)]
    prefill: usize,
    /// Run no more than this many tokens at once after the prompt [default: 32 after a prompt, else
    /// as many as suit the models].
    #[arg(long, value_name = "N")]
    chunk: Option<usize>,
    /// Use no more than this many tokens of each text; with --depths, at the deepest, but at least
    /// one window [default: all; with --depths, two windows].
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Evaluate at these depths: in windows of so many tokens, of which the last 512 are scored.
    /// Windows of all depths end at the same places of the text, and are as many.
    #[arg(long, value_name = "N,N…", value_delimiter = ',', conflicts_with_all = ["window", "stride", "score_from", "prefill"])]
    depths: Vec<usize>,
    /// Evaluate each compressed cache again with so many sinks and recent tokens exact, in place of
    /// its own: what do these make? With 0+0 every prediction reads all tokens, its own too, from
    /// coded rows. (Rows over several layers, --select and --method code up to 32 tokens together,
    /// which stay exact until then.)
    #[arg(long, value_name = "SINKS+RECENT,…", value_delimiter = ',')]
    exact: Vec<Exact>,
    /// Write all of it to a new directory: report.json, CSV tables, and a page with charts,
    /// index.html.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Hide facts in the text, and ask for them at its end: by length, and by how deep in the text
    /// they are. Without a kind: single.
    #[arg(
        long, value_name = "KIND,KIND…", num_args = 0..=1, require_equals = true, value_delimiter = ',', default_missing_value = Kind::Single.name(),
        value_parser = kinds(), help_heading = "Needle"
    )]
    needle: Vec<Kind>,
    /// Tokens of text, questions and answers [default: --depths, or a quarter, half and all of the
    /// model's context, which counts as 8192 where it is longer].
    #[arg(long, value_name = "N,N…", value_delimiter = ',', requires = "needle", help_heading = "Needle")]
    needle_lengths: Vec<usize>,
    /// Questions for each kind, length and depth.
    #[arg(long, value_name = "N", default_value_t = needle::Task::default().trials, requires = "needle", help_heading = "Needle")]
    needle_trials: usize,
    /// What facts and texts are drawn from.
    #[arg(long, value_name = "N", default_value_t = needle::Task::default().seed, requires = "needle", help_heading = "Needle")]
    needle_seed: u64,
    /// Have each model go on for this many tokens after the beginning of the text, always with the
    /// likeliest, and the dense model say how likely it finds what was written.
    #[arg(long, value_name = "N", help_heading = "Long generation")]
    generate: Option<usize>,
    /// Tokens of the text that it goes on from [default: 512, or fewer where text or context are
    /// shorter].
    #[arg(long, value_name = "N", requires = "generate", help_heading = "Long generation")]
    generate_prompt: Option<usize>,
    #[command(flatten)]
    weights: WeightArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

fn kinds() -> impl TypedValueParser<Value = Kind> {
    PossibleValuesParser::new(Kind::ALL.map(|kind| PossibleValue::new(kind.name()).help(kind.about()))).try_map(|name| name.parse::<Kind>())
}

impl Args {
    pub fn run(self, console: &Console) -> Result<()> {
        let online = self.cache.method()?.name().is_some();
        let mut names: Vec<&String> = self.against.iter().chain(&self.models).collect();
        // Before any weight is read: whether these can be compared.
        let mut checkpoints = several::open(&names)?;
        let own = if self.against.is_none() { own_model(&checkpoints[0]) } else { None };
        if let Some((name, model)) = &own {
            names.insert(0, name);
            checkpoints.insert(0, Checkpoint::open(model)?);
        }
        let against = self.against.is_some() || own.is_some();
        if against && checkpoints[0].factored().is_some() {
            let message = format!("{} has been compressed itself; give the dense model that it was made from", names[0]);
            return Err(Error::Argument { name: "against".into(), message });
        }
        let tokenizers = checkpoints.iter().map(Checkpoint::tokenizer).collect::<Result<Vec<_>>>()?;
        let contents = self.text.iter().map(|path| read_text(path)).collect::<Result<Vec<_>>>()?;
        let texts = self.text.iter().zip(&contents).map(|(path, content)| {
            let tokens = shared_tokens(&names, &checkpoints, &tokenizers, content)?;
            Ok(Text { name: path.display().to_string(), tokens })
        });
        let texts = texts.collect::<Result<Vec<_>>>()?;
        let positions = |checkpoint: &Checkpoint| checkpoint.config().max_position_embeddings;
        let trained = checkpoints.iter().map(positions).min().unwrap_or(0);
        let depths = Depths { depths: self.depths.clone(), tokens: self.tokens };
        for (name, checkpoint) in names.iter().zip(&checkpoints) {
            depths.check(name, positions(checkpoint))?;
        }
        let windowings = self.windowings(&depths, &texts, trained)?;
        let windows = windowings.iter().map(|windowing| longest(windowing, &texts)).collect::<Result<Vec<_>>>()?;
        let first_is_reference = against || (checkpoints[0].factored().is_none() && !online);
        let writing = self.continuation(&names, &checkpoints, &texts, first_is_reference)?;
        let questions = match self.needle_task(trained) {
            Some(task) => {
                // Without one the text is continued as it is.
                let template = checkpoints[0].has_chat_template()?.then(|| checkpoints[0].chat_template()).transpose()?;
                task.questions(&contents.join("\n\n"), &tokenizers[0], template.as_ref())?
            }
            None => Vec::new(),
        };
        let directory = self.report.as_deref().map(Directory::reserve).transpose()?;
        // What is named by --against has its weights as they are stored.
        let stored = console.engine()?;
        let engine = self.weights.of(stored.clone())?;
        let mut bar = console.bar();
        let mut models = Vec::new();
        for (index, checkpoint) in checkpoints.into_iter().enumerate() {
            bar.show("load", 0, None)?;
            let engine = if index == 0 && self.against.is_some() { &stored } else { &engine };
            models.push(engine.load_telling(checkpoint, &mut |progress| bar.report(progress))?);
        }
        let farthest = questions.iter().map(|question| question.length).max().unwrap_or(0);
        let asked = windowings.iter().map(|windowing| windowing.window).max().unwrap_or(0);
        for (name, model) in names.iter().zip(&models) {
            if let Some(remark) = untrained(name, model.checkpoint(), asked.max(farthest)) {
                console.remark(&remark);
            }
        }

        let subject = |(index, exact): (usize, Option<Exact>), plain: SequenceOptions| -> Result<Subject> {
            let (name, model): (&String, &Model) = (names[index], &models[index]);
            // What is compared with is kept as it is.
            let reference = index == 0 && against;
            let mut options = if reference { plain } else { SequenceOptions { method: self.cache.method()?, ..plain } };
            if exact.is_some() {
                // Strictly, or the tokens that go through the model together would read each other
                // exactly.
                options = SequenceOptions { exact, strict: true, ..options };
            }
            let (method, layout) = (options.method.name().unwrap_or(model.method()).into(), options.method.layout(&model.layout()));
            Ok(Subject { model: name.clone(), method, layout, exact: model.exact(&options), sequence: Box::new(model.sequence(options)?) })
        };
        let mut lines = Vec::new();
        for (index, model) in models.iter().enumerate() {
            lines.push((index, None));
            if model.checkpoint().factored().is_some() || (online && !(index == 0 && against)) {
                lines.extend(self.exact.iter().map(|&exact| (index, Some(exact))));
            }
        }

        // What the tokenizer puts before a text, if anything, stands before each window.
        let bos = tokenizers[0].encode("", true)?.first().copied();
        let mut report = Report::default();
        for (&windowing, &longest) in windowings.iter().zip(&windows) {
            // Without a prompt every prediction is to be what it would be token by token.
            let scored = SequenceOptions {
                capacity: longest,
                strict: self.prefill == 0,
                chunk: (self.prefill > 0).then_some(self.prefill),
                ..SequenceOptions::default()
            };
            let task = Task { texts: &texts, bos, windowing, first_is_reference };
            let mut subjects = lines.iter().map(|&line| subject(line, scored)).collect::<Result<Vec<_>>>()?;
            report.rows.extend(run(&task, &mut subjects, &mut |progress| bar.report(progress))?);
            subjects.iter().filter_map(|subject| subject.sequence.remark()).for_each(|remark| console.remark(&remark));
        }
        if let Some(task) = writing {
            let room = SequenceOptions { capacity: task.length(), ..SequenceOptions::default() };
            let others = || lines[1..].iter().map(|&line| subject(line, room));
            report.continuations = continuation::run(&task, &texts, &mut subject(lines[0], room)?, others, &mut |progress| bar.report(progress))?;
        }
        if !questions.is_empty() {
            // One after another: long texts fill long caches. They are read as a conversation is.
            for &line in &lines {
                let mut subject = subject(line, SequenceOptions { capacity: farthest, ..SequenceOptions::default() })?;
                report.needle.extend(needle::run(&questions, &mut subject, &tokenizers[0], &mut |progress| bar.report(progress))?);
            }
        }
        drop(bar);
        if let (Some(directory), Some(path)) = (directory, &self.report) {
            directory.publish(&report)?;
            console.remark(&format!("the report is in {}", path.join("index.html").display()));
        }
        let columns = Columns { depth: !self.depths.is_empty(), exact: !self.exact.is_empty() };
        console.result(&report, |report| {
            tables::rows(&report.rows, columns) + &tables::continuations(&report.continuations, columns) + &tables::needle(&report.needle, columns)
        })
    }

    /// How texts are cut: once, or once for each depth.
    fn windowings(&self, depths: &Depths, texts: &[Text], trained: usize) -> Result<Vec<Windowing>> {
        let chunk = self.chunk.or((self.prefill > 0).then_some(Exact::BLOCK));
        if !depths.depths.is_empty() {
            let windowings = depths.windowings(texts)?;
            return Ok(windowings.into_iter().map(|windowing| Windowing { chunk, ..windowing }).collect());
        }
        let window = self.window.unwrap_or(Windowing::default().window.saturating_add(self.prefill).min(trained));
        let (stride, score_from, prefill, tokens) = (self.stride.unwrap_or(window), self.score_from, self.prefill, self.tokens);
        Ok(vec![Windowing { window, stride, score_from, prefill, chunk, tokens, skip: 0 }])
    }

    /// What is to be written, if anything is.
    fn continuation(
        &self,
        names: &[&String],
        checkpoints: &[Checkpoint],
        texts: &[Text],
        first_is_reference: bool,
    ) -> Result<Option<continuation::Task>> {
        let Some(tokens) = self.generate else { return Ok(None) };
        let refuse = |message: String| Err(Error::Argument { name: "generate".into(), message });
        if !first_is_reference {
            return refuse("what the models write is read by the dense model; name it with --against".into());
        }
        let most = checkpoints.iter().map(|checkpoint| checkpoint.config().max_position_embeddings).min().unwrap_or(0);
        let shortest = texts.iter().map(|text| text.tokens.len()).min().unwrap_or(0);
        let moderate = continuation::Task::default().prompt.min(shortest).min(most.saturating_sub(tokens)).max(1);
        let task = continuation::Task { prompt: self.generate_prompt.unwrap_or(moderate), tokens };
        task.check(texts)?;
        for (name, checkpoint) in names.iter().zip(checkpoints) {
            let trained = checkpoint.config().max_position_embeddings;
            if task.length() > trained {
                return refuse(format!(
                    "{name} was trained for {trained} positions (max_position_embeddings), and a prompt of {} with {tokens} tokens after it has more; ask for fewer",
                    task.prompt
                ));
            }
        }
        Ok(Some(task))
    }

    fn needle_task(&self, trained: usize) -> Option<needle::Task> {
        const MODERATE: usize = 8192;
        let whole = trained.min(MODERATE);
        let asked = [&self.needle_lengths, &self.depths].into_iter().find(|lengths| !lengths.is_empty());
        let lengths = asked.cloned().unwrap_or_else(|| vec![whole / 4, whole / 2, whole]);
        let task =
            needle::Task { kinds: self.needle.clone(), lengths, trials: self.needle_trials, seed: self.needle_seed, ..needle::Task::default() };
        (!task.kinds.is_empty()).then_some(task)
    }
}

/// The model that an adapter file was made for, which it is compared with where nothing else is
/// named: what to call it, and its path.
fn own_model(checkpoint: &Checkpoint) -> Option<(String, PathBuf)> {
    let source = checkpoint.factored().filter(|_| checkpoint.adapter().is_some())?.source.as_ref()?;
    let path = checkpoint.path().to_path_buf();
    Some((source.pull.clone().unwrap_or_else(|| path.display().to_string()), path))
}

/// Tokens of the longest window, which a sequence has to have room for.
fn longest(windowing: &Windowing, texts: &[Text]) -> Result<usize> {
    let windows = texts.iter().map(|text| windowing.cut(text.tokens.len())).collect::<Result<Vec<_>>>()?;
    Ok(windows.iter().flatten().map(|window| window.len()).max().unwrap_or(1))
}

/// The text's tokens, which are the same for all models: numbers about different ones could not be
/// compared.
fn shared_tokens(names: &[&String], checkpoints: &[Checkpoint], tokenizers: &[Tokenizer], text: &str) -> Result<Vec<u32>> {
    let tokens = tokenizers[0].encode(text, true)?;
    let first = checkpoints[0].config().vocab_size;
    for ((name, checkpoint), tokenizer) in names.iter().zip(checkpoints).zip(tokenizers).skip(1) {
        let vocabulary = checkpoint.config().vocab_size;
        let difference = if vocabulary != first {
            format!("has a vocabulary of {vocabulary} tokens, {} one of {first}", names[0])
        } else if tokenizer.encode(text, true)? != tokens {
            format!("makes other tokens of the text than {}", names[0])
        } else {
            continue;
        };
        let message = format!("{name} {difference}; only models with the same tokenizer can be compared");
        return Err(Error::Argument { name: "MODEL".into(), message });
    }
    Ok(tokens)
}
