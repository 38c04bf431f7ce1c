//! `lowkey eval`: what compression cost in quality.

use super::cache::CacheArgs;
use super::console::{Console, read_text};
use super::device::untrained;
use super::locate::locate;
use super::table::{number, table};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use lowkey::checkpoint::{Checkpoint, Tokenizer};
use lowkey::eval::needle::{self, Kind};
use lowkey::eval::report::Directory;
use lowkey::eval::{Report, Row, Subject, Task, Text, Windowing, run};
use lowkey::rows::Exact;
use lowkey::sequence::SequenceOptions;
use lowkey::{Error, Model, Result};
use std::path::PathBuf;

/// Measure perplexity, and distance from the dense model, on a text.
///
/// The text is cut into windows, each read from an empty cache. A window of N tokens has N-1 predictions; --score-from leaves out the first ones.
/// llama.cpp's perplexity of the same window is had with --score-from of half the window.
#[derive(clap::Args)]
pub struct Args {
    /// Directory, .gguf file, or fetched name; any number of them, with the same tokenizer.
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<String>,
    /// The model to compare with, which is evaluated first [default: the first MODEL, if it is dense].
    #[arg(long, value_name = "DENSE")]
    against: Option<String>,
    /// A text; `-` is stdin. May be given several times: each text has a row per model.
    #[arg(long, value_name = "FILE", required = true)]
    text: Vec<PathBuf>,
    /// Tokens the model sees at once [default: 512 and the prompt, or the model's context where that is shorter].
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Tokens from one window's start to the next's. Below the window, each prediction is scored once, with the longer past [default: the window].
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// The first position in a window whose prediction is scored.
    #[arg(long, value_name = "N", default_value_t = 0)]
    score_from: usize,
    /// Read the first tokens of each window in one go, as a prompt, and score only what comes after them.
    #[arg(long, value_name = "N", default_value_t = 0)]
    prefill: usize,
    /// Run no more than this many tokens at once after the prompt [default: 32 after a prompt, else as many as suit the models].
    #[arg(long, value_name = "N")]
    chunk: Option<usize>,
    /// Use no more than this many tokens of each text.
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Write all of it to a new directory: report.json, CSV tables, and a page with charts, index.html.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Hide facts in the text, and ask for them at its end: by length, and by how deep in the text they are. Without a kind: single.
    #[arg(
        long, value_name = "KIND,KIND…", num_args = 0..=1, require_equals = true, value_delimiter = ',', default_missing_value = Kind::Single.name(),
        value_parser = kinds(), help_heading = "Needle"
    )]
    needle: Vec<Kind>,
    /// Tokens of text, questions and answers [default: a quarter, half and all of the model's context, which counts as 8192 where it is longer].
    #[arg(long, value_name = "N,N…", value_delimiter = ',', requires = "needle", help_heading = "Needle")]
    needle_lengths: Vec<usize>,
    /// Questions for each kind, length and depth.
    #[arg(long, value_name = "N", default_value_t = needle::Task::default().trials, requires = "needle", help_heading = "Needle")]
    needle_trials: usize,
    /// What facts and texts are drawn from.
    #[arg(long, value_name = "N", default_value_t = needle::Task::default().seed, requires = "needle", help_heading = "Needle")]
    needle_seed: u64,
    #[command(flatten)]
    cache: CacheArgs,
}

fn kinds() -> impl TypedValueParser<Value = Kind> {
    PossibleValuesParser::new(Kind::ALL.map(|kind| PossibleValue::new(kind.name()).help(kind.about()))).try_map(|name| name.parse::<Kind>())
}

