//! Which coded rows a token reads: all of them, or those that matter to it.
//!
//! **Selective reconstruction**, of xKV (Chang et al., arXiv 2503.18893), after ShadowKV (Sun et al., arXiv 2410.21465). To rebuild every key for every token costs more than to attend to them.
//! So coded tokens stand in chunks of eight; a chunk's *landmark* is the mean of its keys after RoPE, by layer and key/value head. A token that goes through the model alone scores the
//! landmarks, `ln softmax(q·landmark/√d)` for each query head and the largest of those that share a key/value head, and reads the chunks with the highest scores. Chunks whose landmark
//! says least about one of their keys (by the least cosine between the two) are always read. What is exact stays exact: sinks and the newest tokens.
//!
//! Otherwise than there: outliers are read from their codes like all others, not kept exactly beside them, since codes here are close to what they stand for; landmarks are kept for every
//! chunk, also of tokens that are generated; and several tokens at once (a prompt) read everything, as rebuilding is shared by their queries.

/// How many coded tokens a token reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selection {
    /// Tokens chosen by score, for each layer and key/value head: a multiple of [`CHUNK`](Self::CHUNK).
    pub tokens: usize,
}

impl Selection {
    /// Tokens that share a landmark.
    pub const CHUNK: usize = 8;
    /// More tokens than any model reads.
    pub const MOST: usize = 1 << 20;

    /// Chunks chosen by score.
    pub fn chunks(&self) -> usize {
        self.tokens / Self::CHUNK
    }

    /// Chunks that are read because their landmark is a bad one: 24 for every 1024 tokens that are chosen, as published.
    pub fn outliers(&self) -> usize {
        self.tokens * 24 / 1024
    }

    /// The most chunks that are read.
    pub fn most(&self) -> usize {
        self.chunks() + self.outliers()
    }

    /// The chunks that hold tokens `sinks..end`.
    pub fn range(sinks: usize, end: usize) -> std::ops::Range<usize> {
        sinks / Self::CHUNK..end.max(sinks).div_ceil(Self::CHUNK)
    }

    /// The chunks that are read, ascending: `dots` are by query head the scores `q·landmark/√d` of all chunks, `cosines` their least ones.
    pub fn choose(&self, dots: &[Vec<f32>], cosines: &[f32]) -> Vec<usize> {
        let count = cosines.len();
        if count <= self.most() {
            return (0..count).collect();
        }
        let mut scores = vec![f32::NEG_INFINITY; count];
        for dots in dots {
            let highest = dots.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let normaliser = highest + dots.iter().map(|dot| (dot - highest).exp()).sum::<f32>().ln();
            scores.iter_mut().zip(dots).for_each(|(score, dot)| *score = score.max(dot - normaliser));
        }
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by(|&a, &b| cosines[a].total_cmp(&cosines[b]));
        order[..self.outliers()].iter().for_each(|&outlier| scores[outlier] = f32::INFINITY);
        // Stable, so that among equals the earlier chunk comes first.
        order.sort_unstable();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(self.most());
        order.sort_unstable();
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_any_head_and_the_worst_landmarks_are_read() {
        let selection = Selection { tokens: 48 };
        assert_eq!((selection.chunks(), selection.outliers(), selection.most()), (6, 1, 7));
        let mut dots = vec![vec![0.0; 40], vec![0.0; 40]];
        // Ten apart in one head is as good as ten apart in a head whose scores are all higher.
        [3, 9, 30].iter().for_each(|&chunk| dots[0][chunk] = 10.0);
        dots[1].iter_mut().for_each(|dot| *dot += 100.0);
        [5, 9, 31].iter().for_each(|&chunk| dots[1][chunk] = 111.0);
        let mut cosines = vec![0.9; 40];
        cosines[20] = 0.1;
        // Five are better than all others, one is an outlier, and the first of the equal rest fills up.
        assert_eq!(selection.choose(&dots, &cosines), [0, 3, 5, 9, 20, 30, 31]);
        assert_eq!(selection.choose(&[vec![0.0; 7]], &[0.5; 7]), [0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn chunks_cover_the_coded_tokens() {
        assert_eq!(Selection::range(4, 64), 0..8);
        assert_eq!(Selection::range(9, 65), 1..9);
        assert!(Selection::range(4, 0).len() <= 1);
    }
}
