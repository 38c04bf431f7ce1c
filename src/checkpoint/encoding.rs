//! How numbers are stored: plain floats, and ggml's block quantisation.
//!
//! A *block* is the smallest run that can be decoded alone. Whatever it is ([`super::ggml`]), it
//! comes apart into codes `q`, and two numbers for each [`GROUP`] of them.

use super::blocks::{Form, Groups, Has, groups};
use super::ggml::{self, GROUP, f16_of};
use half::f16;
use pulp::{Arch, Simd, WithSimd};

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
    Mxfp4,
}

impl Encoding {
    /// For error messages.
    pub const NAMES: &str = "F32, F16, BF16; in GGUF also Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, MXFP4";

    /// Those of few bits.
    #[cfg(test)]
    pub const QUANTISED: [Encoding; 9] = [
        Encoding::Q4_0,
        Encoding::Q4_1,
        Encoding::Q5_0,
        Encoding::Q5_1,
        Encoding::Q8_0,
        Encoding::Q4K,
        Encoding::Q5K,
        Encoding::Q6K,
        Encoding::Mxfp4,
    ];

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
            Encoding::Mxfp4 => (32, 1 + 16),
        }
    }

    /// What GGUF calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Encoding::F32 => "F32",
            Encoding::F16 => "F16",
            Encoding::BF16 => "BF16",
            Encoding::Q4_0 => "Q4_0",
            Encoding::Q4_1 => "Q4_1",
            Encoding::Q5_0 => "Q5_0",
            Encoding::Q5_1 => "Q5_1",
            Encoding::Q8_0 => "Q8_0",
            Encoding::Q4K => "Q4_K",
            Encoding::Q5K => "Q5_K",
            Encoding::Q6K => "Q6_K",
            Encoding::Mxfp4 => "MXFP4",
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
            Encoding::Q5_0 | Encoding::Mxfp4 => (5, Has::Scale),
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
        Arch::new().dispatch(Decode { encoding: self, bytes, out });
    }

    /// The sum of products of the numbers in whole blocks with those of `x`, which are as many.
    pub fn dot(self, bytes: &[u8], x: &[f32]) -> f32 {
        Arch::new().dispatch(Dot { encoding: self, bytes, x })
    }

    /// Encodes numbers in whole blocks into `bytes`, which have [as many](Self::bytes) places.
    ///
    /// # Panics
    /// For types that lowkey does not write: those but floats of 16 and 32 bits, Q8_0 and Q4_0.
    pub fn encode(self, numbers: &[f32], bytes: &mut [u8]) {
        fn blocks<const N: usize, const BYTES: usize>(numbers: &[f32], bytes: &mut [u8], encode: impl Fn(&[f32; N], &mut [u8; BYTES])) {
            numbers.as_chunks().0.iter().zip(bytes.as_chunks_mut().0).for_each(|(numbers, block)| encode(numbers, block));
        }
        match self {
            Encoding::F32 => blocks(numbers, bytes, |[x], block| *block = x.to_le_bytes()),
            Encoding::F16 => blocks(numbers, bytes, |[x], block| *block = f16::from_f32(*x).to_le_bytes()),
            Encoding::Q8_0 => blocks(numbers, bytes, ggml::encode_q8_0),
            Encoding::Q4_0 => blocks(numbers, bytes, ggml::encode_q4_0),
            other => panic!("{} is not written", other.name()),
        }
    }

    /// Shows `each` the numbers of whole blocks, in runs of [`GROUP`]; what is left of plain floats
    /// after the last run is left out.
    #[inline(always)]
    fn runs(self, bytes: &[u8], each: &mut impl FnMut(&[f32; GROUP])) {
        match self {
            Encoding::F32 => floats(bytes, f32_of, each),
            Encoding::F16 => floats(bytes, f16_of, each),
            Encoding::BF16 => floats(bytes, bf16_of, each),
            quantised => quantised.groups(bytes, &mut Runs(each)),
        }
    }

    /// Shows `each` the groups of whole blocks, as they come apart; plain floats have none.
    #[inline(always)]
    pub fn groups(self, bytes: &[u8], each: &mut impl Groups) {
        match self {
            Encoding::F32 | Encoding::F16 | Encoding::BF16 => {}
            Encoding::Q4_0 => groups(bytes, Encoding::Q4_0.form(), ggml::q4_0, each),
            Encoding::Q4_1 => groups(bytes, Encoding::Q4_1.form(), ggml::q4_1, each),
            Encoding::Q5_0 => groups(bytes, Encoding::Q5_0.form(), ggml::q5_0, each),
            Encoding::Q5_1 => groups(bytes, Encoding::Q5_1.form(), ggml::q5_1, each),
            Encoding::Q8_0 => groups(bytes, Encoding::Q8_0.form(), ggml::q8_0, each),
            Encoding::Q4K => groups(bytes, Encoding::Q4K.form(), ggml::q4_k, each),
            Encoding::Q5K => groups(bytes, Encoding::Q5K.form(), ggml::q5_k, each),
            Encoding::Q6K => groups(bytes, Encoding::Q6K.form(), ggml::q6_k, each),
            Encoding::Mxfp4 => groups(bytes, Encoding::Mxfp4.form(), ggml::mxfp4, each),
        }
    }

    /// Plain float `index`; zero where there are none.
    #[inline(always)]
    fn float(self, bytes: &[u8], index: usize) -> f32 {
        match self {
            Encoding::F32 => f32_of(&bytes.as_chunks().0[index]),
            Encoding::F16 => f16_of(&bytes.as_chunks().0[index]),
            Encoding::BF16 => bf16_of(&bytes.as_chunks().0[index]),
            _ => 0.0,
        }
    }

    /// Takes whole blocks apart: the code of every number, and two numbers for every [`GROUP`].
    ///
    /// Plain floats have no codes.
    pub fn unpack(self, bytes: &[u8], codes: &mut [u8], groups: &mut [[f32; 2]]) {
        match self {
            Encoding::F32 | Encoding::F16 | Encoding::BF16 => {}
            Encoding::Q4_0 => blocks(bytes, codes, groups, ggml::q4_0),
            Encoding::Q4_1 => blocks(bytes, codes, groups, ggml::q4_1),
            Encoding::Q5_0 => blocks(bytes, codes, groups, ggml::q5_0),
            Encoding::Q5_1 => blocks(bytes, codes, groups, ggml::q5_1),
            Encoding::Q8_0 => blocks(bytes, codes, groups, ggml::q8_0),
            Encoding::Q4K => blocks(bytes, codes, groups, ggml::q4_k),
            Encoding::Q5K => blocks(bytes, codes, groups, ggml::q5_k),
            Encoding::Q6K => blocks(bytes, codes, groups, ggml::q6_k),
            Encoding::Mxfp4 => blocks(bytes, codes, groups, ggml::mxfp4),
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

/// Groups as the numbers they stand for.
struct Runs<'a, F>(&'a mut F);

impl<F: FnMut(&[f32; GROUP])> Groups for Runs<'_, F> {
    #[inline(always)]
    fn group(&mut self, form: Form, codes: &[u8; GROUP], numbers: [f32; 2]) {
        (self.0)(&form.run(codes, numbers));
    }
}

