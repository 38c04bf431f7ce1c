//! Quantised tensors as they are: codes, and two numbers for every 32 of them, whatever the blocks
//! are that a file has them in.

use super::ggml::GROUP;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// What the two numbers of 32 codes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Has {
    /// A scale, and nothing: `x = s·(q − 2^(bits − 1))`.
    Scale,
    /// A scale and a minimum: `x = s·q + m`.
    Minimum,
    /// A scale for each half, as with [`Scale`](Self::Scale).
    Scales,
}

/// How a tensor is quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// Bits of a code.
    pub bits: u32,
    /// What 32 of them have beside.
    pub has: Has,
}

impl Form {
    /// The code of zero, where there is no minimum.
    pub(super) const fn zero(self) -> f32 {
        match self.has {
            Has::Minimum => 0.0,
            Has::Scale | Has::Scales => (1 << (self.bits - 1)) as f32,
        }
    }

    /// A group's two numbers in f16.
    ///
    /// A minimum makes good what its scale's rounding does to the group's mean code; of the two
    /// roundings of the scale, that is taken with which the numbers of its `codes` are nearer.
    pub(super) fn round(self, codes: &[u8; GROUP], [first, second]: [f32; 2]) -> [f16; 2] {
        let nearest = f16::from_f32(first);
        if self.has != Has::Minimum || nearest.to_f32() == first || !nearest.is_finite() {
            return [nearest, f16::from_f32(second)];
        }
        let count = GROUP as f32;
        let mean = codes.iter().map(|code| f32::from(*code)).sum::<f32>() / count;
        let variance = codes.iter().map(|code| (f32::from(*code) - mean).powi(2)).sum::<f32>() / count;
        let beyond = f16::from_bits(if (nearest.to_f32() < first) == (first > 0.0) { nearest.to_bits() + 1 } else { nearest.to_bits() - 1 });
        let rounded = [nearest, beyond].map(|scale| {
            let error = first - scale.to_f32();
            let (wanted, minimum) = (second + error * mean, f16::from_f32(second + error * mean));
            (error * error * variance + (wanted - minimum.to_f32()).powi(2), [scale, minimum])
        });
        let [a, b] = rounded;
        if b.0 < a.0 { b.1 } else { a.1 }
    }

    /// A group's numbers by what they are: the scale of the first half of its codes, that of the
    /// second, and the minimum.
    #[inline(always)]
    pub(super) fn scales(self, [first, second]: [f32; 2]) -> [f32; 3] {
        match self.has {
            Has::Scale => [first, first, 0.0],
            Has::Minimum => [first, first, second],
            Has::Scales => [first, second, 0.0],
        }
    }

    /// What the codes of a group and its two numbers stand for.
    #[inline(always)]
    pub(super) fn run(self, codes: &[u8; GROUP], group: [f32; 2]) -> [f32; GROUP] {
        let (zero, [low, high, minimum]) = (self.zero(), self.scales(group));
        let mut run = [0f32; GROUP];
        let ((low_run, high_run), (low_codes, high_codes)) = (run.split_at_mut(GROUP / 2), codes.split_at(GROUP / 2));
        low_run.iter_mut().zip(low_codes).for_each(|(x, code)| *x = low * (f32::from(*code) - zero) + minimum);
        high_run.iter_mut().zip(high_codes).for_each(|(x, code)| *x = high * (f32::from(*code) - zero) + minimum);
        run
    }
}

/// Rows of a quantised tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Blocks {
    /// How they are quantised.
    pub form: Form,
    /// A byte for each number, row-major; rows are whole groups of 32.
    pub codes: Vec<u8>,
    /// Two numbers for every 32 codes.
    ///
    /// In f16, to which the products of K blocks' two scales are rounded: numbers differ from the
    /// file's by less than a millionth of their mean square, as scale and minimum are rounded
    /// together.
    pub groups: Vec<[f16; 2]>,
}

impl Blocks {
    /// The numbers, rounded to f16.
    pub fn f16(&self) -> Vec<f16> {
        let mut numbers = vec![f16::ZERO; self.codes.len()];
        let groups = self.codes.as_chunks().0.iter().zip(&self.groups);
        for (out, (codes, group)) in numbers.as_chunks_mut::<GROUP>().0.iter_mut().zip(groups) {
            out.convert_from_f32_slice(&self.form.run(codes, group.map(f16::to_f32)));
        }
        numbers
    }
}

/// What is done with every group of a row.
///
/// A trait and no closure, since it is to be inlined wherever it is called: only then is it made
/// for the instructions of its caller.
pub(super) trait Groups {
    /// Codes, and the two numbers of their group.
    fn group(&mut self, form: Form, codes: &[u8; GROUP], numbers: [f32; 2]);
}

/// The groups of blocks.
#[inline(always)]
pub(super) fn groups<const BYTES: usize, const NUMBERS: usize, const GROUPS: usize>(
    bytes: &[u8],
    form: Option<Form>,
    unpack: impl Fn(&[u8; BYTES], &mut [u8; NUMBERS]) -> [[f32; 2]; GROUPS],
    each: &mut impl Groups,
) {
    let Some(form) = form else { return };
    for block in bytes.as_chunks::<BYTES>().0 {
        let mut codes = [0; NUMBERS];
        let groups = unpack(block, &mut codes);
        for (codes, group) in codes.as_chunks::<GROUP>().0.iter().zip(groups) {
            each.group(form, codes, group);
        }
    }
}
