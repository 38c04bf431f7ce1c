//! How numbers are stored: plain floats, and ggml's block quantisation.
//!
//! A *block* is the smallest run that can be decoded alone. Classic blocks hold 32 numbers,
//! `x = d·q (+ m)` with a scale `d` and, in the `_1` kinds, a minimum `m`; K blocks hold 256 in
//! sub-blocks of 16 or 32 that have small integer scales of their own, `x = (d·s)·q − d_min·s_min`.
//! Low and high nibbles of a byte belong to different halves of a run, never to neighbours.
//! (Layout: ggml's `ggml-common.h` and `ggml-quants.c`.)
//!
//! Whatever the block, it comes apart into codes `q`, and two numbers for each [`GROUP`] of them.

use super::blocks::{Form, GROUP, Has};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// The encodings that lowkey reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

impl Encoding {
    /// For error messages.
    pub const NAMES: &str = "F32, F16, BF16; in GGUF also Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K";

    /// Numbers and bytes of one block.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Encoding::F32 => (1, 4),
            Encoding::F16 | Encoding::BF16 => (1, 2),
            Encoding::Q4_0 => (32, 2 + 16),
            Encoding::Q4_1 => (32, 4 + 16),
            Encoding::Q5_0 => (32, 2 + 4 + 16),
            Encoding::Q5_1 => (32, 4 + 4 + 16),
            Encoding::Q8_0 => (32, 2 + 32),
            Encoding::Q4K => (256, 4 + 12 + 128),
            Encoding::Q5K => (256, 4 + 12 + 32 + 128),
            Encoding::Q6K => (256, 128 + 64 + 16 + 2),
        }
    }

    /// Whether decoding yields numbers that are *defined* by their rounding to f16.
    pub const fn is_quantised(self) -> bool {
        self.block().0 > 1
    }

    /// What its blocks come apart into; `None` where numbers are plain floats.
    pub const fn form(self) -> Option<Form> {
        let (bits, has) = match self {
            Encoding::F32 | Encoding::F16 | Encoding::BF16 => return None,
            Encoding::Q4_0 => (4, Has::Scale),
            Encoding::Q4_1 | Encoding::Q4K => (4, Has::Minimum),
            Encoding::Q5_0 => (5, Has::Scale),
            Encoding::Q5_1 | Encoding::Q5K => (5, Has::Minimum),
            Encoding::Q6K => (6, Has::Scales),
            Encoding::Q8_0 => (8, Has::Scale),
        };
        Some(Form { bits, has })
    }

    /// Numbers in so many bytes.
    pub const fn numbers(self, bytes: usize) -> usize {
        bytes / self.block().1 * self.block().0
    }

    /// Bytes of so many numbers.
    pub const fn bytes(self, numbers: usize) -> usize {
        numbers / self.block().0 * self.block().1
    }

    /// Decodes whole blocks; `out` has [`numbers`](Self::numbers)`(bytes.len())` places.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Encoding::F32 => {
                for (x, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *x = f32::from_le_bytes(*b);
                }
            }
            Encoding::F16 => {
                let halves: Vec<f16> = bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b)).collect();
                halves.convert_to_f32_slice(out);
            }
            Encoding::BF16 => {
                for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *x = bf16::from_le_bytes(*b).to_f32();
                }
            }
            _ => {
                let (mut codes, mut groups) = (vec![0; out.len()], vec![[0f32; 2]; out.len() / GROUP]);
                self.unpack(bytes, &mut codes, &mut groups);
                if let Some(form) = self.form() {
                    form.decode(&codes, &groups, out);
                }
            }
        }
    }

    /// Takes whole blocks apart: the code of every number, and two numbers for every [`GROUP`].
    ///
    /// Plain floats have no codes.
    pub fn unpack(self, bytes: &[u8], codes: &mut [u8], groups: &mut [[f32; 2]]) {
        match self {
            Encoding::F32 | Encoding::F16 | Encoding::BF16 => {}
            Encoding::Q4_0 => blocks(bytes, codes, groups, q4_0),
            Encoding::Q4_1 => blocks(bytes, codes, groups, q4_1),
            Encoding::Q5_0 => blocks(bytes, codes, groups, q5_0),
            Encoding::Q5_1 => blocks(bytes, codes, groups, q5_1),
            Encoding::Q8_0 => blocks(bytes, codes, groups, q8_0),
            Encoding::Q4K => blocks(bytes, codes, groups, q4_k),
            Encoding::Q5K => blocks(bytes, codes, groups, q5_k),
            Encoding::Q6K => blocks(bytes, codes, groups, q6_k),
        }
    }
}

