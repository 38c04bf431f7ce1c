//! What attention reads: the columns of keys and values, exact and coded.

use crate::kv::Reach;
use nalgebra::DMatrix;
use std::ops::Range;

/// Keys and values as attention sees them: `[H_kv·d, columns]`, exact ones first, what every query
/// sees besides last.
pub(super) struct Columns {
    pub(super) keys: DMatrix<f32>,
    pub(super) values: DMatrix<f32>,
    pub(super) reach: Reach,
    /// Exact columns: tokens `0..sinks`, then those from `window` on; after them come coded ones,
    /// run by run.
    pub(super) sinks: usize,
    pub(super) window: usize,
    pub(super) runs: Vec<Run>,
    /// Which runs a key/value head reads, where it does not read all of them.
    pub(super) chosen: Option<Vec<Vec<usize>>>,
    /// How many tokens each column of candidates and evicted tokens stands for; `None` where
    /// nothing is evicted.
    pub(super) evicted: Option<Vec<u32>>,
}

/// Consecutive coded tokens, and the column of the first.
pub(super) struct Run {
    pub(super) tokens: Range<usize>,
    pub(super) column: usize,
}

/// Columns that every query sees: `[H_kv·d, columns]`.
pub(super) struct EvictionColumns {
    pub(super) keys: DMatrix<f32>,
    pub(super) values: DMatrix<f32>,
    /// How many tokens each is.
    pub(super) counts: Vec<u32>,
}

impl Columns {
    /// Adds to `scores: [columns, tokens]`, which are still to be divided by `√head_dim`, what a
    /// column that is many tokens has more: `ln n`.
    pub(super) fn multiply(&self, scores: &mut DMatrix<f32>, head_dim: usize) {
        let Some(evicted) = &self.evicted else { return };
        let first = scores.nrows() - evicted.len();
        for (row, &count) in evicted.iter().enumerate().filter(|(_, count)| **count > 1) {
            let more = (count as f32).ln() * (head_dim as f32).sqrt();
            scores.row_mut(first + row).add_scalar_mut(more);
        }
    }

    /// The columns that the query at `position` sees with a key/value head, where it sees no
    /// further back than `window` tokens, itself included: exact sinks, exact others, coded.
    pub(super) fn seen(&self, position: usize, window: usize, kv_head: usize) -> Vec<Range<usize>> {
        let oldest = (position + 1).saturating_sub(window);
        let exact_from = self.reach.of(position).max(oldest).max(self.window);
        let range = |start: usize, end: usize| start.min(end)..end;
        let mut seen = vec![
            range(oldest, self.sinks.min(position + 1)),
            range(self.sinks + exact_from - self.window, self.sinks + (position + 1).saturating_sub(self.window)),
        ];
        let mut add = |run: &Run| {
            let tokens = range(run.tokens.start.max(oldest), run.tokens.end.min(self.reach.of(position)));
            if !tokens.is_empty() {
                seen.push(run.column + tokens.start - run.tokens.start..run.column + tokens.end - run.tokens.start);
            }
        };
        match &self.chosen {
            None => self.runs.iter().for_each(&mut add),
            Some(chosen) => chosen[kv_head].iter().for_each(|&run| add(&self.runs[run])),
        }
        if let Some(evicted) = self.evicted.as_ref().filter(|evicted| !evicted.is_empty()) {
            seen.push(self.keys.ncols() - evicted.len()..self.keys.ncols());
        }
        seen
    }

    /// Adds what every query sees besides.
    pub(super) fn beside(mut self, evicted: EvictionColumns) -> Columns {
        let first = self.keys.ncols();
        let count = evicted.counts.len();
        self.keys = self.keys.insert_columns(first, count, 0.0);
        self.values = self.values.insert_columns(first, count, 0.0);
        self.keys.columns_mut(first, count).copy_from(&evicted.keys);
        self.values.columns_mut(first, count).copy_from(&evicted.values);
        self.evicted = Some(evicted.counts);
        self
    }
}
