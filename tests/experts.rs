//! Mixtures of experts beside what tests/families.rs holds to transformers: weights in blocks and
//! in parts, and files that are refused by name.

mod common;

use common::{Random, nmse};
use half::f16;
use lowkey::checkpoint::{Checkpoint, WeightStorage};
use lowkey::compress::{Budget, Layout, LowKey, Method, Plan, factor};
use lowkey::gpu::{Options, Tier};
use lowkey::kv::Exact;
use lowkey::sequence::{Logits, Sequence};
use lowkey::task::quietly;
use lowkey::{Error, calibrate, cpu, decoder};
use safetensors::{Dtype, SafeTensors, serialize_to_file, tensor::TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Type, shape and bytes.
type Tensor = (Dtype, Vec<usize>, Vec<u8>);
type Tensors = BTreeMap<String, Tensor>;

fn write(directory: &Path, config: &Value, tensors: &Tensors) {
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    serialize_to_file(views, None, &directory.join("model.safetensors")).unwrap();
}

/// Sixteen experts of 64, of which three are chosen, and one of `shared` for all: large enough for
/// several parts.
fn random(shared: usize) -> (tempfile::TempDir, Checkpoint) {
    let (hidden, width, count) = (64, 64, 16);
    let (mut tensors, mut random) = (Tensors::new(), Random(7));
    let mut add = |name: String, shape: &[usize], size: f32| {
        let numbers = random.normals(shape.iter().product(), size);
        tensors.insert(name, (Dtype::F16, shape.to_vec(), numbers.into_iter().flat_map(|x| f16::from_f32(x).to_le_bytes()).collect()));
    };
    let size = (hidden as f32).powf(-0.5);
    add("model.embed_tokens.weight".into(), &[96, hidden], 1.0);
    add("model.norm.weight".into(), &[hidden], 1.0);
    for layer in 0..2 {
        let mut of_layer = |name: &str, shape: &[usize], size: f32| add(format!("model.layers.{layer}.{name}"), shape, size);
        ["input_layernorm.weight", "post_attention_layernorm.weight"].into_iter().for_each(|norm| of_layer(norm, &[hidden], 1.0));
        ["q_proj", "k_proj", "v_proj"].into_iter().for_each(|name| of_layer(&format!("self_attn.{name}.bias"), &[hidden], 0.1));
        ["q_proj", "k_proj", "v_proj", "o_proj"].into_iter().for_each(|name| of_layer(&format!("self_attn.{name}.weight"), &[hidden, hidden], size));
        of_layer("mlp.gate.weight", &[count, hidden], 2.0 * size);
        of_layer("mlp.shared_expert_gate.weight", &[1, hidden], size);
        let experts = (0..count).map(|expert| (format!("mlp.experts.{expert}"), width));
        for (name, width) in experts.chain([("mlp.shared_expert".into(), shared)]) {
            ["gate_proj", "up_proj"].into_iter().for_each(|matrix| of_layer(&format!("{name}.{matrix}.weight"), &[width, hidden], 1.5 * size));
            of_layer(&format!("{name}.down_proj.weight"), &[hidden, width], size);
        }
    }
    let config = json!({
        "model_type": "qwen2_moe", "vocab_size": 96, "hidden_size": hidden, "intermediate_size": 999, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": true,
        "num_experts": count, "num_experts_per_tok": 3, "moe_intermediate_size": width, "shared_expert_intermediate_size": shared,
    });
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), &config, &tensors);
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    (directory, checkpoint)
}

fn logits(sequence: &mut dyn Sequence) -> Vec<f32> {
    let tokens = Random(5).tokens(40, 96);
    let mut all = sequence.forward(&tokens[..36], Logits::All).unwrap();
    tokens[36..].iter().for_each(|token| all.extend(sequence.forward(&[*token], Logits::Last).unwrap()));
    all
}

