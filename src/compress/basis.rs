//! The basis of a row, and the one closed form behind the offline methods: principal components in
//! a metric.
//!
//! To replace `y` by `ŷ = (y − μ)·A·B + μ` of rank `r` at the least `E[(y − ŷ)·M·(y − ŷ)ᵀ]` is to
//! take the leading eigenvectors `V` of `M^½·C·M^½`, `C` being the second moment of `y` about `μ`:
//! `A = M^½·V`, `B = Vᵀ·M^−½`, and each eigenvalue is what leaving its coordinate out costs.
//! (Proof: with `w = (y − μ)·M^½` it is the principal components of `w`.)
//!
//! - `M = 1` is the whitened SVD of SVD-LLM (arXiv 2403.07378), Palu (2407.21118) and ReCalKV
//!   (2505.24357). They whiten the inputs of a projection, `C_x = LLᵀ`, and truncate the SVD of
//!   `LᵀW`; its right singular vectors are the eigenvectors of `WᵀC_xW`, which is the `C` of the
//!   outputs. No Cholesky factor, no inverse, nothing to fail where `C_x` is singular.
//! - `M = E[qᵀq]` is KQ-SVD (2512.05916): `‖(K − K̂)·Qᵀ‖²` is what it minimises, without its
//!   pseudo-inverse of the keys.
//! - `M = E[gᵀg]`, `g` the gradient of the loss, is the second-order loss itself.

use crate::Result;
use crate::linalg::Moments;
use crate::linalg::{Eigen, product, tr_product};
use nalgebra::{DMatrix, DVector};

/// Coordinates for a vector `y: [w]`, in the order in which they matter.
///
/// `z = (y − μ)·A`, `ŷ = z·B + μ`.
#[derive(Debug, Clone, PartialEq)]
pub struct Basis {
    /// `μ`, `[w]`.
    pub mean: DVector<f64>,
    /// `A`, `[w, r]`.
    pub down: DMatrix<f64>,
    /// `B`, `[r, w]`.
    pub up: DMatrix<f64>,
    /// `E[z_i²]`, `[r]`, over the calibration tokens.
    pub variance: DVector<f64>,
    /// What it costs to leave a coordinate out, `[r]`, descending, in the method's own measure.
    pub loss: DVector<f64>,
}

impl Basis {
    /// All principal components of what `moments` describe, about `mean`, in the metric `metric`.
    ///
    /// A square root of it and that root's inverse.
    ///
    /// # Errors
    /// [`crate::Error::Numeric`], naming `what`.
    pub fn principal(what: &str, moments: &Moments, mean: DVector<f64>, metric: Option<&Roots>) -> Result<Basis> {
        let second = about(moments, &mean);
        Basis::components(what, mean, second, metric)
    }

    /// [`principal`](Self::principal), of a second moment `[w, w]` that is about `mean` already.
    ///
    /// # Errors
    /// [`crate::Error::Numeric`], naming `what`.
    pub fn components(what: &str, mean: DVector<f64>, second: DMatrix<f64>, metric: Option<&Roots>) -> Result<Basis> {
        let weighted = match metric {
            Some(Roots { root, .. }) => tr_product(root.as_view(), product(second.as_view(), root.as_view()).as_view()),
            None => second,
        };
        let Eigen { values, vectors } = Eigen::of(what, &weighted)?;
        let loss = values.map(|value| value.max(0.0));
        let (down, up) = match metric {
            Some(Roots { root, inverse }) => (product(root.as_view(), vectors.as_view()), tr_product(vectors.as_view(), inverse.as_view())),
            None => (vectors.clone(), vectors.transpose()),
        };
        Ok(Basis { mean, down, up, variance: loss.clone(), loss })
    }

    /// The sum of what the coordinates from `rank` on cost.
    pub fn tail(&self, rank: usize) -> f64 {
        self.loss.iter().skip(rank).sum()
    }
}

/// The second moment about another point than zero: `E[yyᵀ] − E[y]μᵀ − μE[y]ᵀ + μμᵀ`.
pub fn about(moments: &Moments, mean: &DVector<f64>) -> DMatrix<f64> {
    let mut second = moments.second.map(f64::from);
    let first = moments.mean.map(f64::from);
    second.ger(-1.0, &first, mean, 1.0);
    second.ger(-1.0, mean, &first, 1.0);
    second.ger(1.0, mean, mean, 1.0);
    second
}

