//! `lowkey rm`: removes models from the cache directory.

use super::console::Console;
use super::table::bytes;
use lowkey::local::{self, Removal};
use lowkey::pull::Store;
use lowkey::{Error, Result};
use serde::Serialize;

/// Remove models from the cache directory.
///
/// With a model goes what was compressed into its own directory. On a terminal it is shown what
/// would go, and asked.
#[derive(clap::Args)]
pub struct Args {
    /// Names that `lowkey list` shows, or their paths.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
    /// Do not ask.
    #[arg(long, short)]
    yes: bool,
}

#[derive(Serialize)]
struct Report {
    removed: Vec<String>,
    /// Freed.
    bytes: u64,
}

impl Args {
    pub fn run(self, console: &Console) -> Result<()> {
        let store = Store::standard()?;
        let removal = local::removal(&store, &self.names)?;
        if !self.yes && !console.converses() {
            let message = "is needed where nobody can be asked: this is no terminal".into();
            return Err(Error::Argument { name: "yes".into(), message });
        }
        let mut report = Report { removed: Vec::new(), bytes: 0 };
        if self.yes || console.ask(&question(&removal))? {
            report.removed = removal.models().iter().map(|local| local.name.clone()).collect();
            report.bytes = removal.bytes();
            removal.run()?;
        }
        console.result(&report, |report| format!("{} freed\n", bytes(report.bytes)))
    }
}

fn question(removal: &Removal) -> String {
    let lines = removal.models().iter().map(|local| format!("{}  {}\n", local.path.display(), bytes(local.bytes)));
    let them = if removal.models().len() == 1 { "it" } else { "them" };
    format!("{}Remove {them}, {} in all?", lines.collect::<String>(), bytes(removal.bytes()))
}
