//! Choosing an adapter and a tier, and opening the device.

use super::canary::Canaries;
use super::faults::Faults;
use super::pipeline::Pipelines;
use super::profile::Profile;
use super::shader::IMMEDIATE_BYTES;
use super::tuned::{self, Adapter, Origin};
use super::wait::Patience;
use crate::gpu::Tuning;
use crate::{Error, Result};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

/// What a device's kernels may use, best first.
///
/// The best that the adapter offers is taken unless one is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// 16-bit arithmetic types and subgroup reductions.
    F16Subgroups,
    /// 16-bit arithmetic types.
    F16,
    /// Neither: 16-bit numbers are unpacked from 32-bit words, reductions go through workgroup
    /// memory.
    Baseline,
}

impl Tier {
    /// All three, best first.
    pub const ALL: [Tier; 3] = [Tier::F16Subgroups, Tier::F16, Tier::Baseline];

    /// The name that `--tier` takes and `doctor` prints.
    pub fn name(self) -> &'static str {
        match self {
            Tier::F16Subgroups => "f16-subgroups",
            Tier::F16 => "f16",
            Tier::Baseline => "baseline",
        }
    }

    fn features(self) -> wgpu::Features {
        match self {
            Tier::F16Subgroups => wgpu::Features::SHADER_F16 | wgpu::Features::SUBGROUP,
            Tier::F16 => wgpu::Features::SHADER_F16,
            Tier::Baseline => wgpu::Features::empty(),
        }
    }

    /// The preprocessor's flags.
    pub fn flags(self) -> &'static [&'static str] {
        match self {
            Tier::F16Subgroups => &["F16", "SUBGROUPS"],
            Tier::F16 => &["F16"],
            Tier::Baseline => &[],
        }
    }
}

impl std::str::FromStr for Tier {
    type Err = Error;
    fn from_str(s: &str) -> Result<Tier> {
        Tier::ALL
            .into_iter()
            .find(|t| t.name() == s)
            .ok_or_else(|| Error::Argument { name: "tier".into(), message: format!("{s:?} is none of {}", Tier::ALL.map(Tier::name).join(", ")) })
    }
}

/// What shaders are checked for while they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ShaderChecks {
    /// Nothing: what becomes of an index outside its buffer is the driver's business.
    None,
    /// Every index stays inside its buffer. Drivers with bounds of their own do it without a cost.
    #[default]
    Bounds,
    /// Bounds, and every loop ends and no divisor is zero, as browsers have it: for shaders that
    /// nobody trusts.
    All,
}

impl ShaderChecks {
    pub(super) fn of_wgpu(self) -> wgpu::ShaderRuntimeChecks {
        match self {
            ShaderChecks::None => wgpu::ShaderRuntimeChecks::unchecked(),
            ShaderChecks::Bounds => wgpu::ShaderRuntimeChecks { bounds_checks: true, ..wgpu::ShaderRuntimeChecks::unchecked() },
            ShaderChecks::All => wgpu::ShaderRuntimeChecks::checked(),
        }
    }
}

/// Which device to open, and how.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Part of the adapter's name, in any case.
    ///
    /// `None` takes the first that is no software renderer, else the first.
    pub adapter: Option<String>,
    /// The tier; `None` takes the best.
    pub tier: Option<Tier>,
    /// Caps the size of one binding below the adapter's own limit, in bytes.
    pub max_binding: Option<u64>,
    /// After how long without anything being done a wait ends in an error.
    ///
    /// `None` takes a minute on a GPU and ten on a software renderer.
    pub patience: Option<Duration>,
    /// What shaders are checked for while they run.
    pub checks: ShaderChecks,
    /// The directory with what was measured of adapters ([`Tuned`](super::Tuned)).
    ///
    /// `None` for built-in constants.
    pub tunings: Option<PathBuf>,
    /// Puts known words behind every buffer, for tests.
    ///
    /// [`Device::overrun`] says by them where something was written that should not have been.
    pub canaries: bool,
}

/// An open device: everything that kernels are made with.
pub struct Device {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) pipelines: Pipelines,
    /// While dispatches are timed.
    pub(super) profile: Mutex<Option<Profile>>,
    info: wgpu::AdapterInfo,
    tier: Tier,
    max_binding: u64,
    memory: Option<u64>,
    tuning: RwLock<Tuning>,
    origin: Origin,
    pub(super) faults: Arc<Faults>,
    pub(super) patience: Patience,
    pub(super) canaries: Option<Canaries>,
    /// Buffers and bind groups made.
    pub(super) made: AtomicU64,
}

