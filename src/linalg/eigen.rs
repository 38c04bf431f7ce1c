//! The eigendecomposition of a symmetric matrix, in f64: what every low-rank method comes down to.

use super::{check_finite, tr_product};
use crate::{Error, Result};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::{MatMut, MatRef, Par, diag::DiagMut, dyn_stack};
use nalgebra::{DMatrix, DVector};

/// From this width on, the work is shared out over the cores. Measured on two cores, seconds on one
/// and on both: 512 wide 0.032 and 0.033, 1024 wide 0.198 and 0.180, 1536 wide 0.62 and 0.47, 2048
/// wide 1.53 and 0.86, 4096 wide 15.8 and 8.3.
const SHARE_OUT: usize = 1024;
/// The parts it is cut into, however many cores there are: sums are rounded in the order of the
/// parts, and equal input is to give equal factors on every machine size.
const PARTS: usize = 8;

/// `C = V·diag(λ)·Vᵀ` with `λ` descending and the columns of `V` orthonormal.
///
/// The sign of each column is fixed (its entry of largest magnitude is positive, the first among
/// equals), so that equal input gives equal factors.
#[derive(Debug, Clone, PartialEq)]
pub struct Eigen {
    /// Eigenvalues `[n]`, descending.
    pub values: DVector<f64>,
    /// Eigenvectors `[n, n]`, one per column.
    pub vectors: DMatrix<f64>,
}

impl Eigen {
    /// Decomposes `matrix: [n, n]`; only its symmetric part `(C + Cᵀ)/2` counts.
    ///
    /// `what` names it in errors.
    ///
    /// # Errors
    /// [`Error::Numeric`] where an entry is not finite, the matrix is not square, or the iteration
    /// does not converge.
    pub fn of(what: &str, matrix: &DMatrix<f64>) -> Result<Eigen> {
        let fail = |message: String| Error::Numeric { what: what.into(), message };
        if !matrix.is_square() {
            return Err(fail(format!("a matrix of {} by {} has no eigenvalues", matrix.nrows(), matrix.ncols())));
        }
        check_finite(what, matrix)?;
        let n = matrix.nrows();
        // Brought to a largest entry of one, so that squares in the iteration neither overflow nor
        // vanish.
        let scale = matrix.amax();
        if scale == 0.0 {
            return Ok(Eigen { values: DVector::zeros(n), vectors: DMatrix::identity(n, n) });
        }
        let symmetric = matrix / scale;
        let symmetric = (&symmetric + symmetric.transpose()) / 2.0;
        let (ascending, vectors) = ascending(&symmetric).ok_or_else(|| fail(format!("the eigenvalues of {n} by {n} numbers did not converge")))?;
        let values = DVector::from_iterator(n, ascending.iter().rev().map(|value| value * scale));
        let mut vectors = vectors.select_columns((0..n).rev().collect::<Vec<_>>().iter());
        for mut column in vectors.column_iter_mut() {
            if column[column.iamax()] < 0.0 {
                column.neg_mut();
            }
        }
        check_finite(what, &vectors)?;
        Ok(Eigen { values, vectors })
    }

    /// `Σ_{i≥rank} λ_i`, negative rounding taken as zero.
    ///
    /// What the best projection onto `rank` directions leaves.
    pub fn tail(&self, rank: usize) -> f64 {
        self.values.iter().skip(rank).map(|value| value.max(0.0)).sum()
    }

    /// `C^p`, `[n, n]`, where eigenvalues below `floor` times the largest are taken for that, so
    /// that a moment that is singular has an inverse: `power(0.5, floor)` and `power(-0.5, floor)`
    /// are the inverse of each other. With a floor of zero, directions of no eigenvalue (or a
    /// negative one) stay without.
    pub fn power(&self, p: f64, floor: f64) -> DMatrix<f64> {
        let floor = floor * self.values.iter().next().map_or(0.0, |value| value.max(0.0));
        let values: Vec<f64> = self.values.iter().map(|value| value.max(floor)).take_while(|&value| value > 0.0).collect();
        // Half of the power on each side makes the product symmetric to the last bit.
        let mut half = self.vectors.columns(0, values.len()).transpose();
        for (mut row, value) in half.row_iter_mut().zip(values) {
            row *= value.powf(p / 2.0);
        }
        let mut power = tr_product(half.as_view(), half.as_view());
        power.fill_upper_triangle_with_lower_triangle();
        power
    }
}

