//! K-SVD: each head's keys (after RoPE) and values by their own principal components, whatever
//! reads them. The plainest of the baselines of KQ-SVD (arXiv 2512.05916).
//!
//! `K ≈ K·V̂·V̂ᵀ` with `V̂: [d, R]` the first right singular vectors of the cached keys
//! `K: [T, d]`, that is the eigenvectors of `C = KᵀK/T`. It is the best approximation of the keys;
//! of the products with queries, which are all that attention sees, it is not:
//! `‖K·V̂V̂ᵀ·Qᵀ − KQᵀ‖²` is above the least by `Σ_{i≤R} σ_i(KQᵀ)² − ‖K·V̂V̂ᵀ·Qᵀ‖²` (the paper's
//! Theorem 3).

use super::Basis;
use super::unit::{Context, Unit, by_head};
use crate::Result;
use nalgebra::{DMatrix, DVector};

/// The basis of one head's keys or values, from second moments around zero, as in the paper.
///
/// `what` names it in errors.
///
/// # Errors
/// [`crate::Error::Numeric`] where `second` is not finite or has no eigenvalues.
pub fn basis(what: &str, second: &DMatrix<f64>) -> Result<Basis> {
    Basis::components(what, DVector::zeros(second.nrows()), second.clone(), None)
}

/// The rows of one layer.
pub(super) fn units(context: &Context, layer: usize) -> Result<Vec<Unit>> {
    by_head(context, layer, |what, _, keys| basis(what, keys), |what, _, values| basis(what, values))
}
