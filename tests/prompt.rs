//! What depends on the prompt: xKV's bases and selective reconstruction, on both decoders.

mod common;

use common::rows::{coded, ways};
use common::{Random, SyntheticModel, families, nmse};
use lowkey::checkpoint::Checkpoint;
use lowkey::compress::Solver;
use lowkey::cpu::{self, RowType};
use lowkey::decoder;
use lowkey::gpu::{Options, Tier};
use lowkey::kv::{Budget, CacheMethod, Exact, LatentSet, Read, Selector, Xkv};
use lowkey::sequence::{Logits, Prompt, Sequence, SequenceOptions};
use lowkey::session::Cancel;
use lowkey::{Device, Engine, Error, LoadOptions};
use safetensors::Dtype;
use std::sync::Arc;

const PROMPT: usize = 150;

fn cpu(checkpoint: &Checkpoint, rows: Option<LatentSet>) -> Arc<cpu::Model> {
    Arc::new(cpu::Model::with_latents(checkpoint, rows).unwrap())
}

/// A prompt in one call, then single tokens: all their logits.
fn read(sequence: &mut dyn Sequence, tokens: &[u32]) -> Vec<f32> {
    let mut logits = sequence.forward(&tokens[..PROMPT], Logits::Last).unwrap();
    tokens[PROMPT..].iter().for_each(|token| logits.extend(sequence.forward(&[*token], Logits::All).unwrap()));
    logits
}

fn options(select: Option<usize>) -> SequenceOptions {
    let exact = Some(Exact { sinks: 4, recent: 10 });
    SequenceOptions { capacity: 260, exact, chunk: Some(64), method: CacheMethod::Calibrated(Read::top(select)), ..Default::default() }
}

/// What is read of a prompt that is coded by `xkv` there and then, by the library's own way in.
fn prompted(checkpoint: &Checkpoint, device: Device, xkv: Xkv, select: Option<usize>, tokens: &[u32]) -> Vec<f32> {
    let engine = Engine::open(&LoadOptions { device, ..Default::default() }).unwrap();
    let model = engine.load(checkpoint.path()).unwrap();
    let mut sequence = model.sequence(SequenceOptions { method: CacheMethod::Xkv(xkv, Read::top(select)), ..options(select) }).unwrap();
    read(&mut sequence, tokens)
}

/// Groups of layers with the last one uneven, bytes for everything, in f16.
const WHOLE: Xkv = Xkv { layers: 2, budget: Budget::Bytes(1 << 20), bits: Some(16) };

/// A model whose keys are a multiple of a run wide, and whose bases pay within a short prompt.
fn narrow() -> SyntheticModel {
    SyntheticModel { layers: 3, kv_heads: 2, heads: 4, head_dim: 16, ..SyntheticModel::default() }
}

#[test]
fn at_full_rank_a_prompt_is_the_dense_one() {
    let directory = SyntheticModel { dtype: Dtype::F32, ..narrow() }.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let tokens = Random(1).tokens(PROMPT + 60, checkpoint.config().vocab_size);
    let model = cpu(&checkpoint, None);
    for row_type in [RowType::F16, RowType::F32] {
        let dense = read(&mut model.sequence(options(None), row_type).unwrap(), &tokens);
        for layers in [1, 2, 8] {
            let (bases, cancel) = (Solver(Xkv { layers, ..WHOLE }), Cancel::default());
            let prompt = Prompt { tokens: &tokens[..PROMPT], bases: &bases, logits: Logits::Last, cancel: &cancel };
            let (mut sequence, first) = model.read_prompt(&prompt, options(None), row_type).unwrap();
            let mut logits = first;
            tokens[PROMPT..].iter().for_each(|token| logits.extend(sequence.forward(&[*token], Logits::All).unwrap()));
            let error = nmse(&logits, &dense);
            assert!(error < 1e-5, "groups of {layers}, {row_type:?}: {error}");
        }
    }
}

