//! **Selective reconstruction**, of xKV (Chang et al., arXiv 2503.18893), after ShadowKV (Sun et
//! al., arXiv 2410.21465): for each key/value head the chunks whose landmarks its queries score
//! highest, `ln softmax(q·landmark/√d)` and the largest of the query heads that share it.
//!
//! Otherwise than there: a chunk is two tokens with a landmark in four bits, not eight with one in
//! f16. That takes about as many bytes (18 for 64 numbers of a token, for 16.5) and finds the right
//! tokens nearly as well as if every key were looked at (docs/results/2026-11-26-prompt.md). Two
//! keys have hardly an outlier among them, so there are no outlier chunks that are always read.
//! Landmarks are kept for every chunk, also of tokens that are generated.

use super::{highest, log_sum};

/// Of one key/value head.
pub(super) fn choose(most: usize, dots: &[Vec<f32>]) -> Vec<usize> {
    let mut scores = vec![f32::NEG_INFINITY; dots[0].len()];
    for dots in dots {
        let normaliser = log_sum(dots);
        scores.iter_mut().zip(dots).for_each(|(score, dot)| *score = score.max(dot - normaliser));
    }
    highest(most, &scores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_any_head_are_read() {
        let mut dots = vec![vec![0.0; 40], vec![0.0; 40]];
        // Ten apart in one head is as good as ten apart in a head whose scores are all higher.
        [3, 9, 30].iter().for_each(|&chunk| dots[0][chunk] = 10.0);
        dots[1].iter_mut().for_each(|dot| *dot += 100.0);
        [5, 9, 31].iter().for_each(|&chunk| dots[1][chunk] = 111.0);
        // Five are better than all others, and the first of the equal rest fills up.
        assert_eq!(choose(6, &dots), [0, 3, 5, 9, 30, 31]);
        assert_eq!(choose(6, &[vec![0.0; 6]]), [0, 1, 2, 3, 4, 5]);
    }
}
