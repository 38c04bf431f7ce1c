//! Whether a row's bands have scales of their own.
//!
//! Scales take a word of every row. Without them codes are multiplied by what was right on average,
//! which is in the basis; what that loses depends on how much the energy of a band varies from
//! token to token. No second moment tells, so the calibration text's
//! [`Sample`](crate::calibrate::Sample) is coded both ways. A row does without scales where that
//! loses less than the word saves elsewhere.

use super::bands::{Filled, bytes, water_fill};
use super::basis::Basis;
use super::coder::coder;
use crate::kv::{Format, Scale};
use crate::linalg::tr_product;
use nalgebra::DMatrix;
use rayon::prelude::*;

/// Scales also follow what calibration did not see, so the sample is coded with so many times its
/// energy, about its mean. Rows of other text miss by 1.1 to 2.4 times what was planned.
/// SmolLM2-135M calibrated on WikiText-2, fast, 3,840 bytes, KL divergence with scales throughout,
/// as chosen at the sample's own energy, and as chosen here: on WikiText-2 0.0052, 0.0053, 0.0048;
/// on program text 0.029, 0.036, 0.028.
const ENERGY: f64 = 1.5;

/// Formats within `budget` bytes per token, if there are any, for rows that have these bases, and
/// of which these are `samples`, `[w, tokens]`: never ones that lose more on the samples than
/// formats with scales throughout, where there are bytes for those.
pub(super) fn choose(bases: &[&Basis], samples: &[DMatrix<f32>], budget: u64) -> Vec<Format> {
    let all = |scale| water_fill(bases, &vec![scale; bases.len()], budget);
    let scaled = all(Scale::Band);
    if bytes(&scaled.formats) > budget {
        return all(Scale::Fixed).formats;
    }
    let fixed: Vec<Format> = scaled.formats.iter().map(|format| Format { scale: Scale::Fixed, ..format.clone() }).collect();
    let [with, without] = [&scaled.formats, &fixed].map(|formats| losses(bases, samples, formats, ENERGY));
    // What it saves grows with the energy as well.
    let worth = f64::from(u32::BITS) * scaled.level * ENERGY;
    let scales: Vec<Scale> =
        with.iter().zip(&without).map(|(with, without)| if without - with < worth { Scale::Fixed } else { Scale::Band }).collect();
    // The words that were saved are spent again.
    let Filled { formats, .. } = water_fill(bases, &scales, budget);
    let lost: f64 = losses(bases, samples, &formats, ENERGY).iter().sum();
    if lost < with.iter().sum() { formats } else { scaled.formats }
}

/// What each row's code loses on its sample, for each token.
fn losses(bases: &[&Basis], samples: &[DMatrix<f32>], formats: &[Format], energy: f64) -> Vec<f64> {
    let rows: Vec<_> = bases.iter().zip(samples).zip(formats).collect();
    rows.into_par_iter().map(|((basis, sample), format)| loss(basis, sample, format, energy)).collect()
}

/// In the measure of the basis: an error of the size of a coordinate's variance costs what leaving
/// it out does.
fn loss(basis: &Basis, sample: &DMatrix<f32>, format: &Format, energy: f64) -> f64 {
    let coder = coder(basis, format);
    let mut louder = sample.clone();
    louder.column_iter_mut().for_each(|mut y| y.zip_apply(&coder.mean, |y, mean| *y = mean + energy.sqrt() as f32 * (*y - mean)));
    let mut error = tr_product(coder.up.as_view(), coder.coordinates(&coder.encode(&louder)).as_view());
    for (mut error, y) in error.column_iter_mut().zip(louder.column_iter()) {
        error += &coder.mean - y;
    }
    let error = tr_product(basis.down.as_view(), error.map(f64::from).as_view());
    let rows = error.row_iter().zip(basis.loss.iter().zip(&basis.variance));
    let all: f64 = rows.filter(|(_, (_, variance))| **variance > 0.0).map(|(error, (loss, variance))| loss / variance * error.norm_squared()).sum();
    all / sample.ncols().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Random;
    use nalgebra::DVector;

    /// Rows of uneven coordinates whose energy varies from token to token by factors of about
    /// `exp(spread)`.
    fn sample(seed: u64, spread: f64) -> DMatrix<f32> {
        let mut random = Random::new(seed);
        let energy: Vec<f64> = (0..256).map(|_| (spread * random.gaussian()).exp()).collect();
        DMatrix::from_fn(64, energy.len(), |i, token| (0.95f64.powi(i as i32) * energy[token] * random.gaussian()) as f32)
    }

    fn basis(sample: &DMatrix<f32>) -> Basis {
        let sample = sample.map(f64::from);
        Basis::components("test", DVector::zeros(sample.nrows()), &sample * sample.transpose() / sample.ncols() as f64, None).unwrap()
    }

    #[test]
    fn rows_of_steady_energy_do_without_scales_and_others_have_them() {
        use Scale::{Band, Fixed};
        for (spreads, expected) in
            [([0.0, 1.0, 0.0, 1.0], Some([Fixed, Band, Fixed, Band])), ([2.0; 4], Some([Band; 4])), ([0.1, 0.2, 0.3, 0.4], None)]
        {
            let samples: Vec<_> = spreads.iter().zip(1..).map(|(&spread, seed)| sample(seed, spread)).collect();
            let bases: Vec<_> = samples.iter().map(basis).collect();
            let bases: Vec<_> = bases.iter().collect();
            for budget in [64, 96, 160, 256] {
                let formats = choose(&bases, &samples, budget);
                let scales: Vec<_> = formats.iter().map(|format| format.scale).collect();
                assert!(expected.is_none_or(|expected| scales == expected), "{spreads:?}, {budget}: {scales:?}");
                assert!(bytes(&formats) <= budget, "{spreads:?}, {budget}: {formats:?}");
                let scaled = water_fill(&bases, &[Band; 4], budget).formats;
                for energy in [1.0, ENERGY] {
                    let [chosen, scaled] = [&formats, &scaled].map(|formats| losses(&bases, &samples, formats, energy).iter().sum::<f64>());
                    assert!(if scales == [Band; 4] { chosen == scaled } else { chosen < scaled }, "{spreads:?}, {budget}: {chosen}, {scaled}");
                }
            }
            // Room for a run of two bits in each row, but for no scales; and not even that.
            assert_eq!([16, 12].map(|budget| bytes(&choose(&bases, &samples, budget))), [16, 16]);
        }
    }
}
