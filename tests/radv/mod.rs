//! Mesa's RADV without a card: its null device compiles for any AMD family and says what it made.

pub mod assembly;

use ash::{Device, Entry, Instance, khr, vk};
use lowkey::gpu::{Spec, Tier};
use naga::back::spv;
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::path::{Path, PathBuf};

/// The family compiled for: RDNA3, a Radeon RX 7900.
pub const FAMILY: &str = "navi31";

/// RADV's manifests, where the loader would look for them too. A machine may have one for each word
/// size; the loader leaves alone what it cannot load.
pub fn manifests() -> Vec<PathBuf> {
    let folders = ["/etc", "/usr/share", "/usr/local/share", "/usr/local/etc"].map(|at| Path::new(at).join("vulkan/icd.d"));
    let given = std::env::var_os("VK_DRIVER_FILES").or_else(|| std::env::var_os("VK_ICD_FILENAMES"));
    let given = given.iter().flat_map(std::env::split_paths).collect::<Vec<_>>();
    let found = folders.iter().filter_map(|folder| folder.read_dir().ok()).flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let is_radv = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("radeon_icd"));
    given.into_iter().chain(found).filter(is_radv).collect()
}

/// The environment in which the loader finds the null device and nothing else.
pub fn environment(command: &mut std::process::Command, manifests: &[PathBuf]) {
    let files = std::env::join_paths(manifests).unwrap();
    command.env("VK_DRIVER_FILES", &files).env("VK_ICD_FILENAMES", &files);
    command.env("RADV_FORCE_FAMILY", FAMILY).env("RADV_DEBUG", "nocache");
    for name in ["RADV_PERFTEST", "ACO_DEBUG", "AMD_DEBUG", "VK_INSTANCE_LAYERS"] {
        command.env_remove(name);
    }
}

/// What the driver says of a pipeline.
pub struct Code {
    /// Its numbers by their names.
    pub statistics: BTreeMap<String, u64>,
    /// Lanes of a wave.
    pub wave: u32,
    /// The final machine code as text.
    pub assembly: String,
}

impl Code {
    /// A number of the driver's, which must have it.
    pub fn number(&self, name: &str) -> u64 {
        *self.statistics.get(name).unwrap_or_else(|| panic!("RADV says nothing of {name}: {:?}", self.statistics))
    }
}

/// The null device.
pub struct Radv {
    device: Device,
    executables: khr::pipeline_executable_properties::Device,
    version: u32,
    /// The driver's name and version.
    pub driver: String,
    /// The fewest lanes of a subgroup.
    pub subgroups: [u32; 2],
    /// What everything is called through.
    _entry: Entry,
}

