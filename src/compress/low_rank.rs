//! The closed form behind every method that factors a projection: the best `A·B ≈ W` for the inputs that were seen.
//!
//! To minimise `E‖x(W − AB)‖²` over factors of rank `r`, whiten the inputs (`C = E[xᵀx] = SSᵀ`) and truncate the SVD of `SᵀW`: so do SVD-LLM
//! (arXiv 2403.07378), Palu (2407.21118) and ReCalKV (2505.24357). The same product needs neither a Cholesky factor nor an inverse: with `V` the
//! eigenvectors of the outputs' second moment `G = WᵀCW`, which is small, `AB = W·V_r·V_rᵀ`. It is the principal components of the outputs, it exists where `C`
//! is singular, and it leaves `Σ_{i>r} λ_i(G)`.
//!
//! Of the freedom to move a scale between `A` and `B`, the latents get the square root: latent `i` has root mean square `σ_i^{1/2}`, `σ_i = λ_i^{1/2}`. That is the
//! split under which equal noise on all latents does the least harm, and it halves the range of exponents that f16 has to span.

use crate::Result;
use crate::linalg::Eigen;
use nalgebra::DMatrix;

/// `W ≈ A·B`.
pub(super) struct LowRank {
    /// `A`, `[D, r]`: a hidden state's latent row is `x·A`.
    pub down: DMatrix<f64>,
    /// `B`, `[r, out]`: a row brought back is `z·B`.
    pub up: DMatrix<f64>,
}

/// Singular values below this share of the largest are taken for it where scales are split, so that directions that carry nothing get no huge factors.
const FLOOR: f64 = 1e-4;

/// The best factors of rank `rank` of `weight: [D, out]`, whose outputs' second moment is `outputs = WᵀCW`, `[out, out]`. With `rank = out` their product is
/// `weight` itself, up to rounding. `what` names it in errors.
///
/// # Errors
/// [`crate::Error::Numeric`] where the eigenvalues cannot be had.
pub(super) fn principal(what: &str, weight: &DMatrix<f64>, outputs: &DMatrix<f64>, rank: usize) -> Result<LowRank> {
    let eigen = Eigen::of(what, outputs)?;
    let largest = eigen.values.iter().next().map_or(0.0, |value| value.max(0.0).sqrt());
    let mut down = weight * eigen.vectors.columns(0, rank);
    let mut up = eigen.vectors.columns(0, rank).transpose();
    for i in 0..rank {
        let sigma = if largest > 0.0 { eigen.values[i].max(0.0).sqrt().max(FLOOR * largest) } else { 1.0 };
        down.column_mut(i).unscale_mut(sigma.sqrt());
        up.row_mut(i).scale_mut(sigma.sqrt());
    }
    Ok(LowRank { down, up })
}

/// `WᵀCW`: the second moment of the outputs of `weight: [D, out]` on inputs of second moment `inputs: [D, D]`.
pub(super) fn output_moment(weight: &DMatrix<f64>, inputs: &DMatrix<f64>) -> DMatrix<f64> {
    weight.transpose() * (inputs * weight)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(rows: usize, columns: usize, seed: usize) -> DMatrix<f64> {
        DMatrix::from_fn(rows, columns, |i, j| (((i * 37 + j * 101 + seed * 13) as f64 * 0.731).sin() * 43758.5453).fract() / (1.0 + j as f64))
    }

    /// `‖X(W − AB)‖²/n` and what theory says it is, at every rank: falling, and zero at the end.
    #[test]
    fn the_whitened_residual_is_the_sum_of_the_eigenvalues_dropped() {
        let (n, width, out) = (200, 24, 10);
        let (x, weight) = (numbers(n, width, 1), numbers(width, out, 2));
        let inputs = x.transpose() * &x / n as f64;
        let outputs = output_moment(&weight, &inputs);
        let eigen = Eigen::of("test", &outputs).unwrap();
        let mut before = f64::INFINITY;
        for rank in 1..=out {
            let factors = principal("test", &weight, &outputs, rank).unwrap();
            let residual = (&x * (&weight - &factors.down * &factors.up)).norm_squared() / n as f64;
            assert!((residual - eigen.tail(rank)).abs() < 1e-12 * eigen.tail(0), "rank {rank}: {residual} against {}", eigen.tail(rank));
            assert!(residual < before);
            before = residual;
            let latents = &x * &factors.down;
            for i in 0..rank.min(3) {
                let square = latents.column(i).norm_squared() / n as f64;
                assert!((square / eigen.values[i].sqrt() - 1.0).abs() < 1e-6, "latent {i} has mean square {square}");
            }
        }
    }

    /// ReCalKV alternates between `B` given `A` and `A` given `B`; started here, neither moves anything.
    #[test]
    fn calibration_by_least_squares_has_nothing_left_to_improve() {
        let (n, width, out, rank) = (90, 12, 8, 5);
        let (x, weight) = (numbers(n, width, 3), numbers(width, out, 4));
        let inputs = x.transpose() * &x / n as f64;
        let LowRank { down, up } = principal("test", &weight, &output_moment(&weight, &inputs), rank).unwrap();
        let latents = down.transpose() * &inputs;
        let up_again = (&latents * &down).try_inverse().unwrap() * &latents * &weight;
        let down_again = &weight * up.transpose() * (&up * up.transpose()).try_inverse().unwrap();
        assert!((up_again - &up).amax() < 1e-7 * up.amax());
        assert!((down_again - &down).amax() < 1e-7 * down.amax());
    }

    #[test]
    fn full_rank_is_exact_even_where_nothing_was_seen() {
        let weight = numbers(9, 6, 5);
        for inputs in [DMatrix::zeros(9, 9), DMatrix::from_diagonal_element(9, 9, 1.0), numbers(9, 2, 6) * numbers(9, 2, 6).transpose()] {
            let factors = principal("test", &weight, &output_moment(&weight, &inputs), 6).unwrap();
            assert!((factors.down * factors.up - &weight).amax() < 1e-12);
        }
    }
}
