//! Sums of exponentials over a whole vocabulary, fast enough not to be noticed beside the model
//! that predicted it.
//!
//! Terms are f32, made by code without branches that the compiler turns into vector instructions;
//! sums are f64.

/// Sums that are kept side by side.
const LANES: usize = 16;

/// `Σ term(a[i], b[i])`, in f64.
pub fn sum(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f64 {
    let mut sums = [0f64; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += term(a[lane], b[lane]) as f64;
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(&a, &b)| term(a, b) as f64).sum();
    sums.iter().sum::<f64>() + rest
}

/// `exp(x)` for `x ≤ 0`, with a relative error below 2e-7; nothing below e⁻⁸⁷, where f32 ends.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding it leaves no room for a fraction: f32 then counts in ones.
    const ROUND: f32 = (3 << 22) as f32;
    // ln 2 in two parts, the first so short that its products with whole numbers are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let clamped = x.max(-88.0);
    // x = n ln 2 + f with |f| ≤ ln 2 / 2, and n in the low bits of `shifted`.
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let f = clamped - n * LN_2[0] - n * LN_2[1];
    let series = 1.0 + f * (1.0 + f * (0.5 + f * (1.0 / 6.0 + f * (1.0 / 24.0 + f * (1.0 / 120.0 + f * (1.0 / 720.0 + f * (1.0 / 5040.0)))))));
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { series * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_exact_to_f32() {
        assert_eq!((exp(0.0), exp(-0.0), exp(f32::NEG_INFINITY), exp(-87.1)), (1.0, 1.0, 0.0, 0.0));
        let worst = (0..870_000).map(|i| -1e-4 * i as f32).map(|x| (exp(x) as f64 / (x as f64).exp() - 1.0).abs()).fold(0.0, f64::max);
        assert!(worst < 2e-7, "{worst}");
    }

    #[test]
    fn sums_leave_nothing_out() {
        for length in [0, 1, 15, 16, 17, 48, 100] {
            let (a, b): (Vec<f32>, Vec<f32>) = (0..length).map(|i| (i as f32, (length - i) as f32)).unzip();
            let plain: f64 = (0..length).map(|i| (i * (length - i)) as f64).sum();
            assert_eq!(sum(&a, &b, |a, b| a * b), plain);
        }
    }
}