fn text(of: Option<&CStr>) -> String {
    of.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

impl Radv {
    /// `Err` with the reason where there is none.
    pub fn open() -> Result<Radv, String> {
        // SAFETY: plain calls of Vulkan, on handles that live as long as the process.
        unsafe {
            let entry = Entry::load().map_err(|e| format!("no Vulkan loader: {e}"))?;
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
            let instance = entry
                .create_instance(&vk::InstanceCreateInfo::default().application_info(&application), None)
                .map_err(|e| format!("no Vulkan instance: {e}"))?;
            for physical in instance.enumerate_physical_devices().map_err(|e| format!("no Vulkan device: {e}"))? {
                let mut driver = vk::PhysicalDeviceDriverProperties::default();
                let mut subgroups = vk::PhysicalDeviceSubgroupSizeControlProperties::default();
                let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut driver).push_next(&mut subgroups);
                instance.get_physical_device_properties2(physical, &mut properties);
                let (name, version) = (text(properties.properties.device_name_as_c_str().ok()), properties.properties.api_version);
                if name.to_lowercase().contains(FAMILY) {
                    let (device, executables) = Radv::device(&instance, physical);
                    let driver = format!("{name}, {}", text(driver.driver_info_as_c_str().ok()));
                    return Ok(Radv {
                        device,
                        executables,
                        version,
                        driver,
                        subgroups: [subgroups.min_subgroup_size, subgroups.max_subgroup_size],
                        _entry: entry,
                    });
                }
            }
            Err(format!("no Vulkan device of {FAMILY}"))
        }
    }

    /// A device that tells what it compiled, and with what wgpu asks for as far as it changes code:
    /// robust access to buffers.
    unsafe fn device(instance: &Instance, physical: vk::PhysicalDevice) -> (Device, khr::pipeline_executable_properties::Device) {
        let mut executables = vk::PhysicalDevicePipelineExecutablePropertiesFeaturesKHR::default().pipeline_executable_info(true);
        let mut robust = vk::PhysicalDeviceRobustness2FeaturesEXT::default().robust_buffer_access2(true).robust_image_access2(true);
        let mut halves =
            vk::PhysicalDevice16BitStorageFeatures::default().storage_buffer16_bit_access(true).uniform_and_storage_buffer16_bit_access(true);
        let mut later = vk::PhysicalDeviceVulkan12Features::default().shader_float16(true).shader_int8(true);
        let mut latest = vk::PhysicalDeviceVulkan13Features::default().subgroup_size_control(true);
        let mut features = vk::PhysicalDeviceFeatures2::default()
            .features(vk::PhysicalDeviceFeatures::default().robust_buffer_access(true))
            .push_next(&mut executables)
            .push_next(&mut robust)
            .push_next(&mut halves)
            .push_next(&mut later)
            .push_next(&mut latest);
        let queue = [vk::DeviceQueueCreateInfo::default().queue_priorities(&[1.0])];
        let extensions = [khr::pipeline_executable_properties::NAME, ash::ext::robustness2::NAME].map(CStr::as_ptr);
        let info = vk::DeviceCreateInfo::default().queue_create_infos(&queue).enabled_extension_names(&extensions).push_next(&mut features);
        // SAFETY: as above.
        let device = unsafe { instance.create_device(physical, &info, None) }.unwrap();
        let executables = khr::pipeline_executable_properties::Device::new(instance, &device);
        (device, executables)
    }

    /// Compiles a variant as a release build would have it compiled.
    pub fn compile(&self, spec: &Spec) -> Code {
        let words = self.spirv(spec);
        let bindings: Vec<_> = (0..spec.bindings.len() as u32)
            .map(|binding| {
                vk::DescriptorSetLayoutBinding::default()
                    .binding(binding)
                    .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                    .descriptor_count(1)
                    .stage_flags(vk::ShaderStageFlags::COMPUTE)
            })
            .collect();
        let immediates = [vk::PushConstantRange::default().stage_flags(vk::ShaderStageFlags::COMPUTE).size(64)];
        // SAFETY: as above; the module is valid, since naga has validated it.
        unsafe {
            let sets = [self.device.create_descriptor_set_layout(&vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings), None).unwrap()];
            let layout = vk::PipelineLayoutCreateInfo::default().set_layouts(&sets).push_constant_ranges(&immediates);
            let layout = self.device.create_pipeline_layout(&layout, None).unwrap();
            let module = self.device.create_shader_module(&vk::ShaderModuleCreateInfo::default().code(&words), None).unwrap();
            let stage = vk::PipelineShaderStageCreateInfo::default()
                .flags(vk::PipelineShaderStageCreateFlags::ALLOW_VARYING_SUBGROUP_SIZE)
                .stage(vk::ShaderStageFlags::COMPUTE)
                .module(module)
                .name(c"main");
            let told = vk::PipelineCreateFlags::CAPTURE_STATISTICS_KHR | vk::PipelineCreateFlags::CAPTURE_INTERNAL_REPRESENTATIONS_KHR;
            let info = vk::ComputePipelineCreateInfo::default().flags(told).stage(stage).layout(layout);
            let pipeline = self.device.create_compute_pipelines(vk::PipelineCache::null(), &[info], None).unwrap()[0];
            self.read(pipeline)
        }
    }

    unsafe fn read(&self, pipeline: vk::Pipeline) -> Code {
        let info = vk::PipelineExecutableInfoKHR::default().pipeline(pipeline);
        // SAFETY: as above; a compute pipeline has one executable, and a text is as long as the
        // driver says.
        unsafe {
            let statistics = self.executables.get_pipeline_executable_statistics(&info).unwrap();
            let whole = statistics.iter().filter(|s| s.format == vk::PipelineExecutableStatisticFormatKHR::UINT64);
            let statistics = whole.map(|s| (text(s.name_as_c_str().ok()), s.value.u64)).collect();
            let mut texts = self.executables.get_pipeline_executable_internal_representations(&info).unwrap();
            let mut room: Vec<Vec<u8>> = texts.iter().map(|text| vec![0; text.data_size]).collect();
            texts.iter_mut().zip(&mut room).for_each(|(text, room)| text.p_data = room.as_mut_ptr().cast());
            let read = self.executables.fp().get_pipeline_executable_internal_representations_khr;
            let mut count = texts.len() as u32;
            read(self.device.handle(), &info, &mut count, texts.as_mut_ptr()).result().unwrap();
            let at = texts.iter().position(|t| text(t.name_as_c_str().ok()) == "Assembly").expect("RADV writes assembly");
            let assembly = String::from_utf8_lossy(&room[at]).trim_end_matches('\0').to_owned();
            let properties = self.executables.get_pipeline_executable_properties(&vk::PipelineInfoKHR::default().pipeline(pipeline)).unwrap();
            Code { statistics, wave: properties[0].subgroup_size, assembly }
        }
    }

    /// As wgpu-hal's Vulkan backend translates what is trusted: without checks, loop bounds and
    /// cleared workgroup memory, bindings numbered on end.
    fn spirv(&self, spec: &Spec) -> Vec<u32> {
        let source = spec.source(Tier::F16Subgroups).unwrap();
        let module = naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{}", e.emit_to_string(&source)));
        let capabilities = Capabilities::IMMEDIATES | Capabilities::SHADER_FLOAT16_IN_FLOAT32 | Capabilities::SHADER_FLOAT16 | Capabilities::SUBGROUP;
        let info = Validator::new(ValidationFlags::all(), capabilities).validate(&module).unwrap();
        let place = |(to, (from, _)): (usize, &(u32, _))| {
            let from = naga::ResourceBinding { group: 0, binding: *from };
            (from, spv::BindingInfo { descriptor_set: 0, binding: to as u32, binding_array_size: None })
        };
        let unchecked = BoundsCheckPolicy::Unchecked;
        let options = spv::Options {
            lang_version: if self.version >= vk::API_VERSION_1_3 { (1, 6) } else { (1, 5) },
            flags: spv::WriterFlags::LABEL_VARYINGS | spv::WriterFlags::FORCE_POINT_SIZE,
            bounds_check_policies: BoundsCheckPolicies { index: unchecked, buffer: unchecked, image_load: unchecked, binding_array: unchecked },
            zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
            force_loop_bounding: false,
            emit_int_div_checks: false,
            fake_missing_bindings: false,
            binding_map: spec.bindings.iter().enumerate().map(place).collect(),
            ..Default::default()
        };
        let entry = spv::PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: "main".into() };
        spv::write_vec(&module, &info, &options, Some(&entry)).unwrap()
    }
}