#[test]
fn experts_may_be_in_blocks_and_in_parts() {
    let (_directory, checkpoint) = random(128);
    for (storage, tier) in [WeightStorage::F16, WeightStorage::Q8, WeightStorage::Q4].into_iter().zip(Tier::ALL) {
        let on_processor = Arc::new(cpu::Model::load_as(&checkpoint, storage, &mut quietly).unwrap());
        let expected = logits(&mut on_processor.sequence(64, cpu::RowType::F16).unwrap());
        // Ten experts' gates and ups in f16 are 160 KiB.
        let device = common::device(Options { tier: Some(tier), max_binding: Some(160 << 10), ..Default::default() });
        let model = Arc::new(decoder::Model::load_as(&checkpoint, storage, device, &mut quietly).unwrap());
        let mut sequence = model.sequence(64).unwrap();
        let taken = sequence.memory().scratch_bytes;
        let error = nmse(&logits(&mut sequence), &expected);
        println!("{storage:?}, {tier:?}: {error:.1e}");
        assert!(error < 1e-4, "{storage:?}, {tier:?}: {error}");
        // Embedding, head and argmax; of a layer six for attention and what is before and after
        // it, five with subgroups; norm and router; and a dispatch for each part.
        let (dispatches, parts) = (sequence.counters().dispatches, if storage == WeightStorage::F16 { 2 + 1 } else { 1 + 1 });
        let attention = if tier == Tier::F16Subgroups { 5 } else { 6 };
        assert_eq!(dispatches, 3 + 2 * (attention + 2 + parts), "{storage:?}");

        // Three of sixteen experts, and all of the shared one, in a step; all of them in memory.
        let [read, all] = [3 + 2, 16 + 2].map(|experts| 2 * (experts * 3 * 64 * 64 + 4 * 64 * 64) + 96 * 64);
        let step = model.matrix_bytes() as f64 / read as f64;
        let bytes = match storage {
            WeightStorage::F16 => 2.0..2.2,
            WeightStorage::Q8 => 1.06..1.3,
            // Rows of 64 take a set of 128.
            _ => 1.12..1.4,
        };
        assert!(bytes.contains(&step), "{storage:?}: {step} bytes of a weight in a step");
        let plan = decoder::plan_memory(&checkpoint, storage, &64.into());
        let each = plan.weights as f64 / all as f64;
        assert!(bytes.contains(&each), "{storage:?}: {each} bytes of a weight in memory");
        let scratch = plan.scratch as f64 / taken as f64;
        assert!((1.0..4.0).contains(&scratch), "{storage:?}: {scratch} of the scratch is planned");
        assert!(on_processor.matrix_bytes() < cpu::plan_memory(&checkpoint, storage, &64.into()).weights / 2);
    }
}

#[test]
fn a_shared_expert_that_does_not_come_apart_is_refused_on_a_gpu_alone() {
    let (_directory, checkpoint) = random(96);
    let refused = decoder::Model::load(&checkpoint, common::device(Options::default())).err().unwrap();
    assert!(
        matches!(&refused, Error::Unsupported { message, .. } if message.contains("shared expert is 96 wide") && message.contains("64")),
        "{refused}"
    );
    let model = Arc::new(cpu::Model::load(&checkpoint).unwrap());
    assert!(logits(&mut model.sequence(64, cpu::RowType::F16).unwrap()).iter().all(|x| x.is_finite()));
}

