//! Adapter files: a model with one is the checkpoint that stands alone, its model is found, and
//! nothing else is taken for either.

mod common;

use common::gguf::Gguf;
use common::{Random, SyntheticModel, families};
use half::f16;
use lowkey::calibrate::{self, Statistics};
use lowkey::checkpoint::{Checkpoint, Factored};
use lowkey::compress::{Budget, Float, Form, Layout, LowKey, LowRank, Method, Output, Plan, Ranks, ReCalKv, run};
use lowkey::cpu::{self, RowType};
use lowkey::sequence::{Logits, Sequence, SequenceOptions};
use lowkey::task::Progress;
use lowkey::{Engine, Error, LoadOptions, Result, decoder};
use safetensors::tensor::{SafeTensors, TensorView, serialize};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

fn quietly(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A model as a GGUF file whose numbers f16 holds: no checkpoint rounds them.
fn write_gguf(model: &SyntheticModel, path: &Path) -> Gguf {
    let mut file = model.gguf();
    for tensor in file.tensors.iter_mut().filter(|tensor| tensor.kind == 0) {
        let halves = tensor.bytes.chunks_exact(4).map(|x| f16::from_f32(f32::from_le_bytes([x[0], x[1], x[2], x[3]])));
        tensor.bytes = halves.flat_map(|x| x.to_f32().to_le_bytes()).collect();
    }
    file.write(path);
    file
}

fn statistics(checkpoint: &Checkpoint) -> Statistics {
    let model = Arc::new(cpu::Model::load(checkpoint).unwrap());
    let tokens = Random(77).tokens(480, model.config().vocab_size);
    let (source, text) = (calibrate::source_digest(checkpoint).unwrap(), calibrate::text_digest(&["random"]));
    let options = calibrate::Options { window: 160, longest: 160, span: 2, ..calibrate::Options::default() };
    calibrate::gather(&model, &[tokens], source, text, &options, &mut quietly).unwrap().0
}

/// The GGUF file of a model, and both forms of what a plan makes of it.
struct Made {
    directory: TempDir,
    model: PathBuf,
    adapter: PathBuf,
    standalone: PathBuf,
}

fn make(synthetic: &SyntheticModel, plan: &Plan) -> Made {
    let directory = tempfile::tempdir().unwrap();
    let [model, adapter, standalone] = ["model.gguf", "small.lowkey", "standalone"].map(|name| directory.path().join(name));
    write_gguf(synthetic, &model);
    let checkpoint = Checkpoint::open(&model).unwrap();
    let statistics = statistics(&checkpoint);
    for output in [Output::adapter(&adapter), Output::standalone(&standalone)] {
        run(&checkpoint, plan, Some(&statistics), &output, &mut quietly).unwrap();
    }
    Made { directory, model, adapter, standalone }
}

const HALF: LowRank = LowRank { budget: Budget::Keep(0.5), ranks: Some(Ranks::Uniform), bits: 16 };

fn lowkey(layout: Layout) -> Plan {
    Plan::new(Method::LowKey(LowKey { budget: Budget::Times(4.0), layout, ..LowKey::default() }))
}

fn recalkv() -> Plan {
    Plan::new(Method::ReCalKv(ReCalKv { low_rank: HALF, group_heads: 2, ..ReCalKv::default() }))
}

fn plans() -> Vec<Plan> {
    vec![
        lowkey(Layout::default()),
        lowkey(Layout::Small { span: 2 }),
        lowkey(Layout::Fast { context: 256, row_heads: None }),
        recalkv(),
        Plan::new(Method::KqSvd(HALF)),
        Plan::new(Method::Dense { bits: 4 }),
        Plan::new(Method::Oscar { bits: 2 }),
    ]
}

fn prompt(checkpoint: &Checkpoint) -> Vec<u32> {
    Random(5).tokens(90, checkpoint.config().vocab_size)
}

/// What a model goes on with, token by token, and the logits of each.
fn greedy(sequence: &mut dyn Sequence, prompt: &[u32]) -> (Vec<u32>, Vec<Vec<f32>>) {
    let (mut tokens, mut all) = (Vec::new(), vec![sequence.forward(prompt, Logits::Last).unwrap()]);
    for _ in 0..40 {
        let token = lowkey::logits::argmax(&all[all.len() - 1]).unwrap();
        tokens.push(token);
        all.push(sequence.forward(&[token], Logits::Last).unwrap());
    }
    (tokens, all)
}

fn options() -> SequenceOptions {
    SequenceOptions { capacity: 140, ..SequenceOptions::default() }
}

#[test]
fn text_is_that_of_the_checkpoint_that_stands_alone_on_the_processor() {
    for (number, (family, synthetic)) in families().into_iter().enumerate() {
        // The first family by every plan, ReCalKV, which moves weights and biases, in every family.
        let synthetic = SyntheticModel { rope_scaling: Value::Null, ..synthetic };
        for plan in plans().into_iter().filter(|plan| number == 0 || matches!(plan.method, Method::ReCalKv(_))) {
            let made = make(&synthetic, &plan);
            let [adapter, standalone] = [&made.adapter, &made.standalone].map(|path| Checkpoint::open(path).unwrap());
            assert_eq!((adapter.path(), adapter.adapter()), (&*made.model, Some(&*made.adapter)));
            let ([a, b], what) = ([&adapter, &standalone].map(|c| c.factored().unwrap()), format!("{family}, {}", plan.method.name()));
            assert_eq!(a, b, "{what}");
            assert_eq!(adapter.rows().unwrap(), standalone.rows().unwrap(), "{what}");
            let run = |checkpoint: &Checkpoint| {
                greedy(&mut Arc::new(cpu::Model::load(checkpoint).unwrap()).sequence(options(), RowType::F16).unwrap(), &prompt(checkpoint))
            };
            assert_eq!(run(&adapter), run(&standalone), "{what}");
            let text = "the and <|im_end|>";
            assert_eq!(adapter.tokenizer().unwrap().encode(text, true).unwrap(), standalone.tokenizer().unwrap().encode(text, true).unwrap());
            // It is a small part of the model, and what is no basis is no part of it.
            assert!(made.adapter.metadata().unwrap().len() < made.model.metadata().unwrap().len(), "{what}");
            let bytes = std::fs::read(&made.adapter).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let moved = matches!(plan.method, Method::ReCalKv(_));
            assert_eq!(file.names().iter().any(|name| name.contains("self_attn")), moved, "{what}");
            let orthonormal = matches!(plan.method, Method::Oscar { .. });
            assert_eq!(file.names().iter().any(|name| name.contains("down")), !orthonormal, "{what}");
        }
    }
}

#[test]
fn text_is_that_of_the_checkpoint_that_stands_alone_on_a_gpu() {
    let device = common::device(lowkey::gpu::Options::default());
    for plan in plans() {
        let made = make(&SyntheticModel::default(), &plan);
        let run = |path: &Path| {
            let checkpoint = Checkpoint::open(path).unwrap();
            greedy(&mut Arc::new(decoder::Model::load(&checkpoint, device.clone()).unwrap()).sequence(options()).unwrap(), &prompt(&checkpoint))
        };
        assert_eq!(run(&made.adapter), run(&made.standalone), "{}", plan.method.name());
    }
}

/// In f32 what is beside the model is as exact as the model.
#[test]
fn numbers_are_stored_as_they_are_asked_for() {
    let synthetic = SyntheticModel::default();
    let directory = synthetic.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let path = directory.path().join("exact.lowkey");
    let plan = lowkey(Layout::default());
    let statistics = statistics(&checkpoint);
    let made = lowkey::compress::factor(&checkpoint, &plan, Some(&statistics), &mut quietly).unwrap();
    // In the model's own directory, where it is found as well.
    let output = Output { path: path.clone(), form: Form::Adapter, float: Float::F32 };
    run(&checkpoint, &plan, Some(&statistics), &output, &mut quietly).unwrap();
    let opened = Engine::open(&LoadOptions { device: lowkey::Device::Cpu, ..LoadOptions::default() }).unwrap().load(&path).unwrap();
    assert_eq!(opened.checkpoint().rows().unwrap(), Some(made.rows));
    assert_eq!(opened.method(), "lowkey");
}

#[test]
fn its_model_is_found_beside_it_by_name_or_fingerprint() {
    let made = make(&SyntheticModel::default(), &plans()[0]);
    let source = Checkpoint::open(&made.adapter).unwrap().factored().unwrap().source.clone().unwrap();
    assert_eq!((source.name.as_str(), source.pull, source.layers, source.kv_heads), ("model.gguf", None, 3, 3));

    // Under another name, among others.
    let renamed = made.directory.path().join("renamed.gguf");
    std::fs::rename(&made.model, &renamed).unwrap();
    write_gguf(&SyntheticModel { seed: 9, ..SyntheticModel::default() }, &made.directory.path().join("other.gguf"));
    std::fs::write(made.directory.path().join("broken.gguf"), "GGUF").unwrap();
    assert_eq!(Checkpoint::open(&made.adapter).unwrap().path(), renamed);

    // Elsewhere it has to be named.
    let elsewhere = tempfile::tempdir().unwrap();
    let moved = elsewhere.path().join("model.gguf");
    std::fs::rename(&renamed, &moved).unwrap();
    let error = Checkpoint::open(&made.adapter).err().unwrap();
    assert_eq!(error.kind(), "checkpoint");
    for part in ["small.lowkey: was made for model.gguf (llama, 3 layers of width 60, 6 heads on 3", &source.fingerprint[..12], "--adapter"] {
        assert!(error.to_string().contains(part), "no {part:?} in {error}");
    }
    assert_eq!(Checkpoint::open_with(&moved, &made.adapter).unwrap().path(), moved);
    // What only has its name is told of.
    write_gguf(&SyntheticModel { seed: 9, ..SyntheticModel::default() }, &made.model);
    let error = Checkpoint::open(&made.adapter).err().unwrap().to_string();
    assert!(error.contains("model.gguf: has that name, but is another model"), "{error}");

    // A directory's name is that of the directory, however it is said.
    let directory = SyntheticModel::default().write_temporary();
    let checkpoint = Checkpoint::open(&directory.path().join(".")).unwrap();
    assert_eq!(lowkey::checkpoint::Source::of(&checkpoint).name, directory.path().file_name().unwrap().to_str().unwrap());
}

#[test]
fn a_fingerprint_is_of_names_types_shapes_and_the_ends_of_tensors() {
    // One tensor is long enough that its middle is not looked at.
    let model = SyntheticModel { vocab: 700, ..SyntheticModel::default() };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let original = write_gguf(&model, &path);
    let print = |edit: &dyn Fn(&mut Gguf)| {
        let mut file = original.clone();
        edit(&mut file);
        file.write(&path);
        Checkpoint::open(&path).unwrap().fingerprint()
    };
    let same = print(&|_| {});
    let at = |name: &str| original.tensors.iter().position(|tensor| tensor.name == name).unwrap();
    let (embeddings, small) = (at("token_embd.weight"), at("blk.0.attn_norm.weight"));
    let length = original.tensors[embeddings].bytes.len();
    assert!(length > 4 * 4096);
    assert_eq!(same.len(), 64);
    for byte in [0, 4095, length - 4096, length - 1] {
        assert_ne!(print(&|file| file.tensors[embeddings].bytes[byte] ^= 1), same, "byte {byte}");
    }
    assert_ne!(print(&|file| file.tensors[small].bytes[100] ^= 1), same);
    assert_eq!(print(&|file| file.tensors[embeddings].bytes[length / 2] ^= 1), same);
    // The tokenizer is no part of it.
    assert_eq!(print(&|file| file.metadata.retain(|(key, _)| key != "tokenizer.chat_template")), same);
    // The same numbers in another type are.
    let halves = |file: &mut Gguf| {
        let tensor = &mut file.tensors[small];
        tensor.kind = 1;
        tensor.bytes = tensor.bytes.chunks_exact(4).flat_map(|x| f16::from_f32(f32::from_le_bytes([x[0], x[1], x[2], x[3]])).to_le_bytes()).collect();
    };
    assert_ne!(print(&halves), same);
}

/// Writes what `edit` makes of an adapter file's JSON and tensors (type, shape and bytes by name).
fn edited(made: &Made, edit: impl FnOnce(&mut Value, &mut Vec<(String, Vec<usize>, Vec<u8>)>)) -> Result<Checkpoint> {
    let bytes = std::fs::read(&made.adapter).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let mut value: Value = serde_json::from_str(&header.metadata().as_ref().unwrap()["lowkey"]).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> = file.iter().map(|(name, view)| (name.to_string(), view.shape().to_vec(), view.data().to_vec())).collect();
    edit(&mut value, &mut tensors);
    let views = tensors.iter().map(|(name, shape, bytes)| (name, TensorView::new(safetensors::Dtype::F16, shape.clone(), bytes).unwrap()));
    let metadata = HashMap::from([("lowkey".to_string(), value.to_string())]);
    let path = made.directory.path().join("edited.lowkey");
    std::fs::write(&path, serialize(views, Some(metadata)).unwrap()).unwrap();
    let checkpoint = Checkpoint::open_with(&made.model, &path)?;
    checkpoint.rows()?;
    for name in checkpoint.tensor_names() {
        checkpoint.f16(name, checkpoint.shape(name).unwrap())?;
    }
    Ok(checkpoint)
}

#[test]
fn what_is_no_adapter_of_this_model_is_refused_by_name() {
    let plan = recalkv();
    let made = make(&SyntheticModel::default(), &plan);
    type Tensors = Vec<(String, Vec<usize>, Vec<u8>)>;
    fn tensor<'a>(tensors: &'a mut Tensors, name: &str) -> &'a mut (String, Vec<usize>, Vec<u8>) {
        tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap()
    }
    edited(&made, |_, _| {}).unwrap();
    let queries = "model.layers.1.self_attn.q_proj.weight";
    type Edit = fn(&mut Value, &mut Tensors);
    let edits: [(Edit, &str, &[&str]); 12] = [
        (|value, _| value["format"] = json!(99), "unsupported", &["format 99", "compress the model again"]),
        (|value, _| value["source"] = Value::Null, "checkpoint", &["which model it was made for"]),
        (|value, _| value["source"]["layers"] = json!("three"), "checkpoint", &["cannot be read"]),
        (|value, _| value["rows"][0]["kv_heads"] = json!(9), "checkpoint", &["row 0 takes 9 heads"]),
        (|value, _| value["kv_bytes_per_token"] = json!(1), "checkpoint", &["promises 1 bytes"]),
        (|value, _| value["source"]["fingerprint"] = json!("0123456789abcdef"), "checkpoint", &["0123456789ab)", "model.gguf is another model"]),
        (|_, tensors| tensors.retain(|tensor| tensor.0 != "rows.1.mean"), "tensor", &["rows.1.mean", "missing"]),
        (|_, tensors| tensors.retain(|tensor| tensor.0 != "rows.2.up.weight"), "tensor", &["rows.2.up.weight", "missing"]),
        (|_, tensors| tensor(tensors, "rows.0.up.weight").1.reverse(), "tensor", &["rows.0.up.weight", "has shape"]),
        (
            |_, tensors| tensor(tensors, "rows.0.down.weight").2[..2].copy_from_slice(&f16::NAN.to_le_bytes()),
            "tensor",
            &["rows.0.down.weight", "NaN"],
        ),
        (|_, tensors| tensor(tensors, "model.layers.1.self_attn.q_proj.weight").1.reverse(), "tensor", &[queries, "where the model needs [72, 60]"]),
        (|_, tensors| tensors[0].0 = "rows.77.mean".into(), "tensor", &["rows.77.mean", "belongs neither"]),
    ];
    for (edit, kind, parts) in edits {
        let error = edited(&made, edit).err().unwrap();
        let message = error.to_string();
        assert!(error.kind() == kind && parts.iter().all(|part| message.contains(part)) && message.contains("edited.lowkey"), "{kind}: {message}");
    }

    // Cut anywhere, or nothing like it.
    let whole = std::fs::read(&made.adapter).unwrap();
    let path = made.directory.path().join("other.lowkey");
    let refused = |bytes: &[u8], word: &str| {
        std::fs::write(&path, bytes).unwrap();
        let message = Checkpoint::open(&path).err().unwrap().to_string();
        assert!(message.contains("other.lowkey") && message.contains(word), "{message}");
    };
    for length in [0, 7, 8, 100, 3000, whole.len() / 2, whole.len() - 1] {
        refused(&whole[..length], "truncated");
    }
    refused(&std::fs::read(&made.model).unwrap(), "not a safetensors file");
    refused(&std::fs::read(made.standalone.join("model.safetensors")).unwrap(), "is no adapter file");
    refused(b"not at all what was expected", "not a safetensors file");
}

