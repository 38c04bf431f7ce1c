//! One budget of bits, water-filled over everything that is cached.
//!
//! To leave a coordinate of loss `λ` out costs `λ`; to code it in `b` bits costs `λ·D(b)`, `D`
//! being a codebook's error on a unit Gaussian ([`distortion`]). Bits go, run by run of 16
//! coordinates, to where a bit saves most. Rank and precision are one decision: what gets no bits
//! is not kept.

use super::basis::Basis;
use crate::kv::{Band, Format, RUN, Scale, distortion};

/// How a budget is spent.
pub(super) struct Filled {
    /// A format for each row.
    pub(super) formats: Vec<Format>,
    /// What one bit more would save: as much as in the best step that there were no bytes for,
    /// nothing where there were bytes for all.
    pub(super) level: f64,
}

/// Allots at most `budget` bytes per token to the rows that have these bases and scales. A row
/// whose every run is worth less than the bits it would take still gets one run of two bits, since
/// a row cannot be empty: the only case in which the budget is exceeded, for the caller to refuse.
pub(super) fn water_fill(bases: &[&Basis], scales: &[Scale], budget: u64) -> Filled {
    let widths: &[u8] = &[0, 2, 3, 4, 8, 16];
    // By how much each step saves, per bit and unit of loss; made to fall from step to step, so
    // that the wider never comes before the narrower.
    let mut gains: Vec<f64> = widths.windows(2).map(|w| (distortion(w[0]) - distortion(w[1])) / f64::from(w[1] - w[0])).collect();
    for i in 1..gains.len() {
        gains[i] = gains[i].min(gains[i - 1] * (1.0 - 1e-9));
    }
    struct Step {
        gain: f64,
        row: usize,
        run: usize,
        level: usize,
    }
    let mut steps = Vec::new();
    for (row, basis) in bases.iter().enumerate() {
        for (run, losses) in basis.loss.as_slice().chunks(RUN).enumerate() {
            let loss = losses.iter().sum::<f64>() / RUN as f64;
            steps.extend(gains.iter().enumerate().map(|(i, gain)| Step { gain: gain * loss, row, run, level: i + 1 }));
        }
    }
    // Stable, so that among equals the earlier row, run and step come first.
    steps.sort_by(|a, b| b.gain.total_cmp(&a.gain));

    let mut levels: Vec<Vec<usize>> = bases.iter().map(|basis| vec![0; basis.loss.len().div_ceil(RUN)]).collect();
    for levels in &mut levels {
        levels[0] = 1;
    }
    let words = |levels: &[usize], row: usize| format(levels, widths, scales[row]).words() as i64;
    let mut left = budget as i64 / 4 - levels.iter().enumerate().map(|(row, levels)| words(levels, row)).sum::<i64>();
    let mut level = None;
    for step in steps {
        let levels = &mut levels[step.row];
        if step.level != levels[step.run] + 1 || step.gain <= 0.0 {
            continue;
        }
        let before = words(levels, step.row);
        levels[step.run] = step.level;
        let more = words(levels, step.row) - before;
        if more > left {
            levels[step.run] -= 1;
            level.get_or_insert(step.gain);
        } else {
            left -= more;
        }
    }
    let formats = levels.iter().zip(scales).map(|(levels, &scale)| format(levels, widths, scale)).collect();
    Filled { formats, level: level.unwrap_or(0.0) }
}

/// What a token's rows take.
pub(super) fn bytes(formats: &[Format]) -> u64 {
    formats.iter().map(|format| 4 * format.words() as u64).sum()
}

