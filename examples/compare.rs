//! Compressed models beside the one they were made from: an evaluation's report, and the README's picture of it.
//!
//! Models that have been compressed already are named after the dense one; others are made here, out of sight, by what each `--make` says:
//!
//! ```sh
//! cargo run --release --example compare -- MODEL --make small=4,6,8,12 --make fast=3.6,4,6 --make palu=1.25,1.5,2 --make dense=8,4 \
//!     --calibration FILE --text FILE --figure assets/frontier.svg
//! ```

use clap::Parser;
use lowkey::calibrate::{self, SensitivityKind, Statistics};
use lowkey::checkpoint::Checkpoint;
use lowkey::compress::{self, Budget, Float, Layout, Method, Plan};
use lowkey::eval::{self, Report, Row, Subject, Task, Text, Windowing, report};
use lowkey::progress::Progress;
use lowkey::sequence::SequenceOptions;
use lowkey::session::Cancel;
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
    model: PathBuf,
    /// What has been made of it already.
    #[arg(required_unless_present = "make")]
    small: Vec<PathBuf>,
    /// What to make of it, evaluate, and forget: `small` or `fast` (lowkey's layouts), or a published method, each with how many times smaller the caches are to be,
    /// or `dense` with the bits of a number. May be given several times.
    #[arg(long, value_name = "WHAT=N,N…")]
    make: Vec<Make>,
    /// Text to calibrate with, in place of the built-in one.
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "make")]
    calibration: Vec<PathBuf>,
    /// Use no more than this many tokens of it, spread over all of it in windows of 512.
    #[arg(long, value_name = "N", default_value_t = 8192)]
    calibration_tokens: usize,
    /// A text to evaluate on; may be given several times.
    #[arg(long, value_name = "FILE", required = true)]
    text: Vec<PathBuf>,
    /// Use no more than this many tokens of each text, in windows of 512.
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// The first position in a window whose prediction is scored.
    #[arg(long, value_name = "N", default_value_t = 0)]
    score_from: usize,
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
        let (method, layout) = match what {
            "small" => (Method::LowKey, Layout::Small),
            "fast" => (Method::LowKey, Layout::Fast),
            name => (Method::named(name)?, Layout::default()),
        };
        let plan = |number: &str| {
            let wrong = |what: &str| refuse(format!("`{number}` is not {what}"));
            if method == Method::Dense {
                let bits = number.parse().map_err(|_| wrong("a number of bits; choose 8 or 4"))?;
                return Ok((format!("{bits} bits"), Plan { bits, ..Plan::new(method, Budget::Times(1.0)) }));
            }
            let times: f64 = number.parse().map_err(|_| wrong("how many times smaller a cache can be"))?;
            Ok((format!("{times}×"), Plan { layout, ..Plan::new(method, Budget::Times(times)) }))
        };
        let layout = match method {
            Method::LowKey => what,
            Method::Dense => "rotated",
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
    let checkpoint = Checkpoint::open(&options.model)?;
    let heads = checkpoint.config().num_key_value_heads;
    let mut makes = options.make.clone();
    for (_, plan) in makes.iter_mut().flat_map(|make| &mut make.plans) {
        plan.group_heads = plan.group_heads.min(heads);
        plan.check(checkpoint.config())?;
    }
    let engine = Engine::open(&LoadOptions { device: options.device.clone(), ..LoadOptions::default() })?;
    let mut bench = Bench::open(&options, engine.load(&options.model)?)?;
    for path in &options.small {
        bench.add(&engine.load(path)?, name(path), None, on_progress)?;
    }
    let statistics = statistics(&options, &checkpoint, &makes, on_progress)?;
    for Make { layout, plans } in &makes {
        for (point, plan) in plans {
            // One after another, so that there is never more than one on the disk or in memory.
            let place = tempfile::tempdir()?;
            let path = place.path().join("model");
            compress::run(&checkpoint, plan, statistics.as_ref(), Float::F16, &path, on_progress)?;
            bench.add(&engine.load(&path)?, point.clone(), Some(layout), on_progress)?;
        }
    }

    let rows = bench.rows();
    if let Some(figure) = &options.figure {
        let first: Vec<_> = rows.iter().filter(|row| row.text == rows[0].text).cloned().collect();
        std::fs::write(figure, report::frontier(&first)?.ok_or("no model is at any distance from the dense one")?)?;
        println!("{}", figure.display());
    }
    if let (Some(directory), Some(path)) = (directory, &options.report) {
        directory.publish(&Report { rows, ..Report::default() })?;
        println!("{}", path.join("index.html").display());
    }
    Ok(())
}

