//! Weights that stay in blocks of few bits are the same model as those widened to f16.

mod common;

use common::gguf::{Encoded, Gguf};
use common::{Random, SyntheticModel, nmse};
use half::f16;
use lowkey::checkpoint::{Checkpoint, WeightStorage};
use lowkey::cpu::{self, RowType};
use lowkey::decoder::{Model, plan_memory};
use lowkey::gpu::{Device, Options, Tier};
use lowkey::sequence::{Logits, Sequence, SequenceOptions};
use lowkey::task::quietly;
use std::sync::Arc;

/// A type of GGUF's: its number, numbers and bytes of a block, the place of each scale in f16, and
/// what these are beside the spread of a block's random codes.
struct Kind {
    name: &'static str,
    number: u32,
    block: (usize, usize),
    scales: &'static [(usize, f32)],
}

/// What scales are is chosen so that numbers have about the variance 1, and the mean 0.
const KINDS: [Kind; 8] = [
    Kind { name: "Q4_0", number: 2, block: (32, 18), scales: &[(0, 0.22)] },
    Kind { name: "Q4_1", number: 3, block: (32, 20), scales: &[(0, 0.22), (2, -1.6)] },
    Kind { name: "Q5_0", number: 6, block: (32, 22), scales: &[(0, 0.11)] },
    Kind { name: "Q5_1", number: 7, block: (32, 24), scales: &[(0, 0.11), (2, -1.7)] },
    Kind { name: "Q8_0", number: 8, block: (32, 34), scales: &[(0, 0.0135)] },
    Kind { name: "Q4_K", number: 12, block: (256, 144), scales: &[(0, 0.0046), (2, 0.034)] },
    Kind { name: "Q5_K", number: 13, block: (256, 176), scales: &[(0, 0.0023), (2, 0.035)] },
    Kind { name: "Q6_K", number: 14, block: (256, 210), scales: &[(208, 0.0007)] },
];

