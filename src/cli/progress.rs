//! Progress bars, and the ear for Ctrl-C during long work.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lowkey::Result;
use lowkey::session::Cancel;
use lowkey::task::Progress;
use std::ops::ControlFlow;
use std::time::Duration;

/// One bar, relabelled and restarted as the work goes through its stages. It disappears when
/// dropped.
pub struct Bar {
    bar: ProgressBar,
    stage: String,
    cancel: Cancel,
}

impl Bar {
    /// A bar that shows nothing yet; hidden where `quiet`, or where stderr is no terminal.
    pub fn new(quiet: bool, cancel: Cancel) -> Bar {
        let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        Bar { bar: ProgressBar::with_draw_target(None, target), stage: String::new(), cancel }
    }

    /// Shows `done` of `total` units of `stage`; where `total` is not known, only that something
    /// goes on.
    ///
    /// # Errors
    /// [`lowkey::Error::Interrupted`] after Ctrl-C.
    pub fn show(&mut self, stage: &str, done: u64, total: Option<u64>) -> Result<()> {
        self.cancel.check()?;
        let template = if total.is_some() { "{msg:<12} {bar:30} {percent:>3}% {elapsed} (left {eta})" } else { "{msg:<12} {spinner} {elapsed}" };
        // Before anything else is said to the bar, which would be drawn in a style of its own.
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
        if self.stage != stage {
            self.stage = stage.into();
            self.bar.reset();
            self.bar.set_message(self.stage.clone());
            self.bar.enable_steady_tick(Duration::from_millis(200));
        }
        if let Some(total) = total {
            self.bar.set_length(total);
        }
        self.bar.set_position(done);
        Ok(())
    }

    /// Takes it off the screen until it is shown again.
    pub fn hide(&mut self) {
        if !self.stage.is_empty() {
            self.stage.clear();
            self.bar.disable_steady_tick();
            self.bar.finish_and_clear();
        }
    }

    /// As [`show`](Self::show), for what the library reports.
    pub fn report(&mut self, progress: Progress) -> ControlFlow<()> {
        match self.show(progress.stage, progress.done, Some(progress.total)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
