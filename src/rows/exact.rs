//! Which tokens a query reads exactly, and which from their coded rows.
//!
//! The first tokens ("attention sinks", Xiao et al., arXiv 2309.17453) and the newest are what attention leans on most, and they are few: they stay exact. The query at position
//! `t` reads the tokens below `sinks` exactly, those from there to below [`Reach::of`]`(t)` from coded rows, and the rest, up to itself, exactly again.
//!
//! A row is coded once no query to come is due to read it exactly; while tokens come one at a time that is done for [`Exact::BLOCK`] of them together, so that it costs a step nothing. Where several
//! tokens go through the model together, either every query has just its own `recent` tokens exact, as if they had come one by one (*strict*: what an evaluation of one long text should
//! measure), or all tokens of the chunk stay exact for one another (a prompt: better, and free). A row over several layers can only be coded when the last of
//! them has run, so there it is always the latter.

/// How many tokens stay exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Exact {
    /// At the start of the text.
    pub sinks: usize,
    /// Before and with the query: at least so many.
    pub recent: usize,
}

impl Default for Exact {
    fn default() -> Exact {
        Exact { sinks: 4, recent: 32 }
    }
}

/// For the queries of one forward call, which rows each reads coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// Tokens at the start that every query reads exactly.
    pub sinks: usize,
    /// The least and the most that [`of`](Self::of) can be.
    pub low: usize,
    /// See [`low`](Self::low).
    pub high: usize,
    /// Tokens before and with a query that it reads exactly, as far as `low` and `high` let it.
    pub recent: usize,
}

impl Exact {
    /// Tokens that are coded together.
    pub const BLOCK: usize = 32;

    /// The rows that are coded when `position` tokens have gone through the model: no query to come is due to read them exactly. A multiple of [`BLOCK`](Self::BLOCK).
    pub fn coded(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.recent).min(position) / Self::BLOCK * Self::BLOCK
    }

    /// The newest exact rows that have to be kept where up to `chunk` tokens go through the model together.
    pub fn window(&self, chunk: usize) -> usize {
        self.recent.saturating_add(Self::BLOCK).saturating_add(chunk)
    }

    /// For `tokens` queries from `position` on, where exact rows below `exact_from`, sinks apart, are gone.
    pub fn reach(&self, position: usize, tokens: usize, strict: bool, exact_from: usize) -> Reach {
        let low = exact_from.min(position).max(self.sinks);
        match strict {
            true => Reach { sinks: self.sinks, low, high: (position + tokens).max(low), recent: self.recent },
            false => {
                let coded = self.coded(position).max(low);
                Reach { sinks: self.sinks, low: coded, high: coded, recent: self.recent }
            }
        }
    }
}

impl Reach {
    /// The query at `position` reads coded rows `sinks..of(position)`, and exactly those below and from there up to itself.
    pub fn of(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.recent).clamp(self.low, self.high)
    }

    /// Whether it reads the row of `key` from its code.
    pub fn coded(&self, position: usize, key: usize) -> bool {
        (self.sinks..self.of(position)).contains(&key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strictly_every_query_has_its_own_window_whatever_the_chunk() {
        let exact = Exact { sinks: 4, recent: 32 };
        for (position, tokens) in [(0, 200), (100, 100), (150, 1), (199, 1)] {
            let reach = exact.reach(position, tokens, true, 0);
            for t in position..position + tokens {
                for key in 0..=t {
                    assert_eq!(reach.coded(t, key), key >= 4 && t - key >= 32, "{t} {key}");
                }
            }
        }
    }

    #[test]
    fn step_by_step_rows_are_coded_in_blocks_and_only_what_is_coded_is_read() {
        let exact = Exact { sinks: 4, recent: 32 };
        for position in 0..500 {
            let reach = exact.reach(position, 1, false, 0);
            let first = reach.of(position);
            assert!(first <= exact.coded(position).max(4));
            assert!(position < 64 || (32..64).contains(&(position + 1 - first)), "{position} {first}");
        }
        assert_eq!((exact.coded(62), exact.coded(63), exact.coded(95)), (0, 32, 64));
        // What has not come is not coded.
        let none = Exact { sinks: 0, recent: 0 };
        assert_eq!((none.coded(31), none.coded(32), none.coded(33)), (0, 32, 32));
        // A chunk reads its own tokens exactly, and what is gone from its code.
        assert_eq!(exact.reach(100, 50, false, 0).of(149), 64);
        assert_eq!(exact.reach(100, 50, false, 90).of(149), 90);
        assert!(!exact.reach(0, 3, false, 0).coded(2, 1));
    }
}
