//! `lowkey completions`: what a shell needs to complete this command line.

use super::Cli;
use super::console::Console;
use clap::CommandFactory;
use clap_complete::{Shell, generate};
use lowkey::Result;
use serde::Serialize;

/// Print a script that makes a shell complete commands and options.
///
/// For bash: lowkey completions bash > ~/.local/share/bash-completion/completions/lowkey
#[derive(clap::Args)]
pub struct Args {
    /// Which shell.
    shell: Shell,
}

#[derive(Serialize)]
struct Report {
    shell: String,
    script: String,
}

impl Args {
    pub fn run(self, console: &Console) -> Result<()> {
        let mut script = Vec::new();
        generate(self.shell, &mut Cli::command(), "lowkey", &mut script);
        let report = Report { shell: self.shell.to_string(), script: String::from_utf8_lossy(&script).into_owned() };
        console.result(&report, |report| report.script.clone())
    }
}
