//! From what the user calls a model to its place on disk.

use lowkey::{Error, Result, pull};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// A path as it is; else the place of a fetched model of that name.
///
/// # Errors
/// [`Error::Io`] where there is neither; it says how to fetch one.
pub fn locate(model: &str) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.into());
    }
    pull::resolve(model).ok_or_else(|| {
        let known = pull::KNOWN.iter().any(|known| known.name == model);
        let reason = if known {
            format!("it has not been fetched yet; `lowkey pull {model}` does that")
        } else {
            "there is no such file or directory, and no model of that name has been fetched; `lowkey pull NAME` fetches one".to_string()
        };
        Error::Io { action: "read", path: path.into(), source: std::io::Error::new(ErrorKind::NotFound, reason) }
    })
}