/// What a loss says of keys and values goes through experts and past attention sinks: with it, more
/// bits are less error, in either layout.
#[test]
fn families_with_experts_are_compressed() {
    for name in ["gpt_oss", "mixtral", "qwen2_moe"] {
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        let model = Arc::new(cpu::Model::load(&checkpoint).unwrap());
        let text = Random(8).tokens(600, checkpoint.config().vocab_size);
        let options = calibrate::Options { window: 200, sensitivity: calibrate::SensitivityKind::Full, ..Default::default() };
        let (source, digest) = (calibrate::source_digest(&checkpoint).unwrap(), calibrate::text_digest(&["random"]));
        let (statistics, _) = calibrate::gather(&model, &[text], source, digest, &options, &mut |_| ControlFlow::Continue(())).unwrap();
        let dense = logits(&mut model.sequence(64, cpu::RowType::F32).unwrap());
        for layout in [Layout::Small { span: 1 }, Layout::FAST] {
            let [fine, coarse] = [1.5, 4.0].map(|times| {
                let method = Method::LowKey(LowKey { budget: Budget::Times(times), layout, ..LowKey::default() });
                let mut rows = factor(&checkpoint, &Plan::new(method), Some(&statistics), &mut |_| ControlFlow::Continue(())).unwrap().rows;
                rows.exact = Exact { sinks: 2, recent: 4 };
                let model = Arc::new(cpu::Model::with_latents(&checkpoint, Some(rows)).unwrap());
                nmse(&logits(&mut model.sequence(64, cpu::RowType::F32).unwrap()), &dense)
            });
            println!("{name}, {layout:?}: {fine:.1e} at 1.5 times, {coarse:.1e} at 4");
            assert!(fine < 0.2 * coarse && coarse > 0.0, "{name}, {layout:?}: {fine} at 1.5 times, {coarse} at 4");
        }
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/families").join(name)
}

/// A fixture with something else in it.
fn edited(name: &str, edit: &dyn Fn(&mut Value, &mut Tensors)) -> tempfile::TempDir {
    let path = fixture(name);
    let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Tensors =
        tensors.tensors().into_iter().map(|(name, tensor)| (name, (tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec()))).collect();
    let mut config: Value = serde_json::from_slice(&std::fs::read(path.join("config.json")).unwrap()).unwrap();
    edit(&mut config, &mut tensors);
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), &config, &tensors);
    directory
}

/// Experts in one tensor for gate and up, and one for down, are what they are one by one.
#[test]
fn experts_may_be_stacked() {
    let stacked = edited("qwen3_moe", &|_, tensors| {
        for layer in 0..3 {
            let mut take =
                |expert: usize, name: &str| tensors.remove(&format!("model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight")).unwrap();
            let (mut both, mut down) = (Vec::new(), Vec::new());
            for expert in 0..9 {
                ["gate", "up"].into_iter().for_each(|name| both.extend(take(expert, name).2));
                down.extend(take(expert, "down").2);
            }
            let mut put = |name: &str, shape: [usize; 3], bytes| {
                tensors.insert(format!("model.layers.{layer}.mlp.experts.{name}"), (Dtype::F16, shape.to_vec(), bytes));
            };
            put("gate_up_proj", [9, 24, 32], both);
            put("down_proj", [9, 32, 12], down);
        }
    });
    let [found, expected] = [stacked.path(), &fixture("qwen3_moe")].map(|path| {
        let model = Arc::new(cpu::Model::load(&Checkpoint::open(path).unwrap()).unwrap());
        logits(&mut model.sequence(64, cpu::RowType::F32).unwrap())
    });
    assert_eq!(found, expected);
}

/// What reading all of a fixture says that has something else in it.
fn error(name: &str, edit: &dyn Fn(&mut Value, &mut Tensors)) -> String {
    let directory = edited(name, edit);
    let all = Checkpoint::open(directory.path()).and_then(|checkpoint| cpu::Model::load(&checkpoint).map(|_| ()));
    all.expect_err("was not refused").to_string()
}

