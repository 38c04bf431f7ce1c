//! Which tokens a query reads exactly, and which from their latents.
//!
//! The first tokens ("attention sinks", Xiao et al., arXiv 2309.17453) and the newest are what
//! attention leans on most, and they are few: they stay exact. The query at position `t` reads the
//! tokens below `sinks` exactly, those from there to below [`Reach::of`]`(t)` from latents, and the
//! rest, up to itself, exactly again.
//!
//! A row is coded once no query to come is due to read it exactly; while tokens come one at a time
//! that is done for [`Exact::BLOCK`] of them together, so that it costs a step nothing. Where
//! several tokens go through the model together, either every query has just its own `recent`
//! tokens exact, as if they had come one by one (*strict*: what an evaluation of one long text
//! should measure), or all tokens of the chunk stay exact for one another (a prompt: better, and
//! free). A row over several layers can only be coded when the last of them has run, so there it is
//! always the latter.
//!
//! Where the rows of several tokens share numbers ([`Blocks`](super::Blocks)) they are coded in
//! blocks, the first of which begins after the sinks ([`Schedule`]): a query then has up to a block
//! less one more tokens exact, strictly or not.

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
    /// Tokens that are coded together.
    pub block: usize,
}

/// When rows are coded and which queries read which, where `block` tokens are coded together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// What stays exact.
    pub exact: Exact,
    /// Tokens of a block, of which all are coded at once; 1 where each has a row of its own.
    pub block: usize,
}

impl Exact {
    /// Tokens that are coded together while they come one at a time.
    pub const BLOCK: usize = 32;

    /// At most `capacity` tokens of either: more than there are tokens is all of them.
    pub fn within(self, capacity: usize) -> Exact {
        Exact { sinks: self.sinks.min(capacity), recent: self.recent.min(capacity) }
    }

    /// The schedule of rows that are coded in blocks of `block` tokens.
    pub fn blocks(self, block: usize) -> Schedule {
        Schedule { exact: self, block }
    }

    /// [`Schedule::coded`] of rows of their own.
    pub fn coded(&self, position: usize) -> usize {
        self.blocks(1).coded(position)
    }

    /// [`Schedule::window`] of rows of their own.
    pub fn window(&self, chunk: usize) -> usize {
        self.blocks(1).window(chunk)
    }

    /// [`Schedule::reach`] of rows of their own.
    pub fn reach(&self, position: usize, tokens: usize, strict: bool, exact_from: usize) -> Reach {
        self.blocks(1).reach(position, tokens, strict, exact_from)
    }
}

impl Schedule {
    /// The rows that are coded when `position` tokens have gone through the model.
    ///
    /// No query to come is due to read them exactly. A multiple of [`Exact::BLOCK`], or whole
    /// blocks.
    pub fn coded(&self, position: usize) -> usize {
        let due = (position + 1).saturating_sub(self.exact.recent).min(position);
        if self.block > 1 { self.whole(due) } else { due / Exact::BLOCK * Exact::BLOCK }
    }

    /// Where coding begins: with blocks, after the sinks.
    pub fn start(&self) -> usize {
        self.whole(0)
    }

    /// The end of the last block that ends up to `position`; at least [`start`](Self::start).
    pub fn whole(&self, position: usize) -> usize {
        whole(position, self.exact.sinks, self.block)
    }

    /// How many of the newest exact rows to keep where `chunk` tokens are read together.
    pub fn window(&self, chunk: usize) -> usize {
        self.exact.recent.saturating_add(Exact::BLOCK.max(self.block)).saturating_add(chunk)
    }

    /// What `tokens` queries from `position` on read exactly.
    ///
    /// Exact rows below `exact_from`, sinks apart, are gone.
    pub fn reach(&self, position: usize, tokens: usize, strict: bool, exact_from: usize) -> Reach {
        let Exact { sinks, recent } = self.exact;
        let low = exact_from.min(position).max(sinks);
        let (low, high) = match strict {
            true => (low, (position + tokens).max(low)),
            false => [self.coded(position).max(low); 2].into(),
        };
        Reach { sinks, low, high, recent, block: self.block }
    }
}

/// The end of the last block of `block` tokens, counted from the sinks, that ends up to `position`;
/// the sinks where none does. With blocks of one, `position`.
fn whole(position: usize, sinks: usize, block: usize) -> usize {
    if block > 1 { sinks + position.saturating_sub(sinks) / block * block } else { position }
}

impl Reach {
    /// Every row is read exactly.
    pub const ALL_EXACT: Reach = Reach { sinks: 0, low: 0, high: 0, recent: 0, block: 1 };

    /// Where the query at `position` begins to read exactly: latents are `sinks..of(position)`.
    pub fn of(&self, position: usize) -> usize {
        whole((position + 1).saturating_sub(self.recent), self.sinks, self.block).clamp(self.low, self.high)
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

    /// Strictly and step by step: blocks from the sinks on, whole ones alone, and never a token
    /// that is still due exactly.
    #[test]
    fn blocks_are_coded_when_they_are_whole() {
        for (sinks, recent, block) in [(4, 32, 32), (4, 32, 128), (0, 0, 32), (7, 50, 128)] {
            let schedule = Exact { sinks, recent }.blocks(block);
            for position in 0..600 {
                for strict in [true, false] {
                    let reach = schedule.reach(position, 1, strict, 0);
                    let end = reach.of(position);
                    assert!((end - sinks).is_multiple_of(block), "{position}: {end}");
                    assert!(end == sinks || position + 1 - end >= recent);
                    assert!(position < sinks + recent + block || position + 1 - end <= recent + block, "{position}: {end}");
                    assert!(end <= schedule.coded(position + 1).max(sinks));
                    assert!(schedule.window(1) >= position.saturating_sub(schedule.coded(position)).min(position.saturating_sub(sinks)));
                }
            }
        }
        let schedule = Exact { sinks: 4, recent: 0 }.blocks(32);
        assert_eq!([0, 3, 4, 35, 36, 67, 68].map(|position| schedule.whole(position)), [4, 4, 4, 4, 36, 36, 68]);
        assert_eq!((schedule.start(), Exact { sinks: 4, recent: 0 }.blocks(1).start()), (4, 0));
    }
}
