//! Where long work stands, and the caller's way to stop it.

use crate::{Error, Result};
use std::ops::ControlFlow;

/// A report from long work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is being done, as a word: `calibrate`, `factor`, `write`.
    pub stage: &'static str,
    /// Units done.
    pub done: u64,
    /// Units in all; 0 where that is not known.
    pub total: u64,
}

/// Told of progress.
///
/// Answers [`ControlFlow::Break`] to have the work stopped, which then ends with
/// [`Error::Interrupted`] and leaves nothing behind.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// Goes on, whatever is told.
pub fn quietly(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Told how many of a model's layers are loaded, tells `on_progress`.
pub(crate) fn each_layer(layers: usize, on_progress: OnProgress<'_>) -> impl FnMut(usize) -> Result<()> {
    move |done| report(on_progress, "load", done, layers)
}

/// Tells `on_progress`, and stops if it says so.
pub(crate) fn report(on_progress: OnProgress<'_>, stage: &'static str, done: usize, total: usize) -> Result<()> {
    match on_progress(Progress { stage, done: done as u64, total: total as u64 }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Interrupted),
    }
}
