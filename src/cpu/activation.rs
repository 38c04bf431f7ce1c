//! What an MLP makes of a number, and its derivative.

use crate::checkpoint::{Activation, ClampedSwiglu};

/// `√(2/π)` and the cubic's coefficient of GELU's approximation by a tanh.
const TANH: [f32; 2] = [0.797_884_6, 0.044_715];

/// The activation of `x`, and its derivative there.
pub(super) fn activate(activation: Activation, x: f32) -> (f32, f32) {
    match activation {
        Activation::Silu => {
            let sigmoid = 1.0 / (1.0 + (-x).exp());
            (x * sigmoid, sigmoid + x * sigmoid * (1.0 - sigmoid))
        }
        Activation::Gelu => {
            let below = 0.5 * erfc(-x * std::f32::consts::FRAC_1_SQRT_2);
            let density = (-0.5 * x * x).exp() / (2.0 * std::f32::consts::PI).sqrt();
            (x * below, below + x * density)
        }
        Activation::GeluTanh => {
            let [root, cubic] = TANH;
            let tanh = (root * (x + cubic * x * x * x)).tanh();
            let inner = root * (1.0 + 3.0 * cubic * x * x);
            (0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner)
        }
        Activation::Relu2 => {
            let x = x.max(0.0);
            (x * x, 2.0 * x)
        }
    }
}

/// What gate and up become, and the slopes with respect to both.
pub(super) fn clamped_swiglu(ClampedSwiglu { alpha, limit }: ClampedSwiglu, gate: f32, up: f32) -> (f32, [f32; 2]) {
    // `min` would lose what is no number.
    let (clamped, shifted) = (if gate > limit { limit } else { gate }, up.clamp(-limit, limit) + 1.0);
    let sigmoid = 1.0 / (1.0 + (-alpha * clamped).exp());
    let slope = sigmoid + alpha * clamped * sigmoid * (1.0 - sigmoid);
    let within = |inside: bool, slope: f32| if inside { slope } else { 0.0 };
    (shifted * clamped * sigmoid, [within(gate <= limit, shifted * slope), within(up.abs() <= limit, clamped * sigmoid)])
}

/// The complementary error function, to 1.2e-7 of its value (Press et al., Numerical Recipes in C,
/// section 6.2): GPUs have none, and their kernel has the same coefficients.
fn erfc(x: f32) -> f32 {
    const COEFFICIENTS: [f64; 10] =
        [0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223];
    let z = f64::from(x.abs());
    let t = 1.0 / (1.0 + 0.5 * z);
    let tail = t * (COEFFICIENTS.iter().fold(0.0, |sum, c| sum * t + c) - z * z).exp();
    (if x >= 0.0 { tail } else { 2.0 - tail }) as f32
}

/// `c·tanh(x / c)`, and its derivative.
pub(super) fn soft_cap(cap: f32, x: f32) -> (f32, f32) {
    let tanh = (x / cap).tanh();
    (cap * tanh, 1.0 - tanh * tanh)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values_and_slopes() {
        // Of Φ(1) and tables.
        let known = [(Activation::Silu, 0.731_058_6), (Activation::Gelu, 0.841_344_7), (Activation::GeluTanh, 0.841_192), (Activation::Relu2, 1.0)];
        for (activation, expected) in known {
            assert!((activate(activation, 1.0).0 - expected).abs() < 1e-6, "{activation:?}");
            for x in [-4.0f32, -0.7, 0.3, 2.5] {
                let [low, high] = [x - 1e-2, x + 1e-2].map(|x| f64::from(activate(activation, x).0));
                let slope = f64::from(activate(activation, x).1);
                assert!(((high - low) / 2e-2 - slope).abs() < 1e-3, "{activation:?} at {x}: {slope}");
            }
        }
        let spec = ClampedSwiglu { alpha: 1.7, limit: 2.0 };
        assert!((clamped_swiglu(spec, 9.0, -9.0).0 + 2.0 / (1.0 + (-3.4f32).exp())).abs() < 1e-6);
        for (gate, up) in [(-1.5f32, 0.4f32), (1.2, -1.7), (2.5, 0.3), (0.7, 2.6), (3.0, -3.0)] {
            let at = |gate, up| f64::from(clamped_swiglu(spec, gate, up).0);
            let slopes = [at(gate + 1e-2, up) - at(gate - 1e-2, up), at(gate, up + 1e-2) - at(gate, up - 1e-2)];
            let found = clamped_swiglu(spec, gate, up).1;
            assert!(slopes.iter().zip(found).all(|(slope, found)| (slope / 2e-2 - f64::from(found)).abs() < 1e-3), "{gate} {up}: {found:?}");
        }
        assert!(clamped_swiglu(spec, f32::NAN, 1.0).0.is_nan() && clamped_swiglu(spec, 1.0, f32::NAN).0.is_nan());
        assert!((soft_cap(5.0, 50.0).0 - 5.0).abs() < 1e-6 && soft_cap(5.0, 0.0) == (0.0, 1.0));
    }
}