/// Eigenvalues and eigenvectors of a symmetric matrix in ascending order; `None` where they are not
/// found.
fn ascending(symmetric: &DMatrix<f64>) -> Option<(DVector<f64>, DMatrix<f64>)> {
    let n = symmetric.nrows();
    let par = if n < SHARE_OUT { Par::Seq } else { Par::rayon(PARTS) };
    let (mut values, mut vectors) = (DVector::zeros(n), DMatrix::zeros(n, n));
    let mut memory = dyn_stack::MemBuffer::new(self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, par, Default::default()));
    self_adjoint_evd(
        MatRef::from_column_major_slice(symmetric.as_slice(), n, n),
        DiagMut::from_slice_mut(values.as_mut_slice()),
        Some(MatMut::from_column_major_slice_mut(vectors.as_mut_slice(), n, n)),
        par,
        dyn_stack::MemStack::new(&mut memory),
        Default::default(),
    )
    .ok()?;
    Some((values, vectors))
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

    /// A symmetric matrix without a pattern.
    fn numbers(n: usize) -> DMatrix<f64> {
        let mut random = crate::linalg::Random::new(n as u64);
        let x = DMatrix::from_fn(n, n, |_, j| random.gaussian() / (1.0 + j as f64).sqrt());
        (&x + x.transpose()) / 2.0
    }

    #[test]
    fn what_is_shared_out_over_cores_is_right_descending_and_the_same_on_any_number_of_them() {
        for n in [SHARE_OUT - 1, SHARE_OUT + 3] {
            let matrix = numbers(n);
            let by_cores = [1, 3].map(|cores| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(cores).build().unwrap();
                pool.install(|| Eigen::of("test", &matrix).unwrap())
            });
            assert!(by_cores[0] == by_cores[1], "{n}");
            let Eigen { values, vectors } = &by_cores[0];
            assert!(values.as_slice().is_sorted_by(|a, b| a >= b), "{n}");
            let scaled = DMatrix::from_fn(n, n, |i, j| vectors[(i, j)] * values[j]);
            assert!((tr_product(matrix.as_view(), vectors.as_view()) - scaled).amax() < 1e-11, "{n}");
            assert!((tr_product(vectors.as_view(), vectors.as_view()) - DMatrix::identity(n, n)).amax() < 1e-12, "{n}");
        }
    }

    #[test]
    fn powers_multiply_as_powers_do_and_have_a_floor() {
        let x = numbers(12);
        let moment = &x * &x;
        let eigen = Eigen::of("test", &moment).unwrap();
        let (root, inverse) = (eigen.power(0.5, 0.0), eigen.power(-0.5, 0.0));
        assert!((&root * &root - &moment).amax() < 1e-12);
        assert!((&root * &inverse - DMatrix::identity(12, 12)).amax() < 1e-9);
        assert!((eigen.power(1.0, 0.0) - &moment).amax() < 1e-12);
        assert_eq!(root, root.transpose());
        // One direction is weak, one is missing.
        let weak = Eigen::of("test", &DMatrix::from_diagonal(&DVector::from_vec(vec![1e-9, 4.0, 0.0]))).unwrap();
        let diagonal = |p, floor| weak.power(p, floor).diagonal();
        assert!((diagonal(-0.5, 0.01) - DVector::from_vec(vec![5.0, 0.5, 5.0])).amax() < 1e-14);
        assert!((weak.power(0.5, 0.01) * weak.power(-0.5, 0.01) - DMatrix::identity(3, 3)).amax() < 1e-14);
        assert!((diagonal(-1.0, 0.0) - DVector::from_vec(vec![1e9, 0.25, 0.0])).amax() < 1e-3);
        assert_eq!(Eigen::of("test", &DMatrix::zeros(3, 3)).unwrap().power(-0.5, 1e-3), DMatrix::zeros(3, 3));
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
