//! KVReviver: tokens that are evicted, and what is left of them.

mod common;

use common::rows::{coded, ways};
use common::{Random, SyntheticModel, nmse};
use lowkey::checkpoint::{Architecture, Checkpoint};
use lowkey::cpu::{self, RowType};
use lowkey::gpu::{self, Tier};
use lowkey::kv::{Budget, CacheMethod, Evicted, Exact, LatentSet, Reviver};
use lowkey::sequence::{Logits, Sequence, SequenceOptions};
use lowkey::{Device, Engine, Error, LoadOptions, decoder};
use safetensors::Dtype;
use std::sync::Arc;

const DENSE: [Evicted; 4] = [Evicted::None, Evicted::Mean, Evicted::Sketch, Evicted::Shrunk];

fn narrow() -> SyntheticModel {
    SyntheticModel { layers: 3, kv_heads: 2, heads: 4, head_dim: 16, dtype: Dtype::F32, ..SyntheticModel::default() }
}

fn cpu(checkpoint: &Checkpoint, rows: Option<LatentSet>) -> Arc<cpu::Model> {
    Arc::new(cpu::Model::with_latents(checkpoint, rows).unwrap())
}

fn options(capacity: usize, keep: f64, evicted_as: Evicted) -> SequenceOptions {
    let method = CacheMethod::Evict(Reviver::new(Budget::Keep(keep), Some(evicted_as)));
    SequenceOptions { capacity, exact: Some(Exact { sinks: 4, recent: 10 }), method, ..Default::default() }
}

/// A prompt in one call, then single tokens: the logits of these.
fn read(sequence: &mut dyn Sequence, tokens: &[u32]) -> Vec<f32> {
    sequence.forward(&tokens[..200], Logits::None).unwrap();
    tokens[200..].iter().flat_map(|token| sequence.forward(&[*token], Logits::All).unwrap()).collect()
}

fn gpu(checkpoint: &Checkpoint, rows: Option<LatentSet>, device: &Arc<gpu::Device>) -> Arc<decoder::Model> {
    Arc::new(decoder::Model::with_latents(checkpoint, rows, device.clone()).unwrap())
}

fn devices() -> [Arc<gpu::Device>; 3] {
    Tier::ALL.map(|tier| gpu::Device::open(&gpu::Options { tier: Some(tier), ..Default::default() }).unwrap())
}

/// On a GPU of every tier: a prompt of several chunks and then steps, with few slots, whatever is
/// left of the evicted, is what the processor makes of it. Both keep rows in f16.
#[test]
fn a_gpu_evicts_as_the_processor_does() {
    let devices = devices();
    let dense = SyntheticModel { dtype: Dtype::F16, ..narrow() };
    let odd = SyntheticModel { heads: 6, head_dim: 14, ..dense.clone() };
    for (model, has_rows) in [(dense, false), (odd, false), (SyntheticModel::default(), true)] {
        let directory = model.write_temporary();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let tokens = Random(2).tokens(260, checkpoint.config().vocab_size);
        let exact = Exact { sinks: 4, recent: 10 };
        let all: Vec<_> = match has_rows {
            false => DENSE.map(|evicted_as| ("dense", None, evicted_as)).into(),
            true => ways(checkpoint.config()).into_iter().map(|(way, specs)| (way, Some(coded(&checkpoint, specs, exact)), Evicted::Rows)).collect(),
        };
        for (way, rows, evicted_as) in all {
            let options = SequenceOptions { exact: Some(exact), ..options(300, if has_rows { 1.0 } else { 0.3 }, evicted_as) };
            let expected = read(&mut cpu(&checkpoint, rows.clone()).sequence(options, RowType::F16).unwrap(), &tokens);
            // A code that rounds the other way travels far.
            let most = if has_rows { 1e-4 } else { 1e-6 };
            // One way to code rows has all tiers: which tokens are candidates is the same for all.
            for device in &devices[..if has_rows && way != "joint rows" { 1 } else { devices.len() }] {
                let what = format!("{way}, {evicted_as:?}, {:?}", device.tier());
                let mut sequence = gpu(&checkpoint, rows.clone(), device).sequence(options).unwrap();
                let found = read(&mut sequence, &tokens);
                let error = nmse(&found, &expected);
                assert!(error < most, "{what}: {error}");
                if device.tier() == Tier::F16Subgroups {
                    sequence.truncate(0);
                    assert_eq!(read(&mut sequence, &tokens), found, "{what}: from the beginning");
                }
            }
        }
    }
}

