//! What a row of an evaluation is about.

use crate::kv::Exact;

/// Which model was measured, and how its cache was kept: the first fields of every row.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Label {
    /// The model.
    pub model: String,
    /// Its method: `dense`, `recalkv`, …
    pub method: String,
    /// How its rows are stored.
    pub layout: String,
    /// Tokens at the start of a text that stay exact; absent for a cache that is exact throughout.
    pub sinks: Option<usize>,
    /// How many of the newest tokens do, the one that is read included.
    pub recent: Option<usize>,
}

impl Label {
    /// Which tokens stay exact beside latents; `None` for a cache that is exact throughout.
    pub fn exact(&self) -> Option<Exact> {
        self.sinks.zip(self.recent).map(|(sinks, recent)| Exact { sinks, recent })
    }
}
