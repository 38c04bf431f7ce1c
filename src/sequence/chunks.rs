//! How many tokens go through the model together.

use super::SequenceOptions;
use crate::kv::Exact;

/// The least and the most tokens of a call, and how they read each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkPolicy {
    /// A device that turns out to be slow is given fewer than the most, but not fewer than these.
    pub min: usize,
    /// See [`min`](Self::min).
    pub max: usize,
    /// Whether they read each other as if they had come one by one.
    pub strict: bool,
}

impl ChunkPolicy {
    /// Where a device takes up to `most` tokens, best `usual`.
    ///
    /// `spans`: whether rows belong to several layers.
    pub fn new(options: &SequenceOptions, spans: bool, usual: usize, most: usize) -> ChunkPolicy {
        // Rows over several layers, and those with landmarks, are coded after a chunk: small ones
        // come closest to one token at a time. What is evicted is so on the way, block by block.
        let evicts = options.method.eviction().is_some();
        let together = spans || options.method.read().selection().is_some() || evicts;
        let small = options.strict && together || evicts;
        let largest = if small { Exact::BLOCK.min(most) } else { most };
        let max = options.chunk.unwrap_or(usual).clamp(1, largest.max(1));
        // What was asked for is kept to: it decides which rows a query reads exactly.
        let min = if options.chunk.is_some() || small { max } else { 8.min(max) };
        ChunkPolicy { min, max, strict: options.strict && !together }
    }
}
