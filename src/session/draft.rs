//! Drafts from the text itself: what followed when it last went like this. Answers that repeat
//! their prompt, as edits, summaries and code do, are then verified several tokens at a time.
//!
//! Known as prompt lookup decoding (Saxena, 2023), and from LLMA (Yang et al., arXiv 2304.04487).
//! A draft never changes the text: what the model would not have said is taken back.

/// The longest end of the text that is looked for, and the shortest that counts.
const LONGEST: usize = 8;
const SHORTEST: usize = 2;

/// Drafts for one answer.
pub(super) struct Drafter {
    /// Prompt and answer so far.
    text: Vec<u32>,
    /// The longest draft.
    most: usize,
    /// How long the next one may be: two more after one that came true, one less after one that did
    /// not, as Hugging Face's assisted generation has it.
    length: usize,
}

impl Drafter {
    /// Drafts of up to `most` tokens; `None` for none.
    pub fn new(prompt: &[u32], most: usize) -> Option<Drafter> {
        (most > 0).then(|| Drafter { text: prompt.to_vec(), most, length: most })
    }

    /// `token` has come.
    pub fn push(&mut self, token: u32) {
        self.text.push(token);
    }

    /// What may come next, at most `room` tokens.
    pub fn draft(&self, room: usize) -> &[u32] {
        let end = self.text.len();
        // The newest of the longest matches, by where it ends.
        let mut best = (SHORTEST - 1, end);
        for at in (1..end).rev() {
            let ends = self.text[..at].iter().rev().zip(self.text.iter().rev());
            let length = ends.take(LONGEST).take_while(|(a, b)| a == b).count();
            if length > best.0 {
                best = (length, at);
                if length == LONGEST {
                    break;
                }
            }
        }
        &self.text[best.1..end.min(best.1 + room.min(self.length))]
    }

    /// Of a draft of `drafted` tokens so many came true.
    pub fn learn(&mut self, drafted: usize, accepted: usize) {
        self.length = if accepted == drafted { self.most.min(self.length + 2) } else { self.length.saturating_sub(1).max(1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_the_longest_matches_goes_on() {
        let drafter = |text: &[u32]| Drafter::new(text, 3).unwrap();
        // Both times that 1 2 was there before; the longer match wins over the newer.
        assert_eq!(drafter(&[1, 2, 3, 4, 1, 2, 5, 1, 2]).draft(9), [5, 1, 2]);
        assert_eq!(drafter(&[9, 1, 2, 3, 4, 0, 1, 2, 5, 9, 1, 2]).draft(2), [3, 4]);
        // One token alone is no match, nor is nothing.
        assert_eq!(drafter(&[1, 2, 1]).draft(9), [0u32; 0]);
        assert_eq!(drafter(&[]).draft(9), [0u32; 0]);
        assert_eq!(drafter(&[7, 7, 7, 7]).draft(9), [7]);
        assert!(Drafter::new(&[1], 0).is_none());
    }

    #[test]
    fn drafts_grow_with_success_and_shrink_without() {
        let mut drafter = Drafter::new(&[1, 2, 3, 4, 5, 1, 2], 3).unwrap();
        for (drafted, accepted, left) in [(3, 1, 2), (2, 0, 1), (1, 0, 1), (1, 1, 3), (3, 3, 3)] {
            drafter.learn(drafted, accepted);
            assert_eq!(drafter.draft(9).len(), left);
        }
        drafter.push(3);
        assert_eq!(drafter.draft(9), [4, 5, 1]);
    }
}
