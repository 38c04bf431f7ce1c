//! The eigendecomposition of a symmetric matrix, in f64: what every low-rank method comes down to.

use super::check_finite;
use crate::{Error, Result};
use nalgebra::{DMatrix, DVector, SymmetricEigen};

/// `C = V·diag(λ)·Vᵀ` with `λ` descending and the columns of `V` orthonormal.
///
/// The sign of each column is fixed (its entry of largest magnitude is positive, the first among equals), so that equal input gives equal factors.
#[derive(Debug, Clone, PartialEq)]
pub struct Eigen {
    /// Eigenvalues `[n]`, descending.
    pub values: DVector<f64>,
    /// Eigenvectors `[n, n]`, one per column.
    pub vectors: DMatrix<f64>,
}

impl Eigen {
    /// Decomposes `matrix: [n, n]`; only its symmetric part `(C + Cᵀ)/2` counts. `what` names it in errors.
    ///
    /// # Errors
    /// [`Error::Numeric`] where an entry is not finite, the matrix is not square, or the iteration does not converge.
    pub fn of(what: &str, matrix: &DMatrix<f64>) -> Result<Eigen> {
        let fail = |message: String| Error::Numeric { what: what.into(), message };
        if !matrix.is_square() {
            return Err(fail(format!("a matrix of {} by {} has no eigenvalues", matrix.nrows(), matrix.ncols())));
        }
        check_finite(what, matrix)?;
        let n = matrix.nrows();
        // Brought to a largest entry of one, so that squares in the iteration neither overflow nor vanish.
        let scale = matrix.amax();
        if scale == 0.0 {
            return Ok(Eigen { values: DVector::zeros(n), vectors: DMatrix::identity(n, n) });
        }
        let symmetric = matrix / scale;
        let symmetric = (&symmetric + symmetric.transpose()) / 2.0;
        let steps = 100 * n.max(10);
        let found = SymmetricEigen::try_new(symmetric, f64::EPSILON, steps)
            .ok_or_else(|| fail(format!("the eigenvalues of {n} by {n} numbers did not converge in {steps} steps")))?;
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&i, &j| found.eigenvalues[j].total_cmp(&found.eigenvalues[i]));
        let values = DVector::from_iterator(n, order.iter().map(|&i| found.eigenvalues[i] * scale));
        let mut vectors = found.eigenvectors.select_columns(&order);
        for mut column in vectors.column_iter_mut() {
            if column[column.iamax()] < 0.0 {
                column.neg_mut();
            }
        }
        check_finite(what, &vectors)?;
        Ok(Eigen { values, vectors })
    }

    /// `Σ_{i≥rank} λ_i`, negative rounding taken as zero: what the best projection onto `rank` directions leaves.
    pub fn tail(&self, rank: usize) -> f64 {
        self.values.iter().skip(rank).map(|value| value.max(0.0)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_by_two_in_closed_form() {
        let eigen = Eigen::of("test", &DMatrix::from_row_slice(2, 2, &[2.0, 1.0, 1.0, 2.0])).unwrap();
        assert!((eigen.values[0] - 3.0).abs() < 1e-14 && (eigen.values[1] - 1.0).abs() < 1e-14);
        let half = 0.5f64.sqrt();
        assert!((eigen.vectors.column(0) - DVector::from_vec(vec![half, half])).amax() < 1e-14);
        assert!((eigen.vectors.column(1).amax() - half).abs() < 1e-14);
    }

    #[test]
    fn the_path_graph_in_closed_form() {
        // The second difference on n points has eigenvalues 2 − 2cos(πk/(n+1)).
        let n = 57;
        let path = DMatrix::from_fn(n, n, |i, j| match i.abs_diff(j) {
            0 => 2.0,
            1 => -1.0,
            _ => 0.0,
        });
        let eigen = Eigen::of("test", &(&path * 1e200)).unwrap();
        for k in 0..n {
            let expected = 2.0 - 2.0 * (std::f64::consts::PI * (n - k) as f64 / (n + 1) as f64).cos();
            assert!((eigen.values[k] / 1e200 - expected).abs() < 1e-12, "{k}");
        }
        let back = &eigen.vectors * DMatrix::from_diagonal(&(&eigen.values / 1e200)) * eigen.vectors.transpose();
        assert!((back - path).amax() < 1e-12);
        assert!((eigen.vectors.transpose() * &eigen.vectors - DMatrix::identity(n, n)).amax() < 1e-12);
        assert!((eigen.tail(n - 1) - eigen.values[n - 1]).abs() < 1e188);
    }

    #[test]
    fn repeated_zero_and_missing_eigenvalues() {
        let zero = Eigen::of("test", &DMatrix::zeros(3, 3)).unwrap();
        assert_eq!(zero.values, DVector::zeros(3));
        assert_eq!(zero.vectors, DMatrix::identity(3, 3));
        let same = Eigen::of("test", &(DMatrix::identity(4, 4) * 5.0)).unwrap();
        assert!((same.values - DVector::repeat(4, 5.0)).amax() < 1e-14);
        assert_eq!(Eigen::of("test", &DMatrix::zeros(0, 0)).unwrap().values.len(), 0);
    }

    #[test]
    fn what_is_not_finite_or_not_square_is_refused_by_name() {
        for bad in [f64::NAN, f64::INFINITY] {
            let mut matrix = DMatrix::identity(3, 3);
            matrix[(2, 1)] = bad;
            let message = Eigen::of("layer 7 keys", &matrix).unwrap_err().to_string();
            assert!(message.contains("layer 7 keys") && message.contains("row 2, column 1"), "{message}");
        }
        assert!(Eigen::of("test", &DMatrix::zeros(2, 3)).is_err());
    }
}
