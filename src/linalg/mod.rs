//! The linear algebra that the rest stands on: thin over nalgebra (and faer for eigenvalues), and
//! honest about what can fail.
//!
//! Two kinds of work meet here. The decoder on the CPU multiplies large f32 matrices, and wants all
//! cores ([`tr_product`]). The methods of compression solve f64 problems, and want an answer that
//! is the same on every run or an error, never a panic and never a loop that does not end on a NaN
//! ([`Eigen`]), and rotations to even out what is to be rounded ([`rotation`]). Everything follows
//! nalgebra's column-major convention: a token is a column, and a linear weight that is stored
//! `[out, in]` row by row is, read in place, the matrix `W` of `[in, out]` whose columns are the
//! outputs: `y = Wᵀx`.

mod eigen;
mod moments;
mod product;
mod random;
mod rotation;

pub use eigen::Eigen;
pub use moments::Moments;
pub use product::{add_product, gram, outer_products, product, tr_product, tr_product_by, tr_product_into};
pub use random::Random;
pub use rotation::rotation;

use crate::{Error, Result};
use nalgebra::{DMatrix, RealField};

/// Whether all numbers of `matrix` are finite.
///
/// # Errors
/// [`Error::Numeric`], naming `what`, with the first entry that is not.
pub fn check_finite<T: RealField + Copy>(what: &str, matrix: &DMatrix<T>) -> Result<()> {
    match matrix.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::Numeric {
            what: what.into(),
            message: format!("the entry in row {}, column {} is {}, not a finite number", at % matrix.nrows(), at / matrix.nrows(), matrix[at]),
        }),
    }
}

/// `parts`, all of as many columns, one under the other.
pub(crate) fn stack(parts: &[DMatrix<f32>]) -> DMatrix<f32> {
    let mut whole = DMatrix::zeros(parts.iter().map(DMatrix::nrows).sum(), parts[0].ncols());
    let mut first = 0;
    for part in parts {
        whole.rows_mut(first, part.nrows()).copy_from(part);
        first += part.nrows();
    }
    whole
}
