//! Quantised tensors as they are: codes, and two numbers for every 32 of them, whatever the blocks
//! are that a file has them in.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// Numbers that share a scale and a minimum, or two scales.
pub(super) const GROUP: usize = 32;

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
    /// Q8_0's.
    pub const Q8_0: Form = Form { bits: 8, has: Has::Scale };
    /// Q4_0's.
    pub const Q4_0: Form = Form { bits: 4, has: Has::Scale };

    /// The code of zero.
    const fn offset(self) -> u32 {
        1 << (self.bits - 1)
    }

    /// What codes and pairs of numbers stand for.
    pub(super) fn decode(self, codes: &[u8], groups: &[[f32; 2]], out: &mut [f32]) {
        let offset = self.offset() as f32;
        for ((codes, [first, second]), out) in codes.chunks_exact(GROUP).zip(groups.iter().copied()).zip(out.chunks_exact_mut(GROUP)) {
            for (i, (code, x)) in codes.iter().zip(out).enumerate() {
                let q = f32::from(*code);
                *x = match self.has {
                    Has::Scale => first * (q - offset),
                    Has::Minimum => first * q + second,
                    Has::Scales => [first, second][2 * i / GROUP] * (q - offset),
                };
            }
        }
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
    /// file's by less than a millionth of their mean square.
    pub groups: Vec<[f16; 2]>,
}

impl Blocks {
    /// Quantises numbers, in rows of whole groups, as ggml's Q8_0 and Q4_0 are: the largest of a
    /// group is met exactly, up to f16.
    ///
    /// # Panics
    /// Where there is no whole number of groups, and for forms with more than one scale.
    pub fn quantise(form: Form, numbers: &[f16]) -> Blocks {
        assert!(numbers.len().is_multiple_of(GROUP) && form.has == Has::Scale, "{} numbers as {form:?}", numbers.len());
        let (mut codes, mut groups) = (vec![0; numbers.len()], vec![[f16::ZERO; 2]; numbers.len() / GROUP]);
        let offset = form.offset() as f32;
        codes.par_chunks_exact_mut(GROUP).zip(&mut groups).zip(numbers.par_chunks_exact(GROUP)).for_each(|((codes, group), numbers)| {
            let mut wide = [0f32; GROUP];
            numbers.convert_to_f32_slice(&mut wide);
            let largest = wide.iter().copied().fold(0f32, |most, x| if x.abs() > most.abs() { x } else { most });
            // Of few bits the code furthest from zero is the lowest one, so it is the largest's.
            let scale = f16::from_f32(if form.bits == 8 { largest.abs() / (offset - 1.0) } else { -largest / offset });
            let inverse = if scale.to_f32() == 0.0 { 0.0 } else { 1.0 / scale.to_f32() };
            group[0] = scale;
            codes.iter_mut().zip(wide).for_each(|(code, x)| *code = (x * inverse + offset).round().clamp(0.0, 2.0 * offset - 1.0) as u8);
        });
        Blocks { form, codes, groups }
    }

    /// The numbers, rounded to f16.
    pub fn f16(&self) -> Vec<f16> {
        let groups: Vec<[f32; 2]> = self.groups.iter().map(|pair| pair.map(f16::to_f32)).collect();
        let mut wide = vec![0f32; self.codes.len()];
        self.form.decode(&self.codes, &groups, &mut wide);
        let mut numbers = vec![f16::ZERO; wide.len()];
        numbers.convert_from_f32_slice(&wide);
        numbers
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Random;

    #[test]
    fn quantised_numbers_are_near() {
        let mut random = Random::new(1);
        let mut numbers: Vec<f16> = (0..64 * GROUP).map(|_| f16::from_f64(random.gaussian() * 0.02)).collect();
        numbers[..GROUP].fill(f16::ZERO);
        for (form, most) in [(Form::Q8_0, 5e-5), (Form::Q4_0, 1.5e-2)] {
            let found = Blocks::quantise(form, &numbers).f16();
            assert!(found[..GROUP].iter().all(|x| *x == f16::ZERO));
            let square = |f: &dyn Fn(usize) -> f64| (0..numbers.len()).map(|i| f(i).powi(2)).sum::<f64>();
            let error = square(&|i| found[i].to_f64() - numbers[i].to_f64()) / square(&|i| numbers[i].to_f64());
            assert!(error < most && error > most / 10.0, "{form:?}: {error}");
        }
    }
}
