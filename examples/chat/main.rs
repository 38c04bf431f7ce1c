//! An interactive chat: several turns, streamed, with what the cache costs after each answer.
//!
//! `cargo run --release --example chat -- MODEL`. Where stdin is no terminal, each of its lines is a question.

mod chat;
#[path = "../../src/cli/locate.rs"]
mod locate;
mod questions;
#[path = "../../src/cli/sampling.rs"]
mod sampling;

use chat::Chat;
use clap::Parser;
use lowkey::gpu::Tier;
use lowkey::session::Cancel;
use lowkey::{Device, Engine, Error, LoadOptions, Result};
use questions::Questions;
use sampling::SamplingArgs;
use std::process::ExitCode;

/// Chat with a language model.
#[derive(Parser)]
#[command(name = "chat", max_term_width = 120)]
struct Args {
    /// Directory, .gguf file, or a name that `lowkey pull` has fetched.
    model: String,
    /// What the model is told before everything else.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Ask this, and end.
    #[arg(long, value_name = "TEXT")]
    question: Option<String>,
    /// What to run on: `auto` for the best GPU, `cpu` for the processor, or a part of a GPU's name.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Device,
    /// What a GPU's kernels may use: `f16-subgroups`, `f16` or `baseline` [default: the best there is].
    #[arg(long, value_name = "TIER")]
    tier: Option<Tier>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has had enough of it.
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    let path = locate::locate(&args.model)?;
    eprintln!("loading {} …", path.display());
    let engine = Engine::open(&LoadOptions { device: args.device, tier: args.tier })?;
    let model = engine.load(&path)?;
    let cancel = Cancel::default();
    // While a question is being typed, Ctrl-C is the line editor's; while an answer runs, it stops that.
    let on_interrupt = cancel.clone();
    if let Err(error) = ctrlc::set_handler(move || on_interrupt.set()) {
        eprintln!("Ctrl-C will end the program: {error}");
    }
    let mut chat = Chat::new(&model, args.system, args.sampling.resolve(), cancel)?;
    if let Some(question) = args.question {
        chat::say(&format!("> {question}\n"))?;
        return chat.ask(&question);
    }
    let mut questions = Questions::new();
    if questions.interactive() {
        chat::say(&format!("{} on {}. {}\n", args.model, engine.name(), chat::HELP))?;
    }
    while let Some(line) = questions.next() {
        if !chat.hear(line.trim())? {
            break;
        }
    }
    Ok(())
}
