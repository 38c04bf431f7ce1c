//! Compressed models beside the one they were made from: an evaluation's report, and the README's picture of it.
//!
//! `cargo run --release --example compare -- MODEL SMALL… --text assets/evaluation.txt --report DIR --figure assets/frontier.svg`

use clap::Parser;
use lowkey::eval::{self, Report, Subject, Task, Text, Windowing, report};
use lowkey::sequence::SequenceOptions;
use lowkey::{Device, Engine, LoadOptions, Model};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Evaluate compressed models against the one they were made from.
#[derive(Parser)]
struct Options {
    /// The dense model.
    model: PathBuf,
    /// What was made of it.
    #[arg(required = true)]
    small: Vec<PathBuf>,
    /// A text; may be given several times.
    #[arg(long, required = true)]
    text: Vec<PathBuf>,
    /// Use no more than this many tokens of each text.
    #[arg(long)]
    tokens: Option<usize>,
    /// The report's directory.
    #[arg(long)]
    report: PathBuf,
    /// Where to write the chart for the first text, in place of what is there.
    #[arg(long)]
    figure: Option<PathBuf>,
    /// auto, cpu, or a part of a GPU's name.
    #[arg(long, default_value = "auto")]
    device: Device,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let options = Options::parse();
    let directory = report::Directory::reserve(&options.report)?;
    let engine = Engine::open(&LoadOptions { device: options.device, ..LoadOptions::default() })?;
    let paths: Vec<&PathBuf> = std::iter::once(&options.model).chain(&options.small).collect();
    let models = paths.iter().map(|path| engine.load(path)).collect::<lowkey::Result<Vec<Model>>>()?;

    let tokenizer = models[0].tokenizer()?;
    let mut texts = Vec::new();
    for path in &options.text {
        texts.push(Text { name: name(path), tokens: tokenizer.encode(&std::fs::read_to_string(path)?, true)? });
    }
    let plain = Windowing::default();
    let window = plain.window.min(models[0].checkpoint().config().max_position_embeddings);
    let windowing = Windowing { window, stride: window, tokens: options.tokens, ..plain };
    let subject = |(path, model): (&&PathBuf, &Model)| -> lowkey::Result<Subject> {
        let (method, layout) = (model.method().into(), model.layout());
        // Every prediction is to be what it would be token by token.
        let options = SequenceOptions { capacity: window, strict: true, ..SequenceOptions::default() };
        Ok(Subject { model: name(path), method, layout, sequence: model.sequence(options)? })
    };
    let mut subjects = paths.iter().zip(&models).map(subject).collect::<lowkey::Result<Vec<_>>>()?;
    let bos = tokenizer.encode("", true)?.first().copied();
    let task = Task { texts: &texts, bos, windowing, first_is_reference: true };
    let rows = eval::run(&task, &mut subjects, &mut |progress| {
        eprint!("\r{} of {} tokens", progress.done, progress.total);
        // A count that cannot be shown is no reason to stop.
        let _ = std::io::stderr().flush();
        ControlFlow::Continue(())
    })?;
    eprintln!();

    if let Some(figure) = &options.figure {
        let first: Vec<_> = rows.iter().filter(|row| row.text == texts[0].name).cloned().collect();
        std::fs::write(figure, report::frontier(&first)?.ok_or("no model is at any distance from the dense one")?)?;
    }
    directory.publish(&Report { rows, ..Report::default() })?;
    println!("{}", options.report.join("index.html").display());
    Ok(())
}

/// A path's last part.
fn name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}
