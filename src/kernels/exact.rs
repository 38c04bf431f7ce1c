//! Exact rows of a layer.

use super::AttentionShape;
use super::eviction::EvictionStore;
use crate::gpu::Device;
use crate::kv::{Slots, Stores};
use crate::{Error, Result};

/// One layer's exact rows, f16: `[slots][H_kv][pad(head_dim)]`, keys after RoPE.
#[derive(Clone)]
pub struct ExactRows {
    pub(crate) keys: wgpu::Buffer,
    pub(crate) values: wgpu::Buffer,
    /// Where tokens stand.
    pub(crate) slots: Slots,
    /// What is kept beside them, where tokens are evicted: its rows stand in slots behind the
    /// others.
    pub(crate) eviction: Option<EvictionStore>,
}

impl ExactRows {
    /// `rows` zeroed rows, of tokens in their `slots`. `what`: whose, for errors.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], also where they do not fit into one binding.
    pub fn new(device: &Device, attention: &AttentionShape, what: &str, slots: Slots, rows: usize) -> Result<ExactRows> {
        let side = |name: &str| row_buffer(device, format!("{what}'s {name}"), rows, 2 * attention.kv_row());
        Ok(ExactRows { keys: side("keys")?, values: side("values")?, slots, eviction: None })
    }

    /// All `slots`, and candidates and what is left of the evicted beside, as `stores` say.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn beside(device: &Device, attention: &AttentionShape, what: &str, slots: Slots, stores: Stores) -> Result<ExactRows> {
        let eviction = EvictionStore::new(device, attention, what, slots.count(), stores)?;
        let rows = slots.count().saturating_add(stores.candidates);
        Ok(ExactRows { eviction: Some(eviction), ..ExactRows::new(device, attention, what, slots, rows)? })
    }
}

/// A buffer of so many rows of so many bytes.
pub(crate) fn row_buffer(device: &Device, what: String, rows: usize, bytes: usize) -> Result<wgpu::Buffer> {
    let all = (rows as u64).checked_mul(bytes as u64).ok_or_else(|| Error::OutOfMemory { what: what.clone(), bytes: u64::MAX })?;
    device.buffer(&what, all)
}
