//! `lowkey pull`: fetches a model, and says where it is.

use super::console::Console;
use super::table::table;
use lowkey::Result;
use lowkey::pull::{KNOWN, Known, Store};
use serde::Serialize;
use std::ops::ControlFlow;
use std::path::PathBuf;

/// Fetch a model into the cache directory, and print its path.
///
/// The directory is $LOWKEY_CACHE, else the platform's. The hub is reached at $HF_ENDPOINT, else
/// publicly, with the token of $HF_TOKEN or of its own client's file.
#[derive(clap::Args)]
pub struct Args {
    /// A name that --list shows, or owner/name or owner/name:file.gguf of the Hugging Face hub.
    #[arg(required_unless_present = "list")]
    name: Option<String>,
    /// Show the models that need no hub.
    #[arg(long, conflicts_with = "name")]
    list: bool,
}

#[derive(Serialize)]
struct Fetched {
    name: String,
    path: PathBuf,
}

#[derive(Serialize)]
struct List {
    directory: PathBuf,
    models: Vec<Listed>,
}

#[derive(Serialize)]
struct Listed {
    #[serde(flatten)]
    known: &'static Known,
    /// Where it is, once it has been fetched.
    path: Option<PathBuf>,
}

impl Args {
    pub fn run(self, console: &Console) -> Result<()> {
        let store = Store::standard()?;
        let Some(name) = self.name else {
            let models = KNOWN.iter().map(|known| Listed { known, path: store.resolve(known.name) }).collect();
            return console.result(&List { directory: store.directory().into(), models }, text);
        };
        let mut bar = console.bar();
        let mut told = false;
        let fetched = store.fetch(&name, &mut |progress| {
            let go_on = bar.show(progress.stage, progress.done, (progress.total > 0).then_some(progress.total));
            if go_on.is_err() && !std::mem::replace(&mut told, true) {
                console.remark("stopping after the file at hand; Ctrl-C again stops at once. Either way the next pull goes on from there");
            }
            if go_on.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        drop(bar);
        let path = fetched?;
        console.result(&Fetched { name, path }, |fetched| format!("{}\n", fetched.path.display()))
    }
}

fn text(list: &List) -> String {
    let rows: Vec<_> = list
        .models
        .iter()
        .map(|Listed { known, path }| {
            let size = format!("{} MB", known.download_bytes.div_ceil(1_000_000));
            let place = path.as_ref().map_or("not fetched", |_| "fetched");
            vec![known.name.into(), size, known.licence.into(), place.into(), known.about.into()]
        })
        .collect();
    table(&["name", "download", "licence", "state", "what it is"], &rows)
}