/// A symmetric square root of a metric, and its inverse, `[w, w]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Roots {
    /// `M^½`.
    pub root: DMatrix<f64>,
    /// `M^−½`.
    pub inverse: DMatrix<f64>,
}

impl Roots {
    /// Roots of `metric` with some of its mean added on the diagonal.
    ///
    /// So no direction is free and none is trusted too far.
    ///
    /// # Errors
    /// [`crate::Error::Numeric`], naming `what`.
    pub fn of(what: &str, metric: &DMatrix<f64>) -> Result<Roots> {
        // What a few thousand tokens' gradients say of hundreds of directions is mostly noise in
        // the weaker ones. SmolLM2-135M, 8,192 tokens, KL divergence on another text with 0.001,
        // 0.01, 0.05 and 0.2: 0.0049, 0.0043, 0.0038, 0.0040 (small, 2880 bytes); 0.0054, 0.0034,
        // 0.0028 (fast, 4608 bytes).
        const RIDGE: f64 = 0.05;
        let n = metric.nrows();
        let ridge = (RIDGE * metric.trace() / n.max(1) as f64).max(f64::MIN_POSITIVE.sqrt());
        let eigen = Eigen::of(what, &(metric + DMatrix::from_diagonal_element(n, n, ridge)))?;
        let power = |power: f64| {
            let mut scaled = eigen.vectors.clone();
            for (mut column, value) in scaled.column_iter_mut().zip(eigen.values.iter()) {
                column *= value.max(ridge).powf(power);
            }
            scaled * eigen.vectors.transpose()
        };
        Ok(Roots { root: power(0.5), inverse: power(-0.5) })
    }

    /// The roots of a metric made of blocks along its diagonal.
    pub fn blocks(blocks: &[Roots]) -> Roots {
        let n = blocks.iter().map(|block| block.root.nrows()).sum();
        let mut all = Roots { root: DMatrix::zeros(n, n), inverse: DMatrix::zeros(n, n) };
        let mut first = 0;
        for block in blocks {
            let width = block.root.nrows();
            all.root.view_mut((first, first), (width, width)).copy_from(&block.root);
            all.inverse.view_mut((first, first), (width, width)).copy_from(&block.inverse);
            first += width;
        }
        all
    }

