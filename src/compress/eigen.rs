//! EigenAttention (Saxena et al., arXiv 2408.05646), as the baseline of KQ-SVD (2512.05916) that it
//! is there: one orthonormal basis for keys and queries together.
//!
//! `V̂: [d, R]` are the first right singular vectors of keys and queries stacked, `[K; Q]`, that is
//! the eigenvectors of `C_K + C_Q`; rows are `k·V̂`, queries `q·V̂`. Values have K-SVD's basis
//! ([`super::ksvd`]). Scaling keys by `β` and queries by `1/β` leaves attention as it is but moves
//! this basis: towards K-SVD's where keys are the longer ones (the paper's Theorem 4). As in the
//! comparison of KQ-SVD's paper it is taken for each key/value head, after RoPE; EigenAttention
//! itself shares one between all heads of a layer, before RoPE.

use super::unit::{Context, Unit, by_head};
use super::{Basis, ksvd};
use crate::Result;
use crate::linalg::Eigen;
use nalgebra::{DMatrix, DVector};

/// The basis of one head's keys, from second moments of keys and of queries.
///
/// `queries` is summed over the query heads that share the keys. Its coordinates are correlated,
/// and its losses are those of the stacked matrix. `what` names it in errors.
///
/// # Errors
/// [`crate::Error::Numeric`] where a moment is not finite or has no eigenvalues.
pub fn basis(what: &str, keys: &DMatrix<f64>, queries: &DMatrix<f64>) -> Result<Basis> {
    let Eigen { values, vectors } = Eigen::of(what, &(keys + queries))?;
    let variance = (vectors.transpose() * keys * &vectors).diagonal();
    let loss = values.map(|value| value.max(0.0));
    Ok(Basis { mean: DVector::zeros(keys.nrows()), up: vectors.transpose(), down: vectors, variance, loss })
}

/// The rows of one layer.
pub(super) fn units(context: &Context, layer: usize) -> Result<Vec<Unit>> {
    let queries = &context.statistics.layers[layer].queries;
    by_head(context, layer, |what, head, keys| basis(what, keys, &queries[head].map(f64::from)), |what, _, values| ksvd::basis(what, values))
}
