//! How a row's coordinates are packed into words.
//!
//! Coordinates come in runs of 16, sorted so that their precision falls: a [`Band`] is the runs of
//! one width. A row is, in words of 32 bits:
//!
//! - a header, where it has scales: for [`Scale::Band`] a byte for each band below 16 bits, in
//!   order, `2^((byte − 128)/8)`; for [`Scale::Affine`] two f16, the step in the lower half of a
//!   word and the least value in the upper; for [`Scale::Groups`] such a word for each group, in
//!   order; for [`Scale::Blocks`] what [`Blocks`] says;
//! - the bands, widest first, run by run. At 16 bits two f16 to a word; at 8 bits, and wherever
//!   steps are equal, codes from the lowest bits up. Else codes of 2 to 4 bits are [chosen
//!   together](super::trellis), and a run is the lower two bits of all its codes in one word, then
//!   at 4 bits the upper two in another; a band of 3 bits has the lower two of all its runs, then
//!   the highest bits of two runs to a word.

use super::blocks::Blocks;
use super::codebook::EIGHT_BITS;
use super::run::{RUN, Run, ScaleSource, scale_value, step_code};
use super::trellis;
use half::f16;
use pulp::{Arch, Simd, WithSimd};
use serde::{Deserialize, Serialize};

/// The runs of a row that share a width.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Band {
    /// Bits of a coordinate: 16, 8, 4, 3 or 2.
    pub bits: u8,
    /// How many runs of 16 coordinates.
    pub runs: usize,
}

/// What a row's codes are multiplied by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// One: the scale of every dimension is in the basis.
    Fixed,
    /// One number for each row and band: the band's root mean square, to an eighth of an octave.
    Band,
    /// Equal steps between the row's least and largest coordinate. One band, of 4 or 8 bits.
    Affine,
    /// Equal steps between the least and the largest coordinate of every group of runs. One band,
    /// of 2, 4 or 8 bits. Where a row is of several heads, each has as many runs as another.
    Groups {
        /// Runs of a group; the last may have fewer.
        runs: usize,
        /// Coordinates of a group are first cut to the magnitude that this share of them, in
        /// percent, is below: 100 for all.
        clip: u8,
    },
    /// Equal steps, coded and scaled block by block of tokens. One band, of 2, 4 or 8 bits.
    Blocks(Blocks),
}

/// How a row's coordinates are packed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Format {
    /// Widest first, each width once.
    pub bands: Vec<Band>,
    /// Their scales.
    pub scale: Scale,
}

impl Format {
    /// The most groups of a row.
    pub const MOST_GROUPS: usize = 16;

    /// `runs` runs of f16.
    pub fn half(runs: usize) -> Format {
        Format { bands: vec![Band { bits: 16, runs }], scale: Scale::Fixed }
    }

    /// Whether this can be packed at all.
    ///
    /// # Errors
    /// What is wrong, as the end of a sentence about the row.
    pub fn check(&self) -> Result<(), String> {
        if self.bands.is_empty() || self.bands.iter().any(|band| band.runs == 0 || band.runs > 1 << 16) {
            return Err("has no bands, an empty one or an endless one".into());
        }
        if let Some(band) = self.bands.iter().find(|band| ![2, 3, 4, 8, 16].contains(&band.bits)) {
            return Err(format!("has a band of {} bits; 2, 3, 4, 8 and 16 can be read", band.bits));
        }
        if !self.bands.is_sorted_by(|a, b| a.bits > b.bits) {
            return Err("has bands that are not sorted by width".into());
        }
        if self.scale == Scale::Affine && !(self.bands.len() == 1 && [4, 8].contains(&self.bands[0].bits)) {
            return Err("has affine scales, which take one band of 4 or 8 bits".into());
        }
        if let Scale::Groups { runs, clip } = self.scale {
            if !(self.bands.len() == 1 && [2, 4, 8].contains(&self.bands[0].bits)) {
                return Err("has scales by group, which take one band of 2, 4 or 8 bits".into());
            }
            if runs == 0 || self.bands[0].runs.div_ceil(runs) > Format::MOST_GROUPS || !(1..=100).contains(&clip) {
                return Err(format!("has groups of {runs} runs cut to {clip} percent; at most {} groups, and 1 to 100, can be", Format::MOST_GROUPS));
            }
        }
        if let Scale::Blocks(Blocks { tokens, heads, .. }) = self.scale {
            if !(self.bands.len() == 1 && [2, 4, 8].contains(&self.bands[0].bits)) {
                return Err("has scales by block, which take one band of 2, 4 or 8 bits".into());
            }
            if !tokens.is_power_of_two() || !(2..=Blocks::MOST).contains(&tokens) {
                return Err(format!("has blocks of {tokens} tokens; powers of two from 2 to {} can be", Blocks::MOST));
            }
            if heads == 0 || !self.bands[0].runs.is_multiple_of(heads) {
                return Err(format!("has {} runs for {heads} heads", self.bands[0].runs));
            }
        }
        Ok(())
    }

