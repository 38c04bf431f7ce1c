//! The closed form that every offline method is a case of: the best coordinates for a row when an error `e` of it costs `e·S·eᵀ`.
//!
//! To minimise `E[(y − ŷ)·S·(y − ŷ)ᵀ]` over all `ŷ` of rank `r`, let `C = E[yᵀy]` (about a centre `μ`) and `S^½·C·S^½ = U·Λ·Uᵀ`: the best are the
//! first `r` columns of `A = S^½·U` and rows of `B = Uᵀ·S^−½`, and they leave `Σ_{i>r} λ_i`. Proof: with `w = (y − μ)·S^½` it is the principal
//! components of `w`.
//!
//! - `S = 1` is the whitened SVD of SVD-LLM (arXiv 2403.07378), Palu (2407.21118) and ReCalKV (2505.24357). They whiten the inputs of a projection,
//!   `C_x = LLᵀ`, and truncate the SVD of `LᵀW`; its right singular vectors are the eigenvectors of `WᵀC_xW`, which is the `C` of the outputs. No
//!   Cholesky factor, no inverse, nothing to fail where `C_x` is singular.
//! - `S = E[qᵀq]` is KQ-SVD (2512.05916): `‖(K − K̂)·Qᵀ‖²` is what it minimises, without its pseudo-inverse of the keys.
//! - `S = E[gᵀg]`, `g` the gradient of the loss, is the second-order loss itself.

use crate::Result;
use crate::calibrate::Moments;
use crate::linalg::{Eigen, product, rotation, tr_product};
use crate::rows::RUN;
use nalgebra::{DMatrix, DVector};

/// Coordinates of a row: `z = (y − μ)·A`, `ŷ = z·B + μ`.
///
/// As made, they are uncorrelated and of unit variance, in the order of what they matter; at full rank `A·B` is one.
#[derive(Debug, Clone, PartialEq)]
pub struct Basis {
    /// `μ`, `[w]`.
    pub mean: DVector<f64>,
    /// `A`, `[w, r]`.
    pub down: DMatrix<f64>,
    /// `B`, `[r, w]`.
    pub up: DMatrix<f64>,
    /// What each coordinate costs where it is left out, `[r]`, and so what an error of unit variance in it costs; descending.
    pub loss: Vec<f64>,
}

/// Eigenvalues below this share of the largest are taken for it where they are divided by: sums in f32 tell no smaller ones from zero.
const FLOOR: f64 = 1e-8;

impl Basis {
    /// The best basis where all errors cost alike: principal components about `centre: [w]` of a row with second moment `second: [w, w]` about it.
    /// `what` names it in errors.
    ///
    /// # Errors
    /// [`crate::Error::Numeric`] where `second` is not finite or has no eigenvalues.
    pub fn principal(what: &str, centre: DVector<f64>, second: &DMatrix<f64>) -> Result<Basis> {
        let Eigen { values, vectors } = Eigen::of(what, second)?;
        let up = vectors.transpose();
        Ok(Basis::scaled(centre, vectors, up, values.as_slice(), values.as_slice()))
    }

    /// The best basis where an error `e` costs `e·S·eᵀ`, `weight = S: [w, w]`. Where nothing costs anything, the principal components, without loss.
    ///
    /// # Errors
    /// As [`principal`](Self::principal), of either matrix.
    pub fn weighted(what: &str, centre: DVector<f64>, second: &DMatrix<f64>, weight: &DMatrix<f64>) -> Result<Basis> {
        let weight = Eigen::of(what, weight)?;
        if weight.values.iter().all(|&value| value <= 0.0) {
            let mut basis = Basis::principal(what, centre, second)?;
            basis.loss.fill(0.0);
            return Ok(basis);
        }
        let (root, inverse) = (weight.power(0.5, FLOOR), weight.power(-0.5, FLOOR));
        let weighted = tr_product(root.as_view(), product(second, &root).as_view());
        let Eigen { values, vectors } = Eigen::of(what, &weighted)?;
        let down = tr_product(root.as_view(), vectors.as_view());
        let up = tr_product(vectors.as_view(), inverse.as_view());
        Ok(Basis::scaled(centre, down, up, values.as_slice(), values.as_slice()))
    }

