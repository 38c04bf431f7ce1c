//! The key/value cache on the device: exact rows of every layer, all of them or a few ([`Slots`]), and packed rows beside them ([`Layout`]).

mod layout;

pub use layout::{Layout, Place};

use crate::checkpoint::Config;
use crate::gpu::{Device, pad};
use crate::rows::Exact;
use crate::sequence::KvMemory;
use crate::{Error, Result};

/// Where the exact rows of a layer stand: the first tokens in slots of their own, those after them in a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slots {
    /// The first tokens.
    pub sinks: u32,
    /// Slots of the ring.
    pub ring: u32,
}

impl Slots {
    /// Every token has a slot of its own.
    pub const ALL: Slots = Slots { sinks: u32::MAX, ring: 1 };

    /// What stays exact beside coded rows of `capacity` tokens, where up to `chunk` go through the model together.
    pub fn new(exact: &Exact, chunk: usize, capacity: usize) -> Slots {
        Slots { sinks: exact.sinks.min(capacity) as u32, ring: exact.window(chunk).min(capacity) as u32 }
    }

    /// Slots in all.
    pub fn count(&self) -> usize {
        self.sinks as usize + self.ring as usize
    }

    /// Where the token at `position` stands.
    pub fn of(&self, position: usize) -> usize {
        let sinks = self.sinks as usize;
        if position < sinks { position } else { sinks + (position - sinks) % self.ring as usize }
    }
}

/// One layer's exact rows, f16: `[slots][H_kv][pad(head_dim)]`, keys after RoPE.
pub struct LayerCache {
    pub(crate) keys: wgpu::Buffer,
    pub(crate) values: wgpu::Buffer,
}

/// A sequence's rows in all layers.
pub struct Cache {
    pub(crate) layers: Vec<LayerCache>,
    /// Coded rows: `[capacity][words]` for every store of the layout.
    pub(crate) stores: Vec<wgpu::Buffer>,
    /// Where exact rows stand.
    pub slots: Slots,
    /// Tokens that it has room for.
    pub capacity: usize,
}

impl Cache {
    /// Allocates zeroed rows: coded ones as `layout` says with exact ones in `slots`, or exact ones for every token. Nothing grows later.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], also where one layer's rows do not fit into one binding.
    pub fn new(device: &Device, config: &Config, coded: Option<(&Layout, Slots)>, capacity: usize) -> Result<Cache> {
        let make = |what: String, rows: usize, bytes: usize| {
            let all = (rows as u64).checked_mul(bytes as u64).ok_or_else(|| Error::OutOfMemory { what: what.clone(), bytes: u64::MAX })?;
            device.buffer(&what, all)
        };
        let row = 2 * config.num_key_value_heads * pad(config.head_dim);
        let slots = coded.map_or(Slots::ALL, |(_, slots)| slots);
        let exact = coded.map_or(capacity, |(_, slots)| slots.count());
        let side = |layer: usize, name: &str| make(format!("layer {layer}'s {name} for a context of {capacity}"), exact, row);
        let layers = (0..config.num_hidden_layers).map(|l| Ok(LayerCache { keys: side(l, "keys")?, values: side(l, "values")? }));
        let layers = layers.collect::<Result<_>>()?;
        let words = coded.map_or(&[][..], |(layout, _)| &layout.stores);
        let store = |(i, words): (usize, &usize)| make(format!("coded rows {i} for a context of {capacity}"), capacity, 4 * words);
        let stores = words.iter().enumerate().map(store).collect::<Result<_>>()?;
        Ok(Cache { layers, stores, slots, capacity })
    }

    /// Counted from the buffers themselves.
    pub fn memory(&self) -> KvMemory {
        let exact: u64 = self.layers.iter().map(|l| l.keys.size() + l.values.size()).sum();
        let coded: u64 = self.stores.iter().map(|store| store.size()).sum();
        let (growing, kv_fixed_bytes) = if self.slots == Slots::ALL { (exact, 0) } else { (coded, exact) };
        KvMemory { kv_bytes_per_token: growing / self.capacity.max(1) as u64, kv_fixed_bytes, allocated_bytes: growing + kv_fixed_bytes }
    }
}
