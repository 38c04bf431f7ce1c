//! The command line: one file per command, and here what they have in common.
//!
//! A command's `Args` is what the user wrote; its `run` resolves that into the library's own
//! options, does the work, and hands the result to the [`Console`], as text or as one JSON object.
//! Exit codes: 0 done, 1 failed, 2 used wrongly.

mod answer;
mod bench;
mod cache;
mod chat;
mod completions;
mod compress;
mod console;
mod device;
mod doctor;
mod eval;
mod generate;
mod inspect;
mod list;
mod locate;
mod prefixes;
mod progress;
mod pull;
mod rm;
mod sampling;
mod several;
mod size;
mod table;
mod template;
mod thinking;
mod tune;

use clap::{Parser, Subcommand};
use console::Console;
use device::DeviceArgs;
use lowkey::{Error, Result};
use std::process::ExitCode;

/// Run large language models with a compressed key/value cache on any GPU.
///
/// MODEL is a directory with config.json and safetensors, a .gguf file, a name that `lowkey pull`
/// knows, or a .lowkey file that `lowkey compress` has made for one of these.
#[derive(Parser)]
#[command(name = "lowkey", version, max_term_width = 120, disable_help_subcommand = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Args)]
struct Global {
    /// Print one JSON object on stdout instead of text.
    #[arg(long, global = true, help_heading = "Everywhere")]
    json: bool,
    #[command(flatten, next_help_heading = "Everywhere")]
    device: DeviceArgs,
    /// No progress bars and no remarks on stderr.
    #[arg(long, short, global = true, help_heading = "Everywhere")]
    quiet: bool,
}

#[derive(Subcommand)]
enum Command {
    Pull(pull::Args),
    #[command(visible_alias = "ls")]
    List(list::Args),
    Rm(rm::Args),
    #[command(visible_alias = "show")]
    Inspect(inspect::Args),
    Compress(compress::Args),
    Chat(chat::Args),
    Generate(generate::Args),
    Eval(eval::Args),
    Bench(bench::Args),
    Tune(tune::Args),
    Doctor(doctor::Args),
    Completions(completions::Args),
}

impl Command {
    fn run(self, console: &Console) -> Result<()> {
        match self {
            Command::Pull(args) => args.run(console),
            Command::List(args) => args.run(console),
            Command::Rm(args) => args.run(console),
            Command::Inspect(args) => args.run(console),
            Command::Compress(args) => args.run(console),
            Command::Chat(args) => args.run(console),
            Command::Generate(args) => args.run(console),
            Command::Eval(args) => args.run(console),
            Command::Bench(args) => args.run(console),
            Command::Tune(args) => args.run(console),
            Command::Doctor(args) => args.run(console),
            Command::Completions(args) => args.run(console),
        }
    }
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("error,wgpu_hal=off")).init();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(usage) => return refuse(&usage),
    };
    let console = Console::new(cli.global);
    match console.catch_interrupts().and_then(|()| cli.command.run(&console)) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has had enough of it: `lowkey … | head`.
        Err(Error::Io { source, path, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe && path == console::stdout_path() => ExitCode::SUCCESS,
        Err(error) => {
            console.error(error.kind(), &error.to_string());
            ExitCode::from(if matches!(error, Error::Argument { .. }) { 2 } else { 1 })
        }
    }
}

/// Help and version, or what is wrong with the command line.
fn refuse(usage: &clap::Error) -> ExitCode {
    let json = usage.use_stderr() && std::env::args_os().any(|argument| argument == "--json");
    if json {
        let message = usage.render().to_string();
        Console::new(Global { json: true, quiet: true, device: DeviceArgs::default() })
            .error("usage", message.trim_end().strip_prefix("error: ").unwrap_or(message.trim_end()));
    } else {
        // Nothing is left to do where even this cannot be written.
        let _ = usage.print();
    }
    ExitCode::from(if usage.use_stderr() { 2 } else { 0 })
}
