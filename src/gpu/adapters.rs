//! What a system offers.

use super::Tier;
use super::device::{enumerate, instance, judge, memory};

/// What `doctor` says of one adapter.
#[derive(Debug, Clone, serde::Serialize)]
pub struct AdapterReport {
    /// The adapter's name.
    pub name: String,
    /// Vulkan, Metal, Dx12 or Gl.
    pub backend: String,
    /// Discrete, integrated, virtual, a processor's software renderer, or other.
    pub kind: String,
    /// The driver's name and version.
    pub driver: String,
    /// The best tier; `None` where it cannot be used at all.
    pub tier: Option<Tier>,
    /// Bytes of its own memory, or the system's where it has none; `None` where that is not known.
    pub memory: Option<u64>,
    /// Why it cannot be used.
    pub unusable: Option<String>,
    /// Smallest and largest subgroup.
    pub subgroup_sizes: [u32; 2],
    /// Largest storage binding, bytes.
    pub max_storage_binding: u64,
    /// Largest buffer, bytes.
    pub max_buffer: u64,
    /// Workgroup memory, bytes.
    pub max_workgroup_storage: u32,
    /// Whether this is the one that is taken when none is named.
    pub default: bool,
}

/// Every adapter that the system offers, for `doctor`.
pub fn adapters() -> Vec<AdapterReport> {
    let mut default = true;
    enumerate(&instance())
        .iter()
        .map(|adapter| {
            let (info, limits, verdict) = (adapter.get_info(), adapter.limits(), judge(adapter));
            let usable = verdict.is_ok();
            AdapterReport {
                name: info.name,
                backend: format!("{:?}", info.backend),
                kind: format!("{:?}", info.device_type),
                driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
                tier: verdict.as_ref().ok().copied(),
                unusable: verdict.err(),
                subgroup_sizes: [info.subgroup_min_size, info.subgroup_max_size],
                max_storage_binding: limits.max_storage_buffer_binding_size,
                max_buffer: limits.max_buffer_size,
                max_workgroup_storage: limits.max_compute_workgroup_storage_size,
                memory: memory(adapter),
                default: usable && std::mem::take(&mut default),
            }
        })
        .collect()
}
