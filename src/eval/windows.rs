//! How a long text is cut into windows, and which predictions in each are scored.
//!
//! The model sees each window from an empty cache. A prediction is made *at* a position, having
//! seen the tokens up to and including it, and concerns the token after it: a window of `n` tokens
//! has `n - 1` predictions, at positions `0..n-1`.
//!
//! - The default scores every prediction of consecutive windows of 512.
//! - With a stride below the window, windows overlap and each prediction is scored once, in the
//!   first window that contains it; all but those of the first window then have at least
//!   `window - stride` tokens before them. This is Hugging Face's convention for strided
//!   perplexity.
//! - llama.cpp's `perplexity` scores the second half of each window only, at positions `n/2..n-1`:
//!   `score_from = n/2`. Where the model's tokenizer starts texts with a BOS token, it also puts
//!   that in place of each window's first token; [`crate::eval::run`] does so whenever it is given
//!   one.
//!
//! - With a `prefill`, the first tokens of each window are a prompt: they are run in one go, as a
//!   long prompt is before it is answered, and nothing is scored there. The rest is run in pieces
//!   of at most `chunk` tokens, so that a cache that shrinks what it holds after each call is seen
//!   at work.
//! - With a `skip`, the first window does not begin where the text does: so windows of several
//!   lengths can end at the same places ([`super::depth`]).
//!
//! What is left at the end of the text and is shorter than a window is dropped; a text that is
//! shorter than one window is that window.

use crate::{Error, Result};
use std::ops::Range;

/// How to cut a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windowing {
    /// Tokens the model sees at once.
    pub window: usize,
    /// Tokens from the start of a window to that of the next.
    pub stride: usize,
    /// The first position of a window whose prediction is scored.
    pub score_from: usize,
    /// Tokens at the start of a window that are its prompt.
    ///
    /// The first position that is scored is at or after its end.
    pub prefill: usize,
    /// The most tokens after the prompt that are run together.
    ///
    /// `None` for as many as suit the models.
    pub chunk: Option<usize>,
    /// How many tokens of the text to use; `None` for all.
    pub tokens: Option<usize>,
    /// How many of them stand before the first window.
    pub skip: usize,
}

impl Default for Windowing {
    fn default() -> Self {
        Windowing { window: 512, stride: 512, score_from: 0, prefill: 0, chunk: None, tokens: None, skip: 0 }
    }
}

/// One window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Its tokens, as a range of the text's.
    pub tokens: Range<usize>,
    /// How many of them, from the first, are the prompt.
    pub prefill: usize,
    /// The position, within the window, of the first prediction that is scored.
    pub score_from: usize,
}

/// Consecutive tokens of a window, run together: all are scored, or none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Their positions within the window.
    pub range: Range<usize>,
    /// Whether their predictions are scored.
    pub scored: bool,
}

impl Window {
    /// Tokens in it.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Never true: a window has at least two tokens.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Predictions scored.
    pub fn scored(&self) -> usize {
        self.len() - 1 - self.score_from
    }

    /// Cuts the window into its prompt, if it has one, and pieces of at most `size` tokens.
    ///
    /// The last token predicts nothing that could be scored, and is left out.
    pub fn pieces(&self, size: usize) -> impl Iterator<Item = Piece> {
        let (prefill, score_from, end) = (self.prefill, self.score_from, self.len() - 1);
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = next;
            let scored = start >= score_from;
            let limit = if scored { end } else { score_from };
            next = if start < prefill { prefill } else { limit.min(start.saturating_add(size.max(1))) };
            (start < end).then_some(Piece { range: start..next, scored })
        })
    }
}

