//! Stop strings: text that ends an answer, wherever token boundaries fall.
//!
//! A stop string may arrive in pieces. So the end of the text that could still become one is held
//! back until it either does, and is swallowed, or cannot any more, and is let go.

use crate::{Error, Result};

/// Watches streamed text for stop strings.
#[derive(Debug, Clone)]
pub struct StopStrings {
    strings: Vec<String>,
    held: String,
}

/// What one piece of text let go.
#[derive(Debug, PartialEq, Eq)]
pub struct Released {
    /// Text that is certainly no part of a stop string.
    pub text: String,
    /// Whether a stop string was completed. It and everything after it is dropped.
    pub stopped: bool,
}

impl StopStrings {
    /// Watches for any of `strings`.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty one, which would be everywhere.
    pub fn new(strings: Vec<String>) -> Result<StopStrings> {
        if strings.iter().any(String::is_empty) {
            return Err(Error::Argument { name: "stop".into(), message: "a stop string must not be empty".into() });
        }
        Ok(StopStrings { strings, held: String::new() })
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str) -> Released {
        self.held.push_str(text);
        // The one that ends first: it would have been found first had the text come in single
        // characters.
        let found = self.strings.iter().filter_map(|stop| self.held.find(stop.as_str()).map(|start| (start + stop.len(), start))).min();
        if let Some((_, start)) = found {
            self.held.truncate(start);
            return Released { text: std::mem::take(&mut self.held), stopped: true };
        }
        let open = self.strings.iter().map(|stop| open_prefix(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - open);
        Released { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// Lets go of what is held back: no more text will come.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// The length of the longest end of `text` with which `stop` begins.
fn open_prefix(text: &str, stop: &str) -> usize {
    (1..stop.len()).rev().find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Streams `text` in pieces of `size` characters.
    fn stream(stops: &[&str], text: &str, size: usize) -> (String, bool) {
        let mut stop = StopStrings::new(stops.iter().map(|s| s.to_string()).collect()).unwrap();
        let characters: Vec<char> = text.chars().collect();
        let mut out = String::new();
        for piece in characters.chunks(size) {
            let released = stop.push(&piece.iter().collect::<String>());
            out.push_str(&released.text);
            if released.stopped {
                return (out, true);
            }
        }
        out.push_str(&stop.finish());
        (out, false)
    }

    #[test]
    fn however_text_is_cut_the_result_is_the_same() {
        for size in 1..12 {
            assert_eq!(stream(&["\nUser:"], "Hello\nUser: hi", size), ("Hello".into(), true));
            assert_eq!(stream(&["\nUser:"], "Hello\nUsed: hi\nUser", size), ("Hello\nUsed: hi\nUser".into(), false));
            // A stop string that begins within a false start.
            assert_eq!(stream(&["aab"], "aaab and more", size), ("a".into(), true));
            // Of two, the one that ends first.
            assert_eq!(stream(&["cd", "bc"], "abcd", size), ("a".into(), true));
            assert_eq!(stream(&["bcd", "c"], "abcd", size), ("ab".into(), true));
            assert_eq!(stream(&["…über"], "weit …übel …über", size), ("weit …übel ".into(), true));
            assert_eq!(stream(&[], "anything", size), ("anything".into(), false));
        }
    }

    #[test]
    fn only_what_could_become_a_stop_string_is_held_back() {
        let mut stop = StopStrings::new(vec!["<|end|>".into()]).unwrap();
        assert_eq!(stop.push("one <|"), Released { text: "one ".into(), stopped: false });
        assert_eq!(stop.push("en"), Released { text: String::new(), stopped: false });
        assert_eq!(stop.push("ough"), Released { text: "<|enough".into(), stopped: false });
        assert!(StopStrings::new(vec![String::new()]).is_err());
    }
}
