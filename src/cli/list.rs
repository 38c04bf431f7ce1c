//! `lowkey list`: what is in the cache directory.

use super::console::Console;
use super::table::{ago, bytes, table};
use lowkey::Result;
use lowkey::local::{self, Kind, Local};
use lowkey::pull::Store;
use serde::Serialize;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// Show the models in the cache directory: fetched ones, and what was compressed there.
///
/// Every command takes them by these names.
#[derive(clap::Args)]
pub struct Args {}

#[derive(Serialize)]
struct Report {
    directory: PathBuf,
    bytes: u64,
    models: Vec<Local>,
}

impl Args {
    pub fn run(self, console: &Console) -> Result<()> {
        let store = Store::standard()?;
        let models = local::list(&store)?;
        let report = Report { directory: store.directory().into(), bytes: models.iter().map(|local| local.bytes).sum(), models };
        console.result(&report, text)?;
        for Local { name, kind, .. } in &report.models {
            if let Kind::Unreadable { problem } = kind {
                console.remark(&format!("{name} does not open: {problem}"));
            }
        }
        Ok(())
    }
}

fn text(report: &Report) -> String {
    if report.models.is_empty() {
        return format!("no models in {}; `lowkey pull NAME` fetches one\n", report.directory.display());
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let line = |local: &Local| {
        let when = local.modified.map_or(String::new(), |then| ago(now.saturating_sub(then)));
        vec![local.name.clone(), bytes(local.bytes), when, shown(&local.kind)]
    };
    let rows: Vec<_> = report.models.iter().map(line).collect();
    format!("{}{} in {}\n", table(&["name", "size", "written", "what it is"], &rows), bytes(report.bytes), report.directory.display())
}

fn shown(kind: &Kind) -> String {
    match kind {
        Kind::Gguf => "GGUF".into(),
        Kind::Safetensors => "safetensors".into(),
        Kind::Compressed { method, times } => format!("{method}, {times:.1} times smaller"),
        Kind::Unfinished => "unfinished download".into(),
        Kind::Unreadable { .. } => "does not open".into(),
    }
}
