//! A matrix that activations are multiplied by: in f32, or as the checkpoint stores it.
//!
//! What is stored in few bits is never widened as a whole. With one token each row is multiplied as
//! it is decoded; with several, a tile of rows that stays in the cache is decoded first. Decoding
//! costs as much as multiplying by some ten tokens.

use crate::Result;
use crate::checkpoint::{Checkpoint, StoredMatrix, Vector, WeightStorage};
use crate::linalg::{add_product, product, tr_product, tr_product_by};
use nalgebra::{DMatrix, DMatrixView};
use rayon::prelude::*;

/// A weight `W: [in, out]`: column by column what a checkpoint stores row by row.
pub(super) enum Weight {
    F32(DMatrix<f32>),
    Stored(StoredMatrix),
}

/// Numbers in a tile: a quarter of a megabyte of f32, which second-level caches have room for.
const TILE: usize = 1 << 16;
/// Numbers decoded at a time where the product is gathered over all outputs.
const BLOCK: usize = 1 << 20;

impl Weight {
    /// Reads `name`, `[outputs, inputs]`.
    pub(super) fn load(checkpoint: &Checkpoint, name: &str, shape: [usize; 2], storage: WeightStorage) -> Result<Weight> {
        let [outputs, inputs] = shape;
        Ok(match storage {
            WeightStorage::F32 => Weight::F32(DMatrix::from_vec(inputs, outputs, checkpoint.f32(name, &shape)?)),
            _ => Weight::Stored(checkpoint.matrix(name, shape, storage)?),
        })
    }

    /// What it takes in memory, or in the file in which it is read.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Weight::F32(matrix) => size_of::<f32>() * matrix.len(),
            Weight::Stored(matrix) => matrix.bytes(),
        }
    }

    /// How many numbers there are.
    pub(super) fn len(&self) -> usize {
        match self {
            Weight::F32(matrix) => matrix.len(),
            Weight::Stored(matrix) => matrix.shape().into_iter().product(),
        }
    }

    /// Whether it is read where it is in a file.
    pub(super) fn is_mapped(&self) -> bool {
        matches!(self, Weight::Stored(matrix) if matrix.is_mapped())
    }

    /// How its numbers are stored.
    pub(super) fn encoding(&self) -> &'static str {
        match self {
            Weight::F32(_) => "F32",
            Weight::Stored(matrix) => matrix.encoding(),
        }
    }

    /// Lets go of memory where it is in a file.
    pub(super) fn release(&self) {
        if let Weight::Stored(matrix) = self {
            matrix.release();
        }
    }

    /// `Wᵀx`, `[out, tokens]`, of `x: [in, tokens]`.
    pub(super) fn apply(&self, x: &DMatrix<f32>) -> DMatrix<f32> {
        let matrix = match self {
            Weight::F32(matrix) => return tr_product(matrix.as_view(), x.as_view()),
            Weight::Stored(matrix) => matrix,
        };
        let [outputs, inputs] = matrix.shape();
        if x.ncols() > 1 {
            let tile = (TILE / inputs.max(1)).max(16);
            return tr_product_by([inputs, outputs], tile, |first, rows| matrix.decode(first, rows), x.as_view());
        }
        let mut y = DMatrix::zeros(outputs, x.ncols());
        if let Some(x) = x.as_slice().get(..inputs) {
            let x = Vector::new(x);
            let dot = |(row, y): (usize, &mut f32)| *y = matrix.dot(row, &x);
            y.as_mut_slice().par_iter_mut().enumerate().with_min_len((TILE / inputs.max(1)).max(1)).for_each(dot);
        }
        y
    }

    /// `Wg`, `[in, tokens]`, of `g: [out, tokens]`: what a gradient is on the other side.
    pub(super) fn backward(&self, gradient: &DMatrix<f32>) -> DMatrix<f32> {
        let matrix = match self {
            Weight::F32(matrix) => return product(matrix.as_view(), gradient.as_view()),
            Weight::Stored(matrix) => matrix,
        };
        let [outputs, inputs] = matrix.shape();
        let mut sum = DMatrix::zeros(inputs, gradient.ncols());
        let mut rows = vec![0f32; (BLOCK / inputs.max(1)).clamp(1, outputs.max(1)) * inputs];
        for first in (0..outputs).step_by(rows.len() / inputs.max(1)) {
            let count = (rows.len() / inputs).min(outputs - first);
            let tile = (TILE / inputs).max(1);
            let here = &mut rows[..count * inputs];
            here.par_chunks_mut(tile * inputs).enumerate().for_each(|(index, rows)| matrix.decode(first + index * tile, rows));
            add_product(DMatrixView::from_slice(here, inputs, count), gradient.rows(first, count), &mut sum);
        }
        sum
    }

    /// Column `index`, `[in]`, into `out`: a token's embedding.
    pub(super) fn column(&self, index: usize, out: &mut [f32]) {
        match self {
            Weight::F32(matrix) => out.copy_from_slice(matrix.column(index).as_slice()),
            Weight::Stored(matrix) => matrix.decode(index, out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::test_matrix;
    use crate::linalg::Random;
    use std::cell::RefCell;

    #[test]
    fn what_is_stored_multiplies_as_what_it_stands_for() {
        for (name, shape, columns) in [("F16", [70, 33], 1), ("Q8_0", [300, 320], 1), ("Q4_0", [257, 288], 3), ("Q4_0", [70, 320], 40)] {
            let random = RefCell::new(Random::new(1));
            let matrix = test_matrix(name, shape, |_| random.borrow_mut().gaussian() as f32);
            let mut wide = DMatrix::zeros(shape[1], shape[0]);
            matrix.decode(0, wide.as_mut_slice());
            assert_eq!(matrix.encoding(), name);
            let (stored, wide) = (Weight::Stored(matrix), Weight::F32(wide));
            let x = |rows: usize| DMatrix::from_fn(rows, columns, |i, j| ((i * 31 + j * 17) as f32 * 0.37).sin());
            let near = |a: DMatrix<f32>, b: DMatrix<f32>| (&a - &b).norm() < 2e-5 * b.norm() && a.norm() > 0.0;
            assert!(near(stored.apply(&x(shape[1])), wide.apply(&x(shape[1]))), "{name} {shape:?} {columns}");
            assert!(near(stored.backward(&x(shape[0])), wide.backward(&x(shape[0]))), "{name} {shape:?} {columns}, backward");
            let (mut a, mut b) = (vec![0.0; shape[1]], vec![0.0; shape[1]]);
            stored.column(shape[0] - 1, &mut a);
            wide.column(shape[0] - 1, &mut b);
            assert_eq!(a, b);
        }
    }
}
