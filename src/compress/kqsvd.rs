//! KQ-SVD (arXiv 2512.05916, AISTATS 2026; released as DamienLesens/KQ-SVD): keys in the
//! coordinates that keep their products with queries.
//!
//! For each key/value head, keys `K: [T, d]` and queries `Q: [T', d]` after RoPE, find
//! `A, B: [d, R]` that minimise `‖K·A·Bᵀ·Qᵀ − K·Qᵀ‖`: cache `K·A`, take queries to `Bᵀq`, and
//! rebuild nothing. With `Û` the first left singular vectors of `KQᵀ` the paper's solution is
//! `A = K⁺Û`, `B = KᵀÛ`, and what is left is `Σ_{i>R} σ_i(KQᵀ)²`. The norm is that of the error of
//! keys weighted by `C_Q = QᵀQ`, so these are principal components in that metric ([`Basis`]):
//! `A = C_Q^½·U`, `Bᵀ = Uᵀ·C_Q^−½` with `U` the eigenvectors of `C_Q^½·C_K·C_Q^½`, whose
//! eigenvalues are `σ_i²`. Everything is `d` by `d`. The two differ by the free scale of each
//! coordinate; here they have the variance `σ_i²`. What a direction that no query looks along is
//! given does not matter, where the paper divides by what no key has.
//!
//! Query heads that share keys are stacked: their `C_Q` are summed (Theorem 5). For values the same
//! theorem with `W_Oᵀ` in the place of queries minimises `‖V·A·Bᵀ·W_O − V·W_O‖`; again the query
//! heads' `W_O^(h)·W_O^(h)ᵀ` are summed. The released code averages `W_O` over them, where heads of
//! opposite sign cancel.
//!
//! Moments are taken around zero, as in the paper, and without the first tokens of a text, which
//! are cached exactly and whose keys would otherwise decide.

use super::unit::{Context, Unit, by_head};
use super::{Basis, Roots};
use crate::Result;
use nalgebra::{DMatrix, DVector};

/// The basis of one head's keys, from second moments of keys and of queries after RoPE.
///
/// `queries` is summed over the query heads that share the keys. `what` names it in errors.
///
/// # Errors
/// [`crate::Error::Numeric`] where a moment is not finite or has no eigenvalues.
pub fn keys(what: &str, keys: &DMatrix<f64>, queries: &DMatrix<f64>) -> Result<Basis> {
    in_metric(what, keys, queries)
}

/// The basis of one head's values, from second moments and the output's Gram matrix.
///
/// `outputs` is [`output_gram`]'s.
///
/// # Errors
/// [`crate::Error::Numeric`] where a matrix is not finite or has no eigenvalues.
pub fn values(what: &str, values: &DMatrix<f64>, outputs: &DMatrix<f64>) -> Result<Basis> {
    in_metric(what, values, outputs)
}

fn in_metric(what: &str, second: &DMatrix<f64>, metric: &DMatrix<f64>) -> Result<Basis> {
    Basis::components(what, DVector::zeros(second.nrows()), second.clone(), Some(&Roots::exact(what, metric)?))
}

/// `Σ W_O^(h)·W_O^(h)ᵀ`, `[d, d]`, over the query heads that share one key/value head's values.
///
/// `projection: [g·d, D]` are their rows of the output projection, one under the other.
pub fn output_gram(projection: &DMatrix<f64>, d: usize) -> DMatrix<f64> {
    let mut gram = DMatrix::zeros(d, d);
    for first in (0..projection.nrows()).step_by(d) {
        let head = projection.rows(first, d);
        gram.gemm(1.0, &head, &head.transpose(), 1.0);
    }
    gram
}

/// The rows of one layer.
pub(super) fn units(context: &Context, layer: usize) -> Result<Vec<Unit>> {
    let (config, d) = (context.checkpoint.config(), context.head_dim);
    let (hidden, width, group) = (config.hidden_size, config.num_attention_heads * d, config.group_size());
    let name = format!("model.layers.{layer}.self_attn.o_proj.weight");
    // Row by row `[out, in]` is column by column `[in, out]`.
    let projection = DMatrix::from_vec(width, hidden, context.checkpoint.f32(&name, &[hidden, width])?).map(f64::from);
    let queries = &context.statistics.layers[layer].queries;
    let outputs = |head: usize| output_gram(&projection.rows(head * group * d, group * d).into_owned(), d);
    by_head(
        context,
        layer,
        |what, head, second| keys(what, second, &queries[head].map(f64::from)),
        |what, head, second| values(what, second, &outputs(head)),
    )
}

#[cfg(test)]
mod tests {
    use super::super::basis::tests::{at_rank, moment, rows};
    use super::super::{eigen, ksvd};
    use super::*;

    const TOKENS: usize = 60;

    /// `‖K·A·B·Qᵀ − K·Qᵀ‖²` by its definition, per pair of moments' tokens.
    fn error(basis: &Basis, k: &DMatrix<f64>, q: &DMatrix<f64>, rank: usize) -> f64 {
        (k * at_rank(basis, rank) * q.transpose() - k * q.transpose()).norm_squared() / (k.nrows() * q.nrows()) as f64
    }

    /// `σ_i(KQᵀ)²` by the SVD of the matrix itself.
    fn squares(k: &DMatrix<f64>, q: &DMatrix<f64>) -> Vec<f64> {
        let sigma = (k * q.transpose()).singular_values();
        let mut squares: Vec<f64> = sigma.iter().map(|sigma| sigma * sigma / (k.nrows() * q.nrows()) as f64).collect();
        squares.sort_by(|a, b| b.total_cmp(a));
        squares
    }