/// No sinks, nothing recent beyond the block, chunks of one and of a number that does not divide
/// anything: the same on both.
#[test]
fn windows_may_be_as_small_as_they_like() {
    let directory = SyntheticModel { dtype: Dtype::F16, ..narrow() }.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let tokens = Random(7).tokens(220, checkpoint.config().vocab_size);
    let [device, ..] = devices();
    for (sinks, recent, chunk) in [(0, 0, None), (0, 1, Some(7)), (3, 0, Some(1)), (0, 40, Some(32))] {
        let options = SequenceOptions { exact: Some(Exact { sinks, recent }), chunk, ..options(230, 0.3, Evicted::Mean) };
        let expected = read(&mut cpu(&checkpoint, None).sequence(options, RowType::F16).unwrap(), &tokens);
        let found = read(&mut gpu(&checkpoint, None, &device).sequence(options).unwrap(), &tokens);
        assert!(nmse(&found, &expected) < 1e-6, "{sinks} {recent} {chunk:?}: {}", nmse(&found, &expected));
    }
}

/// A call that fails on the way leaves a text that is read anew.
#[test]
fn what_fails_can_be_tried_again() {
    // Every weight is finite, and every logit beyond what f32 holds.
    let model = narrow();
    let directory = model.write_temporary();
    let mut tensors = model.tensors();
    tensors.get_mut("model.norm.weight").unwrap().numbers.fill(f32::MAX);
    common::write_tensors(&directory.path().join("model.safetensors"), &tensors, Dtype::F32);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let tokens = Random(8).tokens(120, checkpoint.config().vocab_size);
    let options = options(200, 0.5, Evicted::Mean);
    let bare: [Box<dyn Sequence>; 2] = [
        Box::new(cpu(&checkpoint, None).sequence(options, RowType::F16).unwrap()),
        Box::new(gpu(&checkpoint, None, &devices()[0]).sequence(options).unwrap()),
    ];
    for mut sequence in bare {
        sequence.forward(&tokens, Logits::None).unwrap();
        assert!(matches!(sequence.forward(&tokens[..3], Logits::Last), Err(Error::Numeric { .. })));
        assert_eq!((sequence.position(), sequence.kept_from()), (0, 0), "nothing is left of what has been counted");
    }
    for device in [Device::Cpu, Device::Auto] {
        let model = Engine::open(&LoadOptions { device, ..Default::default() }).unwrap().load(directory.path()).unwrap();
        let mut sequence = model.sequence(options).unwrap();
        sequence.forward(&tokens, Logits::None).unwrap();
        assert!(matches!(sequence.forward(&tokens[..3], Logits::Last), Err(Error::Numeric { .. })));
        assert_eq!(sequence.position(), 120);
        sequence.forward(&tokens[..3], Logits::None).unwrap();
        assert_eq!(sequence.position(), 123);
    }
}

