//! Which latents a token reads: all of them, or those that matter to it.
//!
//! To rebuild every key for every token costs more than to attend to them. So coded tokens stand in
//! pairs; a pair's *landmark* is the mean of its keys after RoPE, by layer and key/value head. A
//! token that goes through the model alone scores the landmarks, `q·landmark/√d` for each query
//! head, and a [`Selector`] says which pairs it reads. What is exact stays exact: sinks and the
//! newest tokens. Several tokens at once (a prompt) read everything, as rebuilding is shared by
//! their queries.

mod chunkkv;
mod shadowkv;

use super::{Band, Format, RUN, Scale};
use crate::{Error, Result};

/// How many coded tokens a token reads, and which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selection {
    /// Tokens chosen by score, for each layer and key/value head.
    ///
    /// A multiple of [`CHUNK`](Self::CHUNK).
    pub tokens: usize,
    /// By what.
    pub by: Selector,
}

/// What chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Selector {
    /// The likeliest pairs of each key/value head, as xKV does after ShadowKV.
    #[default]
    ShadowKv,
    /// The likeliest stretches of ten tokens, for all heads of a layer.
    ChunkKv,
}

impl Selector {
    /// All there are.
    pub const ALL: [Selector; 2] = [Selector::ShadowKv, Selector::ChunkKv];

    /// `shadowkv`, `chunkkv`.
    pub fn name(self) -> &'static str {
        match self {
            Selector::ShadowKv => "shadowkv",
            Selector::ChunkKv => "chunkkv",
        }
    }

    /// Whether all heads of a layer read the same tokens.
    pub fn shared(self) -> bool {
        self == Selector::ChunkKv
    }

    /// How many pairs it chooses where there are more than `most`.
    fn most(self, most: usize) -> usize {
        match self {
            Selector::ShadowKv => most,
            Selector::ChunkKv => (most / Selection::STRETCH).max(1) * Selection::STRETCH,
        }
    }

    /// The pairs of each of `kv_heads` heads, or the same for all, that are read of a layer's,
    /// ascending and at most `most`: `dots` are by query head the scores `q·landmark/√d` of all.
    fn choose(self, most: usize, dots: &[Vec<f32>], kv_heads: usize) -> Vec<Vec<usize>> {
        match self {
            Selector::ShadowKv => dots.chunks(dots.len() / kv_heads).map(|dots| shadowkv::choose(most, dots)).collect(),
            Selector::ChunkKv => vec![chunkkv::choose(most, dots); kv_heads],
        }
    }
}

impl std::str::FromStr for Selector {
    type Err = Error;

    fn from_str(s: &str) -> Result<Selector> {
        let all = || Selector::ALL.map(Selector::name).join(", ");
        let unknown = || Error::Argument { name: "select-by".into(), message: format!("{s:?} is none of {}", all()) };
        Selector::ALL.into_iter().find(|selector| selector.name() == s).ok_or_else(unknown)
    }
}

impl Selection {
    /// Tokens that share a landmark.
    pub const CHUNK: usize = 2;
    /// More tokens than any model reads.
    pub const MOST: usize = 1 << 20;

