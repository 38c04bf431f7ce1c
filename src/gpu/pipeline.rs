//! Pipelines, each made once per device and variant, and the bind groups that are planned with
//! them.

use super::profile::Profile;
use super::shader::IMMEDIATE_BYTES;
use super::{Device, ShaderChecks, Tier, shader};
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What a kernel does with a binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// `var<storage, read>`.
    Read,
    /// `var<storage, read_write>`.
    Write,
}

/// One variant of one shader: the key of the pipeline cache.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Spec {
    /// The file under `shaders/`.
    pub shader: &'static str,
    /// Preprocessor flags beside the tier's.
    pub flags: Vec<&'static str>,
    /// Constants written before the file.
    pub constants: BTreeMap<&'static str, u32>,
    /// The bindings of group 0: number and access.
    ///
    /// Numbers may have gaps, where a flag leaves one out.
    pub bindings: Vec<(u32, Access)>,
}

impl Spec {
    /// The variant's text for a tier.
    ///
    /// # Errors
    /// As [`shader::preprocess`].
    pub fn source(&self, tier: Tier) -> std::result::Result<String, String> {
        let flags: Vec<&str> = tier.flags().iter().copied().chain(self.flags.iter().copied()).collect();
        shader::preprocess(self.shader, &flags, &self.constants)
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} {:?}", self.shader, self.flags, self.constants)
    }
}

/// What a dispatch has to do at the least, counted from its shapes.
///
/// What [`profile`](Device::profile) holds its time against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// Bytes that it reads and writes, each once, however many workgroups read them.
    pub bytes: u64,
    /// Operations; a multiplication and an addition are two.
    pub flops: u64,
}

/// A pipeline with its bind group: ready to be recorded any number of times.
#[derive(Clone)]
pub struct Kernel {
    name: Arc<str>,
    pipeline: wgpu::ComputePipeline,
    bind_group: wgpu::BindGroup,
}

impl Kernel {
    /// The same by a name that says more: a shape, say.
    pub(crate) fn called(self, more: impl std::fmt::Display) -> Kernel {
        Kernel { name: format!("{} {more}", self.name).into(), ..self }
    }

    /// Records one dispatch.
    ///
    /// Allocates nothing. `immediates` are the kernel's parameters of this step, `grid` its
    /// workgroups, `work` what they do.
    pub fn record(&self, pass: &mut Pass<'_>, immediates: &impl bytemuck::NoUninit, grid: [u32; 3], work: Work) {
        let dispatch = |inner: &mut wgpu::ComputePass<'_>| {
            inner.set_pipeline(&self.pipeline);
            inner.set_bind_group(0, &self.bind_group, &[]);
            inner.set_immediates(0, bytemuck::bytes_of(immediates));
            inner.dispatch_workgroups(grid[0], grid[1], grid[2]);
        };
        match &mut pass.into {
            Recorder::Pass(inner) => dispatch(inner),
            Recorder::Profile { device, encoder, profile } => {
                let timestamp_writes = Some(profile.next(device, &self.name, work));
                dispatch(&mut encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes }));
            }
        }
        pass.dispatches += 1;
    }
}

/// A compute pass that counts its dispatches.
pub struct Pass<'a> {
    into: Recorder<'a>,
    /// Dispatches recorded so far.
    pub dispatches: u32,
}