/// On the processor and on a GPU of every tier: with a bucket for every token a sketch is the
/// tokens themselves, and attention over it exact.
#[test]
fn a_sketch_without_collisions_is_the_dense_model() {
    let directory = SyntheticModel { dtype: Dtype::F16, ..narrow() }.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let config = checkpoint.config();
    let tokens = Random(1).tokens(260, config.vocab_size);
    let width = 2 * config.num_key_value_heads * config.head_dim;
    let exact = Exact { sinks: 4, recent: 10 };
    let dense = read(
        &mut cpu(&checkpoint, None).sequence(SequenceOptions { capacity: 260, exact: Some(exact), ..Default::default() }, RowType::F16).unwrap(),
        &tokens,
    );
    for evicted_as in [Evicted::Sketch, Evicted::Shrunk] {
        // Room for 260 buckets, a mean and the window, and for a few candidates.
        let layer = (260 * (4 * width + 16)) as f64 / 0.98 + (12 * width + 14 * 2 * width + 4 * 260) as f64;
        let budget = Budget::Bytes((layer * config.num_hidden_layers as f64 / 260.0).ceil() as u64);
        let reviver = Reviver { sketch_share: 0.98, ..Reviver::new(budget, Some(evicted_as)) };
        let stores = reviver.stores(&config.geometry(), &[], exact, 260).unwrap();
        assert!(stores.buckets == 260 && stores.candidates < 25, "{stores:?}");
        let options = SequenceOptions { method: CacheMethod::Evict(reviver), ..options(260, 1.0, evicted_as) };
        let found = read(&mut cpu(&checkpoint, None).sequence(options, RowType::F16).unwrap(), &tokens);
        assert!(nmse(&found, &dense) < 1e-7, "{evicted_as:?}: {}", nmse(&found, &dense));
        for device in devices() {
            let found = read(&mut gpu(&checkpoint, None, &device).sequence(options).unwrap(), &tokens);
            assert!(nmse(&found, &dense) < 1e-7, "{evicted_as:?}, {:?}: {}", device.tier(), nmse(&found, &dense));
        }
    }
}

/// What a GPU has allocated is what was asked for, and nearly all of it.
#[test]
fn a_gpu_keeps_the_budget() {
    let directory = narrow().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let dense = checkpoint.config().dense_kv_bytes_per_token() as f64;
    let device = gpu::Device::open(&gpu::Options::default()).unwrap();
    let model = gpu(&checkpoint, None, &device);
    for evicted_as in DENSE {
        for (capacity, keep) in [(300, 0.5), (1000, 0.25)] {
            let memory = model.sequence(options(capacity, keep, evicted_as)).unwrap().memory();
            let taken = (memory.allocated_bytes - memory.kv_fixed_bytes) as f64 + 14.0 * dense;
            let asked = keep * dense * capacity as f64;
            // Buffers are multiples of 16 bytes.
            assert!(taken <= asked + 256.0 && taken > asked - 2000.0, "{evicted_as:?} {capacity} {keep}: {taken} of {asked}");
            assert_eq!(memory.kv_fixed_bytes, (4 + 10 + 32 + 32) * (dense as u64 + 3 * 4), "{evicted_as:?}");
        }
    }
    for (way, specs) in ways(checkpoint.config()) {
        let budget = LatentSet::bytes_per_token(&specs) + dense as u64 / 2;
        let model = gpu(&checkpoint, Some(coded(&checkpoint, specs, Exact { sinks: 4, recent: 10 })), &device);
        let method = CacheMethod::Evict(Reviver::new(Budget::Bytes(budget), None));
        let memory = model.sequence(SequenceOptions { method, ..options(1000, 1.0, Evicted::Rows) }).unwrap().memory();
        let taken = (memory.allocated_bytes - memory.kv_fixed_bytes) as f64 + 14.0 * dense;
        let asked = 1000.0 * budget as f64;
        assert!(taken <= asked + 256.0 && taken > asked - 2000.0, "{way}: {taken} of {asked}");
    }
}

/// What fits is not evicted, whatever would be left of it.
#[test]
fn with_slots_for_all_tokens_it_is_the_dense_model() {
    let directory = narrow().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let tokens = Random(1).tokens(260, checkpoint.config().vocab_size);
    let model = cpu(&checkpoint, None);
    let exact = Some(Exact { sinks: 4, recent: 10 });
    for row_type in [RowType::F16, RowType::F32] {
        let dense = read(&mut model.sequence(SequenceOptions { capacity: 700, exact, ..Default::default() }, row_type).unwrap(), &tokens);
        for evicted_as in DENSE {
            let found = read(&mut model.sequence(options(700, 1.0, evicted_as), row_type).unwrap(), &tokens);
            let error = nmse(&found, &dense);
            assert!(error < 1e-9, "{evicted_as:?}, {row_type:?}: {error}");
        }
    }
}

