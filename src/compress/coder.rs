//! From a basis and a format to what a decoder needs: scaled, rotated, and no wider than its bands.

use super::basis::Basis;
use crate::kv::{Coder, Format, RUN};
use crate::linalg::rotation;
use nalgebra::{DMatrix, DVector};

/// The coder of `basis` in `format`.
///
/// In each band coordinates are scaled and then rotated into each other, so that all have the same
/// variance and are nearly Gaussian, as the codebook expects. A rotated band's noise is the same in
/// all coordinates, `∝ mean(σ²/s²)`; at a cost of `λ/σ²` for each unit of it,
/// `Σ λs²/σ²·mean(σ²/s²)` is least at `s² = σ²/√λ` (Cauchy and Schwarz). Bands of 16 bits are
/// scaled to unit variance, so that f16 holds them.
pub(super) fn coder(basis: &Basis, format: &Format) -> Coder {
    let (width, rank) = (basis.down.nrows(), format.rank());
    let (mut down, mut up) = (DMatrix::zeros(width, rank), DMatrix::zeros(rank, width));
    // A coordinate of no variance or no consequence is scaled as if it had a little.
    let floor = |values: &DVector<f64>| (1e-12 * values.amax()).max(f64::MIN_POSITIVE);
    let (least_variance, least_loss) = (floor(&basis.variance), floor(&basis.loss));
    let mut first = 0;
    for band in &format.bands {
        let count = band.runs * RUN;
        let held = count.min(basis.loss.len().saturating_sub(first));
        let variances = basis.variance.rows(first, held).map(|variance| variance.max(least_variance));
        let roots = basis.loss.rows(first, held).map(|loss| loss.max(least_loss).sqrt());
        let mut a = basis.down.columns(first, held).into_owned();
        let mut b = basis.up.rows(first, held).into_owned();
        // Coordinates have variance `√λ` when they are scaled so, and the band their mean when it
        // is rotated: brought to one.
        let mean = roots.sum() / count as f64;
        for i in 0..held {
            let square = if band.bits < 16 { variances[i] / roots[i] * mean } else { variances[i] };
            a.column_mut(i).unscale_mut(square.sqrt());
            b.row_mut(i).scale_mut(square.sqrt());
        }
        if band.bits < 16 {
            let rotation = rotation(count, ROTATION_SEED).rows(0, held).into_owned();
            down.columns_mut(first, count).copy_from(&(&a * &rotation));
            up.rows_mut(first, count).copy_from(&(rotation.transpose() * &b));
        } else {
            down.columns_mut(first, held).copy_from(&a);
            up.rows_mut(first, held).copy_from(&b);
        }
        first += count;
    }
    Coder { format: format.clone(), mean: basis.mean.map(|x| x as f32), down: Some(down.map(|x| x as f32)), up: up.map(|x| x as f32) }
}

/// The coder of several heads that have one orthonormal `basis: [d, r]`, each in coordinates of its
/// own, about zero.
pub(super) fn by_head(basis: &DMatrix<f64>, heads: usize, format: Format) -> Coder {
    let down = DMatrix::identity(heads, heads).kronecker(basis).map(|x: f64| x as f32);
    Coder { format, mean: DVector::zeros(down.nrows()), up: down.transpose(), down: Some(down) }
}

/// Every program makes the same rotations.
const ROTATION_SEED: u64 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::Roots;
    use crate::kv::{Band, Scale, distortion};
    use crate::linalg::Random;

    /// Gaussian rows of uneven variance, coded in bands, miss by what the plan reckons with,
    /// `Σ λ_i·D(b_i)` and all of what is dropped, or less: in a band of uneven coordinates the
    /// scaling gains.
    #[test]
    fn the_loss_is_what_was_planned_or_less() {
        let (w, tokens) = (160, 3000);
        let mut random = Random::new(3);
        let spread = DVector::from_fn(w, |i, _| 0.97f64.powi(i as i32));
        let mix = rotation(w, 5);
        let y = DMatrix::from_fn(w, tokens, |i, _| random.gaussian() * spread[i]);
        let y = &mix * y;
        let metric = {
            let g = DMatrix::from_fn(w, 400, |i, _| random.gaussian() * (1.0 + (i % 7) as f64));
            &g * g.transpose() / 400.0
        };
        let second = &y * y.transpose() / tokens as f64;
        let roots = Roots::exact("test", &metric).unwrap();
        let basis = Basis::components("test", DVector::zeros(w), second, Some(&roots)).unwrap();
        let bands = [(16, 1), (8, 2), (4, 2), (3, 2), (2, 1)].map(|(bits, runs)| Band { bits, runs });
        for scale in [Scale::Fixed, Scale::Band] {
            let format = Format { bands: bands.to_vec(), scale };
            let coder = coder(&basis, &format);
            let single = y.map(|x| x as f32);
            let z = coder.coordinates(&coder.encode(&single));
            let error = (coder.up.transpose() * z - single).map(f64::from);
            let cost = (&metric * &error).dot(&error) / tokens as f64;
            let bits = bands.iter().flat_map(|band| std::iter::repeat_n(band.bits, band.runs * RUN)).chain(std::iter::repeat(0));
            let planned: f64 = basis.loss.iter().zip(bits).map(|(loss, bits)| loss * distortion(bits)).sum();
            assert!(cost < 1.03 * planned && cost > 0.8 * planned, "{scale:?}: {cost}, planned {planned}");
        }
    }

    #[test]
    fn heads_stay_apart() {
        let basis = rotation(16, 4).rows(0, 14).into_owned();
        let coder = by_head(&basis, 2, Format { bands: vec![Band { bits: 2, runs: 2 }], scale: Scale::Groups { runs: 2, clip: 100 } });
        let down = coder.down.unwrap();
        assert!(down.view((0, 16), (14, 16)).iter().chain(down.view((14, 0), (14, 16)).iter()).all(|x| *x == 0.0));
        assert_eq!(down.view((0, 0), (14, 16)), down.view((14, 16), (14, 16)));
        assert_eq!(coder.up, down.transpose());
    }

    /// At 16 bits and full rank, a vector comes back as it was, but for f16's rounding; also where
    /// the width is no multiple of a run.
    #[test]
    fn all_of_it_in_f16_is_the_vector() {
        let w = 37;
        let mut random = Random::new(8);
        let y = DMatrix::from_fn(w, 50, |_, _| random.gaussian());
        let basis = Basis::components("test", DVector::from_element(w, 0.5), &y * y.transpose() / 50.0, None).unwrap();
        let coder = coder(&basis, &Format::half(w.div_ceil(RUN)));
        let single = y.map(|x| x as f32);
        let mut back = coder.up.transpose() * coder.coordinates(&coder.encode(&single));
        back.column_iter_mut().for_each(|mut column| column += &coder.mean);
        assert!((back - &single).norm() < 2e-3 * single.norm());
    }
}
