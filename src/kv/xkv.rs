//! How a prompt is compressed in bases of its own ([`crate::compress::xkv`]): options, and what
//! they come to in bytes.

use super::{Band, Budget, Coder, Format, Geometry, LatentSpec, RUN, Scale};
use crate::linalg::Moments;
use crate::{Error, Result};
use std::ops::Range;

/// How a prompt is compressed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Xkv {
    /// Consecutive layers that share a basis; the last group may have fewer.
    pub layers: usize,
    /// What a token of the prompt may take, over the whole model, its part of the bases included.
    pub budget: Budget,
    /// Bits of a coordinate, 16, 8 or 4, at ranks in the published proportion.
    ///
    /// `None` to let the spectrum say which coordinates get how many.
    pub bits: Option<u8>,
}

/// Ranks of keys and values stand to each other as one to this: 384 and 576 in the paper.
const VALUES_TO_KEYS: f64 = 1.5;

impl Xkv {
    /// Whether this can be done to a model of this shape.
    ///
    /// # Errors
    /// [`Error::Argument`] with what can be.
    pub fn check(&self, geometry: &Geometry) -> Result<()> {
        let refuse = |name: &str, message: String| Err(Error::Argument { name: name.into(), message });
        if self.layers == 0 {
            return refuse("group-layers", "groups of no layers; choose at least 1".into());
        }
        if self.bits.is_some_and(|bits| ![4, 8, 16].contains(&bits)) {
            return refuse("bits", format!("rows of {} bits; choose 4, 8 or 16, or leave it to the spectrum", self.bits.unwrap_or(0)));
        }
        if geometry.kv_heads * geometry.head_dim < RUN {
            return refuse("method", "keys and values are too narrow for xkv".into());
        }
        for group in self.groups(geometry) {
            let bytes = self.share(geometry, &group)?;
            if bytes <= least(self.bits) {
                return refuse("kv-bytes", format!("{bytes} bytes for layers {} to {} hold no row; allow more", group.start, group.end - 1));
            }
        }
        Ok(())
    }

    /// Whether a prompt of `tokens` tokens can be read so, into a sequence of `capacity`.
    ///
    /// # Errors
    /// As [`check`](Self::check), [`Error::Argument`] for an empty prompt and [`Error::Context`]
    /// for one that does not fit.
    pub fn check_prompt(&self, geometry: &Geometry, tokens: usize, capacity: usize) -> Result<()> {
        self.check(geometry)?;
        match tokens {
            0 => Err(Error::Argument { name: "prompt".into(), message: "it has no tokens".into() }),
            _ if tokens > capacity => Err(Error::Context { needed: tokens, capacity }),
            _ => Ok(()),
        }
    }

    /// In words.
    pub fn options(&self) -> String {
        let bits = self.bits.map_or("bits by spectrum".into(), |bits| format!("{bits} bits"));
        format!("groups of {}, {bits}", self.layers)
    }

    /// The layers of each group.
    pub fn groups(&self, geometry: &Geometry) -> Vec<Range<usize>> {
        let layers = geometry.layers;
        (0..layers).step_by(self.layers).map(|first| first..(first + self.layers).min(layers)).collect()
    }

    /// The prompt length from which it is worth it, as far as that can be known beforehand.
    ///
    /// The bases that go with the budget's rows take less than exact keys and values would beside
    /// these, and every row has room for some coordinates. With bits by the spectrum, for
    /// coordinates of three bits.
    ///
    /// # Errors
    /// [`Error::Argument`] where the budget is none.
    pub fn pays_from(&self, geometry: &Geometry) -> Result<usize> {
        let dense = geometry.dense_bytes_per_token();
        let rows = self.budget.bytes(dense)?;
        let (mut bases, mut room) = (0, 0);
        for group in self.groups(geometry) {
            let (bytes, width) = (self.share(geometry, &group)?, width(geometry, &group));
            let rank = match self.fixed(geometry, &group, bytes, usize::MAX) {
                Some(formats) => formats.iter().map(Format::rank).sum(),
                None => (8 * bytes as usize / 3).min(2 * width),
            };
            bases += basis_bytes(width, rank);
            room = room.max((basis_bytes(width, 2 * RUN) as u64).div_ceil(bytes.saturating_sub(least(self.bits)).max(1)));
        }
        Ok((bases as u64).div_ceil(dense.saturating_sub(rows).max(1)).max(room) as usize)
    }

    /// A group's part of the budget, bytes.
    pub(crate) fn share(&self, geometry: &Geometry, group: &Range<usize>) -> Result<u64> {
        Ok(self.budget.bytes(geometry.dense_bytes_per_token())? * group.len() as u64 / geometry.layers as u64)
    }

    /// Formats of keys and values at fixed bits, as many coordinates as `bytes` have room for with
    /// their part of the bases of a prompt of `tokens`; `None` where bits are not fixed.
    pub(crate) fn fixed(&self, geometry: &Geometry, group: &Range<usize>, bytes: u64, tokens: usize) -> Option<[Format; 2]> {
        let bits = self.bits?;
        let (width, tokens) = (width(geometry, group), tokens as f64);
        let scale = if bits < 16 { Scale::Affine } else { Scale::Fixed };
        let headers = if bits < 16 { 8.0 } else { 0.0 };
        let run = 2.0 * f64::from(bits) + basis_bytes(width, RUN) as f64 / tokens - basis_bytes(width, 0) as f64 / tokens;
        let most = width / RUN;
        let all = (((bytes as f64 - headers - basis_bytes(width, 0) as f64 / tokens) / run) as usize).clamp(2, 2 * most);
        let keys = ((all as f64 / (1.0 + VALUES_TO_KEYS)).round() as usize).clamp(all.saturating_sub(most).max(1), most.min(all - 1));
        Some([keys, all - keys].map(|runs| Format { bands: vec![Band { bits, runs }], scale }))
    }
}

/// What makes the bases: handed to the decoders, which read the prompt and code it.
pub trait PromptBases: Send + Sync {
    /// How the prompt is compressed.
    fn options(&self) -> &Xkv;

    /// Keys' row and values' row of a group of layers, from the `moments` of either (keys before
    /// RoPE) over a prompt of `tokens`.
    ///
    /// # Errors
    /// [`Error::Numeric`] where a prompt's keys or values are not finite.
    fn rows(&self, geometry: &Geometry, group: &Range<usize>, moments: [&Moments; 2], tokens: usize) -> Result<[(LatentSpec, Coder); 2]>;
}

/// Bytes that the rows of a group take at the least: a run and a header each.
fn least(bits: Option<u8>) -> u64 {
    2 * (2 * u64::from(bits.unwrap_or(2)) + 4)
}

/// Numbers of one side of a group's layers.
fn width(geometry: &Geometry, group: &Range<usize>) -> usize {
    group.len() * geometry.kv_heads * geometry.head_dim
}

/// Bytes of bases with so many coordinates in all, in f16, and the two means in f32.
pub(crate) fn basis_bytes(width: usize, rank: usize) -> usize {
    2 * width * rank + 2 * 4 * width
}
