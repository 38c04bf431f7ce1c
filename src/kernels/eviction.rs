//! What stands beside the exact rows of a sequence that evicts tokens ([`crate::kv::Reviver`]).
//! Candidates' rows are in slots behind the exact ones.

use super::AttentionShape;
use crate::gpu::Device;
use crate::kv::{Evicted, Stores};
use crate::{Error, Result};

/// One layer's candidates, rows apart, and what is left of evicted tokens.
#[derive(Clone)]
pub struct EvictionStore {
    /// What there is room for.
    pub(crate) stores: Stores,
    /// Words, in three parts: four for each bucket, how many vectors it has of either sign, the
    /// last one's position and its weight, or without buckets how many are evicted; from `places`
    /// on, for each candidate, position and attention received; from `received` on, for each exact
    /// row's slot, attention received.
    pub(crate) marks: wgpu::Buffer,
    /// Sums of buckets, i32 `[buckets][2][row]`.
    pub(crate) sums: Option<wgpu::Buffer>,
    /// The mean of evicted tokens, and the two halves of their sum, `[3][2][row]`.
    pub(crate) totals: Option<wgpu::Buffer>,
    /// Tokens that are read from their latents, u32 `[capacity]`.
    pub(crate) listed: Option<wgpu::Buffer>,
    /// The word of marks at which candidates begin, and what exact rows have received.
    pub(crate) places: usize,
    pub(crate) received: usize,
    /// Exact rows' slots.
    pub(crate) slots: usize,
}

impl EvictionStore {
    /// Beside exact rows in `slots` slots. `what`: whose, for errors.
    pub(crate) fn new(device: &Device, attention: &AttentionShape, what: &str, slots: usize, stores: Stores) -> Result<EvictionStore> {
        let row = (4 * attention.kv_row()) as u64;
        let buffer = |name: &str, words: u64, each: u64| {
            let what = format!("{what}'s {name}");
            let bytes = words.checked_mul(each).ok_or_else(|| Error::OutOfMemory { what: what.clone(), bytes: u64::MAX })?;
            device.buffer(&what, bytes)
        };
        let (places, received) = (stores.mark_words(), stores.mark_words() + 2 * stores.candidates);
        let is = |there: bool, name: &str, words: u64, each: u64| if there { buffer(name, words, each).map(Some) } else { Ok(None) };
        Ok(EvictionStore {
            marks: buffer("candidates", (received + slots) as u64, 4)?,
            sums: is(stores.evicted_as.is_sketched(), "sketch", stores.buckets as u64, 2 * row)?,
            totals: is(stores.evicted_as.has_mean(), "mean of the evicted", 3, 2 * row)?,
            listed: is(stores.evicted_as == Evicted::Rows, "evicted tokens", stores.listed() as u64, 4)?,
            stores,
            places,
            received,
            slots,
        })
    }

    /// All that there is.
    pub(crate) fn buffers(&self) -> impl Iterator<Item = &wgpu::Buffer> {
        std::iter::once(&self.marks).chain(&self.sums).chain(&self.totals).chain(&self.listed)
    }

    /// All bytes, candidates' rows apart.
    pub(crate) fn bytes(&self) -> u64 {
        self.buffers().map(|buffer| buffer.size()).sum()
    }

    /// Those that do not grow with the capacity.
    pub(crate) fn received_bytes(&self) -> u64 {
        4 * self.slots as u64
    }
}