    /// Whether so many can be chosen.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub fn check(&self) -> Result<()> {
        let tokens = self.tokens;
        if tokens == 0 || !tokens.is_multiple_of(Self::CHUNK) || tokens > Self::MOST {
            let message = format!("{tokens} tokens; choose a multiple of {}, up to {}", Self::CHUNK, Self::MOST);
            return Err(Error::Argument { name: "select".into(), message });
        }
        Ok(())
    }

    /// Chunks that are read.
    pub fn chunks(&self) -> usize {
        self.tokens / Self::CHUNK
    }

    /// The tokens of a layer's and key/value head's list, where there are so many chunks.
    ///
    /// Some may be past the last token.
    pub fn listed(&self, chunks: usize) -> usize {
        Self::CHUNK * if chunks <= self.chunks() { chunks } else { self.by.most(self.chunks()) }
    }

    /// The chunks that hold tokens `sinks..end`.
    pub fn range(sinks: usize, end: usize) -> std::ops::Range<usize> {
        sinks / Self::CHUNK..end.max(sinks).div_ceil(Self::CHUNK)
    }

    /// Bytes of the landmarks of a head's keys, which are `head_dim` wide, for so many tokens.
    pub fn landmark_bytes(head_dim: usize, tokens: usize) -> usize {
        size_of::<u32>() * tokens.div_ceil(Self::CHUNK) * Self::format(head_dim).words()
    }

    /// How a landmark is packed, for each key/value head of `head_dim` numbers.
    ///
    /// What is left of the last run is its least number.
    pub fn format(head_dim: usize) -> Format {
        Format { bands: vec![Band { bits: 4, runs: head_dim.div_ceil(RUN) }], scale: Scale::Affine }
    }

    /// Packs a head's `landmark: [head_dim]` into `words`.
    pub fn pack(landmark: &[f32], words: &mut [u32]) {
        let least = landmark.iter().copied().fold(f32::INFINITY, f32::min);
        let padding = landmark.len().next_multiple_of(RUN) - landmark.len();
        Selection::format(landmark.len()).encode(&[landmark, &vec![least; padding]].concat(), words);
    }

    /// `q·landmark/√d`, of a packed landmark.
    #[cfg(test)]
    pub fn score(words: &[u32], query: &[f32]) -> f32 {
        let [step, least] = [words[0], words[0] >> 16].map(|bits| half::f16::from_bits(bits as u16).to_f32());
        let mut codes = 0.0;
        for (word, query) in words[1..].iter().zip(query.chunks(8)) {
            codes += query.iter().enumerate().map(|(i, q)| q * (word >> (4 * i) & 15) as f32).sum::<f32>();
        }
        (least * query.iter().sum::<f32>() + step * codes) / (query.len() as f32).sqrt()
    }

    /// The chunks of each key/value head that are read, ascending.
    ///
    /// `dots` are by query head the scores `q·landmark/√d` of all chunks.
    pub fn choose(&self, dots: &[Vec<f32>], kv_heads: usize) -> Vec<Vec<usize>> {
        let count = dots[0].len();
        if count <= self.chunks() {
            return vec![(0..count).collect(); kv_heads];
        }
        self.by.choose(self.chunks(), dots, kv_heads)
    }
}

/// The `most` highest, ascending: among equals the earlier ones.
fn highest(most: usize, scores: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    // Stable.
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order.truncate(most);
    order.sort_unstable();
    order
}

/// `ln Σ e^x`.
fn log_sum(dots: &[f32]) -> f32 {
    let highest = dots.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    highest + dots.iter().map(|dot| (dot - highest).exp()).sum::<f32>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A packed landmark is scored as what it unpacks to, which is within half a step of what it
    /// was.
    #[test]
    fn packed_landmarks_are_scored_as_they_are() {
        for head_dim in [6, 14, 64, 128] {
            let numbers = |seed: usize| (0..head_dim).map(|i| ((i * 37 + seed) as f32 * 0.71).sin() * 3.0).collect::<Vec<f32>>();
            let (landmark, query) = (numbers(1), numbers(5));
            let format = Selection::format(head_dim);
            let (mut words, mut back) = (vec![0; format.words()], vec![0.0; format.rank()]);
            Selection::pack(&landmark, &mut words);
            format.decode(&words, &mut back);
            assert!(landmark.iter().zip(&back).all(|(a, b)| (a - b).abs() < 6.1 / 15.0 / 2.0));
            let expected = query.iter().zip(&back).map(|(q, k)| q * k).sum::<f32>() / (head_dim as f32).sqrt();
            assert!((Selection::score(&words, &query) - expected).abs() < 1e-4, "{head_dim}");
        }
    }

    #[test]
    fn chunks_cover_the_coded_tokens() {
        assert_eq!(Selection::range(4, 64), 2..32);
        assert_eq!(Selection::range(9, 65), 4..33);
        assert!(Selection::range(4, 0).len() <= 1);
    }
}
