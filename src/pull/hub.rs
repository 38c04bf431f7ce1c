//! Models from the Hugging Face hub, by hf-hub, and what that leaves open: which files make up a
//! model, resuming over several tries, checksums, and errors that say what to do.

use super::{Store, failed, plain, sha256};
use crate::task::{OnProgress, report};
use crate::{Error, Result};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo, Metadata};
use hf_hub::{Cache, Repo, RepoType};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Tries of one file without a single byte gained before giving up.
const TRIES: usize = 4;

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(500);

/// Small files of a model, each taken where it is there: geometry, tokenizer, chat template,
/// licence.
const SMALL: [&str; 12] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "README.md",
];

/// A connection to the hub for one fetch.
pub(super) struct Hub<'a> {
    name: &'a str,
    api: Api,
    cache: Cache,
    has_token: bool,
}

impl Hub<'_> {
    /// Keeps unfinished downloads under `staging`.
    pub fn new<'a>(store: &Store, name: &'a str, staging: &Path) -> Result<Hub<'a>> {
        let cache = Cache::new(staging.join("hub"));
        let mut builder = ApiBuilder::from_cache(cache.clone()).with_progress(false).with_token(store.token.clone());
        if let Some(endpoint) = &store.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').into());
        }
        let api = builder.build().map_err(|error| failed(name, error.to_string()))?;
        Ok(Hub { name, api, cache, has_token: store.token.is_some() })
    }

    /// Makes the directory `model` out of a repository.
    ///
    /// Its safetensors and what belongs to them, or the one GGUF `file`.
    pub fn fetch(&self, repository: &str, file: Option<&str>, model: &Path, progress: OnProgress) -> Result<()> {
        let newest = self.api.model(repository.into());
        let info = self.patiently(repository, progress, || newest.info())?;
        if !plain(&info.sha) {
            return Err(self.failed(format!("the hub named an unusable revision, {:?}", info.sha)));
        }
        // All files of one revision, even if another is uploaded meanwhile.
        let repo = Repo::with_revision(repository.into(), RepoType::Model, info.sha);
        let there: BTreeSet<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();

        for file in SMALL.into_iter().filter(|file| there.contains(file)) {
            self.file(&repo, file, model, progress)?;
        }
        for file in self.weights(&repo, file, &there, model, progress)? {
            self.file(&repo, &file, model, progress)?;
        }
        Ok(())
    }

    /// The files that hold the weights.
    fn weights(&self, repo: &Repo, file: Option<&str>, there: &BTreeSet<&str>, model: &Path, progress: OnProgress) -> Result<Vec<String>> {
        const INDEX: &str = "model.safetensors.index.json";
        let ggufs: Vec<&str> = there.iter().copied().filter(|file| file.ends_with(".gguf")).collect();
        let choice = || match ggufs[..] {
            [] => "It has no .gguf files".to_string(),
            _ => format!("Its .gguf files, each to be named after a colon, are {}", ggufs.join(", ")),
        };
        match file {
            Some(file) if there.contains(file) => self.parts(file, there),
            Some(file) => Err(self.failed(format!("the repository has no {file}. {}", choice()))),
            None if there.contains("model.safetensors") => Ok(vec!["model.safetensors".into()]),
            None if there.contains(INDEX) => self.shards(&self.file(repo, INDEX, model, progress)?),
            None if there.contains("adapter_config.json") => {
                let message =
                    "the repository holds a LoRA adapter, and no model; merge it into its model first (peft: merge_and_unload, then save_pretrained)";
                Err(self.failed(message.into()))
            }
            None => Err(self.failed(format!("the repository has no model.safetensors and no {INDEX}, which lowkey reads. {}", choice()))),
        }
    }

    /// A GGUF file, and the parts that belong to it where it is the first of several.
    fn parts(&self, file: &str, there: &BTreeSet<&str>) -> Result<Vec<String>> {
        let stem = file.strip_suffix(".gguf").and_then(|stem| stem.split_at_checked(stem.len().checked_sub(15)?));
        let Some((base, place)) = stem else { return Ok(vec![file.into()]) };
        let Some(count) = place.strip_prefix("-00001-of-").and_then(|count| count.parse::<usize>().ok()) else { return Ok(vec![file.into()]) };
        let parts: Vec<String> = (1..=count).map(|part| format!("{base}-{part:05}-of-{count:05}.gguf")).collect();
        match parts.iter().find(|part| !there.contains(part.as_str())) {
            Some(missing) => Err(self.failed(format!("{file} is the first of {count} parts, and the repository has no {missing}"))),
            None => Ok(parts),
        }
    }

    /// The shards that an index names.
    fn shards(&self, index: &Path) -> Result<Vec<String>> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: std::collections::HashMap<String, String>,
        }
        let text = fs::read(index).map_err(Error::io("read", index))?;
        let parsed: Index =
            serde_json::from_slice(&text).map_err(|error| self.failed(format!("the index of the weights does not parse: {error}")))?;
        let shards: BTreeSet<String> = parsed.weight_map.into_values().collect();
        match shards.iter().find(|shard| !plain(shard)) {
            Some(odd) => Err(self.failed(format!("the index of the weights names an unusable file, {odd:?}"))),
            None => Ok(shards.into_iter().collect()),
        }
    }

    /// Brings one file into the directory `model`, from wherever an earlier fetch left off, and
    /// checks it.
    fn file(&self, repo: &Repo, file: &str, model: &Path, progress: OnProgress) -> Result<PathBuf> {
        let remote = self.api.repo(repo.clone());
        let offered = self.patiently(file, progress, || self.api.metadata(&remote.url(file)))?;
        if !plain(offered.etag()) || !plain(offered.commit_hash()) {
            return Err(self.failed(format!(
                "the hub sent an unusable ETag or revision for {file}: {:?}, {:?}",
                offered.etag(),
                offered.commit_hash()
            )));
        }
        let done = model.join(file);
        if done.exists() && self.check(&done, file, &offered, progress).is_ok() {
            return Ok(done);
        }
        let blob = self.cache.repo(repo.clone()).blob_path(offered.etag());
        let mut again = true;
        loop {
            let resumed = self.download(&remote, file, &offered, &blob, progress)?;
            let Err(error) = self.check(&blob, file, &offered, progress) else { break };
            remove(&blob)?;
            // What was pieced together may have had a bad piece, or a server that ignores ranges:
            // once more, from the start.
            if !(resumed && std::mem::take(&mut again)) {
                return Err(error);
            }
        }
        let parent = done.parent().unwrap_or(model);
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        fs::rename(&blob, &done).map_err(Error::io("create", &done))?;
        Ok(done)
    }

    /// Downloads a file to `blob`, going on where hf-hub's `.part` file ends. True where some of it
    /// was there before, or came in several pieces.
    fn download(&self, remote: &ApiRepo, file: &str, offered: &Metadata, blob: &Path, progress: OnProgress) -> Result<bool> {
        let part = blob.with_extension("part");
        let length = |path: &Path| path.metadata().map_or(0, |metadata| metadata.len());
        let (mut idle, mut resumed) = (0, blob.exists());
        while !blob.exists() {
            let before = length(&part);
            resumed |= before > 0;
            if before > 0 && before == offered.size() as u64 {
                fs::rename(&part, blob).map_err(Error::io("create", blob))?; // nothing is left to be asked for
                break;
            }
            if before > offered.size() as u64 {
                remove(&part)?;
            }
            let mut stop = None;
            let listener = Listener { progress: &mut *progress, stop: &mut stop, done: 0, total: 0 };
            let outcome = remote.download_with_progress(file, listener);
            if let Some(stop) = stop {
                return Err(stop);
            }
            match outcome {
                Ok(_) if length(blob) > 0 && length(blob) < offered.size() as u64 => {
                    fs::rename(blob, &part).map_err(Error::io("create", &part))?; // the connection was cut, and hf-hub took it for the end
                }
                // Where there are no symbolic links, hf-hub moves the file to where the link would
                // be.
                Ok(pointer) if !blob.exists() => fs::rename(&pointer, blob).map_err(Error::io("create", blob))?,
                Ok(_) => {}
                Err(error) if length(&part) > before && !final_word(&error) => log::debug!("{file}: {error}; going on at byte {}", length(&part)),
                Err(error) => {
                    idle += 1;
                    if idle == TRIES || final_word(&error) {
                        return Err(self.refusal(file, error));
                    }
                    std::thread::sleep(PAUSE);
                }
            }
        }
        Ok(resumed)
    }

    /// Compares a file with what the hub said of it: its size, and its SHA-256 where the ETag is
    /// one (it is for everything large).
    fn check(&self, path: &Path, file: &str, offered: &Metadata, progress: OnProgress) -> Result<()> {
        let mut content = File::open(path).map_err(Error::io("read", path))?;
        let (total, mut done) = (offered.size() as u64, 0);
        let mut stop = None;
        let digest = sha256(&mut content, &mut |piece| {
            done += piece.len() as u64;
            report(progress, "verify", done as usize, total as usize).map_err(|error| {
                stop = Some(error);
                std::io::Error::other("stopped")
            })
        });
        if let Some(stop) = stop {
            return Err(stop);
        }
        let digest = digest.map_err(Error::io("read", path))?;
        let etag = offered.etag();
        if done != total {
            return Err(self.failed(format!("{file} has {done} bytes, and the hub said {total}. It is not used; run it again")));
        }
        if etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit()) && !etag.eq_ignore_ascii_case(&digest) {
            return Err(self.failed(format!("checksum mismatch: {file} has SHA-256 {digest}, and the hub said {etag}. It is not used; run it again")));
        }
        content.sync_all().map_err(Error::io("write", path))
    }

    /// A question to the hub, asked again where the line is bad.
    fn patiently<T>(&self, what: &str, progress: OnProgress, mut ask: impl FnMut() -> Result<T, ApiError>) -> Result<T> {
        for attempt in 1.. {
            report(progress, "ask", 0, 0)?;
            match ask() {
                Ok(answer) => return Ok(answer),
                Err(error) if attempt == TRIES || final_word(&error) => return Err(self.refusal(what, error)),
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
        unreachable!("the loop has no other end")
    }

    fn failed(&self, message: String) -> Error {
        failed(self.name, message)
    }

    /// What the hub's or the line's refusal of `what` means, and what to do.
    fn refusal(&self, what: &str, error: ApiError) -> Error {
        let error = match error {
            ApiError::IoError(source) if full(&source) => return Error::Io { action: "write", path: self.cache.path().clone(), source },
            error => error,
        };
        self.failed(match status(&error) {
            Some(401 | 403) if self.has_token => format!(
                "the hub does not let this token read {what}. Check the repository's spelling, accept its terms on its page on the hub, and see that the token may read it"
            ),
            Some(401 | 403) => format!(
                "the hub wants a token to read {what}. Check the repository's spelling (one that does not exist looks the same), accept its terms on its page on the hub, make a token there, and set HF_TOKEN to it"
            ),
            Some(404) => format!("the hub has no {what} under that name; check the spelling"),
            Some(429) => format!("the hub asks for patience ({error}); run it again later: it goes on where it stopped"),
            _ => format!("{what}: {error}. Is this machine online, and the hub reachable? Run it again when it is: it goes on where it stopped"),
        })
    }
}

/// The HTTP status that an error is about. hf-hub wraps its client's error type, which has this
/// text.
fn status(error: &ApiError) -> Option<u16> {
    error.to_string().split("http status: ").nth(1)?.get(..3)?.parse().ok()
}

/// Whether asking again would be no use.
fn final_word(error: &ApiError) -> bool {
    matches!(error, ApiError::IoError(error) if full(error)) || matches!(status(error), Some(400..500))
}

fn full(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | ReadOnlyFilesystem | PermissionDenied)
}

fn remove(path: &Path) -> Result<()> {
    fs::remove_file(path).map_err(Error::io("remove", path))
}

/// Passes hf-hub's progress on. It cannot stop hf-hub, so it remembers that it should have.
struct Listener<'a> {
    progress: OnProgress<'a>,
    stop: &'a mut Option<Error>,
    done: usize,
    total: usize,
}

impl hf_hub::api::Progress for Listener<'_> {
    fn init(&mut self, size: usize, _: &str) {
        (self.done, self.total) = (0, size);
    }

    fn update(&mut self, size: usize) {
        self.done += size;
        if self.stop.is_none() {
            *self.stop = report(self.progress, "download", self.done, self.total).err();
        }
    }

    fn finish(&mut self) {}
}