fn blocks<const BYTES: usize, const NUMBERS: usize, const GROUPS: usize>(
    bytes: &[u8],
    codes: &mut [u8],
    groups: &mut [[f32; 2]],
    unpack: impl Fn(&[u8; BYTES], &mut [u8; NUMBERS]) -> [[f32; 2]; GROUPS],
) {
    let places = codes.as_chunks_mut::<NUMBERS>().0.iter_mut().zip(groups.as_chunks_mut::<GROUPS>().0);
    for (block, (codes, groups)) in bytes.as_chunks::<BYTES>().0.iter().zip(places) {
        *groups = unpack(block, codes);
    }
}

/// The f16 at byte `at`.
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The nibbles of a block of 32, the low ones first.
fn nibbles(bytes: &[u8], codes: &mut [u8; 32]) {
    for (i, byte) in bytes.iter().enumerate() {
        codes[i] = byte & 15;
        codes[i + 16] = byte >> 4;
    }
}

/// The fifth bits of a block of 32, one per number.
fn fifth_bits(block: &[u8], at: usize, codes: &mut [u8; 32]) {
    let fifth = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    codes.iter_mut().enumerate().for_each(|(i, code)| *code |= ((fifth >> i & 1) << 4) as u8);
}

fn q4_0(block: &[u8; 18], codes: &mut [u8; 32]) -> [[f32; 2]; 1] {
    nibbles(&block[2..], codes);
    [[half(block, 0), 0.0]]
}

fn q4_1(block: &[u8; 20], codes: &mut [u8; 32]) -> [[f32; 2]; 1] {
    nibbles(&block[4..], codes);
    [[half(block, 0), half(block, 2)]]
}

fn q5_0(block: &[u8; 22], codes: &mut [u8; 32]) -> [[f32; 2]; 1] {
    nibbles(&block[6..], codes);
    fifth_bits(block, 2, codes);
    [[half(block, 0), 0.0]]
}

fn q5_1(block: &[u8; 24], codes: &mut [u8; 32]) -> [[f32; 2]; 1] {
    nibbles(&block[8..], codes);
    fifth_bits(block, 4, codes);
    [[half(block, 0), half(block, 2)]]
}

/// Codes are signed there; here they count from -128.
fn q8_0(block: &[u8; 34], codes: &mut [u8; 32]) -> [[f32; 2]; 1] {
    codes.iter_mut().zip(&block[2..]).for_each(|(code, byte)| *code = byte ^ 128);
    [[half(block, 0), 0.0]]
}

/// Scale and minimum of sub-block `j` of eight, six bits each, in twelve bytes: the first four
/// stand in the low bits of bytes 0 to 7, the other four are put together from the nibbles of bytes
/// 8 to 11 and the top bits of bytes 0 to 7.
fn scale_and_minimum(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, minimum) = match j < 4 {
        true => (packed[j] & 63, packed[j + 4] & 63),
        false => (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4),
    };
    (scale as f32, minimum as f32)
}

/// What sub-blocks of 32 have, at the beginning of a block.
fn sub_blocks(block: &[u8]) -> [[f32; 2]; 8] {
    let (d, d_min) = (half(block, 0), half(block, 2));
    std::array::from_fn(|j| {
        let (scale, minimum) = scale_and_minimum(&block[4..16], j);
        [d * scale, -(d_min * minimum)]
    })
}

fn q4_k(block: &[u8; 144], codes: &mut [u8; 256]) -> [[f32; 2]; 8] {
    for (i, code) in codes.iter_mut().enumerate() {
        let j = i / 32;
        *code = block[16 + j / 2 * 32 + i % 32] >> (j % 2 * 4) & 15;
    }
    sub_blocks(block)
}

fn q5_k(block: &[u8; 176], codes: &mut [u8; 256]) -> [[f32; 2]; 8] {
    for (i, code) in codes.iter_mut().enumerate() {
        let j = i / 32;
        *code = block[48 + j / 2 * 32 + i % 32] >> (j % 2 * 4) & 15 | (block[16 + i % 32] >> j & 1) << 4;
    }
    sub_blocks(block)
}