    /// Brings coordinates of these variances to unit variance; `loss` is what each costs where it is left out.
    pub(super) fn scaled(mean: DVector<f64>, mut down: DMatrix<f64>, mut up: DMatrix<f64>, variances: &[f64], loss: &[f64]) -> Basis {
        for (i, deviation) in floored(variances).map(f64::sqrt).enumerate() {
            down.column_mut(i).unscale_mut(deviation);
            up.row_mut(i).scale_mut(deviation);
        }
        Basis { mean, down, up, loss: loss.iter().map(|value| value.max(0.0)).collect() }
    }

    /// Its first `rank` coordinates; those beyond what it has are zero. (Rows hold runs of [`RUN`].)
    pub fn truncated(mut self, rank: usize) -> Basis {
        self.down = self.down.resize_horizontally(rank, 0.0);
        self.up = self.up.resize_vertically(rank, 0.0);
        self.loss.resize(rank, 0.0);
        self
    }

    /// The coordinates turned into each other ([`rotation`]) so that all are alike, for rows that are rounded with one step for all of them. Before
    /// that each gets the square root of its standard deviation for its own: equal noise on coordinates `λ_i^½·B_i/s_i` costs `Σ λ_i/s_i²·Σ s_i²`,
    /// least at `s_i² = λ_i^½` (Cauchy and Schwarz).
    pub fn rotated(mut self, seed: u64) -> Basis {
        let variances: Vec<f64> = floored(&self.loss).map(f64::sqrt).collect();
        for (i, variance) in variances.iter().enumerate() {
            self.down.column_mut(i).scale_mut(variance.sqrt());
            self.up.row_mut(i).unscale_mut(variance.sqrt());
        }
        let turn = rotation(self.loss.len(), seed);
        self.down = product(&self.down, &turn);
        self.up = tr_product(turn.as_view(), self.up.as_view());
        // What leaving one out costs is its variance times that of an error in it; both are the same sum.
        for (loss, column) in self.loss.iter_mut().zip(turn.column_iter()) {
            *loss = column.iter().zip(&variances).map(|(turn, variance)| turn * turn * variance).sum::<f64>().powi(2);
        }
        self
    }

    /// Loss by run of [`RUN`] coordinates.
    pub fn runs(&self) -> Vec<f64> {
        self.loss.chunks(RUN).map(|run| run.iter().sum()).collect()
    }
}

/// Variances that can be divided by.
fn floored(variances: &[f64]) -> impl Iterator<Item = f64> {
    let largest = variances.iter().copied().fold(0.0, f64::max);
    variances.iter().map(move |variance| if largest > 0.0 { variance.max(FLOOR * largest) } else { 1.0 })
}

