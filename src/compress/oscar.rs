//! OSCAR (arXiv 2605.17757; released as FutureMLS-Lab/OSCAR): keys and values after a rotation that
//! is made from what reads them, in two bits.
//!
//! One rotation for all heads of a layer. Of keys after RoPE by the second moment of the queries,
//! `C_K = (1/H_kv)·Σ_h E[qᵀq]`; of values by that of the values, weighted by how well their token's
//! key answers the queries of its head, `w_t = k_tᵀ·E[qᵀq]·k_t` over its mean:
//! `C_V = (1/H_kv)·Σ_h E[w·vᵀv]`. With `U` the eigenvectors by falling eigenvalue the rotation is
//! `R = U·H·P`: a Hadamard matrix spreads every eigenvector over all coordinates, and a
//! bit-reversed order spreads neighbours over groups. Queries are rotated by `R_K`, and what values
//! sum to back by `R_Vᵀ`: nothing is rebuilt.
//!
//! `yR` is rounded to equal steps between the least and the largest of 128 coordinates (f16 both),
//! after those are cut to the magnitude that 96 % (keys) or 92 % (values) of them are below, as the
//! release does it. At 2 bits that is 2.25 bits a number. With more bits, which the paper does not
//! have, nothing is cut: what is cut then costs more than finer steps gain (SmolLM2-135M, 4 bits:
//! 0.0154 with the cut and 0.0053 without; 2 bits: 0.243 and 0.713). Where a head is narrower than
//! 128, a group is of several heads; the release keeps a head's by itself, whose 64 numbers would
//! take 2.5 bits each. The paper's 64 sinks and 256 recent tokens are a session's to choose here,
//! as with every method.
//!
//! `C_K` is from all calibration tokens. `C_V` is from the sample of some 256 whose keys and values
//! are kept themselves: with all heads of a layer that is 768 vectors or more for a matrix of 64 or
//! 128 rows. What has to be right of it are the leading eigenvectors, and the Hadamard matrix evens
//! out what is wrong with the others.

use super::coder::by_head;
use super::unit::Context;
use crate::Result;
use crate::calibrate::LayerStatistics;
use crate::kv::{Band, Coder, Exact, Format, LatentKind, LatentSet, LatentSpec, RUN, Scale};
use crate::linalg::{Eigen, rotation};
use nalgebra::DMatrix;
use rayon::prelude::*;

/// Coordinates that share a step.
const GROUP: usize = 128;
/// Percent of magnitudes that are not cut at two bits, of keys and of values.
const CLIP: [u8; 2] = [96, 92];

/// `C_K: [d, d]`, from the second moments of the queries of each key/value head.
pub fn key_moment(queries: &[DMatrix<f64>]) -> DMatrix<f64> {
    let mut mean = DMatrix::zeros(queries[0].nrows(), queries[0].ncols());
    queries.iter().for_each(|moment| mean += moment / queries.len() as f64);
    mean
}

/// `C_V: [d, d]`, from keys after RoPE, values, and second moments of queries.
///
/// Keys and values are `[H_kv·d, tokens]`; queries have `[d, d]` for each head.
pub fn value_moment(keys: &DMatrix<f64>, values: &DMatrix<f64>, queries: &[DMatrix<f64>]) -> DMatrix<f64> {
    let d = queries[0].nrows();
    let mut mean = DMatrix::zeros(d, d);
    for (head, moment) in queries.iter().enumerate() {
        let (keys, values) = (keys.rows(head * d, d), values.rows(head * d, d));
        let weights: Vec<f64> = keys.column_iter().map(|key| key.dot(&(moment * key))).collect();
        let all: f64 = weights.iter().sum();
        for (value, weight) in values.column_iter().zip(&weights) {
            // Where no key answers at all, each counts as much.
            let share = if all > 0.0 { weight / all } else { 1.0 / weights.len() as f64 };
            mean.ger(share / queries.len() as f64, &value, &value, 1.0);
        }
    }
    mean
}

/// `R = U·H·P: [d, r]` of a moment, `r` being `d` in whole runs. `what` names it in errors.
///
/// # Errors
/// [`crate::Error::Numeric`] where the moment is not finite or has no eigenvalues.
pub fn basis(what: &str, moment: &DMatrix<f64>) -> Result<DMatrix<f64>> {
    let d = moment.nrows();
    let r = d.next_multiple_of(RUN);
    let spread = Eigen::of(what, moment)?.vectors * rotation(r, ROTATION_SEED).rows(0, d);
    let bits = r.trailing_zeros();
    // Of another width than a power of two there is no bit-reversed order. A group is then a head's
    // all coordinates, and their order does not matter.
    let order = (0..r).map(|i| if r.is_power_of_two() && bits > 0 { (i as u32).reverse_bits() as usize >> (32 - bits) } else { i });
    Ok(DMatrix::from_columns(&order.map(|i| spread.column(i).into_owned()).collect::<Vec<_>>()))
}

