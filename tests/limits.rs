//! What a step may cost and a cache may hold, and how the GPU decoder refuses what it cannot do:
//! errors that name the thing, and a sequence that goes on working.

mod common;

use common::{Random, SyntheticModel, compressed};
use lowkey::Error;
use lowkey::checkpoint::{Architecture, Checkpoint};
use lowkey::decoder::{GpuSequence, Model};
use lowkey::gpu::{Device, Options, Tier, adapters};
use lowkey::kv::Exact;
use lowkey::sequence::{Logits, Sequence, SequenceOptions};
use std::sync::Arc;

/// Everything in one part, 4 key/value heads of 16.
fn synthetic() -> SyntheticModel {
    SyntheticModel { heads: 8, kv_heads: 4, head_dim: 16, hidden: 64, ..SyntheticModel::default() }
}

fn sequence(checkpoint: &Checkpoint, options: Options, capacity: usize) -> Result<GpuSequence, Error> {
    Arc::new(Model::load(checkpoint, common::device(options))?).sequence(capacity)
}

/// Greedy steps: one submit, four bytes back, so many dispatches in all layers at the most, and
/// those of embedding, head and argmax.
fn assert_lean(sequence: &mut GpuSequence, layers: u32, ends: u32) {
    let mut token = 1;
    for _ in 0..3 {
        token = sequence.step(token).unwrap();
        let counters = sequence.counters();
        assert_eq!((counters.submits, counters.readback_bytes), (1, 4));
        assert!(counters.dispatches <= layers + ends, "{counters:?}");
    }
}

#[test]
fn a_step_is_one_submit_and_a_cache_is_what_it_says() {
    let directory = synthetic().write_temporary();
    let dense = Checkpoint::open(directory.path()).unwrap();
    let output = tempfile::tempdir().unwrap();
    let factored = compressed(&dense, 0.5, 4, &output.path().join("factored"));
    let planned = factored.factored().unwrap().kv_bytes_per_token;
    let capacity = 144;

    let mut whole = sequence(&dense, Options::default(), capacity).unwrap();
    // With subgroups scores and sums are one.
    assert_lean(&mut whole, 7 * 3, 3);
    let memory = whole.memory();
    assert_eq!(memory.kv_bytes_per_token, 3 * 2 * 4 * 16 * 2, "layers, keys and values, heads, numbers, bytes");
    assert_eq!(memory.kv_bytes_per_token * capacity as u64, memory.allocated_bytes);
    assert_eq!(memory.kv_bytes_per_token, dense.config().dense_kv_bytes_per_token());

    let mut half = sequence(&factored, Options::default(), capacity).unwrap();
    assert_lean(&mut half, 8 * 3, 3);
    let kept = half.memory();
    assert_eq!(kept.kv_bytes_per_token * capacity as u64, kept.allocated_bytes - kept.kv_fixed_bytes);
    // Sinks, and as many of the newest as a chunk may need: layers, keys and values, heads,
    // numbers, bytes.
    assert_eq!(kept.kv_fixed_bytes, (4 + 144) * 3 * 2 * 4 * 16 * 2);
    assert_eq!(kept.kv_bytes_per_token, planned);
    let share = kept.kv_bytes_per_token as f64 / memory.kv_bytes_per_token as f64;
    assert!((share - 0.5).abs() < 0.02, "{share}");

    // Every 32 tokens a step codes as many rows, in all layers: what it is made from, coordinates,
    // codes. From then on keys are rebuilt.
    let rows = factored.factored().unwrap().rows.len() as u32;
    while half.position() < capacity {
        half.step(1).unwrap();
        let (coded, rebuilt) = ([63, 95, 127].contains(&half.position()), half.position() > 63);
        let more = if coded { 3 * rows } else { 0 } + if rebuilt { 3 } else { 0 };
        assert_eq!(half.counters().dispatches, 8 * 3 + 3 + more, "step to {}", half.position());
    }
}

