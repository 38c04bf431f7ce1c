//! Weights of few bits, in the one form in which kernels read them, whatever a file's blocks are.
//!
//! A *group* is 32 weights of a row with a scale: `x = scale · (q − offset)`, or with a minimum
//! `x = scale · q + minimum`, or with a scale for each half of it. A matrix is planes: codes,
//! scales, and of 5 and 6 bits what is above the lowest four. A lane loads 16 bytes of codes.
//! Four neighbouring loads are a *set*, of two groups in bytes and of four in nibbles, and each has
//! eight weights of all the set's groups: load `v` has quads `v` and `v + 4` of the eight in a
//! group. So neighbouring lanes multiply neighbouring quads of a vector, which is read as fast as
//! it can be, and one load brings the scales of all that a lane has.
//!
//! Rows are padded to whole sets. What stands there does not matter: it is multiplied by zeros.

use half::f16;
use rayon::prelude::*;

/// Weights that share a scale.
pub const GROUP: usize = 32;

/// Loads of 16 bytes in a set.
const LOADS: usize = 4;

/// Bits of a weight, and what a group has beside its codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Quantised {
    /// 4 bits and a scale: 4.5 bits a weight.
    Q4,
    /// 4 bits, a scale and a minimum: 5.
    Q4Minimum,
    /// 5 bits and a scale: 5.5.
    Q5,
    /// 5 bits, a scale and a minimum: 6.
    Q5Minimum,
    /// 6 bits and a scale for every 16: 7.
    Q6,
    /// 8 bits and a scale: 8.5.
    Q8,
}

/// What a group has: two numbers, or the first of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Has {
    Scale,
    Minimum,
    Scales,
}

impl Quantised {
    /// All of them.
    pub const ALL: [Quantised; 6] = [Quantised::Q4, Quantised::Q4Minimum, Quantised::Q5, Quantised::Q5Minimum, Quantised::Q6, Quantised::Q8];

    /// What it is called: `q4`, and `q4m` with a minimum.
    pub const fn name(self) -> &'static str {
        match self {
            Quantised::Q4 => "q4",
            Quantised::Q4Minimum => "q4m",
            Quantised::Q5 => "q5",
            Quantised::Q5Minimum => "q5m",
            Quantised::Q6 => "q6",
            Quantised::Q8 => "q8",
        }
    }

    /// Bits of a code.
    pub const fn bits(self) -> u32 {
        match self {
            Quantised::Q4 | Quantised::Q4Minimum => 4,
            Quantised::Q5 | Quantised::Q5Minimum => 5,
            Quantised::Q6 => 6,
            Quantised::Q8 => 8,
        }
    }

    const fn has(self) -> Has {
        match self {
            Quantised::Q4 | Quantised::Q5 | Quantised::Q8 => Has::Scale,
            Quantised::Q4Minimum | Quantised::Q5Minimum => Has::Minimum,
            Quantised::Q6 => Has::Scales,
        }
    }

    /// The code that stands for zero; none does where groups have a minimum.
    pub const fn offset(self) -> u32 {
        match self.has() {
            Has::Minimum => 0,
            Has::Scale | Has::Scales => 1 << (self.bits() - 1),
        }
    }

    /// The number of a code in a half of a group with such scales.
    pub fn number(self, code: u8, scales: [f16; 2], half: usize) -> f64 {
        let ([first, second], q) = (scales.map(f16::to_f64), f64::from(code) - f64::from(self.offset()));
        match self.has() {
            Has::Scale => first * q,
            Has::Minimum => first * q + second,
            Has::Scales => [first, second][half] * q,
        }
    }

    /// A set's scales with which codes at random stand for numbers of about this mean square root.
    pub fn like(self, size: f64) -> Vec<u32> {
        let codes = f64::from(1u32 << self.bits());
        let scale = f16::from_f64(size * 12f64.sqrt() / codes);
        let second = if self.has() == Has::Minimum { f16::from_f64(-scale.to_f64() * (codes - 1.0) / 2.0) } else { scale };
        vec![u32::from(scale.to_bits()) | u32::from(second.to_bits()) << 16; 4]
    }

    /// The flags by which shaders read it.
    pub(crate) const fn flags(self) -> &'static [&'static str] {
        match self {
            Quantised::Q4 => &["QUANTISED", "SINGLE"],
            Quantised::Q4Minimum => &["QUANTISED"],
            Quantised::Q5 => &["QUANTISED", "SINGLE", "FIVE"],
            Quantised::Q5Minimum => &["QUANTISED", "FIVE"],
            Quantised::Q6 => &["QUANTISED", "SIX"],
            Quantised::Q8 => &["QUANTISED", "SINGLE", "BYTES"],
        }
    }

    /// Groups of a set.
    const fn groups(self) -> usize {
        if self.bits() == 8 { 2 } else { 4 }
    }

    /// Weights of a set.
    pub const fn set(self) -> usize {
        self.groups() * GROUP
    }

    /// Loads of a row of so many weights.
    pub(crate) const fn loads(self, cols: usize) -> usize {
        LOADS * cols.div_ceil(self.set())
    }

    /// Words of a row of so many weights: codes, scales, upper bits.
    pub(super) const fn words(self, cols: usize) -> [usize; 3] {
        let sets = cols.div_ceil(self.set());
        let pairs = match self.has() {
            Has::Scale => self.groups() / 2,
            Has::Minimum | Has::Scales => self.groups(),
        };
        let upper = if self.bits() == 8 { 0 } else { self.bits() as usize - 4 };
        [4 * LOADS * sets, pairs * sets, upper * LOADS * sets]
    }
}

