//! `evict.wgsl`: which tokens stay exact when some leave the window.

use super::eviction::EvictionStore;
use super::spec;
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work};
use crate::kv::Slots;
use crate::kv::{Evicted, Stores};
use std::ops::Range;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    begin: u32,
    leaving: u32,
    held: u32,
    candidates: u32,
    buckets: u32,
    sinks: u32,
    ring: u32,
    places: u32,
    received: u32,
    promoted: u32,
    listed: u32,
}

/// Lanes of the one workgroup.
const WORKGROUP: u32 = 256;

/// The most tokens that leave at once.
pub(crate) const MOST_LEAVING: usize = 64;

/// Which rows move, as `struct Moves` of the shader lays them out: evicted tokens first, from
/// `promoted` on those that take a slot, from `stash` on vectors that come out of a sketch.
pub(crate) struct Moves {
    pub buffer: wgpu::Buffer,
    pub promoted: usize,
    pub stash: usize,
}

impl Moves {
    /// For layers as `stores` say, whose key and value are `row` numbers.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn new(device: &Device, stores: &Stores, row: usize) -> Result<Moves> {
        // What comes out of a sketch takes a slot.
        let most = MOST_LEAVING + stores.buckets.min(stores.candidates);
        let (promoted, stash) = (most, 2 * most);
        let waiting = if stores.evicted_as.is_sketched() { most * row } else { 0 };
        Ok(Moves { buffer: device.buffer("rows that move", 16 * (1 + stash as u64) + 4 * waiting as u64)?, promoted, stash })
    }
}

/// Decides in one layer.
pub struct Evict {
    kernel: Kernel,
    params: Params,
}

fn variant(evicted_as: Evicted) -> Spec {
    let flags = [("CODED", evicted_as == Evicted::Rows), ("SKETCH", evicted_as.is_sketched()), ("MEAN", evicted_as.has_mean())];
    let flags: Vec<_> = flags.into_iter().filter_map(|(flag, is)| is.then_some(flag)).collect();
    let mut bindings = vec![(0, Access::Write), (1, Access::Write)];
    bindings.extend(evicted_as.is_sketched().then_some((2, Access::Read)));
    bindings.extend((evicted_as == Evicted::Rows).then_some((3, Access::Write)));
    spec("evict.wgsl", &flags, &[("WORKGROUP", WORKGROUP)], &bindings)
}

impl Evict {
    /// `sketched`: where tokens stand in sketches, if there are any.
    pub(crate) fn plan(device: &Device, eviction: &EvictionStore, slots: Slots, sketched: Option<&wgpu::Buffer>, moves: &Moves) -> Result<Evict> {
        let mut buffers = vec![&eviction.marks, &moves.buffer];
        buffers.extend(sketched.into_iter().chain(&eviction.listed));
        Ok(Evict {
            kernel: device.kernel(variant(eviction.stores.evicted_as), &buffers)?,
            params: Params {
                candidates: eviction.stores.candidates as u32,
                buckets: eviction.stores.buckets as u32,
                sinks: slots.sinks,
                ring: slots.ring,
                places: eviction.places as u32,
                received: eviction.received as u32,
                promoted: moves.promoted as u32,
                ..bytemuck::Zeroable::zeroed()
            },
        })
    }

    /// Evicts for tokens `leaving` the window, at least one and at most `MOST_LEAVING`.
    ///
    /// `evicted` tokens have left it before them.
    pub fn record(&self, pass: &mut Pass, leaving: &Range<usize>, evicted: usize) {
        let held = evicted.min(self.params.candidates as usize) as u32;
        // A candidate's position and attention, a leaving token's attention.
        let work = Work { bytes: 8 * u64::from(held) + 4 * leaving.len() as u64, flops: 0 };
        let listed = evicted as u32 - held;
        self.kernel.record(
            pass,
            &Params { begin: leaving.start as u32, leaving: leaving.len() as u32, held, listed, ..self.params },
            [1, 1, 1],
            work,
        );
    }
}