pub(super) fn instance() -> wgpu::Instance {
    let backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    wgpu::Instance::new(wgpu::InstanceDescriptor { backends, ..wgpu::InstanceDescriptor::new_without_display_handle_from_env() })
}

/// All adapters of Vulkan, Metal and DX12, each backend's in the system's order, real GPUs before
/// software renderers.
pub(super) fn enumerate(instance: &wgpu::Instance) -> Vec<wgpu::Adapter> {
    let backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    let mut adapters = pollster::block_on(instance.enumerate_adapters(backends));
    adapters.sort_by_key(|a| match a.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    });
    adapters
}

/// Why an adapter cannot run the kernels, or the best tier that it can.
pub(super) fn judge(adapter: &wgpu::Adapter) -> std::result::Result<Tier, String> {
    let (features, limits) = (adapter.features(), adapter.limits());
    if !features.contains(wgpu::Features::IMMEDIATES) || limits.max_immediate_size < IMMEDIATE_BYTES {
        return Err("it has no immediates (push constants)".into());
    }
    if !adapter.get_downlevel_capabilities().flags.contains(wgpu::DownlevelFlags::SHADER_F16_IN_F32) {
        return Err("it cannot unpack 16-bit numbers".into());
    }
    if limits.max_compute_invocations_per_workgroup < 256
        || limits.max_compute_workgroup_storage_size < 16 << 10
        || limits.max_storage_buffers_per_shader_stage < 8
    {
        return Err("it lacks WebGPU's default limits (256 invocations, 16 KiB workgroup memory, 8 storage buffers)".into());
    }
    Ok(Tier::ALL.into_iter().find(|t| features.contains(t.features())).unwrap_or(Tier::Baseline))
}

/// Bytes of an adapter's own memory; of the system's, where it has none. `None` where its interface
/// does not say.
pub(super) fn memory(adapter: &wgpu::Adapter) -> Option<u64> {
    #[cfg(not(target_vendor = "apple"))]
    {
        // SAFETY: nothing is done to the adapter but to ask it.
        let adapter = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
        let instance = adapter.shared_instance().raw_instance();
        // SAFETY: both are the adapter's own, which is held.
        let found = unsafe { instance.get_physical_device_memory_properties(adapter.raw_physical_device()) };
        const DEVICE_LOCAL: u32 = 1;
        let local = found.memory_heaps.iter().take(found.memory_heap_count as usize).filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0);
        local.map(|heap| heap.size).max()
    }
    #[cfg(target_vendor = "apple")]
    {
        let _ = adapter;
        None
    }
}