/// Rows of quantised weights in planes, each `[rows][words]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    /// Their type.
    pub kind: Quantised,
    /// Codes, scales and upper bits.
    pub(super) planes: [Vec<u32>; 3],
    /// Rows.
    pub rows: usize,
}

impl Packed {
    /// Packs codes `[rows][cols]`, each below two to the power of the type's bits, and scales
    /// `[rows][cols / 32]`, of which the type uses one or both.
    ///
    /// # Panics
    /// Where `cols` are not whole groups, or codes and scales not of as many rows.
    pub fn pack(kind: Quantised, codes: &[u8], scales: &[[f16; 2]], cols: usize) -> Packed {
        assert!(
            cols > 0 && cols.is_multiple_of(GROUP) && codes.len().is_multiple_of(cols) && scales.len() * GROUP == codes.len(),
            "groups of {cols}"
        );
        let (rows, [code_words, scale_words, upper_words]) = (codes.len() / cols, kind.words(cols));
        let mut planes = kind.words(cols).map(|words| vec![0; rows * words]);
        let [to_codes, to_scales, to_upper] = &mut planes;
        let places = to_codes.par_chunks_exact_mut(code_words).zip(to_scales.par_chunks_exact_mut(scale_words)).enumerate();
        if upper_words == 0 {
            places
                .for_each(|(row, (to_codes, to_scales))| kind.row(&codes[row * cols..][..cols], &scales[row * cols / GROUP..], to_codes, to_scales));
        } else {
            places.zip(to_upper.par_chunks_exact_mut(upper_words)).for_each(|((row, (to_codes, to_scales)), to_upper)| {
                let codes = &codes[row * cols..][..cols];
                kind.row(codes, &scales[row * cols / GROUP..], to_codes, to_scales);
                kind.upper(codes, to_upper);
            });
        }
        Packed { kind, planes, rows }
    }
}

impl Quantised {
    /// Where weight `k` of a row stands: its load, its group within the set, which of its two quads
    /// there, and its place in the quad.
    const fn place(self, k: usize) -> [usize; 4] {
        let (set, group, quad) = (k / self.set(), k / GROUP % self.groups(), k % GROUP / 4);
        [set * LOADS + quad % 4, group, quad / 4, k % 4]
    }

    /// Lowest four bits or bytes, and scales, of a row.
    fn row(self, codes: &[u8], scales: &[[f16; 2]], to_codes: &mut [u32], to_scales: &mut [u32]) {
        for (k, code) in codes.iter().enumerate() {
            let ([load, group, second, i], code) = (self.place(k), u32::from(*code));
            match self.bits() {
                8 => to_codes[4 * load + 2 * group + second] |= code << (8 * i),
                _ => to_codes[4 * load + group] |= (code & 15) << (8 * i + 4 * second),
            }
        }
        let bits = |number: f16| u32::from(number.to_bits());
        for (group, [first, other]) in scales[..codes.len() / GROUP].iter().enumerate() {
            match self.has() {
                Has::Scale => to_scales[group / 2] |= bits(*first) << (group % 2 * 16),
                Has::Minimum | Has::Scales => to_scales[group] = bits(*first) | bits(*other) << 16,
            }
        }
    }

    /// What is above the lowest four bits.
    ///
    /// A load's, of group and quad, are next to each other.
    fn upper(self, codes: &[u8], to: &mut [u32]) {
        let each = self.bits() as usize - 4;
        for (k, code) in codes.iter().enumerate() {
            let [load, group, second, i] = self.place(k);
            let at = each * (2 * group + second);
            to[each * load + at / 8] |= u32::from(code >> 4) << (8 * i + at % 8);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_are_as_large_as_is_said() {
        let bits = |kind: Quantised| 32.0 * kind.words(1024).iter().sum::<usize>() as f64 / 1024.0;
        assert_eq!(Quantised::ALL.map(bits), [4.5, 5.0, 5.5, 6.0, 7.0, 8.5]);
        // Half a set more.
        assert_eq!(Quantised::Q6.words(1024 + 32), [9 * 16, 9 * 4, 9 * 8]);
    }

    #[test]
    fn every_bit_has_a_place_of_its_own() {
        for kind in Quantised::ALL {
            let cols = 2 * kind.set();
            let all = |code: u8| Packed::pack(kind, &vec![code; cols], &vec![[f16::ZERO; 2]; cols / GROUP], cols).planes;
            let [codes, _, upper] = all((1u32.wrapping_shl(kind.bits()).wrapping_sub(1)) as u8);
            assert!(codes.iter().chain(&upper).all(|word| *word == u32::MAX), "{kind:?}");
            assert_eq!(32 * (codes.len() + upper.len()), kind.bits() as usize * cols);
        }
    }
}
