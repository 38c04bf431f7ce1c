//! The GPU decoder computes what the CPU decoder does: every family and shape, dense and compressed, in every tier, on odd sizes.

mod common;

use common::{Random, SyntheticModel, compressed, families, nmse};
use lowkey::checkpoint::Checkpoint;
use lowkey::cpu::{self, RowType};
use lowkey::decoder;
use lowkey::gpu::{Device, Options, Tier};
use lowkey::sequence::{Logits, Sequence};
use std::sync::Arc;

/// Longer than one chunk, than several score tiles, and no multiple of anything.
const TOKENS: usize = 161;
const MOST: f64 = 1e-5;

/// One checkpoint through both decoders: all logits of a chunked prompt, then single steps, then a shorter text again.
fn compare(name: &str, checkpoint: &Checkpoint, device: &Arc<Device>) {
    let vocab = checkpoint.config().vocab_size;
    let tokens = Random(8).tokens(TOKENS + 5, vocab);
    let mut cpu = Arc::new(cpu::Model::load(checkpoint).unwrap()).sequence(200, RowType::F16).unwrap();
    let mut gpu = Arc::new(decoder::Model::load(checkpoint, device.clone()).unwrap()).sequence(200).unwrap();

    let expected = cpu.forward(&tokens[..TOKENS], Logits::All).unwrap();
    let error = nmse(&gpu.forward(&tokens[..TOKENS], Logits::All).unwrap(), &expected);
    assert!(error < MOST, "{name}, {:?}: {error} on a chunk", device.tier());
    for &token in &tokens[TOKENS..] {
        let expected = cpu.forward(&[token], Logits::Last).unwrap();
        let error = nmse(&gpu.forward(&[token], Logits::Last).unwrap(), &expected);
        assert!(error < MOST, "{name}, {:?}: {error} on a step", device.tier());
    }
    for sequence in [&mut cpu as &mut dyn Sequence, &mut gpu] {
        sequence.truncate(3);
        assert_eq!(sequence.position(), 3);
    }
    let expected = cpu.forward(&tokens[9..20], Logits::Last).unwrap();
    let error = nmse(&gpu.forward(&tokens[9..20], Logits::Last).unwrap(), &expected);
    assert!(error < MOST, "{name}, {:?}: {error} after truncation", device.tier());
    let best = |logits: &[f32]| (0..vocab).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as u32;
    let logits = gpu.forward(&[1], Logits::Last).unwrap();
    gpu.truncate(gpu.position() - 1);
    assert_eq!(gpu.step(1).unwrap(), best(&logits), "{name}, {:?}: argmax", device.tier());
}

fn in_tier(tier: Tier) {
    let device = common::device(Options { tier: Some(tier), ..Default::default() });
    for (family, synthetic) in families() {
        let directory = synthetic.write_temporary();
        let dense = Checkpoint::open(directory.path()).unwrap();
        compare(family, &dense, &device);
        let outputs = tempfile::tempdir().unwrap();
        for (keep, heads) in [(0.5, 4), (0.7, 2)] {
            let factored = compressed(&dense, keep, heads, &outputs.path().join(format!("{keep}-{heads}")));
            compare(&format!("{family} compressed to {keep} in groups of {heads}"), &factored, &device);
        }
    }
}

#[test]
fn gpu_equals_cpu_with_f16_and_subgroups() {
    in_tier(Tier::F16Subgroups);
}

#[test]
fn gpu_equals_cpu_with_f16() {
    in_tier(Tier::F16);
}

#[test]
fn gpu_equals_cpu_in_the_baseline_tier() {
    in_tier(Tier::Baseline);
}

#[test]
fn at_full_rank_a_factored_model_is_the_dense_one() {
    let logits = |checkpoint: &Checkpoint, device: &Arc<Device>| {
        let tokens = Random(9).tokens(70, checkpoint.config().vocab_size);
        let mut sequence = Arc::new(decoder::Model::load(checkpoint, device.clone()).unwrap()).sequence(80).unwrap();
        let mut logits = sequence.forward(&tokens[..66], Logits::All).unwrap();
        tokens[66..].iter().for_each(|token| logits.extend(sequence.forward(&[*token], Logits::Last).unwrap()));
        logits
    };
    for (family, synthetic) in families().into_iter().filter(|(family, _)| ["llama", "qwen2", "qwen3"].contains(family)) {
        let (directory, outputs) = (synthetic.write_temporary(), tempfile::tempdir().unwrap());
        let dense = Checkpoint::open(directory.path()).unwrap();
        let factored = compressed(&dense, 1.0, 2, &outputs.path().join("factored"));
        for tier in Tier::ALL {
            let device = common::device(Options { tier: Some(tier), ..Default::default() });
            let error = nmse(&logits(&factored, &device), &logits(&dense, &device));
            assert!(error < MOST, "{family}, {tier:?}: {error}");
        }
    }
}

#[test]
fn a_table_larger_than_a_binding_is_split() {
    let synthetic = SyntheticModel { vocab: 1999, ..SyntheticModel::default() };
    let directory = synthetic.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let row = checkpoint.config().hidden_size.next_multiple_of(4) * 2;
    // Three parts of the table, the last one short.
    let device = common::device(Options { max_binding: Some((row * 900).max(160 << 10) as u64), ..Default::default() });
    assert!(row * 1999 > device.max_binding() as usize);
    compare("split table", &checkpoint, &device);
}
