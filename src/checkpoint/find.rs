//! Finds the model that an adapter file was made for: beside the file, around it, or among the
//! models that `pull` has fetched.
//!
//! Models of the recorded name come first, then all others; the fingerprint decides. No path is
//! recorded: a file that is handed on would tell where somebody keeps his models, and be of no use.

use super::Checkpoint;
use super::adapter::Adapter;
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// The model, open.
///
/// # Errors
/// [`Error::Checkpoint`] where it is in none of these places; it names the model, and says what to
/// do.
pub(super) fn model_of(adapter: &Adapter) -> Result<Checkpoint> {
    let source = adapter.source();
    let beside = match adapter.path().parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    // Of a name only its last part: no file that is handed on has a say in where to look.
    let namesake = Path::new(&source.name).file_name();
    let (by_name, fetched) = fetched(source.pull.as_deref());
    let places = namesake.map(|name| beside.join(name)).into_iter().chain(by_name).chain(models_in(beside)).chain(fetched);
    let mut remark = String::new();
    for path in places.filter(|path| path.exists() && !super::is_adapter(path)) {
        let reason = match Checkpoint::open_model(&path) {
            Ok(model) if adapter.fits(&model) => return Ok(model),
            Ok(_) => "has that name, but is another model".into(),
            Err(error) => error.to_string(),
        };
        if remark.is_empty() && path.file_name() == namesake {
            remark = format!(" ({}: {reason})", path.display());
        }
    }
    let pull = source.pull.as_ref().map_or(String::new(), |name| format!(", or fetch it with `lowkey pull {name}`"));
    let message = format!(
        "was made for {}, which is neither beside it nor among the models that `lowkey pull` has fetched{remark}. Name the model and then the adapter file with --adapter, put the model or a link \
         to it beside the file{pull}",
        source.describe()
    );
    Err(Error::Checkpoint { path: adapter.path().into(), message })
}

/// A directory and everything in it, as far as it looks like a model; what is in it in the order of
/// names.
fn models_in(directory: &Path) -> Vec<PathBuf> {
    let entries = directory.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    let mut models: Vec<PathBuf> = entries.chain([directory.to_path_buf()]).collect();
    models.retain(|path| path.extension().is_some_and(|extension| extension == "gguf") || path.join("config.json").is_file());
    models.sort();
    models
}

/// What `pull` has fetched: the model of that name, and all others.
#[cfg(feature = "pull")]
fn fetched(name: Option<&str>) -> (Option<PathBuf>, Vec<PathBuf>) {
    match crate::pull::Store::standard() {
        Ok(store) => (name.and_then(|name| store.resolve(name)), store.models()),
        Err(_) => (None, Vec::new()),
    }
}

#[cfg(not(feature = "pull"))]
fn fetched(_: Option<&str>) -> (Option<PathBuf>, Vec<PathBuf>) {
    (None, Vec::new())
}
