//! Compressed models beside the one they were made from: an evaluation's report, and the README's
//! picture of it.
//!
//! Models that have been compressed already are named after the dense one; others are made here,
//! out of sight, by what each `--make` says:
//!
//! ```sh
//! cargo run --release --example compare -- MODEL --make small=4,6,8,12 --make fast=3.6,4,6 \
//!     --make palu=1.25,1.5,2 --make dense=8,4 \
//!     --calibration FILE --text FILE --depths 512,4096 --exact 0+0 --figure assets/frontier.svg
//! ```
//!
//! A figure of several dense models has a row of charts for each. It is drawn from reports:
//! `--report DIR` writes one, here and in `lowkey eval`, and `--with DIR/report.json` draws it too,
//! beside what is evaluated, or without MODEL alone:
//!
//! ```sh
//! cargo run --release --example compare -- --with one/report.json --with other/report.json \
//!     --figure assets/frontier.svg
//! ```

use clap::Parser;
use lowkey::calibrate::{self, SensitivityKind, Statistics};
use lowkey::checkpoint::{Checkpoint, is_adapter};
use lowkey::compress::{self, Budget, Layout, LowKey, Method, Output, Palu, Plan, ReCalKv};
use lowkey::eval::{self, Depths, Report, Row, Subject, Task, Text, Windowing, report};
use lowkey::kv::Exact;
use lowkey::sequence::SequenceOptions;
use lowkey::session::Cancel;
use lowkey::task::Progress;
use lowkey::{Device, Engine, Error, LoadOptions, Model, Result, cpu};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

/// What calibrates where nothing else is given.
const TEXT: &str = include_str!("../assets/calibration.txt");

/// Evaluate compressed models against the one they were made from.
#[derive(Parser)]
struct Options {
    /// The dense model: a directory or a .gguf file.
    #[arg(required_unless_present = "with", requires = "text")]
    model: Option<PathBuf>,
    /// What has been made of it already: adapter files, or checkpoints that stand alone.
    #[arg(required_unless_present_any = ["make", "with"])]
    small: Vec<PathBuf>,
    /// What to make of it, evaluate, and forget: `small` or `fast` (lowkey's layouts), or a
    /// published method, each with how many times smaller the caches are to be, or `dense` with the
    /// bits of a number. May be given several times.
    #[arg(long, value_name = "WHAT=N,N…", requires = "model")]
    make: Vec<Make>,
    /// A report.json whose models are drawn too; may be given several times.
    #[arg(long, value_name = "FILE")]
    with: Vec<PathBuf>,
    /// Text to calibrate with, in place of the built-in one.
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "make")]
    calibration: Vec<PathBuf>,
    /// Use no more than this many tokens of it, spread over all of it in windows of 512.
    #[arg(long, value_name = "N", default_value_t = 8192)]
    calibration_tokens: usize,
    /// A text to evaluate on; may be given several times.
    #[arg(long, value_name = "FILE", requires = "model")]
    text: Vec<PathBuf>,
    /// Use no more than this many tokens of each text, in windows of 512; with --depths, at the
    /// deepest.
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// The first position in a window whose prediction is scored.
    #[arg(long, value_name = "N", default_value_t = 0)]
    score_from: usize,
    /// Evaluate at these depths, a chart for each: in windows of so many tokens, of which the last
    /// 512 are scored.
    #[arg(long, value_name = "N,N…", value_delimiter = ',', conflicts_with = "score_from")]
    depths: Vec<usize>,
    /// Evaluate each compressed model again with so many sinks and recent tokens exact, as a dashed
    /// line.
    #[arg(long, value_name = "SINKS+RECENT,…", value_delimiter = ',')]
    exact: Vec<Exact>,
    /// Write the report to this new directory.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Where to write the chart for the first text, in place of what is there.
    #[arg(long, value_name = "SVG")]
    figure: Option<PathBuf>,
    /// auto, cpu, or a part of a GPU's name.
    #[arg(long, default_value = "auto")]
    device: Device,
}

