//! A flag that stops long work from another thread: a signal handler, a window's close button.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Clones share one flag.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks for the work to stop. It does so after the token or chunk it is at.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked for.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Takes the request back, before the next piece of work.
    pub fn clear(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// [`crate::Error::Interrupted`] where it was asked for.
    ///
    /// # Errors
    /// That one.
    pub fn check(&self) -> crate::Result<()> {
        if self.is_set() { Err(crate::Error::Interrupted) } else { Ok(()) }
    }
}
