//! What is in the cache directory: fetched and compressed models, and unfinished downloads.

use super::{Store, Target};
use crate::checkpoint::Checkpoint;
use crate::{Error, Result};
use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};
use std::time::UNIX_EPOCH;

/// How far below the cache directory models are looked for.
const DEPTH: usize = 4;

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
    pub(super) home: PathBuf,
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

impl Store {
    /// All models in the cache directory, by name. Links are listed, and not followed any further.
    ///
    /// # Errors
    /// [`Error::Io`] for a cache directory that is there and cannot be read.
    pub fn list(&self) -> Result<Vec<Local>> {
        let mut found = Vec::new();
        for entry in self.entries()? {
            let name = entry.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            match name.strip_prefix('.').map(|hidden| hidden.strip_suffix(".partial")) {
                Some(Some(target)) => found.push(Local {
                    name: spoken(target),
                    kind: Kind::Unfinished,
                    bytes: 0,
                    modified: modified(&entry),
                    path: entry.clone(),
                    home: entry,
                }),
                Some(None) => {}
                None => {
                    let mut paths = Vec::new();
                    collect(&entry, DEPTH, &mut paths);
                    found.extend(paths.into_iter().map(|path| self.local(path)));
                }
            }
        }
        let homes: Vec<PathBuf> = found.iter().map(|local| local.home.clone()).collect();
        for local in &mut found {
            local.bytes = size(&local.home, &homes);
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// What is directly in the cache directory; nothing where there is none.
    pub(super) fn entries(&self) -> Result<Vec<PathBuf>> {
        let failed = |error| Error::io("read", &self.directory)(error);
        match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            entries => entries.map_err(failed)?.map(|entry| Ok(entry.map_err(failed)?.path())).collect(),
        }
    }

    /// The model at `path`, not measured yet.
    fn local(&self, path: PathBuf) -> Local {
        let (name, home) = self.called(&path);
        Local { name, kind: kind(&path), bytes: 0, modified: modified(&path), path, home }
    }

    /// The name of the model at `path`, and what belongs to it alone.
    ///
    /// Of a fetched model that is all of its directory.
    fn called(&self, path: &Path) -> (String, PathBuf) {
        let parts: Vec<_> = path.strip_prefix(&self.directory).unwrap_or(path).iter().map(|part| part.to_string_lossy()).collect();
        let (top, rest) = (&*parts[0], parts[1..].join("/"));
        let mut names = vec![top.to_string(), top.replacen("--", "/", 1)];
        if let [owner, repository, _] = top.splitn(3, "--").collect::<Vec<_>>()[..] {
            names.push(format!("{owner}/{repository}:{rest}"));
        }
        let fits = |name: &String| Target::parse(name).is_ok_and(|target| target.directory() == top && self.loadable(&target) == path);
        match names.into_iter().find(fits) {
            Some(name) => (name, self.directory.join(top)),
            None => (parts.join("/"), path.into()),
        }
    }

    /// The place of what [`called`](Self::called) names by its place.
    pub(super) fn placed(&self, name: &str) -> Option<PathBuf> {
        let inside = Path::new(name).components().all(|part| matches!(part, Component::Normal(part) if !part.as_encoded_bytes().starts_with(b".")));
        Some(self.directory.join(name)).filter(|path| inside && !name.is_empty() && is_model(path))
    }
}

/// Appends the model at `path`, and those below it. A link is followed to its end, and no further.
fn collect(path: &Path, depth: usize, models: &mut Vec<PathBuf>) {
    if is_model(path) {
        models.push(path.into());
    }
    if depth > 0 && path.symlink_metadata().is_ok_and(|found| found.is_dir()) {
        // A directory that may not be read has nothing to show.
        let entries = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
        entries.filter(|entry| !is_hidden(entry)).for_each(|entry| collect(&entry, depth - 1, models));
    }
}

/// What an unfinished download in this directory is called.
fn spoken(target: &str) -> String {
    match target.splitn(3, "--").collect::<Vec<_>>()[..] {
        [owner, repository] => format!("{owner}/{repository}"),
        [owner, repository, file] => format!("{owner}/{repository}:{file}"),
        _ => target.into(),
    }
}

/// Whether there is something that looks like a model.
fn is_model(path: &Path) -> bool {
    let has = |name: &str| path.join(name).is_file();
    let file = || path.extension().is_some_and(|ending| ending == "gguf") && path.is_file();
    // Beside a file there may be a config.json too.
    has("config.json") && (has("model.safetensors") || has("model.safetensors.index.json")) || file()
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
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

/// Bytes of all files at and below `path`, but not below `others`. A link counts as itself.
pub(super) fn size(path: &Path, others: &[PathBuf]) -> u64 {
    match path.symlink_metadata() {
        Ok(metadata) if !metadata.is_dir() => metadata.len(),
        Ok(_) => fs::read_dir(path).map_or(0, |entries| {
            entries.flatten().map(|entry| entry.path()).filter(|entry| !others.contains(entry)).map(|entry| size(&entry, others)).sum()
        }),
        Err(_) => 0, // it has just been removed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fetched_models_are_called_what_they_were_fetched_by() {
        let store = Store::at(Path::new("/cache")).unwrap();
        for (place, name, home) in [
            ("stories15M", "stories15M", "stories15M"),
            ("smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct", "smollm2-135m-instruct"),
            ("owner--name", "owner/name", "owner--name"),
            ("owner--name--a.Q8_0.gguf/a.Q8_0.gguf", "owner/name:a.Q8_0.gguf", "owner--name--a.Q8_0.gguf"),
            ("owner--name--big--b.gguf/big/b.gguf", "owner/name:big/b.gguf", "owner--name--big--b.gguf"),
            // Others by their places.
            ("stories15M-lowkey-8", "stories15M-lowkey-8", "stories15M-lowkey-8"),
            ("owner--name--a.gguf/a-lowkey-8", "owner--name--a.gguf/a-lowkey-8", "owner--name--a.gguf/a-lowkey-8"),
            ("mine.gguf", "mine.gguf", "mine.gguf"),
        ] {
            let root = Path::new("/cache");
            assert_eq!(store.called(&root.join(place)), (name.to_string(), root.join(home)));
        }
    }

    #[test]
    fn downloads_are_called_what_they_were_begun_by() {
        assert_eq!(["stories15M", "owner--name", "owner--name--a.gguf"].map(spoken), ["stories15M", "owner/name", "owner/name:a.gguf"]);
    }

    #[test]
    fn names_lead_nowhere_else() {
        let cache = tempfile::tempdir().unwrap();
        let store = Store::at(&cache.path().join("inner")).unwrap();
        for place in ["inner/model", "inner/.hidden", "outside"] {
            let directory = cache.path().join(place);
            fs::create_dir_all(&directory).unwrap();
            ["config.json", "model.safetensors"].iter().for_each(|file| fs::write(directory.join(file), "{}").unwrap());
        }
        assert_eq!(store.placed("model"), Some(store.directory().join("model")));
        let absolute = cache.path().join("outside");
        for name in ["", ".", "..", "../outside", "model/../../outside", ".hidden", "missing", absolute.to_str().unwrap()] {
            assert_eq!(store.placed(name), None, "{name}");
        }
    }
}
