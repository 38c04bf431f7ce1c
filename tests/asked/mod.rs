//! What is asked for: every way to keep a text, on models of every family.
//!
//! All of it is run on one device, which notes the variants that it made, and planned there on
//! heads as wide as models have them.

use super::common::rows::{coded, ways};
use super::common::{Random, SyntheticModel, device, families};
use lowkey::checkpoint::{Architecture, Checkpoint, Config};
use lowkey::compress::{Budget, Method, Plan, Solver, factor};
use lowkey::decoder::Model;
use lowkey::gpu::{Device, Options, Quantised, Spec, Tuning, WeightType, roofline};
use lowkey::kv::{Band, CacheMethod, Coder, Evicted, Exact, Format, LatentKind, LatentSet, LatentSpec, Read, Reviver, Scale, Selector, Xkv};
use lowkey::sequence::{Logits, Prompt, Sequence, SequenceOptions};
use lowkey::task::Cancel;
use nalgebra::{DMatrix, DVector};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

/// Tokens that are read at once, and how many there is room for.
const TEXT: usize = 150;
const CAPACITY: usize = 200;
const EXACT: Exact = Exact { sinks: 4, recent: 10 };

/// All variants that were made. What stands behind buffers is as it was.
pub fn specs() -> Vec<Spec> {
    // The roofline's buffers need not be large.
    let device = device(Options { max_binding: Some(16 << 20), canaries: true, ..Options::default() });
    // As a GPU has it, with more logits than one workgroup looks at; then as a software renderer
    // has it.
    let wide = SyntheticModel { kv_heads: 2, heads: 4, head_dim: 48, hidden: 64, ..SyntheticModel::default() };
    device.set_tuning(Tuning { logits: 100, ..Tuning::of(false) });
    every_way(&device, &wide);
    device.set_tuning(Tuning::of(true));
    of_family(&device, &wide);
    for (_, synthetic) in families() {
        of_family(&device, &synthetic);
    }
    // Those between which there is all that other families do otherwise. They are run elsewhere.
    for name in ["arcee", "gemma2", "gpt_oss", "granite", "hunyuan", "llama-biases", "olmo2", "qwen2_moe", "qwen3_moe", "starcoder2"] {
        plan_checkpoint(&device, &Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/families").join(name));
    }
    for tuning in [Tuning::of(false), Tuning::of(true)] {
        device.set_tuning(tuning);
        of_weights(&device);
        wide_heads().iter().for_each(|synthetic| plan(&device, synthetic));
    }
    device.set_tuning(Tuning { int8: true, ..Tuning::of(false) });
    weighted(&device, 96, |_, _| ());
    roofline(&device).unwrap();
    assert_eq!(device.overrun().unwrap(), None, "a buffer behind which something was written");
    assert_eq!(device.unowned_error(), None);
    device.specs()
}

/// Heads as wide, and as many, as no test could run in a time that one would wait for.
fn wide_heads() -> [SyntheticModel; 4] {
    let heads = |architecture, heads, kv_heads, head_dim| SyntheticModel {
        architecture,
        heads,
        kv_heads,
        head_dim,
        hidden: 16,
        layers: 1,
        ffn: 16,
        ..SyntheticModel::default()
    };
    [
        heads(Architecture::Llama, 9, 3, 64),
        heads(Architecture::Qwen3, 32, 8, 128),
        heads(Architecture::Mistral, 32, 32, 128),
        heads(Architecture::Qwen3, 8, 2, 512),
    ]
}

fn options(method: CacheMethod) -> SequenceOptions {
    SequenceOptions { capacity: CAPACITY, exact: Some(EXACT), method, ..SequenceOptions::default() }
}

/// A text, whose logits are all asked for, and a few tokens after it.
fn read(model: &Arc<Model>, method: CacheMethod) {
    let vocab = model.config().vocab_size;
    let mut sequence = model.sequence(options(method)).unwrap();
    sequence.forward(&Random(1).tokens(TEXT, vocab), Logits::All).unwrap();
    go_on(&mut sequence, vocab);
}

fn go_on(sequence: &mut dyn Sequence, vocab: usize) {
    for token in Random(2).tokens(40, vocab) {
        sequence.step(token).unwrap();
    }
}

fn loaded(checkpoint: &Checkpoint, rows: Option<LatentSet>, device: &Arc<Device>) -> Arc<Model> {
    Arc::new(Model::with_latents(checkpoint, rows, device.clone()).unwrap())
}

fn evicting(evicted_as: Evicted) -> CacheMethod {
    CacheMethod::Evict(Reviver::new(Budget::Keep(if evicted_as == Evicted::Rows { 1.0 } else { 0.5 }), Some(evicted_as)))
}

/// All latents, or those that either selector chooses.
fn calibrated() -> [CacheMethod; 3] {
    let chosen = Selector::ALL.map(|by| CacheMethod::Calibrated(Read::top(Some(16)).by(by)));
    [CacheMethod::Calibrated(Read::All), chosen[0], chosen[1]]
}

/// The methods that code tokens in blocks.
fn block_methods() -> [Method; 2] {
    [Method::Kivi { bits: 4 }, Method::KVarN { key_bits: 4, value_bits: 2 }]
}

/// Every way to code rows and to read them, those of blocks, those of a prompt of its own, and
/// whatever is left of evicted tokens.
fn every_way(device: &Arc<Device>, synthetic: &SyntheticModel) {
    let directory = synthetic.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let [all, some, _] = calibrated();
    let dense = loaded(&checkpoint, None, device);
    read(&dense, CacheMethod::Full);
    [Evicted::None, Evicted::Mean, Evicted::Sketch, Evicted::Shrunk].into_iter().for_each(|evicted_as| read(&dense, evicting(evicted_as)));
    for (_, specs) in ways(checkpoint.config()) {
        let model = loaded(&checkpoint, Some(coded(&checkpoint, specs, EXACT)), device);
        [all, some, evicting(Evicted::Rows)].into_iter().for_each(|method| read(&model, method));
    }
    for method in block_methods() {
        let rows = factor(&checkpoint, &Plan::new(method), None, &mut |_| ControlFlow::Continue(())).unwrap().rows;
        read(&loaded(&checkpoint, Some(rows), device), all);
    }
    let (tokens, vocab) = (Random(3).tokens(TEXT, dense.config().vocab_size), dense.config().vocab_size);
    let (bases, cancel) = (Solver(Xkv { layers: 2, budget: Budget::Bytes(1 << 20), bits: Some(4) }), Cancel::default());
    for method in [all, some] {
        let prompt = Prompt { tokens: &tokens, bases: &bases, logits: Logits::All, cancel: &cancel };
        go_on(&mut dense.read_prompt(&prompt, options(method)).unwrap().0, vocab);
    }
}

/// What a family adds: norms, biases, a window, heads of another width; dense and coded, with
/// queries taken to coordinates and with keys rebuilt.
fn of_family(device: &Arc<Device>, synthetic: &SyntheticModel) {
    let directory = synthetic.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    read(&loaded(&checkpoint, None, device), CacheMethod::Full);
    for (_, specs) in ways(checkpoint.config()).into_iter().take(4).step_by(3) {
        read(&loaded(&checkpoint, Some(coded(&checkpoint, specs, EXACT)), device), CacheMethod::Calibrated(Read::All));
    }
    let random = Arc::new(Model::random(checkpoint.config(), WeightType::F16, device.clone(), 1).unwrap());
    random.random_sequence(None, options(CacheMethod::Full), 1).unwrap().step(1).unwrap();
}

/// The same, planned and not run.
fn plan_checkpoint(device: &Arc<Device>, path: &Path) {
    let checkpoint = Checkpoint::open(path).unwrap();
    let plan = |rows: Option<LatentSet>| drop(loaded(&checkpoint, rows, device).sequence(options(CacheMethod::default())).unwrap());
    plan(None);
    ways(checkpoint.config()).into_iter().take(4).step_by(3).for_each(|(_, specs)| plan(Some(coded(&checkpoint, specs, EXACT))));
}

/// Every type of weights: in rows of whole sets, and not.
fn of_weights(device: &Arc<Device>) {
    for hidden in [128, 96] {
        weighted(device, hidden, |sequence, vocab| {
            sequence.forward(&Random(1).tokens(20, vocab), Logits::Last).unwrap();
            sequence.step(1).unwrap();
        });
    }
}

/// Sequences of models in every quantised type, and how many tokens these know.
fn weighted(device: &Arc<Device>, hidden: usize, run: impl Fn(&mut dyn Sequence, usize)) {
    let synthetic = SyntheticModel { hidden, head_dim: 16, ffn: 64, layers: 1, ..SyntheticModel::default() };
    let directory = synthetic.write_temporary();
    let config = Checkpoint::open(directory.path()).unwrap().config().clone();
    for kind in Quantised::ALL {
        let model = Arc::new(Model::random(&config, WeightType::Quantised(kind), device.clone(), 1).unwrap());
        run(&mut model.random_sequence(None, options(CacheMethod::Full), 1).unwrap(), config.vocab_size);
    }
}

/// Every way to keep a text, on heads of any width: all kernels are planned, and nothing is run.
fn plan(device: &Arc<Device>, synthetic: &SyntheticModel) {
    let directory = synthetic.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let config = checkpoint.config();
    let plan = |rows: Option<LatentSet>, methods: &[CacheMethod]| {
        let model = loaded(&checkpoint, rows, device);
        methods.iter().for_each(|method| drop(model.sequence(options(*method)).unwrap()));
    };
    let dense = [Evicted::None, Evicted::Mean, Evicted::Sketch, Evicted::Shrunk].map(evicting);
    plan(None, &[&[CacheMethod::Full][..], &dense].concat());
    let coded = [&calibrated()[..], &[evicting(Evicted::Rows)]].concat();
    // Orthonormal or not, joint or apart, keys before RoPE and after.
    let sides = [
        (true, vec![LatentKind::Both]),
        (true, vec![LatentKind::PostRopeKeys, LatentKind::Values]),
        (false, vec![LatentKind::PreRopeKeys, LatentKind::Values]),
    ];
    for (down, kind) in sides {
        plan(Some(narrow(config, kind, down)), &coded);
    }
    // Bases of wider ones are large.
    if config.num_key_value_heads * config.head_dim <= 1024 {
        for method in block_methods() {
            let rows = factor(&checkpoint, &Plan::new(method), None, &mut |_| ControlFlow::Continue(())).unwrap().rows;
            plan(Some(rows), &coded[..1]);
        }
    }
}

/// Rows of one run of coordinates over all heads of a layer, of bases that are zero.
fn narrow(config: &Config, kind: Vec<LatentKind>, down: bool) -> LatentSet {
    let format = Format { bands: vec![Band { bits: 4, runs: 1 }], scale: Scale::Band };
    let spec = |kind| LatentSpec { first_layer: 0, layers: 1, kind, first_head: 0, kv_heads: config.num_key_value_heads, format: format.clone() };
    let specs: Vec<LatentSpec> = kind.into_iter().map(spec).collect();
    let coder = |spec: &LatentSpec| {
        let (width, rank) = (spec.width(config.head_dim), spec.format.rank());
        let down = down.then(|| DMatrix::zeros(width, rank));
        Coder { format: spec.format.clone(), mean: DVector::zeros(width), down, up: DMatrix::zeros(rank, width) }
    };
    LatentSet { coders: specs.iter().map(coder).collect(), specs, exact: EXACT }
}
