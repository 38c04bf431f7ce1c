//! From a token's vectors to its row and back: a basis and a format.

use super::Format;
use crate::linalg::{product, tr_product};
use nalgebra::{DMatrix, DVector};
use rayon::prelude::*;

/// An offline basis with the format of its coordinates: `z = (y − μ)·A`, `ŷ = ẑ·B + μ`.
#[derive(Debug, Clone, PartialEq)]
pub struct Coder {
    /// How coordinates are packed; its rank `r` is the width of the basis.
    pub format: Format,
    /// `μ`, `[w]`.
    pub mean: DVector<f32>,
    /// `A`, `[w, r]`: coordinates of unit variance where their scale is fixed.
    ///
    /// `None` where it is `Bᵀ`.
    pub down: Option<DMatrix<f32>>,
    /// `B`, `[r, w]`.
    pub up: DMatrix<f32>,
}

/// Sums of squares, over any number of vectors.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Energy {
    /// Of the vectors about their mean.
    pub all: f64,
    /// Of what a basis holds of them.
    pub held: f64,
}

impl Energy {
    /// The share that the basis does not hold.
    pub fn lost(self) -> f64 {
        if self.all > 0.0 { (1.0 - self.held / self.all).max(0.0) } else { 0.0 }
    }
}

impl std::ops::AddAssign for Energy {
    fn add_assign(&mut self, other: Energy) {
        self.all += other.all;
        self.held += other.held;
    }
}

impl Coder {
    /// Codes the columns of `y: [w, tokens]`: `[tokens][words]`.
    ///
    /// Where tokens are coded in [blocks](Format::block), whole ones; what is left over stays zero.
    pub fn encode(&self, y: &DMatrix<f32>) -> Vec<u32> {
        self.encode_measured(y).0
    }

    /// [`encode`](Self::encode), and what an orthonormal basis holds of the columns.
    ///
    /// The sum of their squares about the mean, and that of their coordinates, before these are
    /// rounded.
    pub fn encode_measured(&self, y: &DMatrix<f32>) -> (Vec<u32>, Energy) {
        let mut centred = y.clone();
        centred.column_iter_mut().for_each(|mut column| column -= &self.mean);
        self.encode_centred(&centred)
    }

    /// The same, of columns less their mean.
    pub fn encode_centred(&self, centred: &DMatrix<f32>) -> (Vec<u32>, Energy) {
        let z = match &self.down {
            Some(down) => tr_product(down.as_view(), centred.as_view()),
            None => product(self.up.as_view(), centred.as_view()),
        };
        let (rank, each, block) = (self.format.rank(), self.format.words(), self.format.block());
        let mut words = vec![0; centred.ncols() * each];
        // Columns are consecutive. To choose codes together is work.
        let blocks = z.as_slice().par_chunks_exact(block * rank).zip(words.par_chunks_exact_mut(block * each));
        blocks.for_each(|(z, words)| self.format.encode(z, words));
        (words, Energy { all: f64::from(centred.norm_squared()), held: f64::from(z.norm_squared()) })
    }

    /// Unpacks coordinates `[r, tokens]` from rows `[tokens][words]`.
    ///
    /// Whole blocks where tokens are coded in them.
    pub fn coordinates(&self, words: &[u32]) -> DMatrix<f32> {
        let (rank, each, block) = (self.format.rank(), self.format.words(), self.format.block());
        let mut z = DMatrix::zeros(rank, words.len() / each);
        // Some tokens at a time, whole blocks.
        let some = (64 / block).max(1) * block;
        let parts = z.as_mut_slice().par_chunks_mut((some * rank).max(1)).zip(words.par_chunks(some * each));
        parts.for_each(|(z, words)| self.format.decode(words, z));
        z
    }
}
