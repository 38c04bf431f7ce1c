//! Where a sequence stands: how many tokens it has, and which of them are exact, coded, or gone.
//!
//! This is index arithmetic alone, and one and the same for the decoder on the processor and the
//! one on the GPU. A call of the model is planned ([`Cursor::call`]) before it runs: what its
//! queries read exactly and what from latents, and which rows are coded meanwhile. When it has run
//! the cursor moves on ([`Cursor::advance`]); when it has failed the cursor goes back
//! ([`Cursor::fail`]).

use super::saved::{Kept, Standing};
use super::{Reach, Schedule, Slots};
use crate::{Error, Result};
use std::ops::Range;

/// A sequence's position, and how far its rows are coded.
#[derive(Debug, Clone, PartialEq)]
pub struct Cursor {
    position: usize,
    capacity: usize,
    coded: Option<Coded>,
}

/// How rows are coded, and how far that has come.
#[derive(Debug, Clone, PartialEq)]
struct Coded {
    options: Coding,
    /// Tokens whose rows are coded.
    done: usize,
    /// Exact rows below this have been overwritten, sinks apart.
    exact_from: usize,
}

/// How a sequence's rows are coded, or its tokens evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coding {
    /// What stays exact, and how many tokens are coded together.
    pub schedule: Schedule,
    /// Where exact rows stand.
    pub slots: Slots,
    /// Whether tokens of one call read each other as if they had come one by one.
    pub strict: bool,
    /// Whether tokens are evicted: then what has left the exact window is never read exactly again.
    pub evicts: bool,
}

/// One call of the model: some tokens go through all layers together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Positions of its tokens.
    pub tokens: Range<usize>,
    /// What its queries read from latents; `None` where every row is exact.
    pub reach: Option<Reach>,
    /// Tokens whose rows are coded meanwhile.
    pub code: Range<usize>,
    /// Whether they are coded before they are read, layer by layer; otherwise when they have been.
    pub code_first: bool,
    /// Tokens that had left the exact window before, sinks apart.
    pub evicted: usize,
}

impl Call {
    /// Of an exact cache.
    pub fn exact(tokens: Range<usize>) -> Call {
        Call { tokens, reach: None, code: 0..0, code_first: false, evicted: 0 }
    }

    /// The tokens that leave the exact window, sinks apart, at most `sinks`.
    pub fn leaving(&self, sinks: usize) -> Range<usize> {
        self.code.start.max(sinks).min(self.code.end)..self.code.end
    }
}

impl Cursor {
    /// Begins an empty sequence with room for `capacity` tokens.
    ///
    /// `coding`: how its tokens are coded; `None` where all are exact.
    pub fn new(capacity: usize, coding: Option<Coding>) -> Cursor {
        let coded = coding.map(|options| Coded { options, done: options.schedule.start(), exact_from: 0 });
        Cursor { position: 0, capacity, coded }
    }

    /// Tokens of the sequence: the position of the next one.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Tokens that there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How rows are coded; `None` where every row is exact.
    pub fn coding(&self) -> Option<&Coding> {
        self.coded.as_ref().map(|coded| &coded.options)
    }

    /// Whether tokens are evicted.
    pub fn evicts(&self) -> bool {
        self.coding().is_some_and(|coding| coding.evicts)
    }

    /// Whether `tokens` of a vocabulary of `vocab` can be appended.
    ///
    /// # Errors
    /// [`Error::Context`] where they do not fit, [`Error::Argument`] for one outside the
    /// vocabulary.
    pub fn check(&self, tokens: &[u32], vocab: usize) -> Result<()> {
        let needed = self.position.saturating_add(tokens.len());
        if needed > self.capacity {
            return Err(Error::Context { needed, capacity: self.capacity });
        }
        match tokens.iter().find(|&&token| token as usize >= vocab) {
            None => Ok(()),
            Some(token) => Err(Error::Argument { name: "tokens".into(), message: format!("token {token} is outside the vocabulary of {vocab}") }),
        }
    }

    /// Which latents the next `tokens` read; `None` where every row is exact.
    pub fn reach(&self, tokens: usize) -> Option<Reach> {
        self.coded.as_ref().map(|Coded { options, done, exact_from }| {
            let exact_from = if options.evicts { *done } else { *exact_from };
            options.schedule.reach(self.position, tokens, options.strict, exact_from)
        })
    }