impl Windowing {
    /// Cuts a text of `length` tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] where nothing would be scored, naming the option that is to blame.
    pub fn cut(&self, length: usize) -> Result<Vec<Window>> {
        let refuse = |name: &str, message: String| Err(Error::Argument { name: name.into(), message });
        if self.window < 2 {
            return refuse("window", format!("{} tokens hold no prediction; at least 2 are needed", self.window));
        }
        if self.stride == 0 {
            return refuse("stride", "0 would never reach the end of the text".into());
        }
        if self.chunk == Some(0) {
            return refuse("chunk", "0 tokens at a time would never reach the end of a window".into());
        }
        if let Some(tokens @ ..2) = self.tokens {
            return refuse("tokens", format!("{tokens} hold no prediction; at least 2 are needed"));
        }
        let length = length.min(self.tokens.unwrap_or(length)).saturating_sub(self.skip);
        if length < 2 {
            return refuse("text", format!("{length} tokens hold no prediction; at least 2 are needed"));
        }
        let window = self.window.min(length);
        if self.score_from >= window - 1 {
            return refuse("score-from", format!("no prediction is made at position {} of a window of {window} tokens", self.score_from));
        }
        if self.prefill >= window - 1 {
            return refuse("prefill", format!("after {} tokens of prompt, a window of {window} has no prediction left", self.prefill));
        }
        let score_from = self.score_from.max(self.prefill);
        let overlap = self.window.saturating_sub(self.stride);
        Ok((0..=length - window)
            .step_by(self.stride)
            .map(|start| Window {
                tokens: self.skip + start..self.skip + start + window,
                prefill: self.prefill,
                score_from: if start == 0 { score_from } else { score_from.max(overlap.saturating_sub(1)) },
            })
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text positions of all tokens whose predictions are scored.
    fn predicted(windowing: Windowing, length: usize) -> Vec<usize> {
        let windows = windowing.cut(length).unwrap();
        let scored: Vec<usize> = windows.iter().flat_map(|w| w.tokens.start + w.score_from + 1..w.tokens.end).collect();
        assert_eq!(scored.len(), windows.iter().map(Window::scored).sum::<usize>());
        scored
    }

    #[test]
    fn consecutive_windows_predict_all_but_their_first_tokens() {
        let windowing = Windowing { window: 4, stride: 4, ..Windowing::default() };
        assert_eq!(predicted(windowing, 11), [1, 2, 3, 5, 6, 7]);
        assert_eq!(predicted(Windowing { tokens: Some(4), ..windowing }, 11), [1, 2, 3]);
        assert_eq!(predicted(windowing, 3), [1, 2]);
    }

    #[test]
    fn what_stands_before_the_first_window_is_left_out() {
        let windowing = Windowing { window: 4, stride: 10, skip: 6, ..Windowing::default() };
        assert_eq!(predicted(windowing, 25), [7, 8, 9, 17, 18, 19]);
        assert_eq!(predicted(Windowing { tokens: Some(19), ..windowing }, 25), [7, 8, 9]);
        assert_eq!(predicted(Windowing { window: 4, stride: 2, skip: 3, ..Windowing::default() }, 9), [4, 5, 6, 7, 8]);
    }

    #[test]
    fn overlapping_windows_predict_each_token_once() {
        for (window, stride) in [(4, 2), (5, 1), (8, 3), (6, 6), (4, 3)] {
            let scored = predicted(Windowing { window, stride, ..Windowing::default() }, window + 5 * stride);
            if stride < window {
                assert_eq!(scored, (1..window + 5 * stride).collect::<Vec<_>>(), "window {window}, stride {stride}");
            }
            assert!(scored.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }

    #[test]
    fn the_second_half_is_scored_as_llama_cpp_does() {
        let windows = Windowing { score_from: 256, ..Windowing::default() }.cut(1100).unwrap();
        assert_eq!(windows.len(), 2);
        assert!(windows.iter().all(|w| w.scored() == 512 - 256 - 1));
    }

    #[test]
    fn a_prompt_is_one_piece_and_the_rest_is_cut() {
        let pieces = |windowing: Windowing, size| {
            let windows = Windowing { window: 12, stride: 12, ..windowing }.cut(12).unwrap();
            windows[0].pieces(size).map(|piece| (piece.range.start, piece.range.end, piece.scored)).collect::<Vec<_>>()
        };
        let plain = Windowing::default();
        assert_eq!(pieces(plain, 5), [(0, 5, true), (5, 10, true), (10, 11, true)]);
        assert_eq!(pieces(Windowing { score_from: 7, ..plain }, 5), [(0, 5, false), (5, 7, false), (7, 11, true)]);
        assert_eq!(pieces(Windowing { prefill: 7, ..plain }, 3), [(0, 7, false), (7, 10, true), (10, 11, true)]);
        assert_eq!(pieces(Windowing { prefill: 7, score_from: 9, ..plain }, 3), [(0, 7, false), (7, 9, false), (9, 11, true)]);
        assert_eq!(pieces(Windowing { prefill: 7, score_from: 2, ..plain }, usize::MAX), [(0, 7, false), (7, 11, true)]);
    }

    #[test]
    fn what_scores_nothing_is_refused_by_name() {
        let name = |windowing: Windowing, length| match windowing.cut(length) {
            Err(Error::Argument { name, .. }) => name,
            _ => "accepted".into(),
        };
        assert_eq!(name(Windowing { window: 1, ..Windowing::default() }, 100), "window");
        assert_eq!(name(Windowing { stride: 0, ..Windowing::default() }, 100), "stride");
        assert_eq!(name(Windowing { score_from: 511, ..Windowing::default() }, 1000), "score-from");
        assert_eq!(name(Windowing { score_from: 99, ..Windowing::default() }, 100), "score-from");
        assert_eq!(name(Windowing::default(), 1), "text");
        assert_eq!(name(Windowing { tokens: Some(0), ..Windowing::default() }, 100), "tokens");
        assert_eq!(name(Windowing { prefill: 511, ..Windowing::default() }, 1000), "prefill");
        assert_eq!(name(Windowing { prefill: 99, ..Windowing::default() }, 100), "prefill");
        assert_eq!(name(Windowing { chunk: Some(0), ..Windowing::default() }, 100), "chunk");
        assert_eq!(name(Windowing { skip: 99, ..Windowing::default() }, 100), "text");
        assert_eq!(name(Windowing { prefill: 510, ..Windowing::default() }, 1000), "accepted");
        assert_eq!(name(Windowing { score_from: 510, ..Windowing::default() }, 1000), "accepted");
    }
}