    #[test]
    fn what_is_left_is_the_tail_of_the_singular_values_and_no_baseline_leaves_less() {
        let d = 10;
        let (k, q) = (rows(TOKENS, d, 1), rows(TOKENS, d, 2));
        let (ck, cq) = (moment(&k), moment(&q));
        let best = keys("test", &ck, &cq).unwrap();
        let baselines = [ksvd::basis("test", &ck).unwrap(), eigen::basis("test", &ck, &cq).unwrap()];
        let squares = squares(&k, &q);
        for rank in 0..=d {
            let tail: f64 = squares[rank..].iter().sum();
            let left = error(&best, &k, &q, rank);
            assert!((left - tail).abs() < 1e-9 * squares[0], "rank {rank}: {left} against {tail}");
            assert!((best.tail(rank) - tail).abs() < 1e-9 * squares[0]);
            for baseline in &baselines {
                assert!(error(baseline, &k, &q, rank) > left * (1.0 - 1e-9) - 1e-9 * squares[0], "rank {rank}");
                // At a middle rank they do leave more: the comparison is no tie.
                assert!(rank != d / 2 || error(baseline, &k, &q, rank) > 1.05 * left);
            }
        }
    }

    /// The paper's own formulas, `A = K⁺Û` and `B = KᵀÛ`, give the same product.
    #[test]
    fn it_is_the_papers_theorem() {
        let d = 7;
        let (k, q) = (rows(TOKENS, d, 3), rows(TOKENS, d, 4));
        let basis = keys("test", &moment(&k), &moment(&q)).unwrap();
        let svd = (&k * q.transpose()).svd(true, false);
        let u = svd.u.unwrap();
        let mut order: Vec<usize> = (0..u.ncols()).collect();
        order.sort_by(|&a, &b| svd.singular_values[b].total_cmp(&svd.singular_values[a]));
        for rank in 1..=d {
            let first = u.select_columns(&order[..rank]);
            let product = k.clone().pseudo_inverse(1e-12).unwrap() * &first * (k.transpose() * &first).transpose();
            assert!((at_rank(&basis, rank) - &product).amax() < 1e-7 * product.amax(), "rank {rank}");
        }
    }

    #[test]
    fn only_products_matter() {
        let (d, rank) = (9, 4);
        let (k, q) = (rows(TOKENS, d, 5), rows(TOKENS, d, 6));
        let product = |basis: Basis| at_rank(&basis, rank);
        let at = |beta: f64| (moment(&(&k * beta)), moment(&(&q / beta)));
        let mixed = {
            // Any invertible mixing of the dimensions of keys, undone in queries, is undone in the
            // basis too.
            let mix = rows(d, d, 7);
            let inverse = mix.clone().try_inverse().unwrap();
            let basis = keys("test", &moment(&(&k * &mix)), &moment(&(&q * inverse.transpose()))).unwrap();
            &mix * product(basis) * inverse
        };
        let (ck, cq) = at(1.0);
        let reference = product(keys("test", &ck, &cq).unwrap());
        assert!((mixed - &reference).amax() < 1e-5 * reference.amax());
        let plain = product(ksvd::basis("test", &ck).unwrap());
        let eigen_at = |beta| {
            let (ck, cq) = at(beta);
            product(eigen::basis("test", &ck, &cq).unwrap())
        };
        for beta in [1e-2, 0.5, 3.0, 1e2] {
            let (ck, cq) = at(beta);
            assert!((product(keys("test", &ck, &cq).unwrap()) - &reference).amax() < 1e-8 * reference.amax(), "{beta}");
            assert!((product(ksvd::basis("test", &ck).unwrap()) - &plain).amax() < 1e-8);
            assert!((eigen_at(beta) - eigen_at(1.0)).amax() > 1e-3, "EigenAttention's basis moves");
        }
        assert!((eigen_at(1e3) - plain).amax() < 1e-4, "to K-SVD's");
    }

    /// Queries of heads that share keys are stacked; averaging them instead lets heads cancel.
    #[test]
    fn query_heads_are_summed_and_so_are_output_projections() {
        let (d, width, rank) = (8, 20, 3);
        let (k, first, second) = (rows(TOKENS, d, 8), rows(TOKENS, d, 9), rows(TOKENS, d, 10));
        let mut stacked = DMatrix::zeros(2 * TOKENS, d);
        stacked.rows_mut(0, TOKENS).copy_from(&first);
        stacked.rows_mut(TOKENS, TOKENS).copy_from(&second);
        let basis = keys("test", &moment(&k), &(moment(&first) + moment(&second))).unwrap();
        let tail: f64 = squares(&k, &stacked)[rank..].iter().sum();
        assert!((error(&basis, &k, &stacked, rank) - tail).abs() < 1e-9 * tail);

        let v = rows(TOKENS, d, 11);
        let one = rows(d, width, 12);
        let other = -&one + rows(d, width, 13) * 0.3;
        let mut projection = DMatrix::zeros(2 * d, width);
        projection.rows_mut(0, d).copy_from(&one);
        projection.rows_mut(d, d).copy_from(&other);
        // What reaches the output through either head.
        let cost = |basis: &Basis| -> f64 {
            let missing = &v * at_rank(basis, rank) - &v;
            ((&missing * &one).norm_squared() + (&missing * &other).norm_squared()) / TOKENS as f64
        };
        let summed = values("test", &moment(&v), &output_gram(&projection, d)).unwrap();
        let left = summed.tail(rank);
        assert!((cost(&summed) - left).abs() < 1e-9 * left);
        let average = (&one + &other) / 2.0;
        let averaged = values("test", &moment(&v), &(&average * average.transpose())).unwrap();
        assert!(left < cost(&averaged) && left < cost(&ksvd::basis("test", &moment(&v)).unwrap()));
    }
}