fn q6_k(block: &[u8; 210], codes: &mut [u8; 256]) -> [[f32; 2]; 8] {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half(block, 208);
    for (i, code) in codes.iter_mut().enumerate() {
        // Each half of 128 has 64 bytes of low nibbles and 32 bytes of high pairs; `run` counts its
        // four runs of 32.
        let (side, run, l) = (i / 128, i / 32 % 4, i % 32);
        let nibble = low[side * 64 + run % 2 * 32 + l] >> (run / 2 * 4) & 15;
        let pair = high[side * 32 + l] >> (run * 2) & 3;
        *code = nibble | pair << 4;
    }
    std::array::from_fn(|j| [0, 1].map(|half| d * f32::from(scales[2 * j + half] as i8)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(encoding: Encoding, bytes: &[u8]) -> Vec<f32> {
        assert_eq!(bytes.len(), encoding.block().1);
        let mut out = vec![f32::NAN; encoding.block().0];
        encoding.decode(bytes, &mut out);
        out
    }

    fn half_bytes(x: f32) -> [u8; 2] {
        f16::from_f32(x).to_le_bytes()
    }

    #[test]
    fn nibbles_of_a_byte_are_sixteen_apart() {
        let mut q4_0 = half_bytes(0.5).to_vec();
        q4_0.extend([0x98; 16]);
        q4_0[2 + 3] = 0x0f;
        let out = decode(Encoding::Q4_0, &q4_0);
        assert_eq!((out[0], out[16], out[3], out[19]), (0.0, 0.5, 3.5, -4.0));

        let mut q4_1 = [half_bytes(0.25), half_bytes(-1.0)].concat();
        q4_1.extend([0x10; 16]);
        q4_1[4 + 15] = 0xf2;
        let out = decode(Encoding::Q4_1, &q4_1);
        assert_eq!((out[0], out[16], out[15], out[31]), (-1.0, -0.75, -0.5, 2.75));
    }

    #[test]
    fn fifth_bits_count_from_the_lowest() {
        let mut q5_0 = half_bytes(2.0).to_vec();
        q5_0.extend((1u32 << 5 | 1 << 30).to_le_bytes());
        q5_0.extend([0x21; 16]);
        let out = decode(Encoding::Q5_0, &q5_0);
        assert_eq!((out[4], out[5], out[29], out[30]), (-30.0, 2.0, -28.0, 4.0));

        let mut q5_1 = [half_bytes(0.5), half_bytes(3.0)].concat();
        q5_1.extend((1u32 << 0 | 1 << 16).to_le_bytes());
        q5_1.extend([0x21; 16]);
        let out = decode(Encoding::Q5_1, &q5_1);
        assert_eq!((out[0], out[1], out[16], out[17]), (11.5, 3.5, 12.0, 4.0));
    }

    #[test]
    fn q8_0_is_signed() {
        let mut block = half_bytes(0.125).to_vec();
        block.extend((0..32).map(|i| (i - 16) as u8));
        let expected: Vec<f32> = (0..32).map(|i| 0.125 * (i - 16) as f32).collect();
        assert_eq!(decode(Encoding::Q8_0, &block), expected);
    }

    /// Scales 1 to 8 and minima 33 to 40 of the eight sub-blocks, packed by hand: six bits each.
    fn packed_scales() -> [u8; 12] {
        let (scales, minima) = ([1u8, 2, 3, 4, 5, 6, 7, 8], [33u8, 34, 35, 36, 37, 38, 39, 40]);
        let mut packed = [0; 12];
        for j in 0..4 {
            packed[j] = scales[j] | scales[j + 4] >> 4 << 6;
            packed[j + 4] = minima[j] | minima[j + 4] >> 4 << 6;
            packed[j + 8] = scales[j + 4] & 15 | (minima[j + 4] & 15) << 4;
        }
        packed
    }

    #[test]
    fn k_blocks_have_a_scale_and_a_minimum_for_every_32() {
        let head = [half_bytes(0.5).to_vec(), half_bytes(0.25).to_vec(), packed_scales().to_vec()].concat();
        let value = |j: usize, q: f32| 0.5 * (j as f32 + 1.0) * q - 0.25 * (33.0 + j as f32);

        let mut q4 = head.clone();
        q4.extend((0..128).map(|i| (i % 16) as u8 + 16 * (15 - i % 16) as u8));
        let out = decode(Encoding::Q4K, &q4);
        for (i, x) in out.iter().enumerate() {
            let (j, l) = (i / 32, i % 16);
            let q = if j % 2 == 0 { l } else { 15 - l };
            assert_eq!(*x, value(j, q as f32), "{i}");
        }

        let mut q5 = head;
        q5.extend((0..32).map(|l| if l == 7 { 0b1010_0101 } else { 0 }));
        q5.extend([0x43; 128]);
        let out = decode(Encoding::Q5K, &q5);
        for (i, x) in out.iter().enumerate() {
            let (j, l) = (i / 32, i % 32);
            let fifth = if l == 7 && [0, 2, 5, 7].contains(&j) { 16.0 } else { 0.0 };
            assert_eq!(*x, value(j, if j % 2 == 0 { 3.0 } else { 4.0 } + fifth), "{i}");
        }
    }

    #[test]
    fn q6_k_puts_four_runs_into_one_pair_byte() {
        let mut block = vec![0u8; 210];
        block[..128].fill(0x52);
        block[128..192].fill(0b11_10_01_00);
        (0..16).for_each(|i| block[192 + i] = (i as i8 - 8) as u8);
        block[208..].copy_from_slice(&half_bytes(0.5));
        for (i, x) in decode(Encoding::Q6K, &block).iter().enumerate() {
            let run = i / 32 % 4;
            let q = [2, 2 + 16, 5 + 32, 5 + 48][run] as f32 - 32.0;
            assert_eq!(*x, 0.5 * (i as f32 / 16.0).floor() * q - 4.0 * q, "{i}");
        }
    }
}
