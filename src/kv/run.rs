//! Sixteen coordinates, and where their codes stand in a row.

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

    pub(super) fn take(&self, words: &[u32], i: usize) -> u32 {
        let bits = usize::from(self.bits);
        if !self.trellis() {
            return words[self.word + i * bits / 32] >> (i * bits % 32) & ((1u64 << bits) - 1) as u32;
        }
        let high = words[self.high / 2] >> (RUN * (self.high % 2) + i * (bits - 2)) & ((1 << (bits - 2)) - 1);
        (words[self.word] >> (2 * i) & 3) | high << 2
    }
}

/// The number of steps from the least value that is nearest to `z`.
pub(super) fn step_code(z: f32, least: f32, step: f32, bits: u8) -> u32 {
    ((z - least) / step).round().clamp(0.0, ((1u32 << bits) - 1) as f32) as u32
}