#[test]
fn it_goes_with_its_own_dense_model_alone() {
    let made = make(&SyntheticModel::default(), &plans()[0]);
    let directory = tempfile::tempdir().unwrap();
    let [other, larger] = [("other.gguf", 9, 3), ("larger.gguf", 1, 4)].map(|(name, seed, layers)| {
        let path = directory.path().join(name);
        write_gguf(&SyntheticModel { seed, layers, ..SyntheticModel::default() }, &path);
        path
    });
    let refused = |model: &Path, parts: &[&str]| {
        let error = Checkpoint::open_with(model, &made.adapter).err().unwrap();
        assert!(matches!(error, Error::Checkpoint { .. }) && parts.iter().all(|part| error.to_string().contains(part)), "{error}");
    };
    refused(&other, &["small.lowkey: was made for model.gguf (", "other.gguf is another model: other.gguf (llama, 3 layers"]);
    refused(&larger, &["made for model.gguf (llama, 3 layers", "larger.gguf (llama, 4 layers"]);
    refused(&made.standalone, &["small.lowkey: goes with model.gguf", "standalone has been compressed already"]);
    refused(&made.adapter, &["small.lowkey: is an adapter file itself"]);

    // Nor is anything made of it again.
    let opened = Checkpoint::open(&made.adapter).unwrap();
    assert_eq!(opened.factored().unwrap().format, Factored::FORMAT);
    let again = Output::adapter(made.directory.path().join("again.lowkey"));
    let error = run(&opened, &plans()[5], None, &again, &mut quietly).unwrap_err().to_string();
    assert!(error.contains("factored already"), "{error}");
}

