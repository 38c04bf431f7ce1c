//! **ChunkKV** (Liu et al., arXiv 2502.00299): whole stretches of tokens, the same for all heads of
//! a layer, by the attention that they receive from all of its queries.
//!
//! Otherwise than there: the stretches are chosen anew for every token that is generated, by
//! landmarks, and none is dropped. A stretch is ten tokens, as published.

use super::{Selection, highest, log_sum};

impl Selection {
    /// Pairs of a stretch.
    pub(crate) const STRETCH: usize = 5;
}

const STRETCH: usize = Selection::STRETCH;

/// Of all query heads of a layer: as many whole stretches as fit, one at the least, by the mean of
/// their pairs' scores.
pub(super) fn choose(most: usize, dots: &[Vec<f32>]) -> Vec<usize> {
    let mut scores = vec![0.0f32; dots[0].len()];
    for dots in dots {
        let normaliser = log_sum(dots);
        scores.iter_mut().zip(dots).for_each(|(score, dot)| *score += (dot - normaliser).exp());
    }
    let means: Vec<f32> = scores.chunks(STRETCH).map(|stretch| stretch.iter().sum::<f32>() / stretch.len() as f32).collect();
    let pairs = |stretch: usize| stretch * STRETCH..((stretch + 1) * STRETCH).min(scores.len());
    highest((most / STRETCH).max(1), &means).into_iter().flat_map(pairs).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The attention of all heads counts, over whole stretches, of which the last may be short.
    #[test]
    fn whole_stretches_are_read() {
        let mut dots = vec![vec![0.0; 23]; 2];
        dots[0][7] = 9.0;
        (20..23).for_each(|pair| dots[1][pair] = 6.0);
        // More attention than the last stretch in all, less than it in the mean.
        (10..15).for_each(|pair| dots[1][pair] = 5.0);
        assert_eq!(choose(12, &dots), [5, 6, 7, 8, 9, 20, 21, 22]);
        assert_eq!(choose(4, &dots), [20, 21, 22]);
    }
}
