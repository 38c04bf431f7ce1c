//! What is in the cache directory: fetched and compressed models, and unfinished downloads.

mod removal;

pub use removal::{Removal, removal};

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::pull::{Store, size};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// A model in the cache directory.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Local {
    /// What it is called: [`Store::resolve`] knows it by that.
    pub name: String,
    /// What is loaded: a directory or a file.
    pub path: PathBuf,
    /// What it is.
    #[serde(flatten)]
    pub kind: Kind,
    /// Bytes on disk, without those of models that lie in its directory.
    pub bytes: u64,
    /// When it was last written, in seconds since 1970; absent where the file system does not say.
    pub modified: Option<u64>,
    /// What belongs to it alone, and goes with it.
    #[serde(skip)]
    home: PathBuf,
}

/// What a model in the cache directory is.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Kind {
    /// A dense model in one GGUF file.
    Gguf,
    /// A dense model in a directory with safetensors.
    Safetensors,
    /// A model with a compressed cache.
    Compressed {
        /// How, as `--method` takes it.
        method: String,
        /// How many times smaller its cache is than the dense model's.
        times: f64,
    },
    /// A download that was stopped; the next one goes on from there.
    Unfinished,
    /// A model that does not open.
    Unreadable {
        /// Why not.
        problem: String,
    },
}

/// All models in the cache directory, by name. Links are listed, and not followed any further.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) for a cache directory that is there and cannot be read.
pub fn list(store: &Store) -> Result<Vec<Local>> {
    let unfinished = store.entries()?.into_iter().filter_map(|entry| {
        let target = entry.file_name()?.to_str()?.strip_prefix('.')?.strip_suffix(".partial")?.to_string();
        Some(Local { name: spoken(&target), kind: Kind::Unfinished, bytes: 0, modified: modified(&entry), path: entry.clone(), home: entry })
    });
    let models = store.models().into_iter().map(|path| {
        let (name, home) = store.called(&path);
        Local { name, kind: kind(&path), bytes: 0, modified: modified(&path), path, home }
    });
    let mut found: Vec<Local> = unfinished.chain(models).collect();
    let homes: Vec<PathBuf> = found.iter().map(|local| local.home.clone()).collect();
    for local in &mut found {
        local.bytes = size(&local.home, &homes);
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// What an unfinished download in this directory is called.
fn spoken(target: &str) -> String {
    match target.splitn(3, "--").collect::<Vec<_>>()[..] {
        [owner, repository] => format!("{owner}/{repository}"),
        [owner, repository, file] => format!("{owner}/{repository}:{file}"),
        _ => target.into(),
    }
}

fn kind(path: &Path) -> Kind {
    match Checkpoint::open(path) {
        Err(error) => Kind::Unreadable { problem: error.to_string() },
        Ok(checkpoint) => match checkpoint.factored() {
            Some(factored) => Kind::Compressed {
                method: factored.method.clone(),
                times: checkpoint.config().dense_kv_bytes_per_token() as f64 / factored.kv_bytes_per_token.max(1) as f64,
            },
            None if path.is_dir() => Kind::Safetensors,
            None => Kind::Gguf,
        },
    }
}

fn modified(path: &Path) -> Option<u64> {
    let time = path.metadata().and_then(|metadata| metadata.modified()).ok()?;
    Some(time.duration_since(UNIX_EPOCH).ok()?.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn downloads_are_called_what_they_were_begun_by() {
        assert_eq!(["stories15M", "owner--name", "owner--name--a.gguf"].map(spoken), ["stories15M", "owner/name", "owner/name:a.gguf"]);
    }
}
