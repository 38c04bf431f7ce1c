//! The key/value cache on the device: exact rows of every layer, all of them or a few ([`Slots`]), and packed rows beside them ([`Layout`]).

mod layout;

pub use layout::{Layout, Place};

use crate::checkpoint::Config;
use crate::gpu::{Device, pad};
use crate::rows::{Exact, Selection};
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
#[derive(Clone)]
pub struct LayerCache {
    pub(crate) keys: wgpu::Buffer,
    pub(crate) values: wgpu::Buffer,
}

impl LayerCache {
    /// `slots` zeroed rows. `what`: whose, for errors.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], also where they do not fit into one binding.
    pub fn new(device: &Device, config: &Config, what: &str, slots: usize) -> Result<LayerCache> {
        let row = 2 * config.num_key_value_heads * pad(config.head_dim);
        let side = |name: &str| rows(device, format!("{what}'s {name}"), slots, row);
        Ok(LayerCache { keys: side("keys")?, values: side("values")? })
    }
}

/// A buffer of so many rows of so many bytes.
fn rows(device: &Device, what: String, rows: usize, bytes: usize) -> Result<wgpu::Buffer> {
    let all = (rows as u64).checked_mul(bytes as u64).ok_or_else(|| Error::OutOfMemory { what: what.clone(), bytes: u64::MAX })?;
    device.buffer(&what, all)
}

/// One layer's landmarks of coded tokens, by which a token chooses what it reads.
pub struct LandmarkCache {
    /// A mean key for every chunk, `[chunks][H_kv][pad(head_dim)]` f16, where keys stand.
    pub(crate) rows: LayerCache,
    /// The least cosine between a landmark and its keys, f32 `[H_kv][chunks]`.
    pub(crate) cosines: wgpu::Buffer,
    /// Chunks that it has room for.
    pub(crate) chunks: usize,
}

impl LandmarkCache {
    /// Those of `capacity` tokens.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(device: &Device, config: &Config, layer: usize, capacity: usize) -> Result<LandmarkCache> {
        let (chunks, heads) = (capacity.div_ceil(Selection::CHUNK), config.num_key_value_heads);
        let make =
            |what: &str, bytes: usize| device.buffer(&format!("layer {layer}'s {what} for a context of {capacity}"), (chunks * heads * bytes) as u64);
        let rows = LayerCache { keys: make("landmarks", 2 * pad(config.head_dim))?, values: device.buffer("no values", 4)? };
        Ok(LandmarkCache { rows, cosines: make("cosines of landmarks", 4)?, chunks })
    }

    fn bytes(&self) -> u64 {
        self.rows.keys.size() + self.cosines.size()
    }
}

/// Store `index` of coded rows, `[capacity][words]`.
///
/// # Errors
/// [`Error::OutOfMemory`], also where it does not fit into one binding.
pub fn store(device: &Device, index: usize, words: usize, capacity: usize) -> Result<wgpu::Buffer> {
    rows(device, format!("coded rows {index} for a context of {capacity}"), capacity, 4 * words)
}

/// A sequence's rows in all layers.
pub struct Cache {
    pub(crate) layers: Vec<LayerCache>,
    /// Coded rows: `[capacity][words]` for every store of the layout.
    pub(crate) stores: Vec<wgpu::Buffer>,
    /// By layer, where tokens choose among coded rows.
    pub(crate) landmarks: Vec<LandmarkCache>,
    /// Where exact rows stand.
    pub slots: Slots,
    /// Tokens that it has room for.
    pub capacity: usize,
}

impl Cache {
    /// Allocates zeroed rows: coded ones as `layout` says with exact ones in `slots`, and their landmarks where tokens `select`; or exact ones for every token. Nothing grows later.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], also where one layer's rows do not fit into one binding.
    pub fn new(device: &Device, config: &Config, coded: Option<(&Layout, Slots)>, select: Option<Selection>, capacity: usize) -> Result<Cache> {
        let slots = coded.map_or(Slots::ALL, |(_, slots)| slots);
        let exact = coded.map_or(capacity, |(_, slots)| slots.count());
        let layer = |l: usize| LayerCache::new(device, config, &format!("for a context of {capacity} layer {l}"), exact);
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        let words = coded.map_or(&[][..], |(layout, _)| &layout.stores);
        let store = |(i, words): (usize, &usize)| store(device, i, *words, capacity);
        let stores = words.iter().enumerate().map(store).collect::<Result<_>>()?;
        let layers_with_landmarks = if select.is_some() { config.num_hidden_layers } else { 0 };
        let landmarks = (0..layers_with_landmarks).map(|l| LandmarkCache::new(device, config, l, capacity)).collect::<Result<_>>()?;
        Ok(Cache { layers, stores, landmarks, slots, capacity })
    }

    /// Counted from the buffers themselves.
    pub fn memory(&self) -> KvMemory {
        let exact: u64 = self.layers.iter().map(|l| l.keys.size() + l.values.size()).sum();
        let landmarks: u64 = self.landmarks.iter().map(LandmarkCache::bytes).sum();
        let coded = landmarks + self.stores.iter().map(|store| store.size()).sum::<u64>();
        let (growing, kv_fixed_bytes) = if self.slots == Slots::ALL { (exact, 0) } else { (coded, exact) };
        KvMemory { kv_bytes_per_token: growing / self.capacity.max(1) as u64, kv_fixed_bytes, allocated_bytes: growing + kv_fixed_bytes }
    }
}