/// Where slots are few every way loses something, another something.
#[test]
fn with_few_slots_something_is_lost_and_not_everything() {
    let directory = narrow().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let tokens = Random(2).tokens(260, checkpoint.config().vocab_size);
    let model = cpu(&checkpoint, None);
    let dense = read(&mut model.sequence(300, RowType::F16).unwrap(), &tokens);
    let found = DENSE.map(|evicted_as| read(&mut model.sequence(options(300, 0.25, evicted_as), RowType::F16).unwrap(), &tokens));
    let errors = [0, 1, 2, 3].map(|way| nmse(&found[way], &dense));
    assert!(errors.iter().all(|&error| error > 1e-6), "{errors:?}");
    // Sums with noise are worth less than nothing, shrunk ones less so.
    assert!(errors[0].max(errors[1]) < errors[3] && errors[3] < errors[2], "{errors:?}");
    assert!(nmse(&found[1], &found[0]) > 1e-6);
    assert_eq!(read(&mut model.sequence(options(300, 0.25, Evicted::Shrunk), RowType::F16).unwrap(), &tokens), found[3]);
}

/// Sinks, recent tokens, candidates and the evicted tokens take what was asked for, and nearly all
/// of it.
#[test]
fn the_budget_is_kept_and_counted() {
    let directory = narrow().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let (model, dense) = (cpu(&checkpoint, None), checkpoint.config().dense_kv_bytes_per_token() as f64);
    for evicted_as in DENSE {
        for (capacity, keep) in [(300, 0.5), (1000, 0.25), (2000, 0.1)] {
            let memory = model.sequence(options(capacity, keep, evicted_as), RowType::F16).unwrap().memory();
            let window = (4.0 + 10.0) * dense;
            let taken = (memory.allocated_bytes - memory.kv_fixed_bytes) as f64 + window;
            let asked = keep * dense * capacity as f64;
            assert!(taken <= asked && taken > asked - 2000.0, "{evicted_as:?} {capacity} {keep}: {taken} of {asked}");
            assert_eq!(memory.kv_bytes_per_token, (memory.allocated_bytes - memory.kv_fixed_bytes) / capacity as u64);
            // The window and the blocks under way, and what they received.
            assert_eq!(memory.kv_fixed_bytes, (4 + 10 + 32 + 32) * (dense as u64 + 3 * 4), "{evicted_as:?}");
        }
    }
}

/// With latents beside, candidates are read exactly instead: all of them is the dense model, and
/// some are better than none.
#[test]
fn candidates_are_read_instead_of_their_rows() {
    let directory = SyntheticModel::default().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let tokens = Random(3).tokens(260, checkpoint.config().vocab_size);
    let dense = read(&mut cpu(&checkpoint, None).sequence(700, RowType::F16).unwrap(), &tokens);
    for (way, specs) in ways(checkpoint.config()) {
        let bytes = LatentSet::bytes_per_token(&specs);
        let model = cpu(&checkpoint, Some(coded(&checkpoint, specs, Exact { sinks: 4, recent: 10 })));
        let error = |slots: u64| {
            let each = checkpoint.config().dense_kv_bytes_per_token() + 8 * checkpoint.config().num_hidden_layers as u64;
            let method = match slots {
                0 => CacheMethod::default(),
                slots => CacheMethod::Evict(Reviver::new(Budget::Bytes(bytes + (slots + 14) * each / 700 + 1), None)),
            };
            let options = SequenceOptions { method, chunk: Some(32), ..options(700, 1.0, Evicted::Rows) };
            let mut sequence = model.sequence(options, RowType::F16).unwrap();
            let error = nmse(&read(&mut sequence, &tokens), &dense);
            assert!(slots == 0 || sequence.memory().kv_bytes_per_token >= bytes, "{way}");
            error
        };
        let [none, some, all] = [0, 120, 400].map(error);
        assert!(all < 1e-9 && some < none, "{way}: {all} {some} {none}");
    }
}

/// What has been evicted is read anew where a sequence is cut within it, and nothing is where it is
/// not.
#[test]
fn cuts_go_back_to_any_token() {
    [Device::Cpu, Device::Auto].into_iter().for_each(cuts);
}

