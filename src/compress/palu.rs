//! Palu (Chang et al., arXiv 2407.21118, ICLR 2025): low-rank keys and values by groups of heads.
//!
//! A projection's columns are cut into groups of `s` heads, and each group is factored by itself,
//! `W_g ≈ A_g·B_g` with `A_g: [D, r_g]`, `B_g: [r_g, s·d]`, by the SVD of the whitened weight; the
//! latent `x·A_g` is cached, before RoPE. One head to a group is its M-LRD, four its G-LRD (the
//! default), all heads its J-LRD; a wider group never loses more at the same total rank, and costs
//! `s` times as much to rebuild keys from. Ranks go by the Fisher information of the projections
//! ([`Ranks::Fisher`](super::Ranks)).
//!
//! Here the whitened SVD is what it equals, the principal components of the group's outputs
//! ([`Basis`]): `y − b = x·W_g` has second moment `W_gᵀC_xW_g`, and `W_g·V_r·V_rᵀ` is the paper's
//! product `A_g·B_g`. Outputs are taken about the bias, which the paper's models have none of and
//! which no factor has to carry. In a model that normalises its keys before RoPE the outputs are
//! the normalised keys. The row is rebuilt at the positions of its tokens; values are summed as
//! latents and brought back once. Latents that are rounded are turned into each other first, as in
//! the paper. What the released code does otherwise and we do not: labels shifted twice when
//! gradients are gathered, gradients in f16, and a kept fraction that is not what rounding has led
//! to.

use super::Basis;
use super::unit::{Context, Unit};
use crate::Result;
use crate::kv::{KvSide, LatentKind};
use crate::linalg::Moments;
use nalgebra::DVector;

/// The basis of one group of heads.
///
/// `outputs` are the moments of what it caches, `[s·d]`, and `bias: [s·d]` is the projection's
/// (zero where it has none). `what` names it in errors.
///
/// # Errors
/// [`crate::Error::Numeric`] where the moments are not finite or have no eigenvalues.
pub fn basis(what: &str, outputs: &Moments, bias: DVector<f64>) -> Result<Basis> {
    Basis::principal(what, outputs, bias, None)
}

/// The rows of one layer: keys and values in groups of `group_heads` heads.
pub(super) fn units(context: &Context, group_heads: usize, layer: usize) -> Result<Vec<Unit>> {
    let (heads, d) = (context.heads, context.head_dim);
    let moments = context.statistics.rows(layer..layer + 1)?;
    let mut units = Vec::new();
    for (side, kind, start) in [(KvSide::Keys, LatentKind::PreRopeKeys, 0), (KvSide::Values, LatentKind::Values, heads * d)] {
        let bias = context.bias(layer, side)?;
        for first_head in (0..heads).step_by(group_heads) {
            let kv_heads = group_heads.min(heads - first_head);
            let (first, width) = (first_head * d, kv_heads * d);
            let what = format!("the {side:?} of layer {layer}, group at head {first_head}").to_lowercase();
            let basis = basis(&what, &moments.part(start + first..start + first + width), bias.rows(first, width).into_owned())?;
            units.push(Unit { first_layer: layer, layers: 1, kind, first_head, kv_heads, basis });
        }
    }
    Ok(units)
}

#[cfg(test)]
mod tests {
    use super::super::basis::tests::{at_rank, moment, rows};
    use super::*;
    use nalgebra::DMatrix;

    fn moments(second: &DMatrix<f64>, bias: &DVector<f64>) -> Moments {
        // Outputs that are the bias plus something of mean zero.
        Moments { mean: bias.map(|x| x as f32), second: (second + bias * bias.transpose()).map(|x| x as f32) }
    }

    /// The textbook's way, `C_x = LLᵀ`, `LᵀW = UΣVᵀ`, `A = L⁻ᵀU_rΣ_r^½`, `B = Σ_r^½V_rᵀ`, leads to
    /// the same product.
    #[test]
    fn it_is_the_whitened_svd() {
        let (inputs, out) = (14, 8);
        let x = rows(200, inputs, 1);
        let weight = rows(inputs, out, 2);
        let bias = DVector::from_fn(out, |i, _| i as f64 / 3.0);
        let basis = basis("test", &moments(&moment(&(&x * &weight)), &bias), bias.clone()).unwrap();
        assert_eq!(basis.mean, bias);
        let root = moment(&x).cholesky().unwrap().l();
        let svd = (root.transpose() * &weight).svd(true, true);
        let (u, v) = (svd.u.unwrap(), svd.v_t.unwrap());
        for rank in 1..=out {
            let sigma = DMatrix::from_diagonal(&svd.singular_values.rows(0, rank).into_owned());
            let a = root.transpose().try_inverse().unwrap() * u.columns(0, rank) * sigma;
            let textbook = a * v.rows(0, rank);
            assert!((&weight * at_rank(&basis, rank) - &textbook).amax() < 1e-4 * weight.amax(), "rank {rank}");
            let tail: f64 = svd.singular_values.iter().skip(rank).map(|sigma| sigma * sigma).sum();
            assert!((basis.tail(rank) - tail).abs() < 1e-6 * basis.loss[0]);
        }
    }

    /// At the same total rank a group of two heads loses no more than the two heads by themselves.
    #[test]
    fn wider_groups_lose_no_more() {
        let d = 6;
        let second = moment(&rows(300, 2 * d, 3));
        let loss = |first: usize, width: usize, rank: usize| -> f64 {
            let block = second.view((first, first), (width, width)).into_owned();
            basis("test", &moments(&block, &DVector::zeros(width)), DVector::zeros(width)).unwrap().tail(rank)
        };
        for rank in 1..=d {
            assert!(loss(0, 2 * d, 2 * rank) <= (loss(0, d, rank) + loss(d, d, rank)) * (1.0 + 1e-5));
        }
    }
}
