//! The key/value cache on the device: exact rows of every layer, all of them or a few ([`Slots`]), and packed rows beside them ([`Layout`]).

mod layout;
mod side;

pub use layout::{Layout, Place};
pub use side::SideCache;

use crate::checkpoint::Config;
use crate::gpu::{Device, pad};
use crate::rows::{Schedule, Selection, Stores};
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
    pub fn new(schedule: &Schedule, chunk: usize, capacity: usize) -> Slots {
        Slots { sinks: schedule.exact.sinks.min(capacity) as u32, ring: schedule.window(chunk).min(capacity) as u32 }
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
    /// What is kept beside them, where the sequence forgets: then candidates' rows stand in slots behind the others.
    pub(crate) side: Option<SideCache>,
}

impl LayerCache {
    /// `slots` zeroed rows. `what`: whose, for errors.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], also where they do not fit into one binding.
    pub fn new(device: &Device, config: &Config, what: &str, slots: usize) -> Result<LayerCache> {
        let side = |name: &str| rows(device, format!("{what}'s {name}"), slots, row_bytes(config));
        Ok(LayerCache { keys: side("keys")?, values: side("values")?, side: None })
    }

    /// [`new`](Self::new) with candidates and what is vague beside, as `stores` say.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn beside(device: &Device, config: &Config, what: &str, slots: usize, stores: Stores) -> Result<LayerCache> {
        let side = SideCache::new(device, config, what, slots, stores)?;
        Ok(LayerCache { side: Some(side), ..LayerCache::new(device, config, what, slots.saturating_add(stores.candidates))? })
    }
}

/// Bytes of a token's key, or value, in one layer.
fn row_bytes(config: &Config) -> usize {
    2 * config.num_key_value_heads * pad(config.head_dim)
}

/// A buffer of so many rows of so many bytes.
fn rows(device: &Device, what: String, rows: usize, bytes: usize) -> Result<wgpu::Buffer> {
    let all = (rows as u64).checked_mul(bytes as u64).ok_or_else(|| Error::OutOfMemory { what: what.clone(), bytes: u64::MAX })?;
    device.buffer(&what, all)
}

/// One layer's landmarks of coded tokens, by which a token chooses what it reads.
pub struct LandmarkCache {
    /// Packed as [`Selection::format`] says: `[chunks][H_kv][words]`.
    pub(crate) words: wgpu::Buffer,
    /// Chunks that it has room for.
    pub(crate) chunks: usize,
}

impl LandmarkCache {
    /// Those of `capacity` tokens.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(device: &Device, config: &Config, layer: usize, capacity: usize) -> Result<LandmarkCache> {
        let chunks = capacity.div_ceil(Selection::CHUNK);
        let bytes = 4 * config.num_key_value_heads * Selection::format(config.head_dim).words();
        Ok(LandmarkCache { words: rows(device, format!("layer {layer}'s landmarks for a context of {capacity}"), chunks, bytes)?, chunks })
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
    /// Where tokens stand in sketches, `[capacity]` u32: twice the bucket, and one more for a minus.
    pub(crate) sketched: Option<wgpu::Buffer>,
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
        let layers = Cache::layers(config, capacity, |what| LayerCache::new(device, config, what, exact))?;
        let stores = Cache::stores(device, coded.map(|(layout, _)| layout), capacity)?;
        let layers_with_landmarks = if select.is_some() { config.num_hidden_layers } else { 0 };
        let landmarks = (0..layers_with_landmarks).map(|l| LandmarkCache::new(device, config, l, capacity)).collect::<Result<_>>()?;
        Ok(Cache { layers, stores, landmarks, sketched: None, slots, capacity })
    }

    /// The rows of a sequence that forgets: exact ones in `slots`, what `stores` say beside them, and coded ones where there is a `layout`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn forgetting(device: &Device, config: &Config, layout: Option<&Layout>, slots: Slots, stores: Stores, capacity: usize) -> Result<Cache> {
        let layers = Cache::layers(config, capacity, |what| LayerCache::beside(device, config, what, slots.count(), stores))?;
        let sketched = match stores.vague.is_sketched() {
            true => Some(device.upload("places in the sketch", &stores.places())?),
            false => None,
        };
        Ok(Cache { layers, stores: Cache::stores(device, layout, capacity)?, landmarks: Vec::new(), sketched, slots, capacity })
    }

    fn layers(config: &Config, capacity: usize, make: impl Fn(&str) -> Result<LayerCache>) -> Result<Vec<LayerCache>> {
        (0..config.num_hidden_layers).map(|l| make(&format!("for a context of {capacity} layer {l}"))).collect()
    }

    fn stores(device: &Device, layout: Option<&Layout>, capacity: usize) -> Result<Vec<wgpu::Buffer>> {
        let words = layout.map_or(&[][..], |layout| &layout.stores);
        words.iter().enumerate().map(|(index, words)| store(device, index, *words, capacity)).collect()
    }

    /// Forgets who is a candidate and what is vague.
    pub fn forget(&self, device: &Device) {
        if self.layers.iter().all(|layer| layer.side.is_none()) {
            return;
        }
        let clear = |encoder: &mut wgpu::CommandEncoder| {
            let buffers = self.layers.iter().filter_map(|layer| layer.side.as_ref()).flat_map(SideCache::buffers);
            buffers.for_each(|buffer| encoder.clear_buffer(buffer, 0, None));
        };
        device.queue.submit([device.encode("forget", |_| (), clear).0]);
    }

    /// Counted from the buffers themselves; `config` is the model's.
    pub fn memory(&self, config: &Config) -> KvMemory {
        let all: u64 = self.layers.iter().map(|l| l.keys.size() + l.values.size()).sum();
        let landmarks: u64 = self.landmarks.iter().map(|landmarks| landmarks.words.size()).sum();
        let mut coded = landmarks + self.stores.iter().chain(&self.sketched).map(|store| store.size()).sum::<u64>();
        let mut exact = all;
        for side in self.layers.iter().filter_map(|layer| layer.side.as_ref()) {
            let candidates = 2 * (side.stores.candidates * row_bytes(config)) as u64;
            exact = exact - candidates + side.received_bytes();
            coded += candidates + side.bytes() - side.received_bytes();
        }
        let (growing, kv_fixed_bytes) = if self.slots == Slots::ALL { (exact, 0) } else { (coded, exact) };
        KvMemory { kv_bytes_per_token: growing / self.capacity.max(1) as u64, kv_fixed_bytes, allocated_bytes: growing + kv_fixed_bytes }
    }
}