#[test]
fn matrices_are_split_to_fit_a_binding_and_a_cache_that_cannot_be_is_refused_by_layer() {
    let directory = SyntheticModel { vocab: 1500, ..synthetic() }.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let options = Options { max_binding: Some(128 << 10), ..Default::default() };
    // The table of 1500 rows of 64 numbers is two parts, embedding and head alike, and so is no
    // other matrix.
    let mut split = sequence(&checkpoint, options.clone(), 32).unwrap();
    assert_lean(&mut split, 7 * 3, 2 + 2 + 1);
    // A row of keys is 128 bytes.
    let refused = sequence(&checkpoint, options.clone(), 1025).err().unwrap();
    assert!(matches!(&refused, Error::OutOfMemory { what, .. } if what.contains("layer 0") && what.contains("1025")), "{refused}");
    // Not even 128 rows of a matrix.
    let refused = sequence(&checkpoint, Options { max_binding: Some(8 << 10), ..Default::default() }, 8).err().unwrap();
    assert!(matches!(&refused, Error::OutOfMemory { what, .. } if what.contains("128 rows")), "{refused}");
}

#[test]
fn a_context_of_nothing_and_one_beyond_the_kernels_are_refused() {
    let directory = synthetic().write_temporary();
    let model = Arc::new(Model::load(&Checkpoint::open(directory.path()).unwrap(), common::device(Options::default())).unwrap());
    for capacity in [0, 1 << 30, usize::MAX] {
        let refused = model.sequence(capacity).err().unwrap();
        assert!(matches!(&refused, Error::Argument { name, message } if name == "context" && message.contains(&capacity.to_string())), "{refused}");
    }
}

#[test]
fn what_does_not_fit_leaves_a_sequence_as_it_was() {
    let directory = synthetic().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let tokens = Random(3).tokens(10, 300);
    let mut sequence = sequence(&checkpoint, Options::default(), 10).unwrap();
    sequence.forward(&tokens[..7], Logits::None).unwrap();
    let expected = sequence.forward(&tokens[7..8], Logits::Last).unwrap();
    sequence.truncate(7);

    let refused = sequence.forward(&tokens[..4], Logits::Last).unwrap_err();
    assert!(matches!(refused, Error::Context { needed: 11, capacity: 10 }), "{refused}");
    for outside in [515, u32::MAX] {
        for refused in [sequence.forward(&[1, outside], Logits::All).unwrap_err(), sequence.step(outside).unwrap_err()] {
            assert!(matches!(&refused, Error::Argument { name, message } if name == "tokens" && message.contains(&outside.to_string())), "{refused}");
        }
    }
    assert_eq!(sequence.position(), 7);
    assert_eq!(sequence.forward(&tokens[7..8], Logits::Last).unwrap(), expected, "the cache is what it was");

    sequence.forward(&tokens[8..], Logits::None).unwrap();
    let refused = sequence.step(1).unwrap_err();
    assert!(matches!(refused, Error::Context { needed: 11, capacity: 10 }), "{refused}");
    assert_eq!(sequence.position(), 10);
}

#[test]
fn what_fails_on_the_way_leaves_a_position_as_it_was() {
    // Every weight is finite, and every logit beyond what f32 holds.
    let model = synthetic();
    let directory = model.write_temporary();
    let mut tensors = model.tensors();
    tensors.get_mut("model.norm.weight").unwrap().numbers.fill(f32::MAX);
    common::write_tensors(&directory.path().join("model.safetensors"), &tensors, safetensors::Dtype::F32);
    let mut sequence = sequence(&Checkpoint::open(directory.path()).unwrap(), Options::default(), 10).unwrap();
    sequence.forward(&[1, 2], Logits::None).unwrap();
    for refused in [
        sequence.forward(&[3, 4, 5], Logits::Last).unwrap_err(),
        sequence.forward(&[3, 4, 5], Logits::All).unwrap_err(),
        sequence.step(3).unwrap_err(),
    ] {
        assert!(matches!(refused, Error::Numeric { .. }), "{refused}");
    }
    assert_eq!(sequence.position(), 2);
}

/// Wherever the first layer is that has them, in a chunk and in a step, and whether or not the
/// driver rounds to infinity.
#[test]
fn keys_and_values_that_16_bits_do_not_hold_are_named() {
    let model = SyntheticModel { architecture: Architecture::Qwen2, ..synthetic() };
    for (side, short, layer) in [("keys", "k", 1), ("values", "v", 2)] {
        let directory = model.write_temporary();
        let mut tensors = model.tensors();
        tensors.get_mut(&format!("model.layers.{layer}.self_attn.{short}_proj.bias")).unwrap().numbers[5] = 71_000.0;
        common::write_tensors(&directory.path().join("model.safetensors"), &tensors, safetensors::Dtype::F32);
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        for tier in Tier::ALL {
            let mut sequence = sequence(&checkpoint, Options { tier: Some(tier), ..Default::default() }, 10).unwrap();
            for refused in [
                sequence.step(3).unwrap_err(),
                sequence.forward(&[3, 4, 5], Logits::None).unwrap_err(),
                sequence.forward(&[3, 4, 5], Logits::Last).unwrap_err(),
                sequence.forward(&[3, 4, 5], Logits::All).unwrap_err(),
            ] {
                let Error::Numeric { what, message } = &refused else { panic!("{refused}") };
                assert_eq!(*what, format!("layer {layer}'s {side}"), "{refused}");
                assert!(message.starts_with("they reach 7") && message.contains("65504"), "{refused}");
            }
            assert_eq!(sequence.position(), 0);
        }
    }
}