    /// What the next `tokens` read, and what is coded meanwhile.
    pub fn call(&self, tokens: usize) -> Call {
        self.call_within(tokens, self.reach(tokens))
    }

    /// [`call`](Self::call) of tokens that read what `reach` says.
    ///
    /// That of a larger call, of which they are a part.
    pub fn call_within(&self, tokens: usize, reach: Option<Reach>) -> Call {
        let end = self.position + tokens;
        let (Some(Coded { options, done, .. }), Some(reach)) = (&self.coded, reach) else { return Call::exact(self.position..end) };
        let to = if options.strict { reach.of(end - 1) } else { options.schedule.coded(end) };
        Call {
            tokens: self.position..end,
            reach: Some(reach),
            code: *done..to.max(*done),
            code_first: options.strict,
            evicted: done.saturating_sub(options.schedule.exact.sinks),
        }
    }

    /// `call` has run.
    pub fn advance(&mut self, call: &Call) {
        self.position = call.tokens.end;
        if let Some(coded) = &mut self.coded {
            coded.done = call.code.end;
            coded.exact_from = coded.exact_from.max(self.position.saturating_sub(coded.options.slots.ring as usize));
        }
    }

    /// How many tokens, of up to `most`, can be given together as if they came one by one, and then
    /// be taken back as if they had not been: nothing is coded or evicted meanwhile.
    pub fn takes_back(&self, most: usize) -> usize {
        let most = if self.evicts() { 0 } else { most.min(self.capacity - self.position) };
        (1..=most).take_while(|tokens| self.call(*tokens).code.is_empty()).count()
    }

    /// So many tokens have been given and taken back: exact rows that stood where theirs do are
    /// gone.
    pub fn overwritten(&mut self, tokens: usize) {
        if let Some(coded) = &mut self.coded {
            coded.exact_from = coded.exact_from.max((self.position + tokens).saturating_sub(coded.options.slots.ring as usize));
        }
    }

    /// Calls of up to `most` tokens have failed since the sequence was at `position`.
    ///
    /// Goes back there, so that the same tokens can be given again. Returns whether the sequence is
    /// empty now, as one that evicts is: attention may have been counted, and rows moved, of tokens
    /// that did not get through.
    pub fn fail(&mut self, position: usize, most: usize) -> bool {
        // What failed may have overwritten as many exact rows as it would have appended.
        self.overwritten(most);
        self.truncate(if self.evicts() { 0 } else { position })
    }

    /// Drops tokens from `position` on, or all where that is below [`kept_from`](Self::kept_from).
    ///
    /// Returns whether the sequence is empty now and was not.
    pub fn truncate(&mut self, position: usize) -> bool {
        if position >= self.position && position > 0 {
            return false;
        }
        let position = if position < self.kept_from() { 0 } else { position };
        self.position = position;
        if let Some(Coded { options, done, exact_from }) = &mut self.coded {
            *done = (*done).min(options.schedule.whole(position));
            *exact_from = (*exact_from).min(position);
        }
        position == 0
    }

    /// The least position, besides 0, that [`truncate`](Self::truncate) can go back to.
    pub fn kept_from(&self) -> usize {
        // Of a block that is coded some tokens alone cannot be coded anew.
        let bound = |coded: &&Coded| {
            let schedule = &coded.options.schedule;
            coded.options.evicts || schedule.block > 1 && coded.done > schedule.start()
        };
        self.coded.as_ref().filter(bound).map_or(0, |coded| coded.done)
    }

    /// Where it stands, and which exact rows there are.
    pub fn standing(&self) -> Standing {
        let Cursor { position, capacity: _, coded } = self;
        let Some(Coded { options, done, exact_from }) = coded else { return Standing::exact(*position) };
        let Coding { schedule, slots: _, strict: _, evicts } = options;
        let exact_from = if *evicts { done } else { exact_from };
        Standing {
            position: *position,
            // With blocks the sinks count as coded before they are there.
            coded: (*done).min(*position),
            exact_from: (*exact_from).max(schedule.exact.sinks).min(*position),
            kept: Some(Kept { exact: schedule.exact, block: schedule.block, evicts: *evicts }),
        }
    }

    /// Goes on where another one stands, or stood, whose exact rows are there as far as there are
    /// slots.
    pub fn stand(&mut self, standing: &Standing) {
        self.position = standing.position;
        if let Some(Coded { options, done, exact_from }) = &mut self.coded {
            *done = standing.coded.max(options.schedule.start());
            *exact_from = standing.exact_from.max(self.position.saturating_sub(options.slots.ring as usize));
        }
    }

