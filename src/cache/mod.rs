//! The key/value cache on the device: exact rows of every layer, all of them or a few ([`Slots`]),
//! and packed rows beside them ([`Layout`]).

mod saved;

use crate::Result;
use crate::gpu::{Device, ElementType, Shape, Tensor};
use crate::kernels::AttentionShape;
use crate::kernels::eviction::EvictionStore;
use crate::kernels::exact::ExactRows;
use crate::kernels::landmark::Landmarks;
use crate::kv::{KvMemory, Layout, Selection, Slots, Stores};

/// Of what shape a cache is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CacheShape {
    /// The attention of every layer.
    pub attention: AttentionShape,
    /// Layers.
    pub layers: usize,
    /// Tokens that it has room for.
    pub capacity: usize,
}

/// A sequence's rows in all layers.
pub struct Cache {
    pub(crate) layers: Vec<ExactRows>,
    /// Latents: `[capacity][words]` u32 for every store of the layout.
    pub(crate) stores: Vec<Tensor>,
    /// Which latents a token reads; `None` for all.
    pub(crate) select: Option<Selection>,
    /// By layer, where tokens choose among latents.
    pub(crate) landmarks: Vec<Landmarks>,
    /// Where tokens stand in sketches, `[capacity]` u32: twice the bucket, and one more for a
    /// minus.
    pub(crate) sketched: Option<wgpu::Buffer>,
    /// Where exact rows stand.
    pub slots: Slots,
    /// Its shape.
    pub shape: CacheShape,
}

impl Cache {
    /// An exact cache.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), also where one layer's rows do not fit
    /// into one binding.
    pub fn exact(device: &Device, shape: CacheShape) -> Result<Cache> {
        let layers = shape.each(|what| ExactRows::new(device, &shape.attention, what, Slots::ALL, shape.capacity))?;
        Ok(Cache::of(layers, shape))
    }

    /// An exact cache in these rows.
    pub(crate) fn of(layers: Vec<ExactRows>, shape: CacheShape) -> Cache {
        Cache { layers, stores: Vec::new(), select: None, landmarks: Vec::new(), sketched: None, slots: Slots::ALL, shape }
    }

    /// Exact rows in `slots` beside coded ones, with their landmarks where tokens `select`.
    ///
    /// The latents themselves are still to be added: [`add_store`](Self::add_store).
    ///
    /// # Errors
    /// As [`exact`](Self::exact).
    pub fn beside(device: &Device, shape: CacheShape, slots: Slots, select: Option<Selection>) -> Result<Cache> {
        let layers = shape.each(|what| ExactRows::new(device, &shape.attention, what, slots, slots.count()))?;
        let with_landmarks = if select.is_some() { shape.layers } else { 0 };
        let landmarks = (0..with_landmarks).map(|l| Landmarks::new(device, &shape.attention, l, shape.capacity)).collect::<Result<_>>()?;
        Ok(Cache { select, landmarks, slots, ..Cache::of(layers, shape) })
    }

    /// Exact rows in `slots`, and beside them what `stores` say is left of tokens that are evicted.
    ///
    /// # Errors
    /// As [`exact`](Self::exact).
    pub fn evicting(device: &Device, shape: CacheShape, slots: Slots, stores: Stores) -> Result<Cache> {
        let layers = shape.each(|what| ExactRows::beside(device, &shape.attention, what, slots, stores))?;
        let sketched = match stores.evicted_as.is_sketched() {
            true => Some(device.upload("places in the sketch", &stores.places())?),
            false => None,
        };
        Ok(Cache { sketched, slots, ..Cache::of(layers, shape) })
    }

    /// The same with room for the latents of `layout`.
    ///
    /// # Errors
    /// As [`exact`](Self::exact).
    pub fn with_latents(mut self, device: &Device, layout: &Layout) -> Result<Cache> {
        layout.stores.iter().try_for_each(|&words| self.add_store(device, words))?;
        Ok(self)
    }

    /// Adds a store of latents: `[capacity][words]`.
    ///
    /// # Errors
    /// As [`exact`](Self::exact).
    pub fn add_store(&mut self, device: &Device, words: usize) -> Result<()> {
        let (index, capacity) = (self.stores.len(), self.shape.capacity);
        let label = format!("coded rows {index} for a context of {capacity}");
        self.stores.push(Tensor::zeroed(device, &label, ElementType::U32, Shape::dense(capacity, words))?);
        Ok(())
    }

    /// Drops all candidates and what is left of evicted tokens.
    ///
    /// # Errors
    /// The device's.
    pub fn clear_evicted(&self, device: &Device) -> Result<()> {
        if self.layers.iter().all(|layer| layer.eviction.is_none()) {
            return Ok(());
        }
        let clear = |encoder: &mut wgpu::CommandEncoder| {
            let buffers = self.layers.iter().filter_map(|layer| layer.eviction.as_ref()).flat_map(EvictionStore::buffers);
            buffers.for_each(|buffer| encoder.clear_buffer(buffer, 0, None));
        };
        device.submit(device.encode("clear evicted", |_| (), clear)?.0).map(|_| ())
    }

    /// Counted from the buffers themselves.
    pub fn memory(&self) -> KvMemory {
        let all: u64 = self.layers.iter().map(|l| l.keys.size() + l.values.size()).sum();
        let landmarks: u64 = self.landmarks.iter().map(|landmarks| landmarks.words.size()).sum();
        let stores: u64 = self.stores.iter().map(|store| store.size()).sum();
        let mut coded = landmarks + stores + self.sketched.as_ref().map_or(0, |places| places.size());
        let mut exact = all;
        for eviction in self.layers.iter().filter_map(|layer| layer.eviction.as_ref()) {
            let candidates = 4 * (eviction.stores.candidates * self.shape.attention.kv_row()) as u64;
            exact = exact - candidates + eviction.received_bytes();
            coded += candidates + eviction.bytes() - eviction.received_bytes();
        }
        let (growing, kv_fixed_bytes) = if self.slots == Slots::ALL { (exact, 0) } else { (coded, exact) };
        KvMemory {
            kv_bytes_per_token: growing / self.shape.capacity.max(1) as u64,
            kv_fixed_bytes,
            allocated_bytes: growing + kv_fixed_bytes,
            scratch_bytes: 0,
        }
    }
}

impl CacheShape {
    fn each(&self, make: impl Fn(&str) -> Result<ExactRows>) -> Result<Vec<ExactRows>> {
        (0..self.layers).map(|l| make(&format!("for a context of {} layer {l}", self.capacity))).collect()
    }
}
