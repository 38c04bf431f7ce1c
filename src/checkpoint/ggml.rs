//! ggml's blocks, taken apart: the code of every number, and two numbers for each [`GROUP`] of
//! them.
//!
//! Classic blocks hold 32 numbers, `x = d·q (+ m)` with a scale `d` and, in the `_1` kinds, a
//! minimum `m`; K blocks hold 256 in sub-blocks of 16 or 32 that have small integer scales of their
//! own, `x = (d·s)·q − d_min·s_min`. Low and high nibbles of a byte belong to different halves of a
//! run, never to neighbours. MXFP4 has a power of two for `d`, and codes that are not evenly apart.
//! (Layout: ggml's `ggml-common.h` and `ggml-quants.c`.)
//!
//! All of it is inlined into loops that are compiled once for every instruction set.

use half::f16;

/// Numbers that share a scale and a minimum, or two scales.
pub(super) const GROUP: usize = 32;

/// A number in f16.
///
/// By arithmetic that compilers inline and make vectors of: the exponent's bias is multiplied
/// right, which also normalises what is subnormal.
#[inline(always)]
pub(super) fn f16_of(bytes: &[u8; 2]) -> f32 {
    let bits = u32::from(u16::from_le_bytes(*bytes));
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    let infinite = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | infinite | (bits & 0x8000) << 16)
}

/// The f16 at byte `at`.
#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    f16_of(&[block[at], block[at + 1]])
}

/// The nibbles of a block, the low ones first.
#[inline(always)]
fn nibbles(bytes: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(bytes.len());
    low.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte & 15);
    high.iter_mut().zip(bytes).for_each(|(code, byte)| *code = byte >> 4);
}

/// The fifth bits of a block of 32, one per number.
#[inline(always)]
fn fifth_bits(block: &[u8], at: usize, codes: &mut [u8; 32]) {
    let fifth = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    codes.iter_mut().enumerate().for_each(|(i, code)| *code |= ((fifth >> i & 1) << 4) as u8);
}

#[inline(always)]
pub(super) fn q4_0(block: &[u8; 18], codes: &mut [u8; 32]) -> [[f32; 2]; 1] {
    nibbles(&block[2..], codes);
    [[half(block, 0), 0.0]]
}

#[inline(always)]
pub(super) fn q4_1(block: &[u8; 20], codes: &mut [u8; 32]) -> [[f32; 2]; 1] {
    nibbles(&block[4..], codes);
    [[half(block, 0), half(block, 2)]]
}

#[inline(always)]
pub(super) fn q5_0(block: &[u8; 22], codes: &mut [u8; 32]) -> [[f32; 2]; 1] {
    nibbles(&block[6..], codes);
    fifth_bits(block, 2, codes);
    [[half(block, 0), 0.0]]
}

#[inline(always)]
pub(super) fn q5_1(block: &[u8; 24], codes: &mut [u8; 32]) -> [[f32; 2]; 1] {
    nibbles(&block[8..], codes);
    fifth_bits(block, 4, codes);
    [[half(block, 0), half(block, 2)]]
}

/// Codes are signed there; here they count from -128.
#[inline(always)]
pub(super) fn q8_0(block: &[u8; 34], codes: &mut [u8; 32]) -> [[f32; 2]; 1] {
    codes.iter_mut().zip(&block[2..]).for_each(|(code, byte)| *code = byte ^ 128);
    [[half(block, 0), 0.0]]
}

/// What sub-blocks of 32 have, at the beginning of a block.
///
/// Scales and minima are of six bits each, in twelve bytes: the first four of both stand in the low
/// bits of bytes 0 to 7, the other four are put together from the nibbles of bytes 8 to 11 and the
/// top bits of bytes 0 to 7. Four are taken at a time.
#[inline(always)]
fn sub_blocks(block: &[u8]) -> [[f32; 2]; 8] {
    let word = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let (d, d_min, [low, high, nibbles]) = (half(block, 0), half(block, 2), [word(4), word(8), word(12)]);
    let four = |first: u32, second: u32| {
        let [a, b] = [first, second].map(u32::to_le_bytes);
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]].map(f32::from)
    };
    let scales = four(low & 0x3f3f_3f3f, nibbles & 0x0f0f_0f0f | (low >> 6 & 0x0303_0303) << 4);
    let minima = four(high & 0x3f3f_3f3f, nibbles >> 4 & 0x0f0f_0f0f | (high >> 6 & 0x0303_0303) << 4);
    std::array::from_fn(|j| [d * scales[j], -(d_min * minima[j])])
}

/// 64 numbers for every 32 bytes: the low nibbles, then the high ones.
#[inline(always)]
fn nibbles_of_64(bytes: &[u8], codes: &mut [u8; 256]) {
    codes.as_chunks_mut::<64>().0.iter_mut().zip(bytes.as_chunks::<32>().0).for_each(|(codes, bytes)| nibbles(bytes, codes));
}

#[inline(always)]
pub(super) fn q4_k(block: &[u8; 144], codes: &mut [u8; 256]) -> [[f32; 2]; 8] {
    nibbles_of_64(&block[16..], codes);
    sub_blocks(block)
}

