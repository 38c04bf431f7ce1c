//! `contest.wgsl`: which tokens stay exact when some leave the window.

use super::eviction::EvictionStore;
use super::spec;
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work};
use crate::rows::Slots;
use crate::rows::{Stores, Vague};
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

/// Where a contest writes who moves: word 4 and on, those who have no slot any more, or get none; from `promoted` on those who take one; from `stash` on what comes out of a sketch.
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
        // Whoever comes out of a sketch takes a slot.
        let most = MOST_LEAVING + stores.buckets.min(stores.candidates);
        let (promoted, stash) = (4 + 4 * most, 4 + 8 * most);
        let waiting = if stores.vague.is_sketched() { most * row } else { 0 };
        Ok(Moves { buffer: device.buffer("rows that move", 4 * (stash as u64 + waiting as u64))?, promoted, stash })
    }
}

/// Decides in one layer.
pub struct Contest {
    kernel: Kernel,
    params: Params,
}

fn variant(vague: Vague) -> Spec {
    let flags = [("CODED", vague == Vague::Rows), ("SKETCH", vague.is_sketched()), ("MEAN", vague.has_mean())];
    let flags: Vec<_> = flags.into_iter().filter_map(|(flag, is)| is.then_some(flag)).collect();
    let mut bindings = vec![(0, Access::Write), (1, Access::Write)];
    bindings.extend(vague.is_sketched().then_some((2, Access::Read)));
    bindings.extend((vague == Vague::Rows).then_some((3, Access::Write)));
    spec("contest.wgsl", &flags, &[("WORKGROUP", WORKGROUP)], &bindings)
}

impl Contest {
    /// `sketched`: where tokens stand in sketches, if there are any.
    pub(crate) fn plan(device: &Device, side: &EvictionStore, slots: Slots, sketched: Option<&wgpu::Buffer>, moves: &Moves) -> Result<Contest> {
        let mut buffers = vec![&side.marks, &moves.buffer];
        buffers.extend(sketched.into_iter().chain(&side.listed));
        Ok(Contest {
            kernel: device.kernel(variant(side.stores.vague), &buffers)?,
            params: Params {
                candidates: side.stores.candidates as u32,
                buckets: side.stores.buckets as u32,
                sinks: slots.sinks,
                ring: slots.ring,
                places: side.places as u32,
                received: side.received as u32,
                promoted: moves.promoted as u32,
                ..bytemuck::Zeroable::zeroed()
            },
        })
    }

    /// Tokens `leaving` the window, at least one and `MOST_LEAVING` at most, when `evicted` have left it before them.
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
