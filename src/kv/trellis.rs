//! Trellis-coded quantisation: codes of 2 to 4 bits that are chosen together, run by run.
//!
//! What a code stands for depends on the two before it. So a coordinate has many more levels than
//! codes, though no row has a bit more, and the codes of a run are chosen for the least error of
//! all sixteen (Marcellin and Fischer, *Trellis coded quantization of memoryless and Gauss–Markov
//! sources*, 1990; as a shift register, Tseng et al., *QTIP*, arXiv 2406.11235). Of a unit Gaussian
//! 2, 3 and 4 bits miss 0.086, 0.022 and 0.0056 in the mean square, where Lloyd and Max's best
//! codes one by one miss 0.118, 0.035 and 0.0095.
//!
//! The lower two bits `u` of a code move the register, the upper ones `h` choose between levels:
//! that of coordinate `i` is `levels[u_{i−2} + 4·u_{i−1} + 16·u_i + 64·h_i]`. The path bites its
//! own tail (Ma and Wolf, *On tail biting convolutional codes*, 1986): before the first coordinate
//! of a run stand its last two. So a run is read by itself, and to read it is to turn round the
//! word of its lower bits.

use super::RUN;
use super::trellis_levels::{FOUR, THREE, TWO};
use half::f16;
use pulp::{Arch, Simd, WithSimd};
use std::sync::LazyLock;

/// Values of the register: two codes' lower bits.
const STATES: usize = 16;
/// A code's lower bits with those of the two before: levels that each value of the upper bits has.
pub const EDGES: usize = 64;

/// The levels of 2, 3 or 4 bits, `[64·2^(bits − 2)]`, each a number that f16 has.
///
/// Shaders keep two to a word. Empty at any other width.
pub fn levels(bits: u8) -> &'static [f32] {
    static LEVELS: LazyLock<[Vec<f32>; 3]> =
        LazyLock::new(|| [&TWO[..], &THREE, &FOUR].map(|levels| levels.iter().map(|&level| f16::from_f32(level).to_f32()).collect()));
    match bits {
        2..=4 => &LEVELS[bits as usize - 2],
        _ => &[],
    }
}

/// The codes of a run of so many bits whose [`levels`] are nearest to `x: [16]` in the sum of
/// squares.
pub(super) fn encode(bits: u8, x: &[f32]) -> [u32; RUN] {
    encode_with(levels(bits), x)
}

/// Encodes a run by the codes whose `levels` are nearest to it in the sum of squares.
///
/// Levels are `[64·2^(bits − 2)]`.
///
/// # Panics
/// Where there are fewer than 64 levels, or more than 16 numbers.
pub fn encode_with(levels: &[f32], x: &[f32]) -> [u32; RUN] {
    // Compiled for every instruction set: the same codes, in a fraction of the time.
    Arch::new().dispatch(Encode { levels, x })
}

struct Encode<'a> {
    levels: &'a [f32],
    x: &'a [f32],
}

impl WithSimd for Encode<'_> {
    type Output = [u32; RUN];

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> [u32; RUN] {
        let Encode { levels, x } = self;
        // cost[state][begin], and by coordinate and state what fell out of the register.
        let mut cost = [[f32::INFINITY; STATES]; STATES];
        (0..STATES).for_each(|state| cost[state][state] = 0.0);
        let mut fell = [[[0u32; STATES]; STATES]; RUN];
        for (fell, &x) in fell.iter_mut().zip(x) {
            let misses = misses(levels, x);
            let mut next = [[0.0; STATES]; STATES];
            for state in 0..STATES {
                let (mut least, mut oldest) = ([f32::INFINITY; STATES], [0; STATES]);
                for old in 0..4 {
                    let edge = old + 4 * state;
                    let (miss, before) = (misses[edge], &cost[edge % STATES]);
                    // No branches: the compiler does several beginnings at once.
                    for begin in 0..STATES {
                        let total = before[begin] + miss;
                        let less = total < least[begin];
                        least[begin] = if less { total } else { least[begin] };
                        oldest[begin] = if less { old as u32 } else { oldest[begin] };
                    }
                }
                (next[state], fell[state]) = (least, oldest);
            }
            cost = next;
        }
        let begin = (0..STATES).min_by(|a, b| cost[*a][*a].total_cmp(&cost[*b][*b])).unwrap_or(0);
        let (mut state, mut codes) = (begin, [0; RUN]);
        for i in (0..RUN).rev() {
            let edge = fell[i][state][begin] as usize + 4 * state;
            codes[i] = (state / 4 + 4 * nearest(levels, edge, x[i])) as u32;
            state = edge % STATES;
        }
        codes
    }
}

/// How much a level misses `x`: the square of the distance less `x²`, which is common to all, so
/// that far out no difference is lost to rounding.
#[inline(always)]
fn miss(level: f32, x: f32) -> f32 {
    level * (level - 2.0 * x)
}

/// How much the nearest of every edge's levels misses `x`.
#[inline(always)]
fn misses(levels: &[f32], x: f32) -> [f32; EDGES] {
    let mut least = [f32::INFINITY; EDGES];
    for levels in levels.as_chunks::<EDGES>().0 {
        for (least, &level) in least.iter_mut().zip(levels) {
            let miss = miss(level, x);
            *least = if miss < *least { miss } else { *least };
        }
    }
    least
}