/// Every program makes the same rotations.
const ROTATION_SEED: u64 = 1;

/// The rows of all layers, in numbers of so many `bits`.
pub(super) fn rows(context: &Context, bits: u8, exact: Exact) -> Result<LatentSet> {
    let layers: Vec<Vec<(LatentSpec, Coder)>> =
        (0..context.statistics.layers.len()).into_par_iter().map(|layer| of_layer(context, layer, bits)).collect::<Result<_>>()?;
    let (specs, coders) = layers.into_iter().flatten().unzip();
    Ok(LatentSet { specs, coders, exact })
}

fn of_layer(context: &Context, layer: usize, bits: u8) -> Result<Vec<(LatentSpec, Coder)>> {
    let (heads, d) = (context.heads, context.head_dim);
    let LayerStatistics { sample, queries, .. } = &context.statistics.layers[layer];
    let queries: Vec<DMatrix<f64>> = queries.iter().map(|moment| moment.map(f64::from)).collect();
    let values = sample.rows.rows(heads * d, heads * d).map(f64::from);
    let moments = [
        (LatentKind::PostRopeKeys, "keys", key_moment(&queries)),
        (LatentKind::Values, "values", value_moment(&sample.post_rope_keys.map(f64::from), &values, &queries)),
    ];
    let mut rows = Vec::new();
    for ((kind, side, moment), clip) in moments.into_iter().zip(CLIP) {
        let clip = if bits == 2 { clip } else { 100 };
        let basis = basis(&format!("OSCAR's moment of the {side} of layer {layer}"), &moment)?;
        let together = (GROUP / basis.ncols()).clamp(1, heads);
        for first_head in (0..heads).step_by(together) {
            let kv_heads = together.min(heads - first_head);
            let runs = kv_heads * basis.ncols() / RUN;
            let format = Format { bands: vec![Band { bits, runs }], scale: Scale::Groups { runs: GROUP / RUN, clip } };
            let coder = by_head(&basis, kv_heads, format.clone());
            rows.push((LatentSpec { first_layer: layer, layers: 1, kind, first_head, kv_heads, format }, coder));
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::super::basis::tests::{moment, rows};
    use super::*;
    use nalgebra::DVector;

    /// The paper's formulas, written out over matrices of queries, keys and values.
    #[test]
    fn moments_are_those_of_the_paper() {
        let (d, tokens, heads) = (8, 50, 3);
        let of = |seed: u64| (0..heads as u64).map(|head| rows(tokens, d, 10 * seed + head)).collect::<Vec<_>>();
        let (q, k, v) = (of(1), of(2), of(3));
        let queries: Vec<_> = q.iter().map(moment).collect();
        let stack = |parts: &[DMatrix<f64>]| DMatrix::from_fn(heads * d, tokens, |i, t| parts[i / d][(t, i % d)]);
        let (mut ck, mut cv) = (DMatrix::zeros(d, d), DMatrix::zeros(d, d));
        for h in 0..heads {
            let gram = q[h].transpose() * &q[h];
            ck += &gram / (heads * tokens) as f64;
            let weights = (&k[h] * &gram * k[h].transpose()).diagonal();
            let weights = &weights / weights.mean();
            cv += v[h].transpose() * DMatrix::from_diagonal(&weights) * &v[h] / (heads * tokens) as f64;
        }
        assert!((key_moment(&queries) - &ck).amax() < 1e-9 * ck.amax());
        assert!((value_moment(&stack(&k), &stack(&v), &queries) - &cv).amax() < 1e-9 * cv.amax());
    }

    /// In the rotated coordinates every one has the mean eigenvalue for its variance, and nothing
    /// is lost.
    #[test]
    fn the_rotation_evens_out_what_it_was_made_from() {
        for d in [14, 16, 48, 64] {
            let second = moment(&rows(300, d, 4));
            let basis = basis("test", &second).unwrap();
            assert!((&basis * basis.transpose() - DMatrix::identity(d, d)).amax() < 1e-9, "{d}");
            let rotated = basis.transpose() * &second * &basis;
            let mean = second.trace() / basis.ncols() as f64;
            // A width that is no multiple of a run has fewer eigenvectors than coordinates; these
            // still get the same of each.
            assert!(rotated.diagonal().iter().all(|variance| (variance / mean - 1.0).abs() < 1e-6), "{d}: {}", rotated.diagonal());
        }
    }

    /// Bit reversal takes the coordinates of neighbouring Hadamard functions apart.
    #[test]
    fn coordinates_come_in_bit_reversed_order() {
        let second = DMatrix::from_diagonal(&DVector::from_fn(16, |i, _| 16.0 - i as f64));
        let (basis, spread) = (basis("test", &second).unwrap(), rotation(16, ROTATION_SEED));
        for (i, j) in [(0, 0), (1, 8), (2, 4), (3, 12), (11, 13), (15, 15)] {
            assert!((basis.column(i) - spread.column(j)).amax() < 1e-12, "{i}");
        }
    }
}
