//! The product of a stored row and a vector, for a step of one token.
//!
//! Blocks of few bits are multiplied in whole numbers: codes are, and the vector is brought to 16
//! bits with a scale for every group, which is exact to a few parts in a hundred thousand of the
//! group's largest. Processors multiply and add pairs of those in one instruction.

use super::blocks::{Form, Groups, Has};
use super::encoding::Encoding;
use super::ggml::GROUP;
#[cfg(target_arch = "x86_64")]
use pulp::{NullaryFnOnce, Simd, f32x8, x86::V3};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::__m256i;

/// What rows are multiplied by.
pub struct Vector<'a> {
    x: &'a [f32],
    groups: Vec<Short>,
    #[cfg(target_arch = "x86_64")]
    simd: Option<V3>,
}

/// A group of numbers in 16 bits.
#[derive(Clone)]
#[repr(C, align(32))]
struct Short {
    numbers: [i16; GROUP],
    scale: f32,
    /// Of either half, of what the 16 bits stand for: what all codes have in common cancels so.
    sums: [f32; 2],
}

impl Vector<'_> {
    /// Made once for all rows.
    pub fn new(x: &[f32]) -> Vector<'_> {
        let short = |run: &[f32; GROUP]| {
            let largest = run.iter().fold(0f32, |most, x| most.max(x.abs()));
            let (scale, inverse) = match largest {
                // 16 bits have none: it is the scale that says so.
                _ if run.iter().any(|x| x.is_nan()) => (f32::NAN, 0.0),
                0.0 => (0.0, 0.0),
                largest => (largest / 32767.0, 32767.0 / largest),
            };
            let numbers = run.map(|x| (x * inverse).round_ties_even() as i16);
            let sums = [&numbers[..GROUP / 2], &numbers[GROUP / 2..]].map(|half| scale * half.iter().map(|x| i32::from(*x)).sum::<i32>() as f32);
            Short { numbers, scale, sums }
        };
        Vector {
            x,
            groups: x.as_chunks().0.iter().map(short).collect(),
            #[cfg(target_arch = "x86_64")]
            simd: V3::try_new(),
        }
    }

    /// The sum of products of its numbers with those of a row in whole blocks, which are as many.
    pub(super) fn dot(&self, encoding: Encoding, bytes: &[u8]) -> f32 {
        #[cfg(target_arch = "x86_64")]
        if let (Some(simd), true) = (self.simd, encoding.is_quantised()) {
            return simd.vectorize(Avx2 { simd, encoding, bytes, vector: self });
        }
        encoding.dot(bytes, self.x)
    }
}

#[cfg(target_arch = "x86_64")]
struct Avx2<'a> {
    simd: V3,
    encoding: Encoding,
    bytes: &'a [u8],
    vector: &'a Vector<'a>,
}

#[cfg(target_arch = "x86_64")]
impl NullaryFnOnce for Avx2<'_> {
    type Output = f32;

    #[inline(always)]
    fn call(self) -> f32 {
        let Avx2 { simd, encoding, bytes, vector } = self;
        let mut sums = Sums { simd, groups: vector.groups.iter(), totals: [simd.splat_f32s(0.0); 2], rest: 0.0 };
        encoding.groups(bytes, &mut sums);
        simd.reduce_sum_f32s(simd.add_f32s(sums.totals[0], sums.totals[1])) + sums.rest
    }
}

/// What has been summed up.
#[cfg(target_arch = "x86_64")]
struct Sums<'a> {
    simd: V3,
    groups: std::slice::Iter<'a, Short>,
    totals: [f32x8; 2],
    /// What does not depend on codes.
    rest: f32,
}

