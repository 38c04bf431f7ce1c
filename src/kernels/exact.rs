//! Exact rows of a layer.

use super::AttentionShape;
use super::eviction::EvictionStore;
use crate::gpu::Device;
use crate::rows::Stores;
use crate::{Error, Result};

/// One layer's exact rows, f16: `[slots][H_kv][pad(head_dim)]`, keys after RoPE.
#[derive(Clone)]
pub struct ExactRows {
    pub(crate) keys: wgpu::Buffer,
    pub(crate) values: wgpu::Buffer,
    /// What is kept beside them, where the sequence forgets: then candidates' rows stand in slots behind the others.
    pub(crate) side: Option<EvictionStore>,
}

impl ExactRows {
    /// `slots` zeroed rows. `what`: whose, for errors.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], also where they do not fit into one binding.
    pub fn new(device: &Device, attention: &AttentionShape, what: &str, slots: usize) -> Result<ExactRows> {
        let side = |name: &str| row_buffer(device, format!("{what}'s {name}"), slots, 2 * attention.kv_row());
        Ok(ExactRows { keys: side("keys")?, values: side("values")?, side: None })
    }

    /// [`new`](Self::new) with candidates and what is vague beside, as `stores` say.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn beside(device: &Device, attention: &AttentionShape, what: &str, slots: usize, stores: Stores) -> Result<ExactRows> {
        let side = EvictionStore::new(device, attention, what, slots, stores)?;
        Ok(ExactRows { side: Some(side), ..ExactRows::new(device, attention, what, slots.saturating_add(stores.candidates))? })
    }
}

/// A buffer of so many rows of so many bytes.
pub(crate) fn row_buffer(device: &Device, what: String, rows: usize, bytes: usize) -> Result<wgpu::Buffer> {
    let all = (rows as u64).checked_mul(bytes as u64).ok_or_else(|| Error::OutOfMemory { what: what.clone(), bytes: u64::MAX })?;
    device.buffer(&what, all)
}
