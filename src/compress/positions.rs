//! Moments of keys after RoPE, for every position of a context.
//!
//! Calibration runs windows of a few hundred tokens, and there a slow frequency has hardly begun to
//! rotate: moments of keys after RoPE taken from the windows say nothing of what a later position
//! looks like. But a key at position `t` is `R_t κ`, and what the key before RoPE, `κ`, has for
//! moments does not depend on `t`. So with `C = E[κ κᵀ]`
//!
//! `E[k kᵀ] = E_t[R_t C R_tᵀ]`,
//!
//! which needs no text. With the two numbers that a frequency `θ` rotates as one complex number,
//! `z → e^{itθ} z`, a pair of numbers of frequencies `θ, φ` has
//! `E[z w̄] → E_t[e^{it(θ−φ)}]·E[z w̄]` and `E[z w] → E_t[e^{it(θ+φ)}]·E[z w]`, and the average
//! over the first `N` positions is `e^{i(N−1)φ/2}·sin(Nφ/2) / (N sin(φ/2))`.
//!
//! The same holds of gradients with respect to keys: those before RoPE, rotated. The mean of the
//! keys need not be averaged: it rotates with the position and is known at each, so that rows are
//! coded about it (`R_t μ`), and `C` is about `μ`. With key biases of a norm of hundreds, as in
//! Qwen2, that is most of a key.

use nalgebra::{Complex, DMatrix};

/// Which positions tokens have.
#[derive(Debug, Clone)]
pub(super) struct Positions {
    /// RoPE's angular frequencies, `[head_dim / 2]`.
    frequencies: Vec<f64>,
    /// Lengths of contexts, each as likely, whose positions are all as likely.
    contexts: Vec<f64>,
}

/// The shortest context that a plan is made for.
const SHORTEST: usize = 512;

impl Positions {
    /// Contexts of up to `longest` tokens: as many of each power of two.
    pub(super) fn up_to(longest: usize, frequencies: Vec<f64>) -> Positions {
        let octaves = std::iter::successors(Some(SHORTEST.min(longest)), |length| Some(2 * length)).take_while(|length| *length < longest);
        Positions { frequencies, contexts: octaves.chain([longest.max(1)]).map(|length| length as f64).collect() }
    }

    /// `E_t[e^{itφ}]`.
    fn average(&self, angle: f64) -> Complex<f64> {
        let of = |n: f64| {
            let (half, sin) = (angle / 2.0, (angle / 2.0).sin());
            if sin.abs() < 1e-12 { Complex::new(1.0, 0.0) } else { Complex::from_polar((n * half).sin() / (n * sin), (n - 1.0) * half) }
        };
        self.contexts.iter().map(|n| of(*n)).sum::<Complex<f64>>() / self.contexts.len() as f64
    }

    /// The mean of `R_t C R_tᵀ`, for a symmetric `C` over the numbers of some heads.
    pub(super) fn second(&self, second: &DMatrix<f64>) -> DMatrix<f64> {
        let (half, heads) = (self.frequencies.len(), second.nrows() / (2 * self.frequencies.len()));
        let pairs = |sign: f64| {
            let factor = |p: usize, q: usize| self.average(self.frequencies[p] + sign * self.frequencies[q]);
            DMatrix::from_fn(half, half, factor)
        };
        let (apart, together) = (pairs(-1.0), pairs(1.0));
        let mut rotated = DMatrix::zeros(second.nrows(), second.ncols());
        for (g, h) in (0..heads).flat_map(|g| (0..heads).map(move |h| (g, h))) {
            for (p, q) in (0..half).flat_map(|p| (0..half).map(move |q| (p, q))) {
                let ([x, y], [u, v]) = ([0, half].map(|part| 2 * g * half + p + part), [0, half].map(|part| 2 * h * half + q + part));
                let (xu, xv, yu, yv) = (second[(x, u)], second[(x, v)], second[(y, u)], second[(y, v)]);
                let a = Complex::new(xu + yv, yu - xv) * apart[(p, q)];
                let b = Complex::new(xu - yv, yu + xv) * together[(p, q)];
                rotated[(x, u)] = (a.re + b.re) / 2.0;
                rotated[(y, v)] = (a.re - b.re) / 2.0;
                rotated[(y, u)] = (a.im + b.im) / 2.0;
                rotated[(x, v)] = (b.im - a.im) / 2.0;
            }
        }
        rotated
    }

    /// Rotates columns of keys before RoPE, each to a position of its own, spread over the
    /// contexts.
    pub(super) fn rotate(&self, keys: &mut DMatrix<f32>) {
        let (half, count) = (self.frequencies.len(), keys.ncols());
        for (index, mut column) in keys.column_iter_mut().enumerate() {
            // Golden ratio's multiples fill an interval evenly, however many there are.
            let place = (index as f64 * 0.618_033_988_749_894_9).fract();
            let position = (place * self.contexts[index * self.contexts.len() / count.max(1)]).floor();
            for head in (0..column.len()).step_by(2 * half) {
                for (p, frequency) in self.frequencies.iter().enumerate() {
                    let (sin, cos) = (position * frequency).sin_cos();
                    let (a, b) = (f64::from(column[head + p]), f64::from(column[head + p + half]));
                    (column[head + p], column[head + p + half]) = ((a * cos - b * sin) as f32, (b * cos + a * sin) as f32);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Random;

    /// Against sums over all positions.
    #[test]
    fn averages_are_those_of_all_positions() {
        let (half, heads, longest) = (3, 2, 1100);
        let frequencies = vec![1.0, 0.03, 0.0004];
        let positions = Positions::up_to(longest, frequencies.clone());
        assert_eq!(positions.contexts, [512.0, 1024.0, 1100.0]);
        let mut random = Random::new(3);
        let width = 2 * half * heads;
        let root = DMatrix::from_fn(width, width, |_, _| random.gaussian());
        let second = &root * root.transpose();
        let rotate = |t: usize| {
            let mut r = DMatrix::<f64>::zeros(width, width);
            for head in (0..width).step_by(2 * half) {
                for (p, frequency) in frequencies.iter().enumerate() {
                    let (sin, cos) = (t as f64 * frequency).sin_cos();
                    let (a, b) = (head + p, head + p + half);
                    (r[(a, a)], r[(b, b)], r[(a, b)], r[(b, a)]) = (cos, cos, -sin, sin);
                }
            }
            r
        };
        let mut expected = DMatrix::zeros(width, width);
        for n in [512, 1024, 1100] {
            for t in 0..n {
                let r = rotate(t);
                expected += &r * &second * r.transpose() / (3 * n) as f64;
            }
        }
        assert!((positions.second(&second) - &expected).norm() < 1e-9 * expected.norm());
        // A single position is none at all.
        assert!((Positions::up_to(1, frequencies).second(&second) - &second).norm() < 1e-9);
    }
}