    /// Goes on at `position`, where the first `coded` tokens are coded and all exact rows are there
    /// that there are slots for.
    pub fn resume(&mut self, position: usize, coded: usize) {
        self.stand(&Standing { coded, ..Standing::exact(position) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::Exact;

    fn coding(strict: bool, evicts: bool, block: usize, chunk: usize, capacity: usize) -> Coding {
        let schedule = Exact { sinks: 4, recent: 32 }.blocks(block);
        Coding { schedule, slots: Slots::new(&schedule, chunk, capacity), strict, evicts }
    }

    /// Whatever calls a text is cut into: every token is coded once and in order, before anything
    /// reads its row, and no exact row that is read has been overwritten.
    #[test]
    fn what_is_read_is_there() {
        for (strict, evicts, block) in [(false, false, 1), (true, false, 1), (false, true, 1), (false, false, 32), (true, false, 128)] {
            for chunk in [1, 7, 32, 100] {
                let coding = coding(strict, evicts, block, chunk, 1000);
                let mut cursor = Cursor::new(1000, Some(coding));
                // What each slot holds.
                let mut slots = vec![usize::MAX; coding.slots.count()];
                let mut coded = coding.schedule.start();
                while cursor.position() < 900 {
                    let call = cursor.call(chunk.min(900 - cursor.position()));
                    let reach = call.reach.unwrap();
                    call.tokens.clone().for_each(|token| slots[coding.slots.of(token)] = token);
                    assert_eq!(call.code.start, coded);
                    let readable = if call.code_first { call.code.end } else { coded };
                    // Sinks have rows too, which nothing reads.
                    for token in call.leaving(4) {
                        assert!(token < call.tokens.end && slots[coding.slots.of(token)] == token, "{token} is coded from its exact row");
                    }
                    for query in call.tokens.clone() {
                        assert!(reach.of(query) <= readable.max(4), "{query} reads rows to {}, coded to {readable}", reach.of(query));
                        for key in (0..4.min(query)).chain(reach.of(query)..=query) {
                            assert_eq!(slots[coding.slots.of(key)], key, "{query} reads {key} exactly");
                        }
                    }
                    coded = call.code.end;
                    cursor.advance(&call);
                }
                assert_eq!(cursor.kept_from(), if evicts || block > 1 { coded } else { 0 });
            }
        }
    }

    #[test]
    fn a_failed_call_can_be_made_again() {
        let mut cursor = Cursor::new(500, Some(coding(false, false, 1, 50, 500)));
        for _ in 0..4 {
            cursor.advance(&cursor.call(50));
        }
        let before = cursor.call(50).code;
        assert!(!cursor.fail(200, 50));
        // The ring of 32 + 32 + 50 has lost the oldest of its tokens to the call, but those were
        // coded.
        assert_eq!((cursor.position(), cursor.call(50).code, cursor.call(50).reach.unwrap().low), (200, before, 160));
        let mut evicting = Cursor::new(500, Some(coding(false, true, 1, 50, 500)));
        evicting.advance(&evicting.call(50));
        assert!(evicting.fail(50, 50));
        assert_eq!((evicting.position(), evicting.call(50)), (0, Cursor::new(500, Some(coding(false, true, 1, 50, 500))).call(50)));
    }

    #[test]
    fn truncation_goes_back_as_far_as_it_can() {
        let mut exact = Cursor::new(10, None);
        exact.advance(&exact.call(8));
        assert!(!exact.truncate(9) && exact.position() == 8);
        assert!(!exact.truncate(5) && exact.position() == 5);
        assert!(exact.truncate(0) && exact.kept_from() == 0);
        assert!(matches!(exact.check(&[0; 11], 5), Err(Error::Context { needed: 11, capacity: 10 })));
        assert!(exact.check(&[5], 5).unwrap_err().to_string().contains("outside the vocabulary of 5"));
        let mut blocks = Cursor::new(300, Some(coding(false, false, 32, 100, 300)));
        blocks.advance(&blocks.call(100));
        assert_eq!((blocks.kept_from(), blocks.call(1).code.start), (68, 68));
        assert!(!blocks.truncate(68) && blocks.position() == 68);
        assert!(blocks.truncate(67) && blocks.position() == 0 && blocks.call(1).code.start == 4);
    }
}
