//! Opens the models of a command that takes any number of them.

use super::locate::locate;
use lowkey::Result;
use lowkey::checkpoint::{Checkpoint, is_adapter};
use std::path::PathBuf;

/// Opens models by what the user calls them. An adapter file goes with the model that it was made
/// for: one of the others, else where [`Checkpoint::open`] finds it.
///
/// # Errors
/// Those of [`locate`] and of opening.
pub fn open(names: &[impl AsRef<str>]) -> Result<Vec<Checkpoint>> {
    let paths = names.iter().map(|name| locate(name.as_ref())).collect::<Result<Vec<_>>>()?;
    let models: Vec<&PathBuf> = paths.iter().filter(|path| !is_adapter(path)).collect();
    let beside_another = |path: &PathBuf| models.iter().find_map(|model| Checkpoint::open_with(model, path).ok());
    // What is wrong with the file itself is said where it is opened alone.
    let open = |path: &PathBuf| match is_adapter(path).then(|| beside_another(path)).flatten() {
        Some(checkpoint) => Ok(checkpoint),
        None => Checkpoint::open(path),
    };
    paths.iter().map(open).collect()
}