/// `E[(y − μ)ᵀ(y − μ)]`, `[w, w]`, about `centre = μ: [w]`.
pub fn about(moments: &Moments, centre: &DVector<f64>) -> DMatrix<f64> {
    let mut second = moments.second.map(f64::from);
    let mean = moments.mean.map(f64::from);
    second.ger(-1.0, &mean, centre, 1.0);
    second.ger(-1.0, centre, &mean, 1.0);
    second.ger(1.0, centre, centre, 1.0);
    second
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::random::Random;

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

    /// `ŷ` of each row of `y` at a rank.
    fn through(basis: &Basis, y: &DMatrix<f64>, rank: usize) -> DMatrix<f64> {
        let Basis { mean, down, up, .. } = basis.clone().truncated(rank);
        let centre = DMatrix::from_fn(y.nrows(), y.ncols(), |_, j| mean[j]);
        (y - &centre) * down * up + centre
    }

    #[test]
    fn the_loss_is_the_sum_of_what_is_dropped_whatever_errors_cost() {
        let (n, w) = (300, 12);
        let (y, g) = (rows(n, w, 1), rows(40, w, 2));
        let centre = DVector::from_fn(w, |i, _| (i as f64).sin());
        let centred = DMatrix::from_fn(n, w, |i, j| y[(i, j)] - centre[j]);
        let (second, weight) = (moment(&centred), moment(&g));
        for (weight, basis) in [
            (DMatrix::identity(w, w), Basis::principal("test", centre.clone(), &second).unwrap()),
            (weight.clone(), Basis::weighted("test", centre.clone(), &second, &weight).unwrap()),
        ] {
            for rank in 0..=w {
                let error = &y - through(&basis, &y, rank);
                let cost = (&error * &weight).dot(&error) / n as f64;
                let dropped: f64 = basis.loss[rank..].iter().sum();
                assert!((cost - dropped).abs() < 1e-9 * basis.loss[0], "rank {rank}: {cost} against {dropped}");
            }
            let z = &centred * &basis.down;
            assert!((moment(&z) - DMatrix::identity(w, w)).amax() < 1e-6, "coordinates are uncorrelated and of unit variance");
            assert!(basis.loss.is_sorted_by(|a, b| a >= b));
            // An error of unit variance in one coordinate costs what leaving it out does.
            for i in 0..w {
                let row = basis.up.row(i);
                assert!(((row * &weight * row.transpose())[(0, 0)] - basis.loss[i]).abs() < 1e-9 * basis.loss[0]);
            }
        }
    }

    /// No other basis of the same rank costs less: not that of another weight, not a disturbed one.
    #[test]
    fn no_other_basis_costs_less() {
        let (n, w) = (200, 10);
        let (y, weight) = (rows(n, w, 3), moment(&rows(30, w, 4)));
        let zero = DVector::zeros(w);
        let best = Basis::weighted("test", zero.clone(), &moment(&y), &weight).unwrap();
        let plain = Basis::principal("test", zero, &moment(&y)).unwrap();
        let cost = |basis: &Basis, rank: usize| {
            let error = &y - through(basis, &y, rank);
            (&error * &weight).dot(&error) / n as f64
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
        for (second, weight) in [(&few, &all), (&all, &few), (&few, &few), (&DMatrix::zeros(w, w), &all), (&all, &DMatrix::zeros(w, w))] {
            let basis = Basis::weighted("test", DVector::zeros(w), second, weight).unwrap();
            assert!((&basis.down * &basis.up - DMatrix::identity(w, w)).amax() < 1e-9);
            let padded = basis.clone().truncated(16);
            assert_eq!((padded.down.shape(), padded.up.shape(), padded.loss.len()), ((w, 16), (16, w), 16));
            assert!((&padded.down * &padded.up - DMatrix::identity(w, w)).amax() < 1e-9);
            assert_eq!(padded.runs(), [padded.loss.iter().sum::<f64>()]);
        }
    }

    #[test]
    fn rotated_coordinates_are_alike_and_say_the_same() {
        let (w, rank) = (24, 16);
        let y = rows(500, w, 8);
        let basis = Basis::principal("test", DVector::zeros(w), &moment(&y)).unwrap().truncated(rank);
        let turned = basis.clone().rotated(3);
        assert!((&turned.down * &turned.up - &basis.down * &basis.up).amax() < 1e-10);
        let mean = basis.loss.iter().map(|loss| loss.sqrt()).sum::<f64>() / rank as f64;
        let variances = moment(&(&y * &turned.down)).diagonal();
        for i in 0..rank {
            assert!((variances[i] / mean - 1.0).abs() < 1e-6, "{i}: {} against {mean}", variances[i]);
            let cost = variances[i] * turned.up.row(i).norm_squared();
            assert!((turned.loss[i] / cost - 1.0).abs() < 1e-6, "{i}");
        }
        // Equal noise on all coordinates costs less than in either extreme of the split.
        let noise = |up: &DMatrix<f64>, down: &DMatrix<f64>| up.norm_squared() * moment(&(&y * down)).trace();
        let orthonormal = DMatrix::from_fn(w, rank, |i, j| basis.down[(i, j)] * basis.loss[j].sqrt());
        let even = noise(&turned.up, &turned.down);
        assert!(even < noise(&basis.up, &basis.down) && even < noise(&orthonormal.transpose(), &orthonormal));
    }

    #[test]
    fn moments_are_moved_to_another_centre() {
        let y = rows(40, 5, 9);
        let moments = Moments { mean: y.row_mean().transpose().map(|x| x as f32), second: moment(&y).map(|x| x as f32) };
        let centre = DVector::from_fn(5, |i, _| i as f64 - 1.5);
        let centred = DMatrix::from_fn(40, 5, |i, j| y[(i, j)] - centre[j]);
        assert!((about(&moments, &centre) - moment(&centred)).amax() < 1e-5 * moment(&y).amax());
    }
}