#[test]
fn what_experts_cannot_be_is_refused_by_name() {
    let config = |fixture: &str, name: &str, value: Value, parts: &[&str]| {
        let message = error(fixture, &|config, _| config[name] = value.clone());
        parts.iter().for_each(|part| assert!(message.contains(part), "{part:?} is not in: {message}"));
    };
    config("mixtral", "num_local_experts", json!(0), &["number of experts is 0"]);
    config("mixtral", "num_local_experts", json!(4000), &["number of experts is 4000"]);
    config("mixtral", "num_local_experts", json!(6), &["model.layers.0.mlp.experts.5.", "missing"]);
    config("mixtral", "num_local_experts", json!(null), &["lacks num_experts"]);
    config("mixtral", "num_experts", json!(7), &["num_experts is 7", "num_local_experts 5"]);
    config("mixtral", "num_experts_per_tok", json!(6), &["num_experts_per_tok is 6", "from 1 to 5"]);
    config("mixtral", "num_experts_per_tok", json!(0), &["num_experts_per_tok is 0"]);
    config("qwen3_moe", "mlp_only_layers", json!([1]), &["mlp_only_layers"]);
    config("qwen3_moe", "decoder_sparse_step", json!(2), &["decoder_sparse_step"]);
    config("qwen3_moe", "moe_intermediate_size", json!(0), &["width of an expert is 0"]);
    config("qwen2_moe", "shared_expert_intermediate_size", json!(0), &["shared_expert_intermediate_size is 0"]);
    config("olmoe", "clip_qkv", json!(8.0), &["clip_qkv"]);
    config("gpt_oss", "swiglu_limit", json!(0.0), &["swiglu_limit is 0"]);
    config("gpt_oss", "quantization_config", json!({ "quant_method": "awq" }), &["quantization_config", "mxfp4"]);
    config("gpt_oss", "num_local_experts", json!(7), &["gate_up_proj_blocks", "[6, 64, 2, 16]", "[7, 64, 2, 16]"]);

    let tensors = |fixture: &str, edit: &dyn Fn(&mut Tensors), parts: &[&str]| {
        let message = error(fixture, &|_, tensors| edit(tensors));
        parts.iter().for_each(|part| assert!(message.contains(part), "{part:?} is not in: {message}"));
    };
    let at = |name: &str| format!("model.layers.1.{name}");
    let without = |fixture: &str, name: &str, parts: &[&str]| tensors(fixture, &|tensors| drop(tensors.remove(&at(name)).unwrap()), parts);
    without("mixtral", "block_sparse_moe.experts.3.w2.weight", &["model.layers.1.mlp.experts.3.down_proj.weight", "missing"]);
    without("mixtral", "block_sparse_moe.gate.weight", &["model.layers.1.mlp.router.weight", "missing"]);
    without("gpt_oss", "mlp.experts.down_proj_scales", &["model.layers.1.mlp.experts.down_proj_scales", "missing"]);
    without("gpt_oss", "mlp.experts.down_proj_blocks", &["model.layers.1.mlp.experts.down_proj_blocks", "missing"]);
    without("gpt_oss", "mlp.experts.gate_up_proj_bias", &["model.layers.1.mlp.experts.0.gate_proj.bias", "missing"]);
    without("gpt_oss", "self_attn.sinks", &["model.layers.1.self_attn.sinks", "missing"]);
    without("granitemoe", "block_sparse_moe.input_linear.weight", &["model.layers.1.mlp.experts.0.gate_proj.weight", "missing"]);
    without("qwen2_moe", "mlp.shared_expert_gate.weight", &["model.layers.1.mlp.shared_expert_gate.weight", "missing"]);
    let edit = |name: &'static str, edit: &'static dyn Fn(&mut Tensor)| {
        move |tensors: &mut Tensors| edit(tensors.get_mut(&format!("model.layers.1.{name}")).unwrap())
    };
    tensors(
        "mixtral",
        &edit("block_sparse_moe.gate.weight", &|(_, _, bytes)| bytes[6..8].copy_from_slice(&f16::NAN.to_le_bytes())),
        &["mlp.router.weight", "NaN", "column 3"],
    );
    tensors("gpt_oss", &edit("mlp.experts.down_proj_scales", &|(_, _, bytes)| bytes[0] = 255), &["mlp.experts.0.down_proj.weight", "NaN"]);
    tensors("gpt_oss", &edit("mlp.experts.down_proj_scales", &|(_, _, bytes)| bytes[0] = 200), &["mlp.experts.0.down_proj.weight", "f16"]);
    tensors("gpt_oss", &edit("mlp.experts.down_proj_blocks", &|(dtype, ..)| *dtype = Dtype::I8), &["down_proj_blocks", "I8"]);
    tensors(
        "gpt_oss-plain",
        &edit("mlp.experts.gate_up_proj", &|(_, shape, _)| shape.swap(1, 2)),
        &["mlp.experts.gate_up_proj", "[6, 40, 32]", "[6, 32, 40]"],
    );
    tensors(
        "granitemoe",
        &edit("block_sparse_moe.output_linear.weight", &|(_, shape, _)| shape.swap(1, 2)),
        &["mlp.experts.down_proj", "[5, 20, 32]"],
    );
    tensors(
        "mixtral",
        &|tensors| {
            let again = tensors[&at("block_sparse_moe.gate.weight")].clone();
            tensors.insert(at("mlp.gate.weight"), again);
        },
        &["mlp.router.weight", "twice"],
    );
}