/// What calibration finds, once for all that is made; nothing where nothing needs it.
fn statistics(
    options: &Options,
    checkpoint: &Checkpoint,
    makes: &[Make],
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<Statistics>> {
    let plans = || makes.iter().flat_map(|make| &make.plans).map(|(_, plan)| plan);
    if plans().all(|plan| plan.method == Method::Dense) {
        return Ok(None);
    }
    let defaults = calibrate::Options::default();
    let longest = defaults.longest.min(checkpoint.config().max_position_embeddings);
    let sensitivity = if plans().any(Plan::weighs) { SensitivityKind::Full } else { SensitivityKind::None };
    let asked =
        calibrate::Options { window: defaults.window.min(longest), longest, tokens: Some(options.calibration_tokens), sensitivity, ..defaults };
    let texts = match &options.calibration[..] {
        [] => vec![TEXT.to_string()],
        files => files.iter().map(|file| read(file)).collect::<Result<_>>()?,
    };
    let model = Arc::new(cpu::Model::load(checkpoint)?);
    Ok(Some(calibrate::run(checkpoint, &model, &texts, asked, on_progress)?.0))
}

/// The dense model, what to evaluate on, and what has been found.
struct Bench {
    dense: Model,
    dense_name: String,
    texts: Vec<Text>,
    bos: Option<u32>,
    windowing: Windowing,
    rows: Vec<Row>,
}

impl Bench {
    fn open(options: &Options, dense: Model) -> Result<Bench> {
        let tokenizer = dense.tokenizer()?;
        let text = |path: &PathBuf| Ok(Text { name: name(path), tokens: tokenizer.encode(&read(path)?, true)? });
        let texts = options.text.iter().map(text).collect::<Result<_>>()?;
        let bos = tokenizer.encode("", true)?.first().copied();
        let plain = Windowing::default();
        let window = plain.window.min(dense.checkpoint().config().max_position_embeddings);
        let windowing = Windowing { window, stride: window, score_from: options.score_from, tokens: options.tokens, ..plain };
        Ok(Bench { dense_name: name(&options.model), dense, texts, bos, windowing, rows: Vec::new() })
    }

    /// Evaluates `model` beside the dense one, as `layout` if that is given.
    fn add(&mut self, model: &Model, name: String, layout: Option<&String>, on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<()> {
        let subject = |model: &Model, name: &String, layout: Option<&String>| {
            // Every prediction is to be what it would be token by token.
            let options = SequenceOptions { capacity: self.windowing.window, strict: true, ..SequenceOptions::default() };
            let layout = layout.cloned().unwrap_or_else(|| model.layout());
            Ok(Subject { model: name.clone(), method: model.method().into(), layout, sequence: model.sequence(options)? })
        };
        let mut subjects = [subject(&self.dense, &self.dense_name, None)?, subject(model, &name, layout)?];
        let task = Task { texts: &self.texts, bos: self.bos, windowing: self.windowing, first_is_reference: true };
        let rows = eval::run(&task, &mut subjects, on_progress)?;
        for row in rows.iter().skip(1).step_by(2) {
            let kl = row.kl_mean.unwrap_or(f64::NAN);
            println!("{} {}, {name}, on {}: {} bytes per token, KL divergence {kl:.5}", row.method, row.layout, row.text, row.kv_bytes_per_token);
        }
        // The dense model's rows are the same every time.
        let skipped = if self.rows.is_empty() { 0 } else { 1 };
        self.rows.extend(rows.chunks(2).flat_map(|pair| pair[skipped..].to_vec()));
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
        let fast = |times| Plan { layout: Layout::Fast, ..Plan::new(Method::LowKey, Budget::Times(times)) };
        assert_eq!((&*layout, plans), ("fast", vec![("3.6×".into(), fast(3.6)), ("4×".into(), fast(4.0))]));
        let palu: Make = "palu=2".parse().unwrap();
        assert_eq!((palu.plans[0].1.method, palu.plans[0].1.budget), (Method::Palu, Budget::Times(2.0)));
        let dense: Make = "dense=8,4".parse().unwrap();
        assert_eq!(dense.plans.iter().map(|(name, plan)| (&**name, plan.bits)).collect::<Vec<_>>(), [("8 bits", 8), ("4 bits", 4)]);
        for (wrong, about) in [("small", "WHAT=N"), ("smaller=4", "smaller"), ("small=", "``"), ("small=4;8", "4;8"), ("dense=4.5", "4.5")] {
            let message = wrong.parse::<Make>().unwrap_err().to_string();
            assert!(message.contains(about), "{message}");
        }
    }
}
