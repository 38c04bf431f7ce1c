//! Sixteen coordinates, and where their codes stand in a row.

use std::sync::LazyLock;

/// Coordinates that stand together.
pub const RUN: usize = 16;

/// What multiplies a run's codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleSource {
    /// Nothing.
    One,
    /// That byte of the header.
    Byte(usize),
    /// The two halves of that word of the header, step and least value; codes count steps.
    Affine(usize),
    /// The numbers of [`Blocks`](super::Blocks).
    Block,
}

/// Where one run's codes stand in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The word at which they begin.
    pub word: usize,
    /// Their width.
    pub bits: u8,
    /// Where lower and upper bits of codes are apart.
    ///
    /// Twice the word of the upper ones, plus one for its upper half.
    pub high: usize,
    /// What multiplies them.
    pub scale: ScaleSource,
}

impl Run {
    /// Whether codes are chosen together: their lower and upper bits are apart.
    pub(crate) fn trellis(&self) -> bool {
        self.bits < 8 && matches!(self.scale, ScaleSource::One | ScaleSource::Byte(_))
    }

    pub(super) fn put(&self, words: &mut [u32], i: usize, code: u32) {
        let bits = usize::from(self.bits);
        if !self.trellis() {
            words[self.word + i * bits / 32] |= code << (i * bits % 32);
            return;
        }
        words[self.word] |= (code & 3) << (2 * i);
        words[self.high / 2] |= (code >> 2) << (RUN * (self.high % 2) + i * (bits - 2));
    }

    /// A code that stands by itself.
    pub(super) fn take(&self, words: &[u32], i: usize) -> u32 {
        let bits = usize::from(self.bits);
        words[self.word + i * bits / 32] >> (i * bits % 32) & ((1u64 << bits) - 1) as u32
    }

    /// The word of lower bits of codes that are chosen together, and the upper bits of all.
    #[inline(always)]
    pub(super) fn parts(&self, words: &[u32]) -> [u32; 2] {
        let high = if self.bits > 2 { words[self.high / 2] >> (RUN * (self.high % 2)) } else { 0 };
        [words[self.word], high]
    }

    /// Codes of so many bits that stand one by one.
    #[inline(always)]
    pub(super) fn codes<const BITS: usize>(&self, words: &[u32]) -> [u32; RUN] {
        let words = &words[self.word..][..RUN * BITS / 32];
        std::array::from_fn(|i| words[i * BITS / 32] >> (i * BITS % 32) & ((1 << BITS) - 1))
    }

    /// What multiplies the run, where that is one number.
    #[inline(always)]
    pub(super) fn factor(&self, words: &[u32]) -> f32 {
        match self.scale {
            ScaleSource::Byte(byte) => SCALES[(words[0] >> (8 * byte) & 0xff) as usize],
            _ => 1.0,
        }
    }
}

/// The number of steps from the least value that is nearest to `z`.
pub(super) fn step_code(z: f32, least: f32, step: f32, bits: u8) -> u32 {
    ((z - least) / step).round().clamp(0.0, ((1u32 << bits) - 1) as f32) as u32
}

/// The scale of a byte of the header.
pub(super) fn scale_value(code: u32) -> f32 {
    ((code as f32 - 128.0) / 8.0).exp2()
}

static SCALES: LazyLock<[f32; 256]> = LazyLock::new(|| std::array::from_fn(|code| scale_value(code as u32)));