/// Plain floats, in runs.
#[inline(always)]
fn floats<const BYTES: usize>(bytes: &[u8], float: impl Fn(&[u8; BYTES]) -> f32, each: &mut impl FnMut(&[f32; GROUP])) {
    for run in bytes.as_chunks::<BYTES>().0.as_chunks::<GROUP>().0 {
        let mut numbers = [0f32; GROUP];
        numbers.iter_mut().zip(run).for_each(|(x, bytes)| *x = float(bytes));
        each(&numbers);
    }
}

#[inline(always)]
fn f32_of(bytes: &[u8; 4]) -> f32 {
    f32::from_le_bytes(*bytes)
}

#[inline(always)]
fn bf16_of(bytes: &[u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16)
}

struct Decode<'a> {
    encoding: Encoding,
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl WithSimd for Decode<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let count = self.out.len();
        let (runs, rest) = self.out.as_chunks_mut::<GROUP>();
        let first = count - rest.len();
        let mut runs = runs.iter_mut();
        self.encoding.runs(self.bytes, &mut |numbers| {
            if let Some(run) = runs.next() {
                *run = *numbers;
            }
        });
        rest.iter_mut().enumerate().for_each(|(i, x)| *x = self.encoding.float(self.bytes, first + i));
    }
}

struct Dot<'a> {
    encoding: Encoding,
    bytes: &'a [u8],
    x: &'a [f32],
}

impl WithSimd for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (runs, rest) = self.x.as_chunks::<GROUP>();
        let (mut runs, mut sums) = (runs.iter(), [simd.splat_f32s(0.0); 4]);
        self.encoding.runs(self.bytes, &mut |numbers| {
            let Some(run) = runs.next() else { return };
            let ((numbers, _), (run, _)) = (S::as_simd_f32s(numbers), S::as_simd_f32s(run));
            for (i, (a, b)) in numbers.iter().zip(run).enumerate() {
                sums[i % 4] = simd.mul_add_e_f32s(*a, *b, sums[i % 4]);
            }
        });
        let [a, b, c, d] = sums;
        let sum = simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)));
        let first = self.x.len() - rest.len();
        rest.iter().enumerate().fold(sum, |sum, (i, x)| sum + x * self.encoding.float(self.bytes, first + i))
    }
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
