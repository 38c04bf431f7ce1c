//! Which columns a block of tokens attends to, as `shaders/lib/columns.wgsl` reads them: what is
//! on the list is decided elsewhere.

use crate::gpu::Access;
use crate::kv::{Reach, Selection, Slots};
use std::ops::Range;

/// Coded tokens that are read, where these are not all there are: a method's own choice, written by
/// a kernel of its own.
#[derive(Clone, Copy)]
pub(crate) struct List<'a> {
    /// Tokens, u32 `[H_kv][by_head]`, or one line for all heads.
    pub tokens: &'a wgpu::Buffer,
    /// Entries of each key/value head; 0 where all read the same.
    pub by_head: usize,
}

/// Which columns a kernel reads besides those of tokens' exact rows and of all coded ones.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Kinds {
    /// Where coded columns are those of a list: its [`by_head`](List::by_head).
    pub listed: Option<usize>,
    /// Of the plain columns, the last that are rows of their own and stand for several tokens each.
    pub counted: usize,
}

impl Kinds {
    /// As shaders know them.
    pub fn flags(&self) -> impl Iterator<Item = &'static str> {
        self.listed.map(|_| "LISTED").into_iter().chain((self.counted > 0).then_some("COUNTED"))
    }

    /// As shaders know them.
    pub fn constants(&self) -> [(&'static str, u32); 2] {
        [("LIST", self.listed.unwrap_or(0) as u32), ("COUNTED_COLUMNS", self.counted as u32)]
    }

    /// How a list is bound, if there is one.
    pub fn list(&self) -> Option<(u32, Access)> {
        self.listed.map(|_| (9, Access::Read))
    }
}

/// A run of tokens that attend together, and their columns.
///
/// Exact keys, what stands beside these, and coded keys.
#[derive(Debug, Clone)]
pub struct Block {
    /// Position of the first token.
    pub first: u32,
    /// Tokens.
    pub tokens: u32,
    /// The first token's place in the chunk.
    pub at: u32,
    /// Columns of sinks; none where every key is exact.
    pub fixed: u32,
    /// The first exact key after them.
    pub near: u32,
    /// Columns behind exact keys' that every query sees.
    pub beside: u32,
    /// The first coded key; the last where they are those of a list.
    pub start: u32,
    /// Columns of coded keys.
    pub coded: u32,
    /// The chunks that coded keys are chosen from; none where all are read.
    pub chunks: Range<u32>,
    /// Keys so far before a query, or farther, it does not see.
    pub window: u32,
    /// Which keys a query reads from their codes.
    pub reach: Reach,
}

impl Block {
    /// A block of `tokens` from position `first` on.
    ///
    /// They see no key `window` or more before them, and read of latents what `reach` says, if
    /// there are any.
    pub fn new(first: u32, tokens: u32, at: u32, window: Option<usize>, reach: Option<Reach>) -> Block {
        let seen = window.map_or(0, |window| (first as usize + 1).saturating_sub(window));
        let window = window.map_or(u32::MAX, |window| u32::try_from(window).unwrap_or(u32::MAX));
        let reach_of_none = Reach { sinks: 0, low: 0, high: 0, recent: 0, block: 1 };
        let dense =
            Block { first, tokens, at, fixed: 0, near: seen as u32, beside: 0, start: 0, coded: 0, chunks: 0..0, window, reach: reach_of_none };
        let Some(reach) = reach else { return dense };
        let end = (first + tokens) as usize;
        let (start, beyond) = (reach.sinks.max(seen), reach.of(end - 1));
        Block {
            fixed: reach.sinks.min(end) as u32,
            near: reach.of(first as usize).max(seen) as u32,
            start: start as u32,
            coded: beyond.saturating_sub(start) as u32,
            reach,
            ..dense
        }
    }

    /// This block, of one token, where it reads chosen chunks of its coded keys.
    pub fn choosing(self, selection: Selection) -> Block {
        let end = self.start + self.coded;
        let chunks = Selection::range(self.start as usize, end as usize);
        let chunks = if self.coded == 0 { 0..0 } else { chunks.start as u32..chunks.end as u32 };
        let listed = selection.listed(chunks.len());
        Block { chunks, ..self.listed(listed as u32) }
    }

    /// This block where so many of its coded keys are on a list.
    pub fn listed(self, columns: u32) -> Block {
        Block { start: (self.start + self.coded).saturating_sub(1), coded: columns, ..self }
    }

    /// This block with so many columns beside its exact ones.
    pub fn beside(self, beside: u32) -> Block {
        Block { beside, ..self }
    }

    /// Columns of exact keys.
    pub fn exact(&self) -> u32 {
        self.fixed + (self.first + self.tokens).saturating_sub(self.near)
    }

    /// Columns of rows in f16: exact ones, and those beside.
    pub fn plain(&self) -> u32 {
        self.exact() + self.beside
    }

    /// Where in the ring its first exact key stands that is no sink.
    pub(super) fn base(&self, slots: Slots) -> u32 {
        (self.near.max(slots.sinks) - slots.sinks) % slots.ring.max(1)
    }

    /// The key of an exact column.
    #[cfg(test)]
    pub fn exact_key(&self, column: u32) -> u32 {
        if column < self.fixed { column } else { self.near + column - self.fixed }
    }
}