#[test]
fn adapters_and_tiers_that_are_not_there_are_refused() {
    let options = Options { adapter: Some("no such card".into()), ..Default::default() };
    let refused = Device::open(&options).err().unwrap();
    assert!(matches!(&refused, Error::NoAdapter { reason } if reason.contains("no such card")), "{refused}");
    let refused = "f64".parse::<Tier>().unwrap_err();
    assert!(matches!(&refused, Error::Argument { name, message } if name == "tier" && message.contains("baseline")), "{refused}");
    for tier in Tier::ALL {
        assert_eq!(tier.name().parse::<Tier>().unwrap(), tier);
    }
    // By any part of its name, in any case.
    let first = adapters().into_iter().find(|a| a.default).unwrap();
    let by_name = Options { adapter: Some(first.name.to_uppercase()), ..Default::default() };
    assert_eq!(Device::open(&by_name).unwrap().name(), first.name);
}

/// What one sequence takes beside its cache is scratch, which all sequences of a model share;
/// whoever comes first or in between reads the same.
#[test]
fn eight_sequences_take_no_more_than_their_caches() {
    let directory = SyntheticModel::default().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let tokens = Random(5).tokens(150, checkpoint.config().vocab_size);
    let (_, specs) = common::rows::ways(checkpoint.config()).remove(0);
    let rows = common::rows::coded(&checkpoint, specs, Exact { sinks: 4, recent: 10 });
    // Which rows a query reads exactly depends on how the text is cut, and that on how fast the
    // device is, unless it is said.
    let options = |capacity| SequenceOptions { capacity, chunk: Some(64), ..SequenceOptions::default() };
    for rows in [None, Some(rows)] {
        let device = common::device(Options::default());
        let model = Arc::new(Model::with_latents(&checkpoint, rows, device.clone()).unwrap());
        let mut first = model.sequence(options(400)).unwrap();
        let expected = first.forward(&tokens, Logits::Last).unwrap();
        // What all logits of a chunk take is allocated when they are first asked for.
        first.forward(&tokens[..3], Logits::All).unwrap();
        let (scratch, begun) = (first.memory().scratch_bytes, device.allocated_bytes());
        let mut others: Vec<GpuSequence> = (0..7).map(|_| model.sequence(options(400)).unwrap()).collect();
        assert_eq!(first.memory().scratch_bytes, scratch);
        let cache = first.memory().allocated_bytes;
        if let (Some(begun), Some(now)) = (begun, device.allocated_bytes()) {
            let grown = (now - begun) / 7;
            println!("{grown} bytes a sequence, of which {cache} are its cache; scratch {scratch}");
            assert!(grown <= cache + 1024, "{grown} bytes for each of 7 sequences whose cache is {cache}; scratch is {scratch}");
        }
        // A longer one makes the scratch anew; the others follow with their next call, from as many
        // threads.
        let mut long = model.sequence(options(900)).unwrap();
        long.forward(&tokens, Logits::Last).unwrap();
        let read = |mut sequence: GpuSequence| {
            sequence.truncate(0);
            let logits = sequence.forward(&tokens, Logits::Last).unwrap();
            (logits, (0..5).map(|i| sequence.step(tokens[i]).unwrap()).collect::<Vec<_>>())
        };
        others.push(first);
        let (alone, steps) = read(others.remove(0));
        assert!(common::nmse(&alone, &expected) < 1e-9);
        std::thread::scope(|scope| {
            let read = &read;
            let threads: Vec<_> = others.into_iter().map(|sequence| scope.spawn(move || read(sequence))).collect();
            for thread in threads {
                let (logits, found) = thread.join().unwrap();
                assert!(common::nmse(&logits, &expected) < 1e-9 && found == steps);
            }
        });
    }
}
