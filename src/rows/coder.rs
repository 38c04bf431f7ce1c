//! From a token's vectors to its row and back: a basis and a format.

use super::Format;
use crate::linalg::{product, tr_product};
use nalgebra::{DMatrix, DVector};

/// An offline basis with the format of its coordinates: `z = (y − μ)·A`, `ŷ = ẑ·B + μ`.
#[derive(Debug, Clone, PartialEq)]
pub struct Coder {
    /// How coordinates are packed; its rank `r` is the width of the basis.
    pub format: Format,
    /// `μ`, `[w]`.
    pub mean: DVector<f32>,
    /// `A`, `[w, r]`: coordinates of unit variance where their scale is fixed. `None` where it is `Bᵀ`.
    pub down: Option<DMatrix<f32>>,
    /// `B`, `[r, w]`.
    pub up: DMatrix<f32>,
}

impl Coder {
    /// Codes the columns of `y: [w, tokens]`: `[tokens][words]`.
    pub fn encode(&self, y: &DMatrix<f32>) -> Vec<u32> {
        let mut centred = y.clone();
        for mut column in centred.column_iter_mut() {
            column -= &self.mean;
        }
        let z = match &self.down {
            Some(down) => tr_product(down.as_view(), centred.as_view()),
            None => product(&self.up, &centred),
        };
        let mut words = vec![0; y.ncols() * self.format.words()];
        for (z, words) in z.column_iter().zip(words.chunks_exact_mut(self.format.words())) {
            self.format.encode(z.as_slice(), words);
        }
        words
    }

    /// The coordinates `[r, tokens]` of packed rows `[tokens][words]`.
    pub fn coordinates(&self, words: &[u32]) -> DMatrix<f32> {
        let mut z = DMatrix::zeros(self.format.rank(), words.len() / self.format.words());
        for (mut z, words) in z.column_iter_mut().zip(words.chunks_exact(self.format.words())) {
            self.format.decode(words, z.as_mut_slice());
        }
        z
    }
}
