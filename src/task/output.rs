//! Outputs appear under their name complete, or not at all: written to a temporary name in the same
//! directory, then renamed.

use crate::{Error, Result};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::{Builder, NamedTempFile, TempDir};

/// What temporary names begin with.
const PREFIX: &str = ".lowkey-";

/// A file on its way to `path`; removed when dropped.
///
/// # Errors
/// [`Error::Exists`] where `path` is taken, [`Error::Io`] where nothing can be created beside it.
pub(crate) fn file(path: &Path) -> Result<NamedTempFile> {
    vacant(path)?;
    builder(0o666).tempfile_in(parent(path)).map_err(Error::io("create", path))
}

/// Gives `file` its name.
pub(crate) fn publish_file(file: NamedTempFile, path: &Path) -> Result<()> {
    file.as_file().sync_all().map_err(Error::io("write", path))?;
    match file.persist_noclobber(path) {
        Ok(_) => Ok(()),
        Err(e) if e.error.kind() == std::io::ErrorKind::AlreadyExists => Err(Error::Exists { path: path.into() }),
        Err(e) => Err(Error::io("write", path)(e.error)),
    }
}

/// Writes `bytes` to `path` in the place of what is there: the one or the other, never a part, also
/// where the machine stops meanwhile.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn replace(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    let mut file = builder(0o666).tempfile_in(parent(path)).map_err(Error::io("create", path))?;
    file.write_all(bytes.as_ref()).and_then(|()| file.as_file().sync_all()).map_err(Error::io("write", path))?;
    file.persist(path).map_err(|e| Error::io("write", path)(e.error))?;
    // That the name stands for this file now is written down with the directory; not everywhere can
    // that be asked for.
    #[cfg(unix)]
    let _ = std::fs::File::open(parent(path)).and_then(|directory| directory.sync_all());
    Ok(())
}

/// Removes what was on its way to a name in `directory` longer ago than `age`, and never got there.
pub(crate) fn sweep(directory: &Path, age: Duration) {
    let Ok(entries) = directory.read_dir() else { return };
    for entry in entries.flatten() {
        let old = || entry.metadata().ok()?.modified().ok()?.elapsed().ok();
        if entry.file_name().to_string_lossy().starts_with(PREFIX) && old().is_some_and(|old| old > age) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// A directory on its way to `path`, where there may be an empty one; removed with all that is in
/// it when dropped.
///
/// # Errors
/// As [`file`].
pub(crate) fn directory(path: &Path) -> Result<TempDir> {
    if !is_empty_directory(path) {
        vacant(path)?;
    }
    builder(0o777).tempdir_in(parent(path)).map_err(Error::io("create", path))
}

/// Gives `directory` its name.
pub(crate) fn publish_directory(directory: TempDir, path: &Path) -> Result<()> {
    if is_empty_directory(path) {
        std::fs::remove_dir(path).map_err(Error::io("replace", path))?;
    }
    vacant(path)?;
    std::fs::rename(directory.path(), path).map_err(Error::io("create", path))?;
    let _ = directory.keep();
    Ok(())
}

fn is_empty_directory(path: &Path) -> bool {
    // A link to one is somebody's arrangement.
    path.symlink_metadata().is_ok_and(|found| found.is_dir()) && path.read_dir().is_ok_and(|mut entries| entries.next().is_none())
}

fn vacant(path: &Path) -> Result<()> {
    match path.symlink_metadata() {
        Ok(_) => Err(Error::Exists { path: path.into() }),
        Err(_) => Ok(()),
    }
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.into(),
        _ => ".".into(),
    }
}

/// Temporary names, with the permissions that an ordinary output would have (less the user's
/// umask).
fn builder(mode: u32) -> Builder<'static, 'static> {
    let mut builder = Builder::new();
    builder.prefix(PREFIX);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    #[cfg(not(unix))]
    let _ = mode;
    builder
}
