//! xKV (Chang et al., *xKV: Cross-Layer SVD for KV-Cache Compression*, arXiv 2503.18893): for each
//! prompt, bases of its own that consecutive layers share.
//!
//! Neighbouring layers' keys (or values) differ token by token, but the subspaces over tokens that
//! they span are nearly the same. So for each group of `G` layers, and for keys before RoPE and
//! values apart, with `X = [X_1 | … | X_G]`, `[T, G·n]`,
//!
//! `X ≈ Z·B`, `Z = X·V_r`, `B = V_rᵀ`,
//!
//! `V_r` being the leading eigenvectors of `XᵀX`: the truncated SVD of `X`, without an SVD of `T`
//! rows. A token leaves one row of `r_k` and one of `r_v` coordinates for all `G` layers. With `L`
//! layers that is `⌈L/G⌉·(r_k + r_v)` numbers for a token, and `L·n·(r_k + r_v)` for the bases,
//! whatever the length: below some length they cost more than they save ([`Xkv::pays_from`]).
//!
//! Otherwise than there: the budget is for rows and bases together, so that a short prompt has
//! fewer coordinates of more bits than a long one; the mean over tokens is taken out first (one
//! vector more, and what it explains needs no rank); 4-bit rows are rotated and quantised by row;
//! instead of fixed ranks the bits can follow the spectrum, water-filled within a group's share;
//! and tokens that come later join by projection, `z = (x − μ)·Bᵀ`, when they leave the exact
//! window (published, they stay exact for ever).

use super::bands::water_fill;
use super::basis::{Basis, about};
use super::coder::coder;
use crate::Result;
use crate::kv::{Coder, Format, Geometry, LatentKind, LatentSpec, PromptBases, RUN, Scale, Xkv, basis_bytes, distortion};
use crate::linalg::Moments;
use nalgebra::{DMatrix, DVector};
use std::ops::Range;

/// Makes a prompt's bases from its moments.
pub struct Solver(pub Xkv);

impl PromptBases for Solver {
    fn options(&self) -> &Xkv {
        &self.0
    }

    fn rows(&self, geometry: &Geometry, group: &Range<usize>, moments: [&Moments; 2], tokens: usize) -> Result<[(LatentSpec, Coder); 2]> {
        let basis = |(what, moments): (&str, &Moments)| {
            let what = format!("the prompt's {what} in layers {} to {}", group.start, group.end - 1);
            let mean = moments.mean.map(f64::from);
            let mut basis = Basis::components(&what, mean.clone(), about(moments, &mean), None)?;
            // Keys and values are weighed by what they lose of their own.
            let all = basis.tail(0).max(f64::MIN_POSITIVE);
            basis.loss.unscale_mut(all);
            // What has no whole run of its own.
            let whole = basis.loss.len() / RUN * RUN;
            basis.loss.rows_range_mut(whole..).fill(0.0);
            Ok(basis)
        };
        let [keys, values] = [basis(("keys", moments[0]))?, basis(("values", moments[1]))?];
        let bytes = self.0.share(geometry, group)?;
        let formats = self.0.fixed(geometry, group, bytes, tokens).unwrap_or_else(|| by_spectrum([&keys, &values], bytes, tokens));
        let row = |(basis, kind, format): (Basis, LatentKind, Format)| {
            let (first_layer, layers) = (group.start, group.len());
            let coder = orthonormal(basis, &format);
            (LatentSpec { first_layer, layers, kind, first_head: 0, kv_heads: geometry.kv_heads, format }, coder)
        };
        let [key_format, value_format] = formats;
        Ok([row((keys, LatentKind::PreRopeKeys, key_format)), row((values, LatentKind::Values, value_format))])
    }
}