/// What dispatches are recorded into.
enum Recorder<'a> {
    /// One pass for all.
    Pass(Box<wgpu::ComputePass<'a>>),
    /// A pass for each, which is timed.
    Profile { device: &'a wgpu::Device, encoder: &'a mut wgpu::CommandEncoder, profile: &'a mut Profile },
}

#[derive(Clone)]
struct Made {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

pub(crate) struct Pipelines {
    tier: Tier,
    checks: ShaderChecks,
    made: Mutex<HashMap<Spec, Made>>,
}

impl Pipelines {
    pub(super) fn new(tier: Tier, checks: ShaderChecks) -> Pipelines {
        Pipelines { tier, checks, made: Mutex::default() }
    }

    fn made(&self) -> MutexGuard<'_, HashMap<Spec, Made>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device {
    /// A kernel: the variant's pipeline (compiled the first time it is asked for) bound to
    /// `buffers`.
    ///
    /// # Errors
    /// [`Error::Gpu`] with the driver's words where it refuses the shader or a binding.
    pub(crate) fn kernel(&self, spec: Spec, buffers: &[&wgpu::Buffer]) -> Result<Kernel> {
        assert_eq!(spec.bindings.len(), buffers.len(), "{}: bindings", spec.shader);
        let found = self.pipelines.made().get(&spec).cloned();
        let Made { pipeline, layout } = match found {
            Some(made) => made,
            // No caller waits meanwhile for what is there already; two that want the same make it
            // twice, and share what was there first.
            None => {
                let made = self.compile(&spec)?;
                self.pipelines.made().entry(spec.clone()).or_insert(made).clone()
            }
        };
        let entries: Vec<_> = spec
            .bindings
            .iter()
            .zip(buffers)
            .map(|((binding, _), b)| wgpu::BindGroupEntry { binding: *binding, resource: b.as_entire_binding() })
            .collect();
        let descriptor = wgpu::BindGroupDescriptor { label: Some(spec.shader), layout: &layout, entries: &entries };
        self.made.fetch_add(1, Ordering::Relaxed);
        let bind_group = self.owning(&format!("binding {spec}"), || self.device.create_bind_group(&descriptor))?;
        let name = spec.flags.iter().fold(spec.shader.trim_end_matches(".wgsl").to_owned(), |name, flag| name + " " + flag);
        Ok(Kernel { name: name.into(), pipeline, bind_group })
    }

    /// Every variant that was asked for so far and could be made, in no order.
    pub fn specs(&self) -> Vec<Spec> {
        self.pipelines.made().keys().cloned().collect()
    }

    fn compile(&self, spec: &Spec) -> Result<Made> {
        let started = Instant::now();
        let source = spec.source(self.pipelines.tier).map_err(|message| Error::Gpu { what: format!("preparing {spec}"), message })?;
        let made = self.owning(&format!("making {spec}"), || self.pipeline(spec, source))?;
        log::debug!("made {spec} in {:.0} ms", 1e3 * started.elapsed().as_secs_f64());
        Ok(made)
    }

    fn pipeline(&self, spec: &Spec, source: String) -> Made {
        let descriptor = wgpu::ShaderModuleDescriptor { label: Some(spec.shader), source: wgpu::ShaderSource::Wgsl(source.into()) };
        // SAFETY: these are our own shaders. Their loops end, and none of their divisors is zero;
        // without checks of bounds, words behind the buffers of their tests say that they stay
        // inside.
        let module = unsafe { self.device.create_shader_module_trusted(descriptor, self.pipelines.checks.of_wgpu()) };
        let entries: Vec<_> = spec
            .bindings
            .iter()
            .map(|(binding, access)| wgpu::BindGroupLayoutEntry {
                binding: *binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Storage { read_only: *access == Access::Read },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let layout = self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(spec.shader), entries: &entries });
        let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(spec.shader),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: IMMEDIATE_BYTES,
        });
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(spec.shader),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            // Every kernel writes workgroup memory before it reads it.
            compilation_options: wgpu::PipelineCompilationOptions { zero_initialize_workgroup_memory: false, ..Default::default() },
            cache: None,
        });
        Made { pipeline, layout }
    }

    /// Records a compute pass and returns the commands with the number of dispatches.
    ///
    /// # Errors
    /// [`Error::DeviceLost`], or [`Error::Gpu`] where what was recorded is refused.
    pub(crate) fn encode(
        &self,
        label: &str,
        record: impl FnOnce(&mut Pass),
        after: impl FnOnce(&mut wgpu::CommandEncoder),
    ) -> Result<(wgpu::CommandBuffer, u32)> {
        self.encode_between(label, |_| (), record, after)
    }

    /// The same, with copies before the pass too.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub(crate) fn encode_between(
        &self,
        label: &str,
        before: impl FnOnce(&mut wgpu::CommandEncoder),
        record: impl FnOnce(&mut Pass),
        after: impl FnOnce(&mut wgpu::CommandEncoder),
    ) -> Result<(wgpu::CommandBuffer, u32)> {
        self.owning(label, || {
            let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some(label) });
            before(&mut encoder);
            let dispatches = self.record(&mut encoder, label, record);
            after(&mut encoder);
            (encoder.finish(), dispatches)
        })
    }

    fn record(&self, encoder: &mut wgpu::CommandEncoder, label: &str, record: impl FnOnce(&mut Pass)) -> u32 {
        let profiling = || self.profile.lock().unwrap_or_else(|e| e.into_inner());
        let mut profile = profiling().take();
        let into = match &mut profile {
            None => Recorder::Pass(Box::new(encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some(label), timestamp_writes: None }))),
            Some(profile) => Recorder::Profile { device: &self.device, encoder, profile },
        };
        let mut pass = Pass { into, dispatches: 0 };
        record(&mut pass);
        let dispatches = pass.dispatches;
        drop(pass);
        if profile.is_some() {
            *profiling() = profile;
        }
        dispatches
    }
}
