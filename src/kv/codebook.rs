//! How much codes miss, and what codes of 8 bits stand for; [`trellis`](super::trellis) has the
//! narrower ones.
//!
//! Rotated coordinates are close to Gaussian whatever they were before, so one code for each width
//! serves every band of every model. At 8 bits equal steps are as good as any, and need no table.

use std::sync::OnceLock;

/// At 8 bits: the value of code 0, and the step to the next. Codes span ±5 standard deviations.
pub const EIGHT_BITS: (f32, f32) = (-5.0 + STEP / 2.0, STEP);
const STEP: f32 = 10.0 / 256.0;

/// The mean squared error of coding a unit Gaussian in `bits` bits.
///
/// 1 at 0 bits, and that of rounding to f16 at 16. Those of 2, 3 and 4 bits are measured.
pub fn distortion(bits: u8) -> f64 {
    // Plans ask for it once for every coordinate that they weigh.
    static EIGHT: OnceLock<f64> = OnceLock::new();
    match bits {
        0 => 1.0,
        2 => 0.0858,
        3 => 0.0217,
        4 => 0.00557,
        8 => *EIGHT.get_or_init(|| gaussian_error(&(0..256).map(|code| f64::from(EIGHT_BITS.0 + code as f32 * EIGHT_BITS.1)).collect::<Vec<_>>())),
        // Relative steps of 2⁻¹⁰, evenly spread over one: E[x²]·2⁻²⁰/12, times the mean of 4^(−f)
        // over the mantissa's range.
        _ => 2f64.powi(-20) / 12.0 * 0.54,
    }
}

/// `E[(x − level(x))²]`, integrated cell by cell: `∫(x−c)²φ = [Φ − xφ] + 2c[φ] + c²[Φ]` between a
/// cell's ends.
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

    /// Max (1960), table I: the error of the optimal quantiser of 8 levels.
    #[test]
    fn errors_are_integrals() {
        let positive = [0.2451, 0.7560, 1.344, 2.152];
        let levels: Vec<f64> = positive.iter().rev().map(|x| -x).chain(positive).collect();
        assert!((gaussian_error(&levels) / 0.03454 - 1.0).abs() < 1e-3);
        assert_eq!(distortion(0), 1.0);
        // Equal steps of Δ miss Δ²/12, and the clipped tails next to nothing.
        assert!((distortion(8) * 12.0 / f64::from(STEP).powi(2) - 1.0).abs() < 2e-2);
        assert!(distortion(16) < 1e-7);
        assert!([0, 2, 3, 4, 8, 16].map(distortion).is_sorted_by(|a, b| a > b));
    }
}