/// Formats whose bits follow the spectrum: for every number of coordinates the rest of `bytes`,
/// when their part of the bases of a prompt of `tokens` is taken off, is water-filled over the most
/// important ones, and the number that loses least is taken.
fn by_spectrum(bases: [&Basis; 2], bytes: u64, tokens: usize) -> [Format; 2] {
    let width = bases[0].loss.len();
    let part = |rank: usize| basis_bytes(width, rank) as f64 / tokens as f64;
    let mut runs: Vec<f64> = bases.iter().flat_map(|basis| basis.loss.as_slice().chunks_exact(RUN).map(|run| run.iter().sum::<f64>())).collect();
    runs.sort_by(|a, b| b.total_cmp(a));
    let formats = |count: usize| -> Option<(f64, [Format; 2])> {
        let left = bytes as f64 - part(RUN * count);
        let floor = runs[count - 1];
        // All that is asked of a basis here is what its coordinates are worth.
        let cut = |basis: &Basis| {
            let kept = basis.loss.as_slice().chunks_exact(RUN).filter(|run| run.iter().sum::<f64>() >= floor).count().max(1);
            let mut loss = basis.loss.clone();
            loss.rows_range_mut(kept * RUN..).fill(0.0);
            Basis { mean: DVector::zeros(0), down: DMatrix::zeros(0, 0), up: DMatrix::zeros(0, 0), variance: DVector::zeros(0), loss }
        };
        let cut = bases.map(cut);
        let mut formats = water_fill(&[&cut[0], &cut[1]], &[Scale::Band; 2], left.max(0.0) as u64).formats.into_iter();
        let formats = [formats.next()?, formats.next()?];
        let taken: usize = formats.iter().map(|format| 4 * format.words()).sum();
        let loss = bases.iter().zip(&formats).map(|(basis, format)| {
            let bits = format.bands.iter().flat_map(|band| std::iter::repeat_n(band.bits, RUN * band.runs)).chain(std::iter::repeat(0));
            basis.loss.iter().zip(bits).map(|(loss, bits)| loss * distortion(bits)).sum::<f64>()
        });
        let loss = loss.sum();
        // The least rows there are may take more than there is.
        (count <= 2 || taken as f64 <= left).then_some((loss, formats))
    };
    let best = (2..=runs.len()).filter_map(formats).min_by(|a, b| a.0.total_cmp(&b.0));
    best.map_or([Format::half(1), Format::half(1)], |(_, formats)| formats)
}