impl Args {
    pub fn run(self, console: &Console) -> Result<()> {
        let online = self.cache.apply(SequenceOptions::default())?.method().is_some();
        let names: Vec<&String> = self.against.iter().chain(&self.models).collect();
        let paths = names.iter().map(|name| locate(name)).collect::<Result<Vec<_>>>()?;
        // Before any weight is read: whether these can be compared.
        let checkpoints = paths.iter().map(|path| Checkpoint::open(path)).collect::<Result<Vec<_>>>()?;
        if self.against.is_some() && checkpoints[0].factored().is_some() {
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
        let trained = checkpoints.iter().map(|checkpoint| checkpoint.config().max_position_embeddings).min().unwrap_or(0);
        let questions = match self.needle_task(trained) {
            Some(task) => {
                // Without one, or without one that works, the text is continued as it is.
                let template = checkpoints[0].chat_template().ok();
                task.questions(&contents.join("\n\n"), &tokenizers[0], template.as_ref())?
            }
            None => Vec::new(),
        };
        let directory = self.report.as_deref().map(Directory::reserve).transpose()?;
        let engine = console.engine()?;
        let mut bar = console.bar();
        let mut models = Vec::new();
        for path in &paths {
            bar.show("load", 0, None)?;
            models.push(engine.load(path)?);
        }
        let window = self.window.unwrap_or(Windowing::default().window.saturating_add(self.prefill).min(trained));
        let farthest = questions.iter().map(|question| question.length).max().unwrap_or(0);
        for (name, checkpoint) in names.iter().zip(&checkpoints) {
            if let Some(remark) = untrained(name, checkpoint.config(), window.max(farthest)) {
                console.remark(&remark);
            }
        }
        let windowing = Windowing {
            window,
            stride: self.stride.unwrap_or(window),
            score_from: self.score_from,
            prefill: self.prefill,
            chunk: self.chunk.or((self.prefill > 0).then_some(Exact::BLOCK)),
            tokens: self.tokens,
        };

        // What the tokenizer puts before a text, if anything, stands before each window.
        let bos = tokenizers[0].encode("", true)?.first().copied();
        let first_is_reference = self.against.is_some() || (models[0].method() == "dense" && !online);
        let task = Task { texts: &texts, bos, windowing, first_is_reference };
        let windows = texts.iter().map(|text| windowing.cut(text.tokens.len())).collect::<Result<Vec<_>>>()?;
        let longest = windows.iter().flatten().map(|window| window.len()).max().unwrap_or(1);
        let subject = |index: usize, plain: SequenceOptions| -> Result<Subject> {
            let (name, model): (&String, &Model) = (names[index], &models[index]);
            // What is compared with is kept as it is.
            let reference = index == 0 && self.against.is_some();
            let options = if reference { plain } else { self.cache.apply(plain)? };
            let method = options.method().unwrap_or(model.method()).into();
            Ok(Subject { model: name.clone(), method, layout: options.layout(&model.layout()), sequence: model.sequence(options)? })
        };
        // Without a prompt every prediction is to be what it would be token by token.
        let scored = SequenceOptions {
            capacity: longest,
            strict: self.prefill == 0,
            chunk: (self.prefill > 0).then_some(self.prefill),
            ..SequenceOptions::default()
        };
        let mut subjects = (0..names.len()).map(|index| subject(index, scored)).collect::<Result<Vec<_>>>()?;
        let mut report = Report { rows: run(&task, &mut subjects, &mut |progress| bar.report(progress))?, ..Report::default() };
        subjects.iter().filter_map(|subject| subject.sequence.remark()).for_each(|remark| console.remark(&remark));
        drop(subjects);
        if !questions.is_empty() {
            // One after another: long texts fill long caches. They are read as a conversation is.
            for index in 0..names.len() {
                let mut subject = subject(index, SequenceOptions { capacity: farthest, ..SequenceOptions::default() })?;
                report.needle.extend(needle::run(&questions, &mut subject, &tokenizers[0], &mut |progress| bar.report(progress))?);
            }
        }
        drop(bar);
        if let (Some(directory), Some(path)) = (directory, &self.report) {
            directory.publish(&report)?;
            console.remark(&format!("the report is in {}", path.join("index.html").display()));
        }
        console.result(&report, |report| text_table(&report.rows) + &needle_tables(&report.needle))
    }

    fn needle_task(&self, trained: usize) -> Option<needle::Task> {
        const MODERATE: usize = 8192;
        let whole = trained.min(MODERATE);
        let lengths = if self.needle_lengths.is_empty() { vec![whole / 4, whole / 2, whole] } else { self.needle_lengths.clone() };
        let task =
            needle::Task { kinds: self.needle.clone(), lengths, trials: self.needle_trials, seed: self.needle_seed, ..needle::Task::default() };
        (!task.kinds.is_empty()).then_some(task)
    }
}

/// The text's tokens, which are the same for all models: numbers about different ones could not be compared.
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

fn text_table(rows: &[Row]) -> String {
    let texts = rows.iter().any(|row| row.text != rows[0].text);
    let head = ["model", "method", "text", "kv B/token", "fixed B", "tokens", "perplexity", "KL mean", "±", "KL p99", "top-1"];
    let lines = rows.iter().map(|row| {
        vec![
            row.model.clone(),
            row.method.clone(),
            row.text.clone(),
            row.kv_bytes_per_token.to_string(),
            row.kv_fixed_bytes.to_string(),
            row.tokens.to_string(),
            number(Some(row.perplexity)),
            number(row.kl_mean),
            number(row.kl_stderr),
            number(row.kl_p99),
            row.top1_agreement.map_or(number(None), |share| format!("{:.1} %", 100.0 * share)),
        ]
    });
    // One text needs no column.
    let shown = |column: &usize| texts || head[*column] != "text";
    let pick = |line: Vec<String>| line.into_iter().enumerate().filter(|(column, _)| shown(column)).map(|(_, cell)| cell).collect();
    let head: Vec<&str> = (0..head.len()).filter(shown).map(|column| head[column]).collect();
    table(&head, &lines.map(pick).collect::<Vec<_>>())
}

/// A line per model, kind and length, a column per depth: the share of right answers, and the mean log-probability of the right answer.
fn needle_tables(rows: &[needle::Row]) -> String {
    let Some(first) = rows.first() else { return String::new() };
    // Up to where they begin again: the next line may be the same model's, with another cache.
    let depths = 1 + rows[1..].iter().take_while(|row| row.depth_percent != first.depth_percent).count();
    let names: Vec<String> = rows[..depths].iter().map(|row| format!("at {} %", row.depth_percent)).collect();
    let head: Vec<&str> = ["needle", "method", "kind", "length"].into_iter().chain(names.iter().map(String::as_str)).collect();
    let lines = rows.chunks(depths).map(|line| {
        let told = line.iter().map(|row| format!("{:.0} % {}", 100.0 * row.accuracy, number(Some(row.log_probability))));
        [line[0].model.clone(), line[0].method.clone(), line[0].kind.name().into(), line[0].length.to_string()].into_iter().chain(told).collect()
    });
    format!("\n{}", table(&head, &lines.collect::<Vec<_>>()))
}