#[cfg(target_arch = "x86_64")]
impl Sums<'_> {
    /// Of sixteen codes and numbers: sums of two products each.
    #[inline(always)]
    fn pairs(&self, codes: &[u8; 16], numbers: &[i16; 16]) -> __m256i {
        let codes = self.simd.avx2._mm256_cvtepu8_epi16(pulp::cast(*codes));
        self.simd.avx2._mm256_madd_epi16(codes, pulp::cast(*numbers))
    }

    #[inline(always)]
    fn add(&self, total: f32x8, scale: f32, pairs: __m256i) -> f32x8 {
        let pairs = pulp::cast(self.simd.avx._mm256_cvtepi32_ps(pairs));
        self.simd.mul_add_e_f32s(self.simd.splat_f32s(scale), pairs, total)
    }
}

#[cfg(target_arch = "x86_64")]
impl Groups for Sums<'_> {
    #[inline(always)]
    fn group(&mut self, form: Form, codes: &[u8; GROUP], numbers: [f32; 2]) {
        let Some(Short { numbers: x, scale, sums: [a, b] }) = self.groups.next() else { return };
        let ([low, high, minimum], zero) = (form.scales(numbers), form.zero());
        let (codes, x) = (codes.as_chunks::<16>().0, x.as_chunks::<16>().0);
        let (first, second) = (self.pairs(&codes[0], &x[0]), self.pairs(&codes[1], &x[1]));
        if form.has == Has::Scales {
            self.totals = [self.add(self.totals[0], low * scale, first), self.add(self.totals[1], high * scale, second)];
            self.rest -= zero * (low * a + high * b);
        } else {
            // Groups take turns: a sum waits for itself.
            let both = self.simd.avx2._mm256_add_epi32(first, second);
            self.totals = [self.totals[1], self.add(self.totals[0], low * scale, both)];
            self.rest += (minimum - low * zero) * (a + b);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Random;

    /// Random bytes, with scales in f16 that are small.
    fn row(encoding: Encoding, blocks: usize, random: &mut Random) -> Vec<u8> {
        let size = encoding.block().1;
        let mut bytes: Vec<u8> = (0..blocks * size).map(|_| random.below(256) as u8).collect();
        for block in bytes.chunks_exact_mut(size) {
            if encoding == Encoding::Mxfp4 {
                block[0] = 124 + block[0] % 8;
                continue;
            }
            let at: &[usize] = match encoding {
                Encoding::Q6K => &[208],
                Encoding::Q4_0 | Encoding::Q5_0 | Encoding::Q8_0 => &[0],
                _ => &[0, 2],
            };
            at.iter().for_each(|at| block[*at..][..2].copy_from_slice(&half::f16::from_f32(random.gaussian() as f32).to_le_bytes()));
        }
        bytes
    }

    #[test]
    fn whole_numbers_multiply_as_what_they_stand_for() {
        let mut random = Random::new(5);
        for encoding in Encoding::QUANTISED {
            let (numbers, blocks) = (encoding.block().0, 7);
            let bytes = row(encoding, blocks, &mut random);
            let mut weights = vec![0f32; numbers * blocks];
            encoding.decode(&bytes, &mut weights);
            let mut x: Vec<f32> = weights.iter().map(|_| random.gaussian() as f32).collect();
            // A group of nothing, and one with numbers of very different sizes.
            x[..GROUP].fill(0.0);
            x[GROUP] = 10.0;
            let expected: f64 = weights.iter().zip(&x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            let size: f64 = weights.iter().zip(&x).map(|(a, b)| (f64::from(*a) * f64::from(*b)).powi(2)).sum::<f64>().sqrt();
            for found in [Vector::new(&x).dot(encoding, &bytes), encoding.dot(&bytes, &x)] {
                assert!((f64::from(found) - expected).abs() < 1e-4 * size, "{}: {found}, {expected}", encoding.name());
            }
            for damaged in [f32::NAN, f32::INFINITY] {
                x[GROUP + 3] = damaged;
                assert!(!Vector::new(&x).dot(encoding, &bytes).is_finite(), "{}: {damaged} is lost", encoding.name());
            }
        }
    }
}