fn cuts(device: Device) {
    let directory = narrow().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let model = Engine::open(&LoadOptions { device, ..Default::default() }).unwrap().load(checkpoint.path()).unwrap();
    let tokens = Random(5).tokens(250, checkpoint.config().vocab_size);
    let vocab = checkpoint.config().vocab_size;
    let mut sequence = model.sequence(options(260, 0.4, Evicted::Shrunk)).unwrap();
    let whole = sequence.forward(&tokens, Logits::All).unwrap();
    for cut in [0, 3, 100, 200] {
        sequence.truncate(cut);
        assert_eq!(sequence.position(), cut);
        assert_eq!(sequence.forward(&tokens[cut..], Logits::All).unwrap(), whole[cut * vocab..], "{cut}");
        assert_eq!(sequence.position(), 250);
    }
    sequence.truncate(100);
    assert!(nmse(&sequence.forward(&tokens[100..], Logits::Last).unwrap(), &whole[249 * vocab..]) < 1e-9);
    // Within the exact window nothing is read anew, and as long as nothing is evicted what was
    // tried is as if it had not been.
    let next = sequence.forward(&tokens[..4], Logits::All).unwrap();
    sequence.truncate(250);
    sequence.forward(&tokens[50..53], Logits::None).unwrap();
    sequence.truncate(250);
    assert_eq!(sequence.forward(&tokens[..4], Logits::All).unwrap(), next);
    let too_many = Random(6).tokens(7, vocab);
    assert!(matches!(sequence.forward(&too_many, Logits::None), Err(Error::Context { .. })));
    sequence.truncate(20);
    assert!(matches!(sequence.forward(&[u32::MAX], Logits::None), Err(Error::Argument { .. })));
    assert_eq!(sequence.position(), 20);
    // Read anew without another token: then there is nothing left to be read.
    sequence.forward(&[], Logits::None).unwrap();
    assert_eq!(sequence.position(), 20);
    // And with one, as if it had come so.
    sequence.truncate(20);
    let next = sequence.step(tokens[20]).unwrap();
    let mut fresh = model.sequence(options(260, 0.4, Evicted::Shrunk)).unwrap();
    fresh.forward(&tokens[..20], Logits::None).unwrap();
    assert_eq!(fresh.step(tokens[20]).unwrap(), next);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let directory = narrow().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let engine = |device| Engine::open(&LoadOptions { device, ..Default::default() }).unwrap();
    let model = engine(Device::Cpu).load(checkpoint.path()).unwrap();
    let name = |error: Option<Error>| match error {
        Some(Error::Argument { name, message }) if !message.is_empty() => name,
        other => panic!("{other:?}"),
    };
    let refused = |options: SequenceOptions| name(model.sequence(options).err());
    let good = options(300, 0.5, Evicted::Mean);
    assert!(model.sequence(good).is_ok());
    assert_eq!(refused(options(300, 0.5, Evicted::Rows)), "evicted");
    assert_eq!(refused(options(300, 0.01, Evicted::Mean)), "kv-bytes");
    assert_eq!(refused(options(300, 1.5, Evicted::Mean)), "keep");
    assert_eq!(refused(options(0, 0.5, Evicted::Mean)), "context");
    assert_eq!(refused(options(usize::MAX, 0.5, Evicted::Mean)), "context");

    let (_, specs) = ways(checkpoint.config()).into_iter().next().unwrap();
    let compressed = cpu(&checkpoint, Some(coded(&checkpoint, specs, Exact { sinks: 4, recent: 10 })));
    for evicted_as in DENSE {
        assert_eq!(name(compressed.sequence(options(300, 1.0, evicted_as), RowType::F16).err()), "evicted");
    }
    let mistral = SyntheticModel { architecture: Architecture::Mistral, sliding_window: Some(24), ..narrow() }.write_temporary();
    let mistral = cpu(&Checkpoint::open(mistral.path()).unwrap(), None);
    assert_eq!(name(mistral.sequence(good, RowType::F16).err()), "method");
}
