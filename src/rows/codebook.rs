//! What a code means: the levels of the Lloyd–Max quantiser of a unit Gaussian (Lloyd 1982, Max 1960), and how much they miss.
//!
//! Rotated coordinates are close to Gaussian whatever they were before, so one codebook for each width serves every band of every model. At 8 bits the optimum is indistinguishable from
//! equal steps, which need no table.

use std::sync::OnceLock;

/// At 8 bits: the value of code 0, and the step to the next. Codes span ±5 standard deviations.
pub const EIGHT_BITS: (f32, f32) = (-5.0 + STEP / 2.0, STEP);
const STEP: f32 = 10.0 / 256.0;

/// The levels of a codebook of 2, 3 or 4 bits, ascending and symmetric about zero. Empty at any other width.
pub fn levels(bits: u8) -> &'static [f32] {
    static BOOKS: OnceLock<[Vec<f32>; 3]> = OnceLock::new();
    let books = BOOKS.get_or_init(|| [2, 3, 4].map(|bits| lloyd_max(1 << bits).into_iter().map(|x| x as f32).collect()));
    match bits {
        2..=4 => &books[bits as usize - 2],
        _ => &[],
    }
}

/// The mean squared error of coding a unit Gaussian in `bits` bits: 1 at 0 bits, and that of rounding to f16 at 16.
pub fn distortion(bits: u8) -> f64 {
    // Plans ask for them once for every coordinate that they weigh.
    static ERRORS: OnceLock<[f64; 4]> = OnceLock::new();
    let errors = ERRORS.get_or_init(|| {
        let optimal = |bits| gaussian_error(&levels(bits).iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
        let steps: Vec<f64> = (0..256).map(|code| f64::from(EIGHT_BITS.0 + code as f32 * EIGHT_BITS.1)).collect();
        [optimal(2), optimal(3), optimal(4), gaussian_error(&steps)]
    });
    match bits {
        0 => 1.0,
        2..=4 => errors[bits as usize - 2],
        8 => errors[3],
        // Relative steps of 2⁻¹⁰, evenly spread over one: E[x²]·2⁻²⁰/12, times the mean of 4^(−f) over the mantissa's range.
        _ => 2f64.powi(-20) / 12.0 * 0.54,
    }
}

/// The code whose level is nearest to `x`, among ascending `levels`.
pub(super) fn nearest(levels: &[f32], x: f32) -> u32 {
    levels.windows(2).filter(|pair| x > (pair[0] + pair[1]) / 2.0).count() as u32
}

/// Lloyd's iteration in closed form: each level is the mean of the Gaussian between the midpoints around it, `(φ(a) − φ(b)) / (Φ(b) − Φ(a))`.
fn lloyd_max(count: usize) -> Vec<f64> {
    let mut levels: Vec<f64> = (0..count).map(|i| 2.5 * ((2 * i + 1) as f64 / count as f64 - 1.0)).collect();
    for _ in 0..10_000 {
        let ends = ends(&levels);
        let next: Vec<f64> = ends.windows(2).map(|w| (density(w[0]) - density(w[1])) / (below(w[1]) - below(w[0]))).collect();
        let moved = next.iter().zip(&levels).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        levels = next;
        if moved < 1e-12 {
            break;
        }
    }
    levels
}

/// `E[(x − level(x))²]`, integrated cell by cell: `∫(x−c)²φ = [Φ − xφ] + 2c[φ] + c²[Φ]` between a cell's ends.
fn gaussian_error(levels: &[f64]) -> f64 {
    let part = |x: f64, c: f64| {
        let tail = if x.is_finite() { x * density(x) } else { 0.0 };
        below(x) * (1.0 + c * c) - tail + 2.0 * c * density(x)
    };
    ends(levels).windows(2).zip(levels).map(|(w, &c)| part(w[1], c) - part(w[0], c)).sum()
}

/// Where one level's cell ends and the next begins, from −∞ to ∞.
fn ends(levels: &[f64]) -> Vec<f64> {
    let between = levels.windows(2).map(|w| (w[0] + w[1]) / 2.0);
    [f64::NEG_INFINITY].into_iter().chain(between).chain([f64::INFINITY]).collect()
}

fn density(x: f64) -> f64 {
    (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt()
}

/// `Φ(x)`, by the series about zero or the continued fraction of the tail; both to rounding.
fn below(x: f64) -> f64 {
    if x.is_infinite() {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    let a = x.abs();
    let upper = if a < 3.0 {
        let (mut term, mut sum) = (a, a);
        for i in 1..100 {
            term *= a * a / (2 * i + 1) as f64;
            sum += term;
        }
        0.5 - density(a) * sum
    } else {
        density(a) / (1..120).rev().fold(a, |fraction, i| a + i as f64 / fraction)
    };
    if x > 0.0 { 1.0 - upper } else { upper }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Max (1960), table I: levels and errors of the optimal quantisers of 4, 8 and 16 levels.
    #[test]
    fn levels_and_errors_are_those_of_max() {
        let published: [(u8, &[f64], f64); 3] = [
            (2, &[0.4528, 1.510], 0.1175),
            (3, &[0.2451, 0.7560, 1.344, 2.152], 0.03454),
            (4, &[0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
        ];
        for (bits, positive, error) in published {
            let levels = levels(bits);
            assert_eq!(levels.len(), 1 << bits);
            for (i, level) in positive.iter().enumerate() {
                assert!((f64::from(levels[levels.len() / 2 + i]) - level).abs() < 6e-4, "{bits}: {levels:?}");
                assert!((levels[levels.len() / 2 + i] + levels[levels.len() / 2 - 1 - i]).abs() < 1e-6);
            }
            assert!((distortion(bits) / error - 1.0).abs() < 1e-3, "{bits}: {}", distortion(bits));
        }
        assert_eq!(distortion(0), 1.0);
        // Equal steps of Δ miss Δ²/12, and the clipped tails next to nothing.
        assert!((distortion(8) * 12.0 / f64::from(STEP).powi(2) - 1.0).abs() < 2e-2);
        assert!(distortion(16) < 1e-7);
    }

    #[test]
    fn the_nearest_level_is_found() {
        let levels = levels(3);
        for i in -400..400 {
            let x = i as f32 / 100.0;
            let best = (0..8).min_by(|&a, &b| (levels[a] - x).abs().total_cmp(&(levels[b] - x).abs())).unwrap();
            assert_eq!(nearest(levels, x), best as u32, "{x}");
        }
    }
}
