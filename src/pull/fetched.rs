//! What is in the cache directory: every model there is, and the name that it came by.

use super::{Store, Target};
use crate::{Error, Result};
use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

/// How far below the cache directory models are looked for.
const DEPTH: usize = 4;

impl Store {
    /// The paths of all models in the cache directory, sorted.
    ///
    /// Directories, `.gguf` and `.lowkey` files. Links are among them, and not followed any
    /// further; what is hidden is still being fetched.
    pub fn models(&self) -> Vec<PathBuf> {
        let mut models = Vec::new();
        // A directory that may not be read has nothing to show.
        for entry in self.entries().unwrap_or_default().into_iter().filter(|entry| !is_hidden(entry)) {
            collect(&entry, DEPTH, &mut models);
        }
        models.sort();
        models
    }

    /// The name that [`fetch`](Store::fetch) fetched the model at `path` by.
    ///
    /// `None` for a model that came another way.
    pub fn name_of(&self, path: &Path) -> Option<String> {
        let path = std::path::absolute(path).ok()?;
        path.strip_prefix(&self.directory).ok()?.iter().next()?;
        let (name, _) = self.called(&path);
        Target::parse(&name).is_ok_and(|target| path.exists() && self.loadable(&target) == path).then_some(name)
    }

    /// What is directly in the cache directory; nothing where there is none.
    pub(crate) fn entries(&self) -> Result<Vec<PathBuf>> {
        let failed = |error| Error::io("read", &self.directory)(error);
        match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            entries => entries.map_err(failed)?.map(|entry| Ok(entry.map_err(failed)?.path())).collect(),
        }
    }

    /// The name of the model at `path`, and what belongs to it alone.
    ///
    /// Of a fetched model that is all of its directory.
    pub(crate) fn called(&self, path: &Path) -> (String, PathBuf) {
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

/// Whether there is something that looks like a model.
fn is_model(path: &Path) -> bool {
    let has = |name: &str| path.join(name).is_file();
    let file = || path.extension().is_some_and(|ending| ending == "gguf" || ending == "lowkey") && path.is_file();
    // Beside a file there may be a config.json too.
    has("config.json") && (has("model.safetensors") || has("model.safetensors.index.json")) || file()
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// Bytes of all files at and below `path`, but not below `others`. A link counts as itself.
pub(crate) fn size(path: &Path, others: &[PathBuf]) -> u64 {
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

    #[test]
    fn models_are_listed_and_known_by_what_they_were_fetched_by() {
        let directory = tempfile::tempdir().unwrap();
        let at = |path: &str| directory.path().join(path);
        for file in [
            "smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf",
            "some--model/config.json",
            "some--model/model.safetensors",
            "some--model/adapter.gguf.part",
            "some--files--parts--q4.gguf/parts/q4.gguf",
            ".half--fetched.partial/model/config.json",
        ] {
            std::fs::create_dir_all(at(file).parent().unwrap()).unwrap();
            std::fs::write(at(file), "").unwrap();
        }
        std::fs::create_dir_all(at("some--empty")).unwrap();
        let store = Store::at(directory.path()).unwrap();
        let named = store.models().iter().map(|path| (path.clone(), store.name_of(path).unwrap())).collect::<Vec<_>>();
        let expected = [
            ("smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
            ("some--files--parts--q4.gguf/parts/q4.gguf", "some/files:parts/q4.gguf"),
            ("some--model", "some/model"),
        ];
        assert_eq!(named, expected.map(|(path, name)| (at(path), name.to_string())));
        for stranger in [at("some--model/config.json"), at("nothing--here"), at("other"), PathBuf::from("/elsewhere/some--model")] {
            assert_eq!(store.name_of(&stranger), None, "{}", stranger.display());
        }
    }
}