/// The format of a row whose runs have these widths, which fall.
fn format(levels: &[usize], widths: &[u8], scale: Scale) -> Format {
    let bands = (1..widths.len()).rev().map(|level| Band { bits: widths[level], runs: levels.iter().filter(|&&have| have == level).count() });
    Format { bands: bands.filter(|band| band.runs > 0).collect(), scale }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nalgebra::{DMatrix, DVector};

    fn basis(losses: &[f64]) -> Basis {
        // A loss for every run.
        let loss = DVector::from_iterator(losses.len() * RUN, losses.iter().flat_map(|&loss| std::iter::repeat_n(loss, RUN)));
        let n = loss.len();
        Basis { mean: DVector::zeros(n), down: DMatrix::identity(n, n), up: DMatrix::identity(n, n), variance: loss.clone(), loss }
    }

    fn cost(basis: &Basis, format: &Format) -> f64 {
        let bits = format.bands.iter().flat_map(|band| std::iter::repeat_n(band.bits, band.runs)).chain(std::iter::repeat(0));
        basis.loss.as_slice().chunks(RUN).zip(bits).map(|(losses, bits)| losses[0] * RUN as f64 * distortion(bits)).sum()
    }

    /// Against all ways to spend as many bytes: never over the budget, never dearer than with less,
    /// and near the least. It is not the least itself where the next step is too large for what is
    /// left.
    #[test]
    fn budgets_are_kept_and_spent_nearly_as_well_as_can_be() {
        let bases = [basis(&[9.0, 3.0, 0.2]), basis(&[40.0, 0.7])];
        let widths = [0u8, 2, 3, 4, 8, 16];
        let ways = |runs: usize| -> Vec<Vec<usize>> {
            let mut all = vec![vec![]];
            for _ in 0..runs {
                all = all
                    .into_iter()
                    .flat_map(|way: Vec<usize>| (0..=*way.last().unwrap_or(&5)).map(move |level| [&way[..], &[level]].concat()))
                    .collect();
            }
            all.into_iter().filter(|way| way[0] > 0).collect()
        };
        for budget in (16..140).step_by(8) {
            let formats = water_fill(&[&bases[0], &bases[1]], &[Scale::Fixed; 2], budget).formats;
            assert!(bytes(&formats) <= budget, "{budget}");
            let found = cost(&bases[0], &formats[0]) + cost(&bases[1], &formats[1]);
            let mut least = f64::INFINITY;
            for first in ways(3) {
                for second in ways(2) {
                    let formats = [format(&first, &widths, Scale::Fixed), format(&second, &widths, Scale::Fixed)];
                    if bytes(&formats) <= budget {
                        least = least.min(cost(&bases[0], &formats[0]) + cost(&bases[1], &formats[1]));
                    }
                }
            }
            let step = water_fill(&[&bases[0], &bases[1]], &[Scale::Fixed; 2], budget.saturating_sub(32)).formats;
            let before = cost(&bases[0], &step[0]) + cost(&bases[1], &step[1]);
            assert!(found <= before && least <= found * (1.0 + 1e-12), "{budget}: {found}, the least {least}");
            assert!(found < 1.7 * least, "{budget}: {found}, the least {least}");
        }
    }

    #[test]
    fn what_does_not_matter_gets_the_least_and_all_is_all() {
        let bases = [basis(&[1.0, 1.0]), basis(&[0.0, 0.0])];
        let Filled { formats, level } = water_fill(&[&bases[0], &bases[1]], &[Scale::Band; 2], 1 << 20);
        assert_eq!(level, 0.0);
        assert_eq!(formats[0], Format { scale: Scale::Band, ..Format::half(2) });
        assert_eq!(formats[1].bands, [Band { bits: 2, runs: 1 }]);
        assert!(bytes(&water_fill(&[&bases[0], &bases[1]], &[Scale::Band; 2], 24).formats) <= 24);
    }

    /// Sixteen coordinates from two bits to three save `16·(D(2) − D(3))` of their loss, for
    /// sixteen bits.
    #[test]
    fn the_level_is_what_the_next_bit_would_save() {
        let bases = [basis(&[3.0])];
        let filled = water_fill(&[&bases[0]], &[Scale::Fixed], 4);
        assert_eq!(filled.formats[0].bands, [Band { bits: 2, runs: 1 }]);
        assert!((filled.level - 3.0 * (distortion(2) - distortion(3))).abs() < 1e-12, "{}", filled.level);
    }
}