impl Kind {
    /// A tensor of random codes with its own shape.
    fn random(&self, tensor: &Encoded, seed: u64) -> Encoded {
        let (mut random, (numbers, bytes)) = (Random(seed), self.block);
        let count = tensor.dimensions.iter().product::<u64>() as usize / numbers;
        let spread = 1.0 / (tensor.dimensions[0] as f32).sqrt();
        let block = |_| {
            let mut block: Vec<u8> = (0..bytes).map(|_| random.next() as u8).collect();
            if ["Q4_K", "Q5_K"].contains(&self.name) {
                // Six bits each, of which the highest is set.
                block[4..12].iter_mut().for_each(|byte| *byte |= 0xa0);
            }
            for (at, scale) in self.scales {
                let scale = f16::from_f32(scale * spread * (0.5 + random.uniform()));
                block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
            block
        };
        Encoded { kind: self.number, bytes: (0..count).flat_map(block).collect(), ..tensor.clone() }
    }
}

/// All logits of a prompt, and those of single steps.
fn logits(checkpoint: &Checkpoint, storage: WeightStorage, device: &Arc<Device>) -> (Arc<Model>, Vec<f32>) {
    let model = Arc::new(Model::load_as(checkpoint, storage, device.clone(), &mut quietly).unwrap());
    let tokens = Random(9).tokens(70, checkpoint.config().vocab_size);
    let mut sequence = model.sequence(80).unwrap();
    let mut logits = sequence.forward(&tokens[..66], Logits::All).unwrap();
    tokens[66..].iter().for_each(|token| logits.extend(sequence.forward(&[*token], Logits::Last).unwrap()));
    (model, logits)
}

/// The model in a file, with matrices in the type that `kind` says by their name.
fn file(synthetic: &SyntheticModel, kind: impl Fn(&str) -> Option<&'static Kind>) -> (tempfile::TempDir, Checkpoint) {
    let mut gguf: Gguf = synthetic.gguf();
    for (seed, tensor) in gguf.tensors.iter_mut().enumerate().filter(|(_, tensor)| tensor.dimensions.len() > 1) {
        if let Some(kind) = kind(&tensor.name) {
            *tensor = kind.random(tensor, seed as u64);
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    gguf.write(&path);
    let checkpoint = Checkpoint::open(&path).unwrap();
    (directory, checkpoint)
}

fn assert_same(name: &str, checkpoint: &Checkpoint, tier: Tier, types: &str) {
    let device = common::device(Options { tier: Some(tier), ..Default::default() });
    let ((stored, found), (wide, expected)) = (logits(checkpoint, WeightStorage::Stored, &device), logits(checkpoint, WeightStorage::F16, &device));
    let error = nmse(&found, &expected);
    // A K block's scales are rounded to f16, and so are the numbers of the other model.
    assert!(error < if name.ends_with("_K") { 1e-5 } else { 2e-6 }, "{name}, {tier:?}: {error}");
    assert_eq!((stored.weight_type().as_str(), wide.weight_type().as_str()), (types, "f16"), "{name}");
    let bits = 16.0 * stored.matrix_bytes() as f64 / wide.matrix_bytes() as f64;
    assert!(bits > 4.4 && bits < 10.0, "{name}: {bits}");
}

const WIDE: usize = 256;

fn wide() -> SyntheticModel {
    SyntheticModel { hidden: WIDE, ffn: WIDE, heads: 8, kv_heads: 4, head_dim: 32, layers: 1, ..SyntheticModel::default() }
}

#[test]
fn blocks_are_the_numbers_they_stand_for() {
    let types = ["q4", "q4m", "q5", "q5m", "q8", "q4m", "q5m", "q6"];
    for (index, (kind, types)) in KINDS.iter().zip(types).enumerate() {
        let (_directory, checkpoint) = file(&wide(), |_| Some(kind));
        assert_same(kind.name, &checkpoint, Tier::ALL[index % 3], types);
        let model = Model::load(&checkpoint, common::device(Options::default())).unwrap();
        // Three norms.
        let planned = plan_memory(&checkpoint, WeightStorage::Stored, &SequenceOptions::from(1)).weights;
        assert_eq!(planned, model.matrix_bytes() + 2 * 3 * WIDE as u64, "{}", kind.name);
        let name = "model.layers.0.self_attn.q_proj.weight";
        let blocks = checkpoint.blocks(name, [WIDE, WIDE], WeightStorage::Stored).unwrap().unwrap();
        let found: Vec<f32> = blocks.f16().into_iter().map(f32::from).collect();
        let error = nmse(&found, &checkpoint.f32(name, &[WIDE, WIDE]).unwrap());
        assert!(error <= if kind.name.ends_with("_K") { 1e-6 } else { 0.0 }, "{}: {error}", kind.name);
    }
}

/// Rows of no whole set, heads that are padded, and a head apart from the embedding.
#[test]
fn rows_need_not_be_whole_sets() {
    let synthetic = SyntheticModel { hidden: 96, ffn: 160, heads: 8, kv_heads: 4, head_dim: 20, layers: 2, tied: false, ..SyntheticModel::default() };
    let (_directory, checkpoint) = file(&synthetic, |_| Some(&KINDS[0]));
    assert_same("narrow", &checkpoint, Tier::F16Subgroups, "q4");
    // Heads of 18 are padded to 20: zero rows in blocks; columns of the output in f16.
    let padded = SyntheticModel { hidden: 96, ffn: 160, heads: 16, kv_heads: 4, head_dim: 18, layers: 2, ..SyntheticModel::default() };
    let (_directory, checkpoint) = file(&padded, |name| Some(&KINDS[if name.contains("attn_q") { 2 } else { 3 }]));
    assert_same("padded", &checkpoint, Tier::F16Subgroups, "q5m f16 q5");
}

/// As Q4_K_M has it, and a gate and an up of two types.
#[test]
fn types_may_be_mixed() {
    let (_directory, checkpoint) = file(&SyntheticModel { layers: 2, ..wide() }, |name| match name {
        "blk.1.attn_v.weight" | "blk.0.ffn_down.weight" | "token_embd.weight" => Some(&KINDS[7]),
        "blk.1.ffn_gate.weight" => Some(&KINDS[6]),
        _ => Some(&KINDS[5]),
    });
    let device = common::device(Options::default());
    let ((stored, found), (_, expected)) = (logits(&checkpoint, WeightStorage::Stored, &device), logits(&checkpoint, WeightStorage::F16, &device));
    assert!(nmse(&found, &expected) < 1e-5);
    let mut types: Vec<_> = stored.weight_type().split(' ').map(String::from).collect();
    types.sort();
    assert_eq!(types, ["f16", "q4m", "q6"]);
}

#[test]
fn floats_are_made_blocks_where_that_is_asked_for() {
    let directory = wide().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let device = common::device(Options::default());
    let (_, expected) = logits(&checkpoint, WeightStorage::Stored, &device);
    for (storage, most) in [(WeightStorage::Q8, 1e-2), (WeightStorage::Q4, 0.5)] {
        let (model, found) = logits(&checkpoint, storage, &device);
        assert_eq!(model.weight_type(), storage.name());
        let error = nmse(&found, &expected);
        assert!(error < most && error > 1e-7, "{storage:?}: {error}");
    }
}

/// All logits of a prompt, and those of single steps, on the processor.
fn processor_logits(model: cpu::Model) -> (String, u64, Vec<f32>) {
    let model = Arc::new(model);
    let tokens = Random(9).tokens(70, model.config().vocab_size);
    let mut sequence = model.sequence(80, RowType::F32).unwrap();
    let mut logits = sequence.forward(&tokens[..66], Logits::All).unwrap();
    tokens[66..].iter().for_each(|token| logits.extend(sequence.forward(&[*token], Logits::Last).unwrap()));
    (model.weight_type(), model.matrix_bytes(), logits)
}

#[test]
fn the_processor_multiplies_blocks_as_they_are() {
    for kind in &KINDS {
        let (_directory, checkpoint) = file(&wide(), |_| Some(kind));
        let (types, bytes, found) = processor_logits(cpu::Model::load_as(&checkpoint, WeightStorage::Stored, &mut quietly).unwrap());
        let (wide, wide_bytes, expected) = processor_logits(cpu::Model::load(&checkpoint).unwrap());
        let error = nmse(&found, &expected);
        // The oracle's numbers are rounded to f16.
        assert!(error < 2e-6, "{}: {error}", kind.name);
        assert_eq!((types, wide.as_str()), (kind.name.to_lowercase(), "f32"));
        assert_eq!(bytes as usize, wide_bytes as usize / 4 / kind.block.0 * kind.block.1, "{}", kind.name);
    }
}

/// Whatever a file has, in whatever type it is asked for; and heads whose rows are interleaved.
#[test]
fn the_processor_takes_every_type_that_is_asked_for() {
    let directory = wide().write_temporary();
    let floats = Checkpoint::open(directory.path()).unwrap();
    let (_gguf, blocks) = file(&wide(), |_| Some(&KINDS[4]));
    for (checkpoint, storage, types, [least, most]) in [
        (&floats, WeightStorage::F32, "f32", [0.0, 0.0]),
        (&floats, WeightStorage::Stored, "f16", [0.0, 1e-10]),
        (&floats, WeightStorage::F16, "f16", [0.0, 1e-10]),
        (&floats, WeightStorage::Q8, "q8_0", [1e-7, 1e-2]),
        (&floats, WeightStorage::Q4, "q4_0", [1e-4, 0.5]),
        (&blocks, WeightStorage::F16, "f16", [0.0, 1e-10]),
        (&blocks, WeightStorage::Q4, "q8_0", [0.0, 2e-6]),
    ] {
        let (found_types, _, found) = processor_logits(cpu::Model::load_as(checkpoint, storage, &mut quietly).unwrap());
        let (.., expected) = processor_logits(cpu::Model::load(checkpoint).unwrap());
        let error = nmse(&found, &expected);
        assert!((least..=most).contains(&error), "{storage:?}: {error}");
        assert_eq!(found_types, types);
    }
}

#[test]
fn a_file_that_changes_while_it_is_read_is_an_error() {
    let (directory, checkpoint) = file(&wide(), |_| Some(&KINDS[0]));
    let path = directory.path().join("model.gguf");
    let mut sequence = Arc::new(cpu::Model::load_as(&checkpoint, WeightStorage::Stored, &mut quietly).unwrap()).sequence(8, RowType::F16).unwrap();
    sequence.forward(&[1, 2], Logits::Last).unwrap();
    let length = std::fs::metadata(&path).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length - 4096).unwrap();
    let said = sequence.forward(&[3], Logits::Last).unwrap_err().to_string();
    assert!(said.contains("model.gguf") && said.contains("has been changed by another program"), "{said}");
    for loaded in [cpu::Model::load(&checkpoint).map(drop), Model::load(&checkpoint, common::device(Options::default())).map(drop)] {
        let said = loaded.unwrap_err().to_string();
        assert!(said.contains("has been changed by another program"), "{said}");
    }
}

/// The script that writes models of the shape and size of real ones.
#[test]
fn the_random_model_is_of_types_as_files_have_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny.gguf");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tools/random_gguf.py");
    let written = std::process::Command::new("python3").args([script, path.to_str().unwrap(), "--shape", "tiny"]).status().unwrap();
    assert!(written.success());
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.tokenizer().unwrap().encode("the sun", false).unwrap().len(), 6);
    let (types, _, logits) = processor_logits(cpu::Model::load_as(&checkpoint, WeightStorage::Stored, &mut quietly).unwrap());
    assert_eq!(types, "q4_k q6_k");
    // Activations neither vanish nor blow up.
    let square = logits.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / logits.len() as f64;
    assert!((0.1..10.0).contains(&square), "{square}");
}
