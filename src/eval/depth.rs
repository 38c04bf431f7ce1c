//! Evaluation at depth: windows of several lengths, of each of which the last predictions are
//! scored.
//!
//! A window of `N` tokens is scored at its end, where a prediction has nearly `N` tokens before it:
//! its last 512 tokens, or all but the first where the window is no longer than that. Windows of
//! all depths end at the same places of the text, which are as far apart as the deepest window is
//! long. So the same tokens are predicted at every depth, and what differs between two depths is
//! how much the model has read, not the text.
//!
//! A text has at least one window of each depth, and of all depths as many.

use super::Windowing;
use super::score::ENOUGH;
use crate::{Error, Result};

/// The most tokens at the end of a window that are scored.
const SCORED: usize = 512;

/// How deep to look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Depths {
    /// Tokens of a window, for each depth.
    pub depths: Vec<usize>,
    /// How many tokens of a text to use at the deepest, but at least one window.
    ///
    /// `None` for as few windows as have the thousand predictions that a 99.9th percentile needs.
    pub tokens: Option<usize>,
}

impl Depths {
    /// The deepest; 0 where there are none.
    pub fn deepest(&self) -> usize {
        self.depths.iter().copied().max().unwrap_or(0)
    }

    /// How to cut texts of these names and tokens, for each depth, in their order.
    ///
    /// # Errors
    /// [`Error::Argument`] for a depth that has no prediction, for tokens without one, and for a
    /// text that is shorter than the deepest window.
    pub fn windowings(&self, texts: &[super::Text]) -> Result<Vec<Windowing>> {
        let refuse = |name: &str, message: String| Err(Error::Argument { name: name.into(), message });
        if let Some(depth @ ..2) = self.depths.iter().min() {
            return refuse("depths", format!("{depth} tokens hold no prediction; a depth is at least 2"));
        }
        if let Some(tokens @ ..2) = self.tokens {
            return refuse("tokens", format!("{tokens} hold no prediction; at least 2 are needed"));
        }
        let deepest = self.deepest();
        if let Some(text) = texts.iter().find(|text| text.tokens.len() < deepest) {
            let tokens = text.tokens.len();
            return refuse(
                "text",
                format!(
                    "{} has {tokens} tokens, and a window at depth {deepest} takes {deepest}; give a longer text, or depths up to {tokens}",
                    text.name
                ),
            );
        }
        let windows = self.tokens.map_or(ENOUGH.div_ceil(scored(deepest)), |tokens| (tokens / deepest).max(1));
        let windowing = |&window: &usize| Windowing {
            window,
            stride: deepest,
            score_from: window - 1 - scored(window),
            tokens: Some(windows.saturating_mul(deepest)),
            skip: deepest - window,
            ..Windowing::default()
        };
        Ok(self.depths.iter().map(windowing).collect())
    }

    /// Whether a model that was made for `trained` positions can be evaluated at all depths.
    ///
    /// # Errors
    /// [`Error::Argument`] where it cannot, with the depths that it can.
    pub fn check(&self, model: &str, trained: usize) -> Result<()> {
        let deepest = self.deepest();
        if deepest <= trained {
            return Ok(());
        }
        let message = format!(
            "{model} was trained for {trained} positions (max_position_embeddings), and a window at depth {deepest} has more; choose depths up to {trained}"
        );
        Err(Error::Argument { name: "depths".into(), message })
    }
}

/// Predictions that are scored in a window.
fn scored(window: usize) -> usize {
    SCORED.min(window.saturating_sub(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{Text, Window};

    fn text(tokens: usize) -> [Text; 1] {
        [Text { name: "the text".into(), tokens: vec![0; tokens] }]
    }

    /// For each depth and window, which of the text's tokens are predicted, and the first and last
    /// position in the window that predicts one.
    fn cut(depths: &[usize], tokens: Option<usize>, length: usize) -> Vec<Vec<[usize; 4]>> {
        let windowings = Depths { depths: depths.into(), tokens }.windowings(&text(length)).unwrap();
        let found = |w: &Window| [w.tokens.start + w.score_from + 1, w.tokens.end - 1, w.score_from, w.len() - 2];
        windowings.iter().map(|windowing| windowing.cut(length).unwrap().iter().map(found).collect()).collect()
    }

    #[test]
    fn the_last_512_tokens_of_a_window_are_scored_and_are_the_same_at_all_depths() {
        let found = cut(&[512, 4096, 1024], None, 100_000);
        // The first of 512 tokens has nothing before it.
        assert_eq!(found[0], [[3585, 4095, 0, 510], [7681, 8191, 0, 510]]);
        assert_eq!(found[1], [[3584, 4095, 3583, 4094], [7680, 8191, 3583, 4094]]);
        assert_eq!(found[2], [[3584, 4095, 511, 1022], [7680, 8191, 511, 1022]]);
    }

    #[test]
    fn tokens_bound_the_windows_but_for_one() {
        let count = |tokens, length| cut(&[100, 1000], tokens, length).iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(count(Some(5999), 100_000), [5, 5]);
        assert_eq!(count(Some(2), 100_000), [1, 1]);
        assert_eq!(count(Some(5999), 2500), [2, 2]);
        assert_eq!((count(None, 100_000), count(None, 1000)), (vec![2, 2], vec![1, 1]));
        // Sixteen windows of 64 tokens have 1,008 predictions.
        assert_eq!(cut(&[64], None, 100_000)[0].len(), 16);
        assert_eq!(cut(&[2], Some(6), 100)[0], [[1, 1, 0, 0], [3, 3, 0, 0], [5, 5, 0, 0]]);
    }

    #[test]
    fn what_is_too_short_is_refused_by_name() {
        let message = |depths: &[usize], tokens, length| Depths { depths: depths.into(), tokens }.windowings(&text(length)).unwrap_err().to_string();
        assert!(message(&[512, 4096], None, 4095).starts_with("text: the text has 4095 tokens"));
        assert!(message(&[512, 1], None, 4095).starts_with("depths: 1 "));
        assert!(message(&[512], Some(1), 4095).starts_with("tokens: 1 "));
        let depths = Depths { depths: vec![512, 8192], tokens: None };
        assert!(depths.check("m", 8192).is_ok());
        assert!(depths.check("m", 8191).unwrap_err().to_string().contains("m was trained for 8191"));
    }
}