    /// Tokens that are coded together; one, but for [`Scale::Blocks`].
    pub fn block(&self) -> usize {
        if let Scale::Blocks(blocks) = self.scale { blocks.tokens } else { 1 }
    }

    /// Coordinates: a multiple of [`RUN`].
    pub fn rank(&self) -> usize {
        RUN * self.bands.iter().map(|band| band.runs).sum::<usize>()
    }

    /// Whether the coordinates of a row's heads are apart.
    ///
    /// Equally many of each, one head after the other.
    pub fn by_head(&self) -> bool {
        matches!(self.scale, Scale::Groups { .. } | Scale::Blocks(_))
    }

    /// Words of a row's header.
    pub fn header(&self) -> usize {
        match self.scale {
            Scale::Fixed => 0,
            Scale::Band => usize::from(self.bands.iter().any(|band| band.bits < 16)),
            Scale::Affine => 1,
            Scale::Groups { runs, .. } => self.bands[0].runs.div_ceil(runs),
            Scale::Blocks(blocks) => blocks.header(self.rank()),
        }
    }

    /// Words of a row.
    pub fn words(&self) -> usize {
        self.header() + self.bands.iter().map(|band| (band.runs * band.bits as usize).div_ceil(2)).sum::<usize>()
    }

    /// Where the runs stand, in the order of the coordinates.
    pub fn runs(&self) -> Vec<Run> {
        let (mut runs, mut word, mut byte) = (Vec::new(), self.header(), 0);
        for band in &self.bands {
            let scale = |i: usize| match self.scale {
                Scale::Band if band.bits < 16 => ScaleSource::Byte(byte),
                Scale::Affine => ScaleSource::Affine(0),
                Scale::Groups { runs, .. } => ScaleSource::Affine(i / runs),
                Scale::Blocks(_) => ScaleSource::Block,
                _ => ScaleSource::One,
            };
            let scales: Vec<ScaleSource> = (0..band.runs).map(scale).collect();
            byte += usize::from(band.bits < 16);
            let each = if band.bits == 3 { 1 } else { band.bits as usize / 2 };
            let high = |i: usize| match band.bits {
                3 => 2 * (word + band.runs) + i,
                4 => 2 * (word + i * each + 1),
                _ => 0,
            };
            runs.extend((0..band.runs).map(|i| Run { word: word + i * each, bits: band.bits, high: high(i), scale: scales[i] }));
            word += (band.runs * band.bits as usize).div_ceil(2);
        }
        runs
    }

    /// Packs coordinates `z: [block][rank]` into `words: [block][words]`.
    ///
    /// All of a [block](Self::block) at once.
    pub fn encode(&self, z: &[f32], words: &mut [u32]) {
        words.fill(0);
        let runs = self.runs();
        match self.scale {
            Scale::Affine => return self.encode_groups(z, &runs, runs.len(), 100, words),
            Scale::Groups { runs: group, clip } => return self.encode_groups(z, &runs, group, clip, words),
            Scale::Blocks(blocks) => return blocks.encode(z, &runs, words),
            Scale::Fixed | Scale::Band => {}
        }
        let (mut first, mut byte) = (0, 0);
        for band in &self.bands {
            let here = first..first + band.runs;
            first = here.end;
            let coordinates = &z[here.start * RUN..here.end * RUN];
            let mut scale = 1.0;
            if self.scale == Scale::Band && band.bits < 16 {
                let code = scale_code(coordinates);
                words[0] |= code << (8 * byte);
                byte += 1;
                scale = scale_value(code);
            }
            for (run, z) in runs[here].iter().zip(coordinates.chunks_exact(RUN)) {
                let codes: [u32; RUN] = match band.bits {
                    16 => std::array::from_fn(|i| u32::from(f16::from_f32(z[i]).to_bits())),
                    8 => std::array::from_fn(|i| ((z[i] / scale - EIGHT_BITS.0) / EIGHT_BITS.1).round().clamp(0.0, 255.0) as u32),
                    bits => trellis::encode(bits, &std::array::from_fn::<f32, RUN, _>(|i| z[i] / scale)),
                };
                codes.into_iter().enumerate().for_each(|(i, code)| run.put(words, i, code));
            }
        }
    }