/// The coder whose projection is its up-projection transposed, so that it need not be stored:
/// coordinates are rotated within a band, but not scaled.
fn orthonormal(basis: Basis, format: &Format) -> Coder {
    let one = DVector::repeat(basis.loss.len(), 1.0);
    let Coder { format, mean, up, .. } = coder(&Basis { variance: one.clone(), loss: one, ..basis }, format);
    // As 16 bits hold it: both directions use the same numbers.
    let up: DMatrix<f32> = up.map(|x| half::f16::from_f32(x).to_f32());
    Coder { format, mean, down: None, up }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use crate::compress::basis::tests::{moment, rows};
    use crate::kv::Budget;

    fn moments(x: &DMatrix<f64>) -> Moments {
        Moments { mean: x.row_mean().transpose().map(|x| x as f32), second: moment(x).map(|x| x as f32) }
    }

    /// Five layers of three heads, 16 wide.
    const GEOMETRY: Geometry = Geometry { layers: 5, heads: 6, kv_heads: 3, head_dim: 16 };

    /// At ranks in the published proportion a group loses what the eigenvalues beyond the rank say,
    /// centred, and its bytes are those asked for.
    #[test]
    fn a_group_keeps_the_leading_components_of_its_prompt() {
        let (geometry, group) = (GEOMETRY, 0..2);
        let (keys, values) = (rows(300, 96, 1), rows(300, 96, 2));
        let tokens = 4000;
        for (budget, ranks) in [(Budget::Times(2.0), [32, 48]), (Budget::Bytes(1 << 20), [96, 96])] {
            let xkv = Xkv { layers: 2, budget, bits: Some(16) };
            xkv.check(&geometry).unwrap();
            let made = Solver(xkv).rows(&geometry, &group, [&moments(&keys), &moments(&values)], tokens).unwrap();
            for ((x, (spec, coder)), rank) in [&keys, &values].into_iter().zip(&made).zip(ranks) {
                assert_eq!((spec.format.rank(), spec.layers, spec.first_layer), (rank, 2, 0));
                let single = x.transpose().map(|x| x as f32);
                let mut back = coder.up.transpose() * coder.coordinates(&coder.encode(&single));
                back.column_iter_mut().for_each(|mut column| column += &coder.mean);
                let mean = x.row_mean();
                let centred = DMatrix::from_fn(x.nrows(), x.ncols(), |i, j| x[(i, j)] - mean[j]);
                let values = crate::linalg::Eigen::of("test", &moment(&centred)).unwrap().values;
                let lost: f64 = values.iter().skip(rank).sum();
                let error = (back - &single).norm_squared() as f64 / x.nrows() as f64;
                assert!((error - lost).abs() < 1e-4 * values.sum(), "{rank}: {error}, {lost}");
            }
            let bytes: u64 = made.iter().map(|(spec, _)| 4 * spec.format.words() as u64).sum();
            let share = budget.bytes(geometry.dense_bytes_per_token()).unwrap() * 2 / 5;
            let bases = made.iter().map(|(spec, _)| 2 * 96 * spec.format.rank()).sum::<usize>() as u64 + 8 * 96;
            let run = 32 + 2 * 96 * 16 / tokens as u64;
            let taken = bytes + bases / tokens as u64;
            assert!(ranks == [96, 96] || taken <= share && taken + run + 2 > share, "{taken} of {share}");
        }
    }

    /// Rows and bases together keep the budget, and the shorter the prompt the fewer the
    /// coordinates.
    #[test]
    fn bits_follow_the_spectrum_and_the_length_within_the_budget() {
        let (geometry, group) = (GEOMETRY, 0..2);
        let xkv = Xkv { layers: 2, budget: Budget::Times(3.0), bits: None };
        let share = xkv.share(&geometry, &group).unwrap() as usize;
        let mut ranks = Vec::new();
        for tokens in [300, 1000, 100_000] {
            let made = Solver(xkv).rows(&geometry, &group, [&moments(&rows(300, 96, 1)), &moments(&rows(300, 96, 2))], tokens).unwrap();
            let bytes: usize = made.iter().map(|(spec, _)| 4 * spec.format.words()).sum();
            let rank: usize = made.iter().map(|(spec, _)| spec.format.rank()).sum();
            let taken = bytes + basis_bytes(96, rank) / tokens;
            assert!(taken <= share && taken + 40 > share, "{tokens}: {taken} of {share}");
            ranks.push(rank);
        }
        assert!(ranks[0] < ranks[1] && ranks[1] < ranks[2], "{ranks:?}");
    }

    /// The last group is what is left, and where bases begin to pay is where the formula says:
    /// `2·w·r + 8·w` bytes of bases a group against what a token saves.
    #[test]
    fn bases_pay_from_the_length_that_the_formula_says() {
        let geometry = GEOMETRY;
        let xkv = Xkv { layers: 2, budget: Budget::Times(2.0), bits: Some(16) };
        assert_eq!(xkv.groups(&geometry), [0..2, 2..4, 4..5]);
        let dense = geometry.dense_bytes_per_token() as usize;
        let bases: usize = 2 * (2 * 96 * 96 + 8 * 96) + 2 * 48 * 48 + 8 * 48;
        // The last group's rows take 72 of its 96 bytes at the least, and the bases of two runs
        // must fit into the rest.
        let room: usize = (2 * 48 * 32 + 8 * 48) / (96 - 72);
        assert_eq!(xkv.pays_from(&geometry).unwrap(), bases.div_ceil(dense / 2).max(room));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let geometry = GEOMETRY;
        let xkv = Xkv { layers: 2, budget: Budget::Times(2.0), bits: Some(16) };
        for (xkv, option) in [
            (Xkv { layers: 0, ..xkv }, "group-layers"),
            (Xkv { bits: Some(5), ..xkv }, "bits"),
            (Xkv { budget: Budget::Times(0.0), ..xkv }, "times"),
            (Xkv { budget: Budget::Bytes(20), ..xkv }, "kv-bytes"),
            (Xkv { budget: Budget::Bytes(20), bits: None, ..xkv }, "kv-bytes"),
        ] {
            let error = xkv.check(&geometry).unwrap_err();
            assert!(matches!(&error, Error::Argument { name, .. } if name == option), "{error}");
            assert!(xkv.check_prompt(&geometry, 5, 9).is_err());
        }
        assert!(matches!(xkv.check_prompt(&geometry, 0, 9), Err(Error::Argument { name, .. }) if name == "prompt"));
        assert!(matches!(xkv.check_prompt(&geometry, 10, 9), Err(Error::Context { needed: 10, capacity: 9 })));
        xkv.check_prompt(&geometry, 9, 9).unwrap();
    }
}