impl Device {
    /// Opens a device.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] where none is there, none is usable or none has the name;
    /// [`Error::Gpu`] where the driver refuses.
    pub fn open(options: &Options) -> Result<Arc<Device>> {
        let adapters = enumerate(&instance());
        let found = || adapters.iter().map(|a| a.get_info().name).collect::<Vec<_>>().join(", ");
        let mut reason = if adapters.is_empty() { "no adapter was found".to_owned() } else { format!("none of these can be used: {}", found()) };
        let mut chosen = None;
        for adapter in &adapters {
            let name = adapter.get_info().name;
            if options.adapter.as_ref().is_some_and(|wanted| !name.to_lowercase().contains(&wanted.to_lowercase())) {
                continue;
            }
            match judge(adapter) {
                Ok(best) => {
                    chosen = Some((adapter, best));
                    break;
                }
                Err(why) => reason = format!("{name} cannot be used: {why}"),
            }
        }
        let Some((adapter, best)) = chosen else {
            if let Some(wanted) = &options.adapter
                && !adapters.iter().any(|a| a.get_info().name.to_lowercase().contains(&wanted.to_lowercase()))
            {
                reason = format!("no adapter is called {wanted:?} (found: {})", if adapters.is_empty() { "none".into() } else { found() });
            }
            return Err(Error::NoAdapter { reason });
        };
        let tier = options.tier.unwrap_or(best);
        if !adapter.features().contains(tier.features()) {
            return Err(Error::Argument { name: "tier".into(), message: format!("{} offers {} at best", adapter.get_info().name, best.name()) });
        }

        let mut limits = wgpu::Limits::default().or_better_values_from(&adapter.limits());
        // A large value here only makes DX12 reserve descriptor heaps.
        limits.max_non_sampler_bindings = limits.max_non_sampler_bindings.min(1 << 16);
        let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("lowkey"),
            required_features: tier.features() | wgpu::Features::IMMEDIATES | adapter.features() & wgpu::Features::TIMESTAMP_QUERY,
            required_limits: limits.clone(),
            ..Default::default()
        }))
        .map_err(|e| Error::Gpu { what: format!("opening {}", adapter.get_info().name), message: e.to_string() })?;

        let faults = Faults::of(&device);
        // Kernels count in 32 bits, and so do bounds checks in MSL: below 4 GiB no index into a
        // binding overflows.
        let most = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(u32::MAX as u64);
        let max_binding = options.max_binding.unwrap_or(most).min(most);
        let info = adapter.get_info();
        let software = info.device_type == wgpu::DeviceType::Cpu;
        let (pipelines, patience) = (Pipelines::new(tier, options.checks), Patience::new(options.patience, software));
        let (tuning, origin) = match &options.tunings {
            Some(directory) => tuned::read(directory, &Adapter::of(&info, tier), &Tuning::of(software)),
            None => (Tuning::of(software), Origin::BuiltIn),
        };
        let (tuning, profile, memory) = (RwLock::new(tuning), Mutex::default(), memory(adapter));
        let (canaries, made) = (options.canaries.then(Canaries::default), AtomicU64::new(0));
        let opened = Device { device, queue, pipelines, profile, info, tier, max_binding, memory, tuning, origin, faults, patience, canaries, made };
        log::debug!("opened {}, {:?}, driver {}, tier {}", opened.name(), opened.info.backend, opened.driver(), tier.name());
        Ok(Arc::new(opened))
    }

    /// The adapter's name.
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// Vulkan, Metal or Dx12.
    pub fn backend(&self) -> String {
        format!("{:?}", self.info.backend)
    }

    /// The driver's name and version.
    pub fn driver(&self) -> String {
        format!("{} {}", self.info.driver, self.info.driver_info).trim().to_owned()
    }

    /// The tier that the kernels are made for.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// Bytes of everything that is allocated on it.
    ///
    /// `None` where the driver's allocator does not tell.
    pub fn allocated_bytes(&self) -> Option<u64> {
        self.device.generate_allocator_report().map(|report| report.total_allocated_bytes)
    }

    /// How many buffers and bindings of kernels have been made on it.
    pub fn made(&self) -> u64 {
        self.made.load(Ordering::Relaxed)
    }

    /// Whether this is a software renderer on the processor.
    pub fn is_software(&self) -> bool {
        self.info.device_type == wgpu::DeviceType::Cpu
    }

    /// Bytes of its own memory, or the system's where it has none; `None` where that is not known.
    pub fn memory(&self) -> Option<u64> {
        self.memory
    }

    /// Storage buffers that a kernel may be bound to.
    pub(crate) fn storage_buffers(&self) -> u32 {
        self.device.limits().max_storage_buffers_per_shader_stage
    }

    /// Bytes that a workgroup may have to itself.
    pub(crate) fn workgroup_memory(&self) -> u32 {
        self.device.limits().max_compute_workgroup_storage_size
    }

    /// The largest storage binding, bytes.
    pub fn max_binding(&self) -> u64 {
        self.max_binding
    }

    /// How kernels that are planned from now on divide their work.
    pub fn tuning(&self) -> Tuning {
        *self.tuning.read().unwrap_or_else(|e| e.into_inner())
    }

    /// Where the tuning is from that the device was opened with.
    pub fn tuning_origin(&self) -> &Origin {
        &self.origin
    }

    /// What a tuning that is measured here holds for.
    pub fn adapter(&self) -> Adapter {
        Adapter::of(&self.info, self.tier)
    }

    /// Sets the tuning of kernels that are planned from now on, of new sequences.
    ///
    /// # Panics
    /// Where `tuning` contradicts what its fields say.
    pub fn set_tuning(&self, tuning: Tuning) {
        assert_eq!(tuning.problem(), None, "{tuning:?}");
        *self.tuning.write().unwrap_or_else(|e| e.into_inner()) = tuning;
    }

    /// The smallest and the largest subgroup that the adapter says it forms.
    pub fn subgroups(&self) -> [u32; 2] {
        [self.info.subgroup_min_size, self.info.subgroup_max_size]
    }
}