    /// Of `metric` as it is, but for eigenvalues that sums in f32 cannot tell from zero.
    ///
    /// Below 1e-8 of the largest they are taken for that, so that every direction is free to be
    /// kept. A metric of nothing is a very small one, the same for all directions.
    ///
    /// # Errors
    /// [`crate::Error::Numeric`], naming `what`.
    pub fn exact(what: &str, metric: &DMatrix<f64>) -> Result<Roots> {
        const FLOOR: f64 = 1e-8;
        let n = metric.nrows();
        let mut eigen = Eigen::of(what, metric)?;
        if eigen.values.iter().all(|&value| value <= 0.0) {
            eigen.values = DVector::repeat(n, f64::MIN_POSITIVE.sqrt());
        }
        Ok(Roots { root: eigen.power(0.5, FLOOR), inverse: eigen.power(-0.5, FLOOR) })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::linalg::Random;

    /// Rows `[n, w]` of uneven, correlated columns.
    pub fn rows(n: usize, w: usize, seed: u64) -> DMatrix<f64> {
        let mut random = Random::new(seed);
        let x = DMatrix::from_fn(n, w, |_, j| random.gaussian() * 0.8f64.powi(j as i32));
        x * DMatrix::from_fn(w, w, |_, _| random.gaussian())
    }

    /// `E[xᵀx]`.
    pub fn moment(x: &DMatrix<f64>) -> DMatrix<f64> {
        x.transpose() * x / x.nrows() as f64
    }

    /// `A·B` at a rank.
    pub fn at_rank(basis: &Basis, rank: usize) -> DMatrix<f64> {
        basis.down.columns(0, rank) * basis.up.rows(0, rank)
    }

    /// `ŷ` of each row of `y` at a rank.
    fn through(basis: &Basis, y: &DMatrix<f64>, rank: usize) -> DMatrix<f64> {
        let centre = DMatrix::from_fn(y.nrows(), y.ncols(), |_, j| basis.mean[j]);
        (y - &centre) * at_rank(basis, rank) + centre
    }

    #[test]
    fn the_loss_is_the_sum_of_what_is_dropped_whatever_errors_cost() {
        let (n, w) = (300, 12);
        let (y, g) = (rows(n, w, 1), rows(40, w, 2));
        let centre = DVector::from_fn(w, |i, _| (i as f64).sin());
        let centred = DMatrix::from_fn(n, w, |i, j| y[(i, j)] - centre[j]);
        let metric = moment(&g);
        let basis = |roots| Basis::components("test", centre.clone(), moment(&centred), roots).unwrap();
        let roots = Roots::exact("test", &metric).unwrap();
        for (metric, basis) in [(DMatrix::identity(w, w), basis(None)), (metric, basis(Some(&roots)))] {
            for rank in 0..=w {
                let error = &y - through(&basis, &y, rank);
                let cost = (&error * &metric).dot(&error) / n as f64;
                assert!((cost - basis.tail(rank)).abs() < 1e-9 * basis.loss[0], "rank {rank}: {cost} against {}", basis.tail(rank));
            }
            let coordinates = moment(&(&centred * &basis.down));
            assert!((coordinates - DMatrix::from_diagonal(&basis.variance)).amax() < 1e-9 * basis.variance[0], "coordinates are uncorrelated");
            assert!(basis.loss.as_slice().is_sorted_by(|a, b| a >= b));
            // An error of the variance of one coordinate costs what leaving it out does.
            for i in 0..w {
                let row = basis.up.row(i);
                let cost = (row * &metric * row.transpose())[(0, 0)] * basis.variance[i];
                assert!((cost - basis.loss[i]).abs() < 1e-9 * basis.loss[0]);
            }
        }
    }

    /// No other basis of the same rank costs less: not that of another metric, not a disturbed one.
    #[test]
    fn no_other_basis_costs_less() {
        let (n, w) = (200, 10);
        let (y, metric) = (rows(n, w, 3), moment(&rows(30, w, 4)));
        let zero = DVector::zeros(w);
        let best = Basis::components("test", zero.clone(), moment(&y), Some(&Roots::exact("test", &metric).unwrap())).unwrap();
        let plain = Basis::components("test", zero, moment(&y), None).unwrap();
        let cost = |basis: &Basis, rank: usize| {
            let error = &y - through(basis, &y, rank);
            (&error * &metric).dot(&error) / n as f64
        };
        let mut random = Random::new(5);
        for rank in 1..w {
            let least = cost(&best, rank);
            assert!(least < cost(&plain, rank), "{rank}");
            for _ in 0..10 {
                let mut other = best.clone();
                other.down.iter_mut().for_each(|x| *x *= 1.0 + 1e-3 * random.gaussian());
                other.up.iter_mut().for_each(|x| *x *= 1.0 + 1e-3 * random.gaussian());
                assert!(least < cost(&other, rank), "{rank}");
            }
        }
    }

    #[test]
    fn at_full_rank_nothing_changes_even_where_nothing_was_seen_or_nothing_matters() {
        let w = 9;
        let few = moment(&rows(3, w, 6));
        let all = moment(&rows(50, w, 7));
        let none = DMatrix::zeros(w, w);
        for (second, metric) in [(&few, &all), (&all, &few), (&few, &few), (&none, &all), (&all, &none)] {
            let basis = Basis::components("test", DVector::zeros(w), second.clone(), Some(&Roots::exact("test", metric).unwrap())).unwrap();
            assert!((at_rank(&basis, w) - DMatrix::identity(w, w)).amax() < 1e-9);
            assert!(metric != &none || basis.tail(0) < 1e-100, "what nothing reads costs nothing");
        }
    }

    #[test]
    fn moments_are_moved_to_another_centre() {
        let y = rows(40, 5, 9);
        let moments = Moments { mean: y.row_mean().transpose().map(|x| x as f32), second: moment(&y).map(|x| x as f32) };
        let centre = DVector::from_fn(5, |i, _| i as f64 - 1.5);
        let centred = DMatrix::from_fn(40, 5, |i, j| y[(i, j)] - centre[j]);
        assert!((about(&moments, &centre) - moment(&centred)).amax() < 1e-5 * moment(&y).amax());
        let [moved, same] =
            [Basis::principal("test", &moments, centre.clone(), None).unwrap(), Basis::components("test", centre, moment(&centred), None).unwrap()];
        assert!((at_rank(&moved, 2) - at_rank(&same, 2)).amax() < 1e-3);
    }
}
