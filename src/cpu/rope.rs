//! Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split layout: dimension `i`
//! of a head rotates with dimension `i + d/2`.
//!
//! A model may have several tables of frequencies; a layer has one of them.

use crate::checkpoint::Config;
use nalgebra::{DMatrixView, DMatrixViewMut};
use std::ops::Range;

/// Cosines and sines of all positions reached so far.
pub(super) struct Rope {
    /// `[d / 2]`, scaling applied.
    frequencies: Vec<f64>,
    /// `[positions][d / 2]`: cosine and sine.
    table: Vec<[f32; 2]>,
}

/// A model's tables.
pub(super) struct Ropes {
    tables: Vec<Rope>,
    /// By layer.
    of: Vec<usize>,
}

impl Ropes {
    /// Those of sequences with room for `context` tokens.
    pub(super) fn new(config: &Config, context: usize) -> Ropes {
        let table = |frequencies| Rope { frequencies, table: Vec::new() };
        Ropes {
            tables: config.ropes.iter().map(|rope| table(rope.frequencies(config.head_dim, context))).collect(),
            of: config.layers.iter().map(|layer| layer.rope).collect(),
        }
    }

    /// Makes ready for positions below `end`.
    pub(super) fn reach(&mut self, end: usize) {
        self.tables.iter_mut().for_each(|table| table.reach(end));
    }

    /// That of a layer.
    pub(super) fn of(&self, layer: usize) -> &Rope {
        &self.tables[self.of[layer]]
    }
}

impl Rope {
    /// Makes ready for positions below `end`. The angles are taken in f64: in f32 they would be off
    /// by 1e-3 at position 10,000.
    fn reach(&mut self, end: usize) {
        let known = self.table.len() / self.frequencies.len();
        for position in known..end {
            self.table.extend(self.frequencies.iter().map(|frequency| {
                let (sine, cosine) = (position as f64 * frequency).sin_cos();
                [cosine as f32, sine as f32]
            }));
        }
    }

    /// Cosine and sine of every pair at positions that have been reached, `[d, positions]`.
    pub(super) fn angles(&self, positions: Range<usize>) -> DMatrixView<'_, f32> {
        let (half, count) = (self.frequencies.len(), positions.len());
        DMatrixView::from_slice(self.table[positions.start * half..positions.end * half].as_flattened(), 2 * half, count)
    }

    /// Rotates every head stacked in the columns of `x: [heads·d, tokens]`; column `j` stands at
    /// position `first + j`, which has been reached.
    pub(super) fn rotate<'a>(&self, x: impl Into<DMatrixViewMut<'a, f32>>, first: usize) {
        self.rotate_towards(x.into(), first, 1.0);
    }

    /// Undoes [`rotate`](Self::rotate). A rotation is orthogonal, so this also takes a gradient
    /// back through one.
    pub(super) fn rotate_back<'a>(&self, x: impl Into<DMatrixViewMut<'a, f32>>, first: usize) {
        self.rotate_towards(x.into(), first, -1.0);
    }

    /// Rotates by `direction` times the angle.
    fn rotate_towards(&self, mut x: DMatrixViewMut<f32>, first: usize, direction: f32) {
        let half = self.frequencies.len();
        for (mut column, table) in x.column_iter_mut().zip(self.table[first * half..].chunks_exact(half)) {
            for head in column.as_mut_slice().chunks_exact_mut(2 * half) {
                let (low, high) = head.split_at_mut(half);
                for ((a, b), [cosine, sine]) in low.iter_mut().zip(high).zip(table) {
                    let sine = direction * sine;
                    (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
                }
            }
        }
    }
}
