//! The key/value cache on the device: what a row holds ([`Layout`]) and the buffers that hold the rows.

mod layout;

pub use layout::{Layout, Side, Slice};

use crate::gpu::Device;
use crate::sequence::KvMemory;
use crate::{Error, Result};

/// One layer's rows for `capacity` tokens, in f16.
pub struct LayerCache {
    /// `[capacity][keys.row]`.
    pub(crate) keys: wgpu::Buffer,
    /// `[capacity][values.row]`.
    pub(crate) values: wgpu::Buffer,
}

/// A sequence's rows in all layers.
pub struct Cache {
    pub(crate) layers: Vec<LayerCache>,
    /// Tokens that it has room for.
    pub capacity: usize,
}

impl Cache {
    /// Allocates zeroed rows. Nothing grows later.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], also where one layer's rows do not fit into one binding.
    pub fn new(device: &Device, layouts: &[Layout], capacity: usize) -> Result<Cache> {
        let side = |layer: usize, name: &str, row: usize| {
            let bytes = (capacity as u64).checked_mul(row as u64 * 2);
            let what = || format!("layer {layer}'s {name} for a context of {capacity}");
            let bytes = bytes.ok_or_else(|| Error::OutOfMemory { what: what(), bytes: u64::MAX })?;
            device.buffer(&what(), bytes)
        };
        let layers = layouts
            .iter()
            .enumerate()
            .map(|(l, layout)| Ok(LayerCache { keys: side(l, "keys", layout.keys.row)?, values: side(l, "values", layout.values.row)? }));
        Ok(Cache { layers: layers.collect::<Result<_>>()?, capacity })
    }

    /// Counted from the buffers themselves.
    pub fn memory(&self) -> KvMemory {
        let allocated_bytes = self.layers.iter().map(|l| l.keys.size() + l.values.size()).sum();
        KvMemory { kv_bytes_per_token: allocated_bytes / self.capacity.max(1) as u64, kv_fixed_bytes: 0, allocated_bytes }
    }
}