/// The GPU finds the same bases and reads the same rows, in every family: its rows in 16 bits are
/// the dense model's, and those in few bits as far from it as the CPU's.
#[test]
fn prompts_on_the_gpu_are_those_of_the_cpu() {
    let device = common::device(Options::default());
    for (family, synthetic) in families() {
        let directory = synthetic.write_temporary();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let tokens = Random(2).tokens(PROMPT + 50, checkpoint.config().vocab_size);
        let cpu = cpu(&checkpoint, None);
        let gpu = Arc::new(decoder::Model::load(&checkpoint, device.clone()).unwrap());
        let dense = read(&mut cpu.sequence(options(None), RowType::F16).unwrap(), &tokens);
        let few = Xkv { layers: 2, budget: Budget::Times(3.0), bits: Some(4) };
        for xkv in [WHOLE, few, Xkv { layers: 3, budget: Budget::Times(4.0), bits: None }] {
            let (bases, cancel) = (Solver(xkv), Cancel::default());
            let prompt = Prompt { tokens: &tokens[..PROMPT], bases: &bases, logits: Logits::Last, cancel: &cancel };
            let on_cpu = cpu.read_prompt(&prompt, options(None), RowType::F16).unwrap();
            let on_gpu = gpu.read_prompt(&prompt, options(None)).unwrap();
            let go_on = |(mut sequence, mut logits): (Box<dyn Sequence>, Vec<f32>)| {
                tokens[PROMPT..].iter().for_each(|token| logits.extend(sequence.forward(&[*token], Logits::All).unwrap()));
                logits
            };
            let (cpu, gpu) = (go_on((Box::new(on_cpu.0), on_cpu.1)), go_on((Box::new(on_gpu.0), on_gpu.1)));
            let (error, own) = (nmse(&gpu, &cpu), nmse(&cpu, &dense));
            assert!(own > 1e-9 && own < 1.0, "{family}, {xkv:?}: the CPU is {own} from the dense model");
            let there = nmse(&gpu, &dense);
            // Directions in which a prompt varies alike may be mixed otherwise, and are then
            // rounded otherwise, no better and no worse.
            let alike = if xkv == WHOLE { error < 1e-4_f64.max(0.2 * own) } else { there < 2.0 * own && own < 2.0 * there };
            assert!(alike, "{family}, {xkv:?}: {error}; {there} from the dense model, and the CPU {own}");
        }
    }
}

/// A token that may choose everything reads everything, and one that may not reads what the
/// specification says: in rows of one layer and of several, rebuilt and not, in every tier.
#[test]
fn chosen_rows_are_those_of_the_cpu_and_all_are_all() {
    let directory = SyntheticModel::default().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let tokens = Random(3).tokens(PROMPT + 40, checkpoint.config().vocab_size);
    let exact = read(&mut cpu(&checkpoint, None).sequence(options(None), RowType::F16).unwrap(), &tokens);
    for (number, (way, specs)) in ways(checkpoint.config()).into_iter().enumerate() {
        let rows = coded(&checkpoint, specs, Exact { sinks: 4, recent: 10 });
        let cpu = cpu(&checkpoint, Some(rows.clone()));
        // Either way of choosing in turn: they meet every kind of rows over the tiers.
        let by = Selector::ALL[number % 2];
        let chosen = |select| SequenceOptions { method: CacheMethod::Calibrated(Read::top(select).by(by)), ..options(None) };
        let on_cpu = |select| read(&mut cpu.sequence(chosen(select), RowType::F16).unwrap(), &tokens);
        let (all, some) = (on_cpu(None), on_cpu(Some(40)));
        assert_eq!(on_cpu(Some(256)), all, "{way}, {by:?}");
        let own = nmse(&some, &all);
        assert!(own > 1e-7, "{way}, {by:?}: 40 of {PROMPT} tokens are not all of them");
        let tier = Tier::ALL[number % 3];
        let device = common::device(Options { tier: Some(tier), ..Default::default() });
        let gpu = Arc::new(decoder::Model::with_latents(&checkpoint, Some(rows), device).unwrap());
        let on_gpu = |select| read(&mut gpu.sequence(chosen(select)).unwrap(), &tokens);
        let error = nmse(&on_gpu(Some(256)), &all);
        // Coordinates that are rounded otherwise may have other codes, as near: of what coding
        // loses a part.
        let lost = nmse(&all, &exact);
        assert!(error < 1e-3_f64.max(0.2 * lost), "{way}, {tier:?}, all: {error}, and coding loses {lost}");
        let error = nmse(&on_gpu(Some(40)), &some);
        // Of two chunks that are nearly as good as each other either may be chosen.
        assert!(error < 1e-4_f64.max(0.2 * own.max(lost)), "{way}, {by:?}, {tier:?}, some: {error}, and {own} from all");
    }
}

