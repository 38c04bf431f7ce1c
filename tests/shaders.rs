//! Every variant that is asked for is, in every tier, valid WGSL and translates to SPIR-V, HLSL and
//! MSL: what has not been translated is not cross-vendor.

mod asked;
mod common;

use lowkey::gpu::{SOURCES, Spec, Tier};
use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use rayon::prelude::*;
use std::collections::{BTreeSet, HashSet};

fn capabilities(tier: Tier) -> Capabilities {
    let base = Capabilities::IMMEDIATES | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    match tier {
        Tier::F16Subgroups => base | Capabilities::SHADER_FLOAT16 | Capabilities::SUBGROUP,
        Tier::F16 => base | Capabilities::SHADER_FLOAT16,
        Tier::Baseline => base,
    }
}

fn to_spirv(module: &naga::Module, info: &ModuleInfo) -> Result<usize, String> {
    spv::write_vec(module, info, &spv::Options { lang_version: (1, 3), ..Default::default() }, None)
        .map(|words| words.len())
        .map_err(|e| e.to_string())
}

fn to_hlsl(module: &naga::Module, info: &ModuleInfo) -> Result<usize, String> {
    let options = hlsl::Options {
        shader_model: hlsl::ShaderModel::V6_2,
        fake_missing_bindings: true,
        immediates_target: Some(hlsl::BindTarget {
            space: 1,
            register: 0,
            binding_array_size: None,
            dynamic_storage_buffer_offsets_index: None,
            restrict_indexing: false,
        }),
        ..Default::default()
    };
    let mut text = String::new();
    let pipeline = hlsl::PipelineOptions::default();
    hlsl::Writer::new(&mut text, &options, &pipeline).write(module, info, None).map_err(|e| e.to_string())?;
    Ok(text.len())
}

fn to_msl(module: &naga::Module, info: &ModuleInfo) -> Result<usize, String> {
    let options = msl::Options { lang_version: (2, 4), fake_missing_bindings: true, ..Default::default() };
    msl::write_string(module, info, &options, &msl::PipelineOptions::default()).map(|(text, _)| text.len()).map_err(|e| e.to_string())
}

/// Every file is a kernel's, and every condition in one is met by something that is asked for: what
/// is not could be left out.
fn assert_all_is_asked_for(specs: &[Spec]) {
    let files: BTreeSet<&str> = SOURCES.iter().map(|(name, _)| *name).filter(|name| !name.starts_with("lib/")).collect();
    assert_eq!(specs.iter().map(|spec| spec.shader).collect::<BTreeSet<_>>(), files);
    let conditions = SOURCES
        .iter()
        .flat_map(|(_, text)| text.lines())
        .filter_map(|line| line.trim().strip_prefix("#if "))
        .map(|flag| flag.trim_start_matches('!'));
    let tiers: BTreeSet<&str> = Tier::ALL.iter().flat_map(|tier| tier.flags()).copied().collect();
    let known: BTreeSet<&str> = conditions.filter(|flag| !tiers.contains(flag)).collect();
    assert_eq!(specs.iter().flat_map(|spec| spec.flags.iter().copied()).collect::<BTreeSet<_>>(), known);
}

#[test]
fn every_variant_that_is_asked_for_translates() {
    let asked = asked::specs();
    assert_all_is_asked_for(&asked);
    let variants: HashSet<Spec> = asked.into_iter().collect();
    let all: Vec<(Tier, &Spec)> = Tier::ALL.into_iter().flat_map(|tier| variants.iter().map(move |variant| (tier, variant))).collect();
    // All but the one shader that exists to measure f16, and those that are chosen where there are
    // subgroups.
    let possible = |(tier, variant): &&(Tier, &Spec)| match variant.shader {
        "flash.wgsl" | "matvec_int8.wgsl" => *tier == Tier::F16Subgroups,
        _ => *tier != Tier::Baseline || !variant.flags.contains(&"HALVES"),
    };
    all.par_iter().filter(possible).for_each(|(tier, variant)| assert_translates(variant, *tier));
}

fn assert_translates(variant: &Spec, tier: Tier) {
    let name = format!("{} {:?} {:?} in {tier:?}", variant.shader, variant.flags, variant.constants);
    let source = variant.source(tier).unwrap();
    let module = naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source)));
    let info = Validator::new(ValidationFlags::all(), capabilities(tier)).validate(&module).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    for (target, translated) in [("SPIR-V", to_spirv(&module, &info)), ("HLSL", to_hlsl(&module, &info)), ("MSL", to_msl(&module, &info))] {
        assert!(translated.unwrap_or_else(|e| panic!("{name} to {target}: {e}")) > 100, "{name} to {target}");
    }
    // A device without so many buffers reads scores and values apart.
    limits(&module, &name, if variant.shader == "flash.wgsl" { 11 } else { 8 });
}

/// What the least of devices offers: `buffers` storage buffers, eight as a rule, 16 KiB of
/// workgroup memory, 256 lanes, and 64 bytes of immediates.
fn limits(module: &naga::Module, name: &str, buffers: u32) {
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).unwrap();
    let mut workgroup = 0;
    let mut storage = 0;
    for (_, variable) in module.global_variables.iter() {
        match variable.space {
            naga::AddressSpace::WorkGroup => workgroup += layouter[variable.ty].size,
            naga::AddressSpace::Storage { .. } => storage += 1,
            naga::AddressSpace::Immediate => assert!(layouter[variable.ty].size <= 64, "{name}: immediates"),
            _ => {}
        }
    }
    assert!(workgroup <= 16 << 10, "{name}: {workgroup} bytes of workgroup memory");
    assert!(storage <= buffers, "{name}: {storage} storage buffers");
    assert!(module.entry_points[0].workgroup_size.iter().product::<u32>() <= 256, "{name}: lanes");
}
