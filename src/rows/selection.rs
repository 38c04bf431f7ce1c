//! Which coded rows a token reads: all of them, or those that matter to it.
//!
//! **Selective reconstruction**, of xKV (Chang et al., arXiv 2503.18893), after ShadowKV (Sun et al., arXiv 2410.21465). To rebuild every key for every token costs more than to attend to them.
//! So coded tokens stand in chunks; a chunk's *landmark* is the mean of its keys after RoPE, by layer and key/value head. A token that goes through the model alone scores the
//! landmarks, `ln softmax(q·landmark/√d)` for each query head and the largest of those that share a key/value head, and reads the chunks with the highest scores. What is exact stays
//! exact: sinks and the newest tokens.
//!
//! Otherwise than there: a chunk is two tokens with a landmark in four bits, not eight with one in f16. That takes about as many bytes (18 for 64 numbers of a token, for 16.5) and finds the right tokens nearly as well as if every key were
//! looked at (docs/results/2026-11-26-prompt.md). Two keys have hardly an outlier among them, so there are no outlier chunks that are always read. Landmarks are kept for every chunk, also of
//! tokens that are generated; and several tokens at once (a prompt) read everything, as rebuilding is shared by their queries.

use super::{Band, Format, RUN, Scale};
use crate::{Error, Result};
use half::f16;

/// How many coded tokens a token reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selection {
    /// Tokens chosen by score, for each layer and key/value head: a multiple of [`CHUNK`](Self::CHUNK).
    pub tokens: usize,
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

    /// The chunks that hold tokens `sinks..end`.
    pub fn range(sinks: usize, end: usize) -> std::ops::Range<usize> {
        sinks / Self::CHUNK..end.max(sinks).div_ceil(Self::CHUNK)
    }

    /// How a landmark is packed, for each key/value head of `head_dim` numbers; what is left of the last run is its least number.
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
    pub fn score(words: &[u32], query: &[f32]) -> f32 {
        let [step, least] = [words[0], words[0] >> 16].map(|bits| f16::from_bits(bits as u16).to_f32());
        let mut codes = 0.0;
        for (word, query) in words[1..].iter().zip(query.chunks(8)) {
            codes += query.iter().enumerate().map(|(i, q)| q * (word >> (4 * i) & 15) as f32).sum::<f32>();
        }
        (least * query.iter().sum::<f32>() + step * codes) / (query.len() as f32).sqrt()
    }

    /// The chunks that are read, ascending: `dots` are by query head the scores `q·landmark/√d` of all chunks.
    pub fn choose(&self, dots: &[Vec<f32>]) -> Vec<usize> {
        let count = dots[0].len();
        if count <= self.chunks() {
            return (0..count).collect();
        }
        let mut scores = vec![f32::NEG_INFINITY; count];
        for dots in dots {
            let highest = dots.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let normaliser = highest + dots.iter().map(|dot| (dot - highest).exp()).sum::<f32>().ln();
            scores.iter_mut().zip(dots).for_each(|(score, dot)| *score = score.max(dot - normaliser));
        }
        let mut order: Vec<usize> = (0..count).collect();
        // Stable, so that among equals the earlier chunk comes first.
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(self.chunks());
        order.sort_unstable();
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_any_head_are_read() {
        let selection = Selection { tokens: 12 };
        assert_eq!(selection.chunks(), 6);
        let mut dots = vec![vec![0.0; 40], vec![0.0; 40]];
        // Ten apart in one head is as good as ten apart in a head whose scores are all higher.
        [3, 9, 30].iter().for_each(|&chunk| dots[0][chunk] = 10.0);
        dots[1].iter_mut().for_each(|dot| *dot += 100.0);
        [5, 9, 31].iter().for_each(|&chunk| dots[1][chunk] = 111.0);
        // Five are better than all others, and the first of the equal rest fills up.
        assert_eq!(selection.choose(&dots), [0, 3, 5, 9, 30, 31]);
        assert_eq!(selection.choose(&[vec![0.0; 6]]), [0, 1, 2, 3, 4, 5]);
    }

    /// A packed landmark is scored as what it unpacks to, which is within half a step of what it was.
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