/// `⌈L/G⌉·(r_k + r_v)` numbers for each token, and `L·n·(r_k + r_v)` of bases, at three lengths;
/// all of it counted.
#[test]
fn bytes_are_those_of_the_published_formula() {
    let directory = narrow().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let (layers, n) = (3, 32);
    // Three quarters, bases counted: for two layers 64 of 2 · 64 numbers, each 2 bytes and 128 /
    // 190 of bases; for the last one 32 of 2 · 32, each 2 bytes and 64 / 190.
    let xkv = Xkv { layers: 2, budget: Budget::Keep(0.75), bits: Some(16) };
    let model = Engine::open(&LoadOptions { device: Device::Gpu(String::new()), ..LoadOptions::default() }).unwrap().load(checkpoint.path()).unwrap();
    for capacity in [200, 300, 500] {
        let exact = Some(Exact { sinks: 4, recent: 10 });
        let mut sequence =
            model.sequence(SequenceOptions { capacity, exact, method: CacheMethod::Xkv(xkv, Read::All), ..Default::default() }).unwrap();
        let tokens = Random(4).tokens(190, checkpoint.config().vocab_size);
        sequence.forward(&tokens, Logits::Last).unwrap();
        let ranks: Vec<usize> = sequence.rows().iter().map(|row| row.format.rank()).collect();
        assert_eq!(ranks, [32, 32, 16, 16], "whole runs of what there is room for");
        let memory = sequence.memory();
        assert_eq!(memory.kv_bytes_per_token, 2 * (32 + 32 + 16 + 16));
        assert_eq!(memory.allocated_bytes, memory.kv_bytes_per_token * capacity as u64 + memory.kv_fixed_bytes);
        let bases = 2 * (2 * n * (32 + 32) + n * (16 + 16));
        let window = (4 + 10 + 32 + 128).min(capacity + 4);
        let rest = memory.kv_fixed_bytes as usize - bases - layers * 2 * 2 * n * window.min(4 + capacity);
        // Means in f32 and tables: a few KiB whatever the length.
        assert!(rest < 16 << 10, "{rest} bytes besides bases and the exact window");
    }
}

/// Short prompts stay exact and say so; a sequence cut within its prompt is read anew; what cannot
/// be is refused.
#[test]
fn prompts_that_do_not_pay_stay_exact_and_cuts_are_read_anew() {
    let directory = narrow().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let model = Engine::open(&LoadOptions { device: Device::Cpu, ..Default::default() }).unwrap().load(checkpoint.path()).unwrap();
    let tokens = Random(5).tokens(300, checkpoint.config().vocab_size);
    let xkv = Xkv { layers: 2, budget: Budget::Keep(0.7), bits: Some(16) };
    let pays = xkv.pays_from(&checkpoint.config().geometry()).unwrap();
    assert!(pays > 10 && pays < 150, "{pays}");
    let mut sequence = model.sequence(SequenceOptions { capacity: 400, method: CacheMethod::Xkv(xkv, Read::All), ..options(None) }).unwrap();
    sequence.forward(&tokens[..pays - 1], Logits::Last).unwrap();
    assert_eq!(sequence.memory().kv_bytes_per_token, checkpoint.config().dense_kv_bytes_per_token());
    assert!(sequence.remark().unwrap().contains(&format!("its bases pay from {pays} tokens on")));
    // A text that has grown to twice that length is read anew.
    sequence.forward(&tokens[pays - 1..2 * pays], Logits::None).unwrap();
    assert!(sequence.position() == 2 * pays && sequence.remark().is_some());
    sequence.truncate(0);
    assert_eq!(sequence.position(), 0);

    let whole = sequence.forward(&tokens, Logits::All).unwrap();
    assert!(sequence.remark().is_none() && sequence.position() == 300);
    assert!(sequence.memory().kv_bytes_per_token * 10 <= checkpoint.config().dense_kv_bytes_per_token() * 7);
    // The prompt itself is read exactly, so a cut and the rest of it are as good as the whole.
    sequence.truncate(120);
    assert_eq!(sequence.position(), 120);
    let again = sequence.forward(&tokens[120..], Logits::All).unwrap();
    assert_eq!(again, whole[120 * checkpoint.config().vocab_size..]);
    assert_eq!(sequence.position(), 300);
    sequence.step(1).unwrap();
    sequence.truncate(300);
    assert_eq!(sequence.position(), 300);
    let too_many = Random(6).tokens(101, checkpoint.config().vocab_size);
    assert!(matches!(sequence.forward(&too_many, Logits::None), Err(Error::Context { .. })));

    let refused = |options: SequenceOptions| match model.sequence(options).err() {
        Some(Error::Argument { name, .. }) => name,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(options(Some(256))), "select");
    assert_eq!(refused(SequenceOptions { method: CacheMethod::Xkv(xkv, Read::top(Some(13))), ..options(None) }), "select");
    assert_eq!(refused(SequenceOptions { method: CacheMethod::Xkv(Xkv { layers: 0, ..xkv }, Read::All), ..options(None) }), "group-layers");
    assert_eq!(
        refused(SequenceOptions { method: CacheMethod::Xkv(Xkv { budget: Budget::Bytes(40), ..xkv }, Read::All), ..options(None) }),
        "kv-bytes"
    );
}