/// Thousands of damaged files, cut or with bits flipped: most are refused, none panics.
#[test]
fn no_damage_makes_it_panic() {
    let made = make(&SyntheticModel { layers: 1, ..SyntheticModel::default() }, &plans()[0]);
    let sound = std::fs::read(&made.adapter).unwrap();
    let header = 8 + u64::from_le_bytes(sound[..8].try_into().unwrap()) as usize;
    let (mut random, mut refused) = (Random(7), 0);
    for round in 0..1500 {
        let mut bytes = sound.clone();
        for _ in 0..1 + random.below(3) {
            let end = if random.below(8) == 0 { bytes.len() } else { header };
            let at = random.below(end);
            bytes[at] = if random.below(2) == 0 { random.next() as u8 } else { b"0129{}[]\",:"[random.below(11)] };
        }
        if random.below(5) == 0 {
            bytes.truncate(random.below(bytes.len()));
        }
        std::fs::write(&made.adapter, &bytes).unwrap();
        let outcome = std::panic::catch_unwind(|| Checkpoint::open_with(&made.model, &made.adapter).and_then(|checkpoint| checkpoint.rows()));
        refused += outcome.unwrap_or_else(|_| panic!("round {round} panicked")).is_err() as usize;
    }
    assert!(refused > 500, "{refused} of 1500 refused");
}
