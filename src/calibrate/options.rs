//! What calibration is asked, and what it needs.

use std::path::PathBuf;

/// How text is run, and what is asked of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Tokens that are run together, each such window from an empty cache: the fewest.
    ///
    /// Others are twice as long, four times, and so on.
    pub window: usize,
    /// Tokens of the longest windows, at most. Memory grows with them, and time for each token.
    pub longest: usize,
    /// At most this many tokens, rounded up to whole windows and spread evenly over the text.
    ///
    /// `None` for all.
    pub tokens: Option<usize>,
    /// Positions at the start of each window that are left out of all sums.
    ///
    /// Caches keep them exactly. The first tokens attract about half of all attention whatever they
    /// say ("attention sinks", Xiao et al., arXiv 2309.17453) and have activations unlike any
    /// other's.
    pub sinks: usize,
    /// Caches keep the rows of so many newest tokens exactly.
    ///
    /// Gradients reach a key or value only from queries at least this far behind it.
    pub recent: usize,
    /// Consecutive layers whose keys and values are correlated with each other: 1, 2 or 4.
    pub span: usize,
    /// How it is found out what a disturbance of keys and values does to the output.
    pub sensitivity: SensitivityKind,
    /// The first position whose prediction counts for sensitivity.
    ///
    /// Before it, hardly any key or value is not exact.
    pub loss_from: usize,
    /// Windows that scalar sensitivity is measured on, fewer where there are not as many.
    pub scalar_windows: usize,
    /// The seed of labels and noise.
    pub seed: u64,
    /// Where a run that ends early leaves what it has, for the same run to go on with.
    ///
    /// `None` for nowhere.
    pub keep: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            window: 512,
            longest: 4096,
            tokens: None,
            sinks: 4,
            recent: 32,
            span: 1,
            sensitivity: SensitivityKind::Full,
            loss_from: 40,
            scalar_windows: 1,
            seed: 0,
            keep: None,
        }
    }
}

/// Strengths of sensitivity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SensitivityKind {
    /// None.
    None,
    /// [`LayerStatistics::scalar`](super::LayerStatistics::scalar), from two forward passes for
    /// every layer.
    Scalar,
    /// [`LayerStatistics::sensitivity`](super::LayerStatistics::sensitivity) and
    /// [`LayerStatistics::fisher`](super::LayerStatistics::fisher), from a backward pass for every
    /// window.
    Full,
}

/// Wall-clock seconds by stage.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Seconds {
    /// Running the model.
    pub forward: f64,
    /// Running the loss back through it.
    pub backward: f64,
    /// Disturbing it.
    pub disturb: f64,
    /// Summing up what both find.
    pub moments: f64,
}

/// What a run needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Need {
    /// Bytes of memory at most, beside what the program takes anyway.
    pub memory: u64,
    /// Bytes on disk.
    pub disk: u64,
}
