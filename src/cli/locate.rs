//! From what the user calls a model to an open one.

use lowkey::checkpoint::Checkpoint;
use lowkey::{Error, Result, pull};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// A model, and an adapter file for it.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// Directory, .gguf file, fetched name, or .lowkey file (whose model is found beside it or
    /// among the fetched ones).
    model: String,
    /// What `lowkey compress` has made of the model: a .lowkey file.
    #[arg(long, value_name = "FILE")]
    adapter: Option<PathBuf>,
}

impl ModelArgs {
    /// Opens the one with the other.
    ///
    /// # Errors
    /// Those of [`locate`] and of opening.
    pub fn open(&self) -> Result<Checkpoint> {
        let path = locate(&self.model)?;
        match &self.adapter {
            Some(adapter) => Checkpoint::open_with(&path, adapter),
            None => Checkpoint::open(&path),
        }
    }

    /// What the user called it.
    pub fn name(&self) -> String {
        match &self.adapter {
            Some(adapter) => format!("{} with {}", self.model, adapter.display()),
            None => self.model.clone(),
        }
    }
}

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