#[inline(always)]
pub(super) fn q5_k(block: &[u8; 176], codes: &mut [u8; 256]) -> [[f32; 2]; 8] {
    nibbles_of_64(&block[48..], codes);
    for (j, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        codes.iter_mut().zip(&block[16..48]).for_each(|(code, fifth)| *code |= (fifth >> j & 1) << 4);
    }
    sub_blocks(block)
}

#[inline(always)]
pub(super) fn q6_k(block: &[u8; 210], codes: &mut [u8; 256]) -> [[f32; 2]; 8] {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half(block, 208);
    // Each half of 128 has 64 bytes of low nibbles and 32 bytes of high pairs, for four runs of 32.
    let halves = codes.as_chunks_mut::<128>().0.iter_mut().zip(low.as_chunks::<64>().0).zip(high.as_chunks::<32>().0);
    for ((codes, low), high) in halves {
        for (run, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let (low, [nibble_at, pair_at]) = (&low.as_chunks::<32>().0[run % 2], [run / 2 * 4, run * 2]);
            for ((code, nibble), pair) in codes.iter_mut().zip(low).zip(high) {
                *code = nibble >> nibble_at & 15 | (pair >> pair_at & 3) << 4;
            }
        }
    }
    std::array::from_fn(|j| [0, 1].map(|half| d * f32::from(scales[2 * j + half] as i8)))
}

/// Twice the numbers of four bits, E2M1, are whole: the code counts them from 16 on. Their scale is
/// a power of two in eight bits, E8M0, of which 255 is no number (OCP Microscaling Formats, version
/// 1.0).
#[inline(always)]
pub(super) fn mxfp4(block: &[u8; 17], codes: &mut [u8; 32]) -> [[f32; 2]; 1] {
    const CODES: [u8; 16] = [16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4];
    nibbles(&block[1..], codes);
    codes.iter_mut().for_each(|code| *code = CODES[usize::from(*code & 15)]);
    let half_scale = match block[0] {
        // Below the smallest normal number.
        low @ 0..=1 => f32::from_bits(1 << (21 + low)),
        255 => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent - 1) << 23),
    };
    [[half_scale, 0.0]]
}

/// A block of Q8_0, as ggml makes it: the largest number is met exactly, up to the scale's f16.
pub(super) fn encode_q8_0(numbers: &[f32; GROUP], block: &mut [u8; 34]) {
    let largest = numbers.iter().fold(0f32, |most, x| most.max(x.abs()));
    let inverse = scale(largest / 127.0, block);
    block[2..].iter_mut().zip(numbers).for_each(|(code, x)| *code = (x * inverse).round().clamp(-127.0, 127.0) as i8 as u8);
}

/// A block of Q4_0: the number furthest from zero gets the lowest code, the only one that is eight
/// steps away.
pub(super) fn encode_q4_0(numbers: &[f32; GROUP], block: &mut [u8; 18]) {
    let largest = numbers.iter().copied().fold(0f32, |most, x| if x.abs() > most.abs() { x } else { most });
    let inverse = scale(largest / -8.0, block);
    let code = |x: f32| (x * inverse + 8.0).round().clamp(0.0, 15.0) as u8;
    for i in 0..16 {
        block[2 + i] = code(numbers[i]) | code(numbers[i + 16]) << 4;
    }
}

/// Writes the scale in f16, and returns what numbers are multiplied by.
fn scale(scale: f32, block: &mut [u8]) -> f32 {
    let scale = f16::from_f32(scale);
    block[..2].copy_from_slice(&scale.to_le_bytes());
    if scale == f16::ZERO { 0.0 } else { scale.to_f32().recip() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_is_itself() {
        for bits in 0..=u16::MAX {
            let (found, expected) = (f16_of(&bits.to_le_bytes()), f16::from_bits(bits).to_f32());
            assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{bits:x}: {found} {expected}");
        }
    }

    #[test]
    fn mxfp4_has_eight_magnitudes_and_a_power_of_two() {
        let decode = |block: &[u8; 17]| {
            let mut codes = [0; 32];
            let [[half_scale, _]] = mxfp4(block, &mut codes);
            codes.map(|code| half_scale * (f32::from(code) - 16.0))
        };
        let of = |scale: u8, byte: &dyn Fn(u8) -> u8| std::array::from_fn(|i| if i == 0 { scale } else { byte(i as u8 - 1) });
        let magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0].map(|x| 0.5 * x);
        let number = |code: usize| if code < 8 { magnitudes[code] } else { -magnitudes[code - 8] };
        let expected: Vec<f32> = (0..16).chain((0..16).rev()).map(number).collect();
        assert_eq!(decode(&of(126, &|code| code | (15 - code) << 4)).to_vec(), expected);
        for (exponent, scale) in [(0, 2f32.powi(-127)), (1, 2f32.powi(-126)), (254, 2f32.powi(127))] {
            assert_eq!(decode(&of(exponent, &|_| 0x22)), [scale; 32], "{exponent}");
        }
        assert!(decode(&of(255, &|_| 0x22)).iter().all(|x| x.is_nan()));
    }
}