/// With a prompt of its own in few bits, a token may choose as well.
#[test]
fn a_prompts_rows_can_be_chosen_from() {
    let directory = narrow().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let tokens = Random(7).tokens(PROMPT + 40, checkpoint.config().vocab_size);
    let xkv = Xkv { layers: 2, budget: Budget::Times(2.5), bits: None };
    let all = prompted(&checkpoint, Device::Cpu, xkv, None, &tokens);
    assert_eq!(prompted(&checkpoint, Device::Cpu, xkv, Some(256), &tokens), all);
    let some = prompted(&checkpoint, Device::Cpu, xkv, Some(48), &tokens);
    let error = nmse(&prompted(&checkpoint, Device::Auto, xkv, Some(48), &tokens), &some);
    assert!(error < 1e-3 && nmse(&some, &all) > 1e-7, "{error}");
}

/// Text that has gone elsewhere is read anew, with bases of its own; text that goes on as it began
/// is not. Both decoders say the same of either.
#[test]
fn bases_are_made_anew_when_the_text_has_gone_elsewhere() {
    let directory = narrow().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let mut random = Random(8);
    // A prompt of few words, and later of others.
    let mut text = |first: u32, count: usize| -> Vec<u32> { (0..count).map(|_| first + random.below(6) as u32).collect() };
    let (prompt, same, other) = (text(40, 160), text(40, 280), text(200, 280));
    let xkv = Xkv { layers: 2, budget: Budget::Keep(0.7), bits: Some(16) };
    let mut shares = Vec::new();
    for device in [Device::Cpu, Device::Auto] {
        let model = Engine::open(&LoadOptions { device, ..Default::default() }).unwrap().load(directory.path()).unwrap();
        let mut sequence = model.sequence(SequenceOptions { capacity: 500, method: CacheMethod::Xkv(xkv, Read::All), ..options(None) }).unwrap();
        for (rest, anew) in [(&same, false), (&other, true)] {
            sequence.truncate(0);
            sequence.forward(&prompt, Logits::None).unwrap();
            sequence.forward(&rest[..200], Logits::None).unwrap();
            let [before, since] = sequence.lost().unwrap().unwrap();
            assert_eq!(since > 1.5 * before.max(0.01), anew, "{before}, then {since}");
            shares.push([before, since]);
            sequence.forward(&rest[200..], Logits::None).unwrap();
            // Where it is to be read anew, nothing is there until the next token.
            assert_eq!(sequence.lost().unwrap().is_none(), anew);
            let logits = sequence.forward(&[41], Logits::Last).unwrap();
            assert_eq!((logits.len(), sequence.position()), (checkpoint.config().vocab_size, 441));
            let [now, _] = sequence.lost().unwrap().unwrap();
            assert_eq!(now == before, !anew);
        }
    }
    for (cpu, gpu) in shares[..2].iter().flatten().zip(shares[2..].iter().flatten()) {
        assert!((cpu - gpu).abs() < 1e-3, "{shares:?}");
    }
}
