//! The GPU decoder computes what the CPU decoder does: every family and shape, dense and
//! compressed, in every tier, on odd sizes.

mod common;

use common::rows::{coded, ways};
use common::{Random, SyntheticModel, compressed, families, nmse};
use lowkey::checkpoint::Checkpoint;
use lowkey::cpu::{self, RowType};
use lowkey::decoder;
use lowkey::gpu::{Device, Options, Tier};
use lowkey::kv::{Exact, LatentSet};
use lowkey::sequence::{Logits, Sequence, SequenceOptions};
use std::sync::Arc;

/// Longer than one chunk, than several score tiles, and no multiple of anything.
const TOKENS: usize = 161;
const MOST: f64 = 1e-5;

/// One checkpoint through both decoders: all logits of a chunked prompt, then single steps, then
/// from earlier positions on. Where rows are coded, a rounding error that moves a number from one
/// code to the next is seen in the logits; what f16 instead of f32 rows do to the CPU's own logits
/// is the measure of that.
fn compare(name: &str, checkpoint: &Checkpoint, rows: Option<&LatentSet>, strict: bool, device: &Arc<Device>) {
    let name = format!("{name}, strict: {strict}, {:?}", device.tier());
    let vocab = checkpoint.config().vocab_size;
    let tokens = Random(8).tokens(TOKENS + 40, vocab);
    let options = SequenceOptions { capacity: 210, strict, chunk: Some(64), ..Default::default() };
    let cpu = Arc::new(cpu::Model::with_latents(checkpoint, rows.cloned()).unwrap());
    let [mut cpu, mut full] = [RowType::F16, RowType::F32].map(|row_type| cpu.sequence(options, row_type).unwrap());
    let mut gpu = Arc::new(decoder::Model::with_latents(checkpoint, rows.cloned(), device.clone()).unwrap()).sequence(options).unwrap();

    // By phase; forty steps are as many as it takes for a block of rows to be coded on the way.
    // Back to where exact rows are left, and to where there are none but sinks.
    let steps = tokens[TOKENS..].chunks(1).map(|token| (None, token, Logits::Last)).collect();
    let mut phases = vec![("a chunk", vec![(None, &tokens[..TOKENS], Logits::All)]), ("steps", steps)];
    phases.extend([(190, "190"), (80, "80"), (3, "3")].map(|(position, what)| (what, vec![(Some(position), &tokens[9..20], Logits::Last)])));
    for (what, calls) in phases {
        let run = |sequence: &mut dyn Sequence| -> Vec<f32> {
            let call = |&(position, tokens, logits): &(Option<usize>, &[u32], Logits)| {
                if let Some(position) = position {
                    sequence.truncate(position);
                    assert_eq!(sequence.position(), position);
                }
                sequence.forward(tokens, logits).unwrap()
            };
            calls.iter().flat_map(call).collect()
        };
        let expected = run(&mut cpu);
        let (error, own) = (nmse(&run(&mut gpu), &expected), nmse(&run(&mut full), &expected));
        assert!(error < MOST.max(10.0 * own), "{name}, {what}: {error}, where f16 rows alone make {own}");
    }
    let best = |logits: &[f32]| (0..vocab).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as u32;
    let logits = gpu.forward(&[1], Logits::Last).unwrap();
    gpu.truncate(gpu.position() - 1);
    assert_eq!(gpu.step(1).unwrap(), best(&logits), "{name}: argmax");
}

fn in_tier(tier: Tier) {
    let device = common::device(Options { tier: Some(tier), ..Default::default() });
    for (index, (family, synthetic)) in families().into_iter().enumerate() {
        let directory = synthetic.write_temporary();
        let dense = Checkpoint::open(directory.path()).unwrap();
        compare(family, &dense, None, false, &device);
        // Every way in the first family, and two of them, other ones each time, in the rest.
        for (number, (way, specs)) in ways(dense.config()).into_iter().enumerate().filter(|(number, _)| index == 0 || (number + index) % 5 < 2) {
            let rows = coded(&dense, specs, Exact { sinks: 4, recent: 10 });
            compare(&format!("{family}, {way}"), &dense, Some(&rows), number % 2 == 1, &device);
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
    compare("split table", &checkpoint, None, false, &device);
}
