//! Removing models from the cache directory, and nothing else from anywhere.
//!
//! What is to go is first moved out of sight within the cache directory, which happens at once or
//! not at all, and deleted there. So whatever interrupts it, no half of a model is left behind that
//! could be taken for one, and the next removal finishes the work. Links are removed as links: what
//! they lead to stays.

use super::{Local, list};
use crate::pull::Store;
use crate::{Error, Result};
use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// What directories on their way out are called.
const HIDDEN: &str = ".removed-";

/// Models that are to be removed, which nothing has happened to yet.
pub struct Removal<'a> {
    store: &'a Store,
    models: Vec<Local>,
}

/// What would go with these models: they, and what lies in their directories.
///
/// `names` are those of [`list`], or paths.
///
/// # Errors
/// [`Error::Io`] where there is no such model, [`Error::Argument`] for a path outside of the cache
/// directory.
pub fn removal<'a>(store: &'a Store, names: &[String]) -> Result<Removal<'a>> {
    let all = list(store)?;
    let mut homes: Vec<&Path> = Vec::new();
    for name in names {
        let before = homes.len();
        let meant = |local: &&Local| local.name == *name || [&local.path, &local.home].into_iter().any(|path| path == Path::new(name));
        homes.extend(all.iter().filter(meant).map(|local| &*local.home));
        if homes.len() == before {
            return Err(refuse(store, name));
        }
    }
    let models = all.iter().filter(|local| homes.iter().any(|home| local.home.starts_with(home))).cloned().collect();
    Ok(Removal { store, models })
}

/// Why `name` cannot be removed.
fn refuse(store: &Store, name: &str) -> Error {
    let directory = store.directory().display();
    let message = |what: &str| format!("{what} the cache directory {directory}; `lowkey list` shows the models that can be removed");
    if Path::new(name).symlink_metadata().is_ok() {
        return Error::Argument { name: "NAME".into(), message: format!("{name} is {}", message("no model in")) };
    }
    let reason = message("there is no model of that name in");
    Error::Io { action: "remove", path: name.into(), source: std::io::Error::new(ErrorKind::NotFound, reason) }
}

impl Removal<'_> {
    /// The models, by name.
    pub fn models(&self) -> &[Local] {
        &self.models
    }

    /// Bytes that will be freed.
    pub fn bytes(&self) -> u64 {
        self.models.iter().map(|local| local.bytes).sum()
    }

    /// Removes them, and what an interrupted removal has left.
    ///
    /// # Errors
    /// [`Error::Io`] for a model that is being fetched at this moment, that a link out of the cache
    /// directory leads to, or that may not be removed.
    pub fn run(self) -> Result<()> {
        for leftover in self.store.entries()?.iter().filter(|path| starts(path, HIDDEN)) {
            delete(leftover).unwrap_or_else(|error| log::warn!("{error}"));
        }
        let homes: Vec<&Path> = self.models.iter().map(|local| &*local.home).collect();
        let inner = |home: &Path| homes.iter().any(|other| home != *other && home.starts_with(other));
        homes.iter().filter(|home| !inner(home)).try_for_each(|home| self.remove(home))
    }

    fn remove(&self, home: &Path) -> Result<()> {
        let directory = &self.store.directory();
        let refuse = |kind: ErrorKind, reason: &str| Error::io("remove", home)(std::io::Error::new(kind, reason));
        let real = |path: &Path| path.canonicalize().map_err(Error::io("find", path));
        if !real(home.parent().unwrap_or(home))?.starts_with(real(directory)?) {
            return Err(refuse(ErrorKind::InvalidInput, "a link on the way to it leads out of the cache directory"));
        }
        let top = home.strip_prefix(directory).ok().and_then(|inside| inside.iter().next()).unwrap_or_default().to_string_lossy();
        let target = top.strip_prefix('.').and_then(|hidden| hidden.strip_suffix(".partial")).unwrap_or(&top);
        // Where there is none, nobody has ever fetched it.
        let lock = File::open(directory.join(format!(".{target}.lock")));
        if lock.as_ref().is_ok_and(|lock| matches!(lock.try_lock(), Err(TryLockError::WouldBlock))) {
            return Err(refuse(ErrorKind::ResourceBusy, "it is being fetched at this moment; stop that, or wait for its end"));
        }
        let hidden = tempfile::Builder::new().prefix(HIDDEN).tempdir_in(directory).map_err(Error::io("write to", directory))?;
        fs::rename(home, hidden.path().join("model")).map_err(Error::io("remove", home))?;
        delete(&hidden.keep())
    }
}

fn starts(path: &Path, prefix: &str) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(prefix.as_bytes()))
}

/// Deletes a directory with all that is in it; another process may be at it too.
fn delete(directory: &PathBuf) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", directory)(error)),
        _ => Ok(()),
    }
}
