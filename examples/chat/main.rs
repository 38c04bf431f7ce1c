//! An interactive chat: several turns, streamed, with what the cache costs after each answer.
//!
//! `cargo run --release --example chat -- MODEL`. Where stdin is no terminal, each of its lines is a question.

#[path = "../../src/cli/cache.rs"]
mod cache;
mod chat;
#[path = "../../src/cli/device.rs"]
mod device;
#[path = "../../src/cli/locate.rs"]
mod locate;
mod questions;
#[path = "../../src/cli/sampling.rs"]
mod sampling;

use cache::CacheArgs;
use chat::Chat;
use clap::Parser;
use device::{DeviceArgs, untrained};
use lowkey::session::Cancel;
use lowkey::{Error, Result};
use questions::Questions;
use sampling::SamplingArgs;
use std::process::ExitCode;

/// Chat with a language model.
#[derive(Parser)]
#[command(name = "chat", max_term_width = 120)]
struct Args {
    #[command(flatten)]
    model: locate::ModelArgs,
    /// What the model is told before everything else.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Ask this, and end.
    #[arg(long, value_name = "TEXT")]
    question: Option<String>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    cache: CacheArgs,
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
    let name = args.model.name();
    eprintln!("loading {name} …");
    let checkpoint = args.model.open()?;
    let engine = args.device.open()?;
    let model = engine.load_checkpoint(checkpoint)?;
    let options = args.sampling.resolve(&args.cache)?;
    let beyond = options.context.and_then(|context| untrained(&name, model.checkpoint(), context));
    args.device.remark(&engine).iter().chain(&beyond).for_each(|remark| eprintln!("{remark}"));
    let cancel = Cancel::default();
    // While a question is being typed, Ctrl-C is the line editor's; while an answer runs, it stops that, and a second one ends the program.
    let on_interrupt = cancel.clone();
    let handler = move || {
        if on_interrupt.is_set() {
            std::process::exit(1);
        }
        on_interrupt.set();
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        eprintln!("Ctrl-C will end the program: {error}");
    }
    let mut chat = Chat::new(&model, args.system, options, cancel.clone())?;
    if let Some(question) = args.question {
        chat::say(&format!("> {question}\n"))?;
        return chat.ask(&question);
    }
    let mut questions = Questions::new();
    if questions.interactive() {
        chat::say(&format!("{name} on {}. {}\n", engine.name(), chat::HELP))?;
    }
    loop {
        // Without a line editor nothing runs that Ctrl-C could stop but the program.
        if !questions.interactive() {
            cancel.set();
        }
        match questions.next()? {
            Some(line) if chat.hear(line.trim())? => {}
            _ => return Ok(()),
        }
    }
}