/// Models that differ only in how large their caches are: a line of the chart.
#[derive(Debug, Clone, PartialEq)]
struct Make {
    /// What the line is called, beside its method.
    layout: String,
    /// What each point is called, and how it is made.
    plans: Vec<(String, Plan)>,
}

impl FromStr for Make {
    type Err = Error;

    fn from_str(text: &str) -> Result<Make> {
        let refuse = |message: String| Error::Argument { name: "make".into(), message };
        let (what, numbers) = text.split_once('=').ok_or_else(|| refuse(format!("`{text}` is not WHAT=N,N…, such as small=4,8,12 or dense=8,4")))?;
        let lowkey = |layout| Method::LowKey(LowKey { layout, ..LowKey::default() });
        let method = match what {
            "small" => lowkey(Layout::default()),
            "fast" => lowkey(Layout::FAST),
            name => name.parse()?,
        };
        let plan = |number: &str| {
            let wrong = |what: &str| refuse(format!("`{number}` is not {what}"));
            let mut method = method.clone();
            if let Method::Dense { bits } | Method::Oscar { bits } | Method::Kivi { bits } = &mut method {
                *bits = number.parse().map_err(|_| wrong("a number of bits; choose 8 or 4"))?;
                return Ok((format!("{bits} bits"), Plan::new(method)));
            }
            let times: f64 = number.parse().map_err(|_| wrong("how many times smaller a cache can be"))?;
            *method.budget_mut().ok_or_else(|| refuse(format!("{what} has no size to choose")))? = Budget::Times(times);
            Ok((format!("{times}×"), Plan::new(method)))
        };
        let layout = match method {
            Method::LowKey(_) => what,
            Method::Dense { .. } => "rotated",
            _ => "f16",
        };
        Ok(Make { layout: layout.into(), plans: numbers.split(',').map(plan).collect::<Result<_>>()? })
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let options = Options::parse();
    let cancel = Cancel::default();
    let stop = cancel.clone();
    ctrlc::set_handler(move || stop.set())?;
    compare(options, &mut |progress| show(progress, &cancel))
}

fn compare(options: Options, on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let directory = options.report.as_deref().map(report::Directory::reserve).transpose()?;
    let earlier = options.with.iter().map(|path| earlier(path)).collect::<Result<Vec<_>>>()?.concat();
    let rows = match &options.model {
        Some(model) => evaluate(model, &options, on_progress)?,
        None => Vec::new(),
    };
    let rows = [earlier, rows].concat();
    if let (Some(figure), Some(first)) = (&options.figure, rows.first()) {
        // By what a text is called: where it was found is nobody's concern.
        let text = name(Path::new(&first.text));
        let first: Vec<_> = rows.iter().filter(|row| name(Path::new(&row.text)) == text).cloned().collect();
        std::fs::write(figure, report::frontier(&first)?.ok_or("no model is at any distance from the dense one")?)?;
        println!("{}", figure.display());
    }
    if let (Some(directory), Some(path)) = (directory, &options.report) {
        directory.publish(&Report { rows, ..Report::default() })?;
        println!("{}", path.join("index.html").display());
    }
    Ok(())
}

/// What an earlier report says of distances.
fn earlier(path: &Path) -> Result<Vec<Row>> {
    let damaged = |source: serde_json::Error| Error::Io { action: "read a report from", path: path.into(), source: source.into() };
    Ok(serde_json::from_str::<Report>(&read(path)?).map_err(damaged)?.rows)
}

fn evaluate(dense: &Path, options: &Options, on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<Vec<Row>> {
    let checkpoint = Checkpoint::open(dense)?;
    let heads = checkpoint.config().num_key_value_heads;
    let mut makes = options.make.clone();
    for (_, plan) in makes.iter_mut().flat_map(|make| &mut make.plans) {
        if let Method::Palu(Palu { group_heads, .. }) | Method::ReCalKv(ReCalKv { group_heads, .. }) = &mut plan.method {
            *group_heads = (*group_heads).min(heads);
        }
        plan.check(checkpoint.config())?;
    }
    let engine = Engine::open(&LoadOptions { device: options.device.clone(), ..LoadOptions::default() })?;
    let mut bench = Bench::open(options, name(dense), engine.load(dense)?)?;
    for path in &options.small {
        let small = if is_adapter(path) { Checkpoint::open_with(dense, path)? } else { Checkpoint::open(path)? };
        bench.add(&engine.load_checkpoint(small)?, name(path), None, on_progress)?;
    }
    let statistics = statistics(options, &checkpoint, &makes, on_progress)?;
    for Make { layout, plans } in &makes {
        for (point, plan) in plans {
            // One after another, so that there is never more than one on the disk or in memory.
            let place = tempfile::tempdir().map_err(|source| Error::Io { action: "create", path: std::env::temp_dir(), source })?;
            let path = place.path().join("adapter");
            compress::run(&checkpoint, plan, statistics.as_ref(), &Output::adapter(&path), on_progress)?;
            bench.add(&engine.load_checkpoint(Checkpoint::open_with(dense, &path)?)?, point.clone(), Some(layout), on_progress)?;
        }
    }
    Ok(bench.rows())
}

/// What calibration finds, once for all that is made; nothing where nothing needs it.
fn statistics(
    options: &Options,
    checkpoint: &Checkpoint,
    makes: &[Make],
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<Statistics>> {
    let plans = || makes.iter().flat_map(|make| &make.plans).map(|(_, plan)| plan);
    if plans().all(|plan| !plan.method.calibrates()) {
        return Ok(None);
    }
    let defaults = calibrate::Options::default();
    let longest = defaults.longest.min(checkpoint.config().max_position_embeddings);
    let sensitivity = if plans().any(|plan| plan.method.weighs()) { SensitivityKind::Full } else { SensitivityKind::None };
    let asked =
        calibrate::Options { window: defaults.window.min(longest), longest, tokens: Some(options.calibration_tokens), sensitivity, ..defaults };
    let texts = match &options.calibration[..] {
        [] => vec![TEXT.to_string()],
        files => files.iter().map(|file| read(file)).collect::<Result<_>>()?,
    };
    let model = Arc::new(cpu::Model::load(checkpoint)?);
    Ok(Some(calibrate::run(checkpoint, &model, &texts, &asked, on_progress)?.0))
}

/// The dense model, what to evaluate on, and what has been found.
struct Bench {
    dense: Model,
    dense_name: String,
    texts: Vec<Text>,
    bos: Option<u32>,
    /// Once, or for each depth.
    windowings: Vec<Windowing>,
    /// What stays exact in each model besides what it says itself.
    exact: Vec<Exact>,
    rows: Vec<Row>,
}

impl Bench {
    fn open(options: &Options, dense_name: String, dense: Model) -> Result<Bench> {
        let tokenizer = dense.tokenizer()?;
        let text = |path: &PathBuf| Ok(Text { name: name(path), tokens: tokenizer.encode(&read(path)?, true)? });
        let texts = options.text.iter().map(text).collect::<Result<Vec<_>>>()?;
        let bos = tokenizer.encode("", true)?.first().copied();
        let trained = dense.checkpoint().config().max_position_embeddings;
        let windowings = if options.depths.is_empty() {
            let plain = Windowing::default();
            let window = plain.window.min(trained);
            vec![Windowing { window, stride: window, score_from: options.score_from, tokens: options.tokens, ..plain }]
        } else {
            let depths = Depths { depths: options.depths.clone(), tokens: options.tokens };
            depths.check(&dense_name, trained)?;
            depths.windowings(&texts)?
        };
        Ok(Bench { dense_name, dense, texts, bos, windowings, exact: options.exact.clone(), rows: Vec::new() })
    }

    /// Evaluates `model` beside the dense one, as `layout` if that is given.
    fn add(&mut self, model: &Model, name: String, layout: Option<&String>, on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<()> {
        let subject = |model: &Model, name: &String, layout: Option<&String>, capacity: usize, exact: Option<Exact>| {
            // Every prediction is to be what it would be token by token.
            let options = SequenceOptions { capacity, strict: true, exact, ..SequenceOptions::default() };
            let layout = layout.cloned().unwrap_or_else(|| model.layout());
            let exact = model.exact(&options);
            Ok::<_, Error>(Subject {
                model: name.clone(),
                method: model.method().into(),
                layout,
                exact,
                sequence: Box::new(model.sequence(options)?),
            })
        };
        // The dense model's rows are the same every time.
        let skipped = if self.rows.is_empty() { 0 } else { 1 };
        for &windowing in &self.windowings {
            let window = windowing.window;
            let mut subjects = vec![subject(&self.dense, &self.dense_name, None, window, None)?, subject(model, &name, layout, window, None)?];
            for &exact in &self.exact {
                subjects.push(subject(model, &name, layout, window, Some(exact))?);
            }
            let task = Task { texts: &self.texts, bos: self.bos, windowing, first_is_reference: true };
            let rows = eval::run(&task, &mut subjects, on_progress)?;
            for row in rows.iter().filter(|row| row.kl_mean > Some(0.0)) {
                let kl = row.kl_mean.unwrap_or(f64::NAN);
                let exact = row.label.exact().map_or(String::new(), |exact| format!(", {exact} exact"));
                println!(
                    "{} {}, {name}{exact}, on {} at depth {}: {} bytes per token, KL divergence {kl:.5}",
                    row.label.method, row.label.layout, row.text, row.window, row.kv_bytes_per_token
                );
            }
            self.rows.extend(rows.chunks(subjects.len()).flat_map(|some| some[skipped..].to_vec()));
        }
        Ok(())
    }

    /// What was found, text by text.
    fn rows(self) -> Vec<Row> {
        let mut rows = self.rows;
        rows.sort_by_key(|row| self.texts.iter().position(|text| text.name == row.text));
        rows
    }
}

/// Where the work stands, over what was shown before.
fn show(progress: Progress, cancel: &Cancel) -> ControlFlow<()> {
    // A count that cannot be shown is no reason to stop.
    let _ = write!(std::io::stderr(), "{} {} of {}\x1b[K\r", progress.stage, progress.done, progress.total);
    if cancel.is_set() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| Error::Io { action: "read", path: path.into(), source })
}

/// A path's last part.
fn name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_to_be_made_is_a_kind_and_its_sizes() {
        let Make { layout, plans } = "fast=3.6,4".parse().unwrap();
        let fast = |times| Plan::new(Method::LowKey(LowKey { budget: Budget::Times(times), layout: Layout::FAST, ..LowKey::default() }));
        assert_eq!((&*layout, plans), ("fast", vec![("3.6×".into(), fast(3.6)), ("4×".into(), fast(4.0))]));
        let palu: Make = "palu=2".parse().unwrap();
        assert_eq!((palu.plans[0].1.method.name(), palu.plans[0].1.method.budget()), ("palu", Some(Budget::Times(2.0))));
        let dense: Make = "dense=8,4".parse().unwrap();
        let plan = |bits| Plan::new(Method::Dense { bits });
        assert_eq!(dense.plans, [("8 bits".into(), plan(8)), ("4 bits".into(), plan(4))]);
        for (wrong, about) in
            [("small", "WHAT=N"), ("smaller=4", "smaller"), ("small=", "``"), ("small=4;8", "4;8"), ("dense=4.5", "4.5"), ("kvarn=4", "no size")]
        {
            let message = wrong.parse::<Make>().unwrap_err().to_string();
            assert!(message.contains(about), "{message}");
        }
    }
}