    /// Packs in equal steps, with a least value and a step for every `group` of runs.
    fn encode_groups(&self, z: &[f32], runs: &[Run], group: usize, clip: u8, words: &mut [u32]) {
        for (index, (runs, z)) in runs.chunks(group).zip(z.chunks(group * RUN)).enumerate() {
            let bits = runs[0].bits;
            let (least, step) = affine(z, bits, clip);
            words[index] = u32::from(f16::from_f32(step).to_bits()) | u32::from(f16::from_f32(least).to_bits()) << 16;
            for (i, &z) in z.iter().enumerate() {
                runs[i / RUN].put(words, i % RUN, step_code(z, least, step, bits));
            }
        }
    }

    /// Unpacks rows `words: [tokens][words]` into coordinates `z: [tokens][rank]`.
    ///
    /// Whole [blocks](Self::block).
    pub fn decode(&self, words: &[u32], z: &mut [f32]) {
        let (runs, block) = (self.runs(), self.block());
        let tokens = words.chunks_exact(block * self.words()).zip(z.chunks_exact_mut(block * self.rank()));
        match self.scale {
            Scale::Blocks(blocks) => tokens.for_each(|(words, z)| blocks.decode(words, &runs, z)),
            _ => Arch::new().dispatch(Decode { runs: &runs, tokens }),
        }
    }
}

/// Unpacking of rows that are coded token by token, compiled for every instruction set.
struct Decode<'a, I> {
    runs: &'a [Run],
    tokens: I,
}

impl<'a, I: Iterator<Item = (&'a [u32], &'a mut [f32])>> WithSimd for Decode<'a, I> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let [two, three, four] = [2, 3, 4].map(trellis::levels);
        let (Ok(two), Ok(three), Ok(four)) = (<&[f32; 64]>::try_from(two), <&[f32; 128]>::try_from(three), <&[f32; 256]>::try_from(four)) else {
            unreachable!("levels of other widths");
        };
        for (words, z) in self.tokens {
            for (run, z) in self.runs.iter().zip(z.as_chunks_mut::<RUN>().0) {
                if run.trellis() {
                    let parts = run.parts(words);
                    let factor = run.factor(words);
                    match run.bits {
                        2 => trellis::decode(two, parts, factor, z),
                        3 => trellis::decode(three, parts, factor, z),
                        _ => trellis::decode(four, parts, factor, z),
                    }
                    continue;
                }
                let codes: [u32; RUN] = match run.bits {
                    4 => run.codes::<4>(words),
                    8 => run.codes::<8>(words),
                    16 => run.codes::<16>(words),
                    _ => run.codes::<2>(words),
                };
                *z = match (run.bits, run.scale) {
                    (_, ScaleSource::Affine(word)) => {
                        let [step, least] = [words[word], words[word] >> 16].map(|bits| f16::from_bits(bits as u16).to_f32());
                        codes.map(|code| least + step * code as f32)
                    }
                    (16, _) => codes.map(|code| f16::from_bits(code as u16).to_f32()),
                    _ => {
                        let factor = run.factor(words);
                        codes.map(|code| factor * (EIGHT_BITS.0 + EIGHT_BITS.1 * code as f32))
                    }
                };
            }
        }
    }
}

/// A band's root mean square in eighths of an octave, 128 for one.
fn scale_code(z: &[f32]) -> u32 {
    let square = z.iter().map(|z| z * z).sum::<f32>() / z.len() as f32;
    (128.0 + (4.0 * square.max(1e-12).log2()).round()).clamp(1.0, 255.0) as u32
}

/// The least coordinate and the step of codes, both as f16 will hold them. With `clip` below 100
/// percent, of coordinates cut to the magnitude that as many of them are below.
fn affine(z: &[f32], bits: u8, clip: u8) -> (f32, f32) {
    let bound = match clip {
        100.. => f32::INFINITY,
        _ => {
            let mut magnitudes: Vec<f32> = z.iter().map(|z| z.abs()).collect();
            let index = usize::from(clip) * z.len() / 100;
            *magnitudes.select_nth_unstable_by(index, f32::total_cmp).1
        }
    };
    let (low, high) = z.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &z| (low.min(z.max(-bound)), high.max(z.min(bound))));
    let half = |x: f32| f16::from_f32(x).to_f32();
    let least = half(low);
    (least, half((high - least) / ((1u32 << bits) - 1) as f32).max(f16::MIN_POSITIVE.to_f32()))
}

#[cfg(test)]
mod tests;