/// The upper bits that choose the nearest of an edge's levels.
#[inline(always)]
fn nearest(levels: &[f32], edge: usize, x: f32) -> usize {
    let mut best = (miss(levels[edge], x), 0);
    for high in 1..levels.len() / EDGES {
        let miss = miss(levels[edge + EDGES * high], x);
        if miss < best.0 {
            best = (miss, high);
        }
    }
    best.1
}

/// Which of the levels each of a run's codes stands for.
pub fn indices(codes: &[u32; RUN]) -> [usize; RUN] {
    let low = |i: usize| (codes[i % RUN] & 3) as usize;
    let edge = |i: usize| low(i + RUN - 2) + 4 * low(i + RUN - 1) + 16 * low(i);
    std::array::from_fn(|i| edge(i) + EDGES * (codes[i] >> 2) as usize)
}

/// What a run's codes stand for, times `factor`: of so many bits, their lower two bits in one word
/// and the others in the next.
#[inline(always)]
pub(super) fn decode<const LEVELS: usize>(levels: &[f32; LEVELS], [low, high]: [u32; 2], factor: f32, z: &mut [f32; RUN]) {
    let more = (LEVELS / EDGES).trailing_zeros();
    // Before the first coordinate stand the last two.
    let round = u64::from(low) << 4 | u64::from(low >> 28);
    for (i, z) in z.iter_mut().enumerate() {
        let high = (high >> (more * i as u32)) as usize & (LEVELS / EDGES - 1);
        *z = factor * levels[(round >> (2 * i)) as usize % EDGES + EDGES * high];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::distortion;
    use crate::linalg::Random;

    fn decode(bits: u8, codes: &[u32; RUN]) -> [f32; RUN] {
        let levels = levels(bits);
        indices(codes).map(|index| levels[index])
    }

    fn error(x: &[f32], decoded: &[f32]) -> f64 {
        x.iter().zip(decoded).map(|(x, y)| f64::from(x - y).powi(2)).sum()
    }

    /// On numbers that the levels were not made with; and each level is the mean of what is coded
    /// as it, so that a coordinate's error and its code have nothing in common.
    #[test]
    fn a_gaussian_is_missed_by_what_is_promised() {
        for bits in [2, 3, 4] {
            let (runs, mut random, mut sum, mut product, mut square) = (6000, Random::new(7), 0.0, 0.0, 0.0);
            for _ in 0..runs {
                let x: Vec<f32> = (0..RUN).map(|_| random.gaussian() as f32).collect();
                let decoded = decode(bits, &encode(bits, &x));
                sum += error(&x, &decoded);
                product += x.iter().zip(decoded).map(|(x, y)| f64::from(x * y)).sum::<f64>();
                square += decoded.iter().map(|y| f64::from(*y).powi(2)).sum::<f64>();
            }
            let found = sum / (runs * RUN) as f64;
            assert!((found / distortion(bits) - 1.0).abs() < 0.02, "{bits} bits: {found}");
            assert!((product / square - 1.0).abs() < 0.005, "{bits} bits: {}", product / square);
        }
    }

    /// What two words are unpacked to is what their codes stand for.
    #[test]
    fn a_run_is_read_by_its_two_words() {
        let mut random = Random::new(9);
        for bits in [2u32, 3, 4] {
            let codes: [u32; RUN] = std::array::from_fn(|_| (random.unit() * f64::from(1 << bits)) as u32);
            let word = |shift: u32, width: u32| {
                codes.iter().enumerate().fold(0, |word, (i, code)| word | (code >> shift & ((1 << width) - 1)) << (width * i as u32))
            };
            let words = [word(0, 2), if bits > 2 { word(2, bits - 2) } else { 0 }];
            let (levels, mut z) = (levels(bits as u8), [0.0; RUN]);
            match bits {
                2 => super::decode::<64>(levels.try_into().unwrap(), words, 0.5, &mut z),
                3 => super::decode::<128>(levels.try_into().unwrap(), words, 0.5, &mut z),
                _ => super::decode::<256>(levels.try_into().unwrap(), words, 0.5, &mut z),
            }
            assert_eq!(z, decode(bits as u8, &codes).map(|x| 0.5 * x));
        }
    }

    /// No codes are nearer: neither any others of a few coordinates, nor those of numbers that have
    /// codes themselves.
    #[test]
    fn the_codes_are_the_nearest() {
        let mut random = Random::new(8);
        for bits in [2, 3, 4] {
            for _ in 0..20 {
                let codes: [u32; RUN] = std::array::from_fn(|_| (random.unit() * f64::from(1 << bits)) as u32);
                let x = decode(bits, &codes);
                assert_eq!(error(&x, &decode(bits, &encode(bits, &x))), 0.0);
                let x: [f32; RUN] = std::array::from_fn(|_| random.gaussian() as f32);
                let codes = encode(bits, &x);
                let best = error(&x, &decode(bits, &codes));
                for first in 0..RUN {
                    for change in 1..1u32 << (2 * bits) {
                        let mut other = codes;
                        other[first] ^= change & ((1 << bits) - 1);
                        other[(first + 1) % RUN] ^= change >> bits;
                        assert!(error(&x, &decode(bits, &other)) >= best - 1e-5);
                    }
                }
            }
        }
    }
}
