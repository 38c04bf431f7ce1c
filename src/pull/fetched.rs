//! What has been fetched: every model there is, and the name that one came by.

use super::{KNOWN, Store, Target};
use std::path::{Path, PathBuf};

/// Files of a repository may be in directories of their own, but not far down.
const DEPTH: usize = 4;

impl Store {
    /// The name that [`fetch`](Store::fetch) fetched the model at `path` by; `None` for a model that came another way.
    pub fn name_of(&self, path: &Path) -> Option<String> {
        let path = std::path::absolute(path).ok()?;
        if let Some(known) = KNOWN.iter().find(|known| self.loadable(&Target::Known(known)) == path) {
            return Some(known.name.into());
        }
        let mut parts = path.strip_prefix(&self.directory).ok()?.iter().map(|part| part.to_str()).collect::<Option<Vec<_>>>()?.into_iter();
        let (owner, rest) = parts.next()?.split_once("--")?;
        let repository = rest.split_once("--").map_or(rest, |(repository, _)| repository);
        let file = parts.collect::<Vec<_>>().join("/");
        let name = if file.is_empty() { format!("{owner}/{repository}") } else { format!("{owner}/{repository}:{file}") };
        (self.resolve(&name)? == path).then_some(name)
    }

    /// The paths of all models that have been fetched, in the order of names: directories and `.gguf` files.
    pub fn models(&self) -> Vec<PathBuf> {
        let mut models = Vec::new();
        collect(&self.directory, DEPTH, &mut models);
        models.sort();
        models
    }
}

/// Appends the models below a directory, which may go so many directories deep. What is hidden is still being fetched.
fn collect(directory: &Path, depth: usize, models: &mut Vec<PathBuf>) {
    for path in directory.read_dir().into_iter().flatten().flatten().map(|entry| entry.path()) {
        let hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
        match path.is_dir() {
            _ if hidden => {}
            true if path.join("config.json").is_file() => models.push(path),
            true if depth > 0 => collect(&path, depth - 1, models),
            _ if path.extension().is_some_and(|extension| extension == "gguf") => models.push(path),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_listed_and_known_by_what_they_were_fetched_by() {
        let directory = tempfile::tempdir().unwrap();
        let at = |path: &str| directory.path().join(path);
        for file in [
            "smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf",
            "some--model/config.json",
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
