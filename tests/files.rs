//! Files as they are found: what another tool has written is read as transformers reads it, or
//! refused with its name and what to do.

mod common;

use common::gguf::{Gguf, Meta};
use common::{SyntheticModel, Tensor, write_tensors};
use lowkey::Result;
use lowkey::checkpoint::{Architecture, Checkpoint, RopeScaling};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::path::Path;
use tempfile::TempDir;

/// A model with these settings, over its own, and these tensors besides.
fn model(settings: &Value, more: &[(&str, &[usize])]) -> TempDir {
    written(SyntheticModel::default(), settings, more)
}

fn written(model: SyntheticModel, settings: &Value, more: &[(&str, &[usize])]) -> TempDir {
    let directory = model.write_temporary();
    let (mut config, mut tensors) = (model.config(), model.tensors());
    settings.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
    for (name, shape) in more {
        let numbers = (0..shape.iter().product::<usize>()).map(|i| i as f32 % 7.0).collect();
        tensors.insert((*name).into(), Tensor { shape: shape.to_vec(), numbers });
    }
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    write_tensors(&directory.path().join("model.safetensors"), &tensors, Dtype::F16);
    directory
}

/// Fails to open, in words that hold all of these.
#[track_caller]
fn refused(opened: Result<Checkpoint>, parts: &[&str]) {
    let error = opened.err().expect("must be refused");
    let message = error.to_string();
    assert!(parts.iter().all(|part| message.contains(part)), "{parts:?} in {message}");
}

fn open(directory: &TempDir) -> Result<Checkpoint> {
    Checkpoint::open(directory.path())
}

#[test]
fn every_stored_tensor_is_used_known_or_refused_by_name() {
    let layer = "model.layers.0";
    for (name, shape, parts) in [
        // Norms that the architecture has not.
        (format!("{layer}.self_attn.q_norm.weight"), vec![12], &["q_norm.weight", "no part of a model with this config"][..]),
        (format!("{layer}.self_attn.k_proj.bias"), vec![36], &["k_proj.bias"]),
        (format!("{layer}.mlp.experts.0.up_proj.weight"), vec![2, 2], &["experts.0.up_proj.weight"]),
        ("vision_tower.patch_embed.weight".into(), vec![2, 2], &["vision_tower.patch_embed.weight"]),
        ("score.weight".into(), vec![2, 60], &["score.weight"]),
        // A layer past those that the config has.
        ("model.layers.3.input_layernorm.weight".into(), vec![60], &["model.layers.3.input_layernorm.weight", "only 3 layers, 0 to 2"]),
        // Adapters, and weights of other packages.
        (format!("{layer}.self_attn.q_proj.lora_A.weight"), vec![2, 60], &["q_proj.lora_A.weight", "LoRA", "merge_and_unload"]),
        (format!("base_model.{layer}.self_attn.q_proj.lora_B.default.weight"), vec![2, 60], &["lora_B", "LoRA"]),
        (format!("{layer}.self_attn.q_proj.qweight"), vec![2, 60], &["qweight", "GPTQ or AWQ", "a GGUF of it"]),
        (format!("{layer}.self_attn.q_proj.scales"), vec![2, 60], &["scales", "MLX"]),
        (format!("{layer}.self_attn.q_proj.weight.absmax"), vec![60], &["absmax", "bitsandbytes"]),
        (format!("{layer}.self_attn.q_proj.weight_scale_inv"), vec![1, 1], &["weight_scale_inv", "FP8"]),
    ] {
        refused(open(&model(&json!({}), &[(&*name, &shape)])), &[parts, &["model.safetensors"]].concat());
    }
    // Buffers that follow from the config change nothing.
    let buffers = [(format!("{layer}.self_attn.rotary_emb.inv_freq"), [6]), ("model.rotary_emb.inv_freq".to_string(), [6])];
    let buffers: Vec<(&str, &[usize])> = buffers.iter().map(|(name, shape)| (name.as_str(), &shape[..])).collect();
    open(&model(&json!({}), &buffers)).unwrap();
    // What needs the missing tensor of such a package says the package, and not that it is missing.
    let directory = model(&json!({}), &[]);
    let mut tensors = SyntheticModel::default().tensors();
    let weight = tensors.remove("model.layers.1.mlp.up_proj.weight").unwrap();
    tensors.insert("model.layers.1.mlp.up_proj.qweight".into(), weight);
    write_tensors(&directory.path().join("model.safetensors"), &tensors, Dtype::F16);
    refused(open(&directory), &["up_proj.qweight", "GPTQ"]);
}

/// As transformers has it: a head that is stored and is another than the table is used.
#[test]
fn a_tied_head_that_is_another_is_used() {
    let tied = SyntheticModel::default();
    let table = tied.tensors()["model.embed_tokens.weight"].clone();
    let with_head = |numbers: Vec<f32>| {
        let directory = tied.write_temporary();
        let mut tensors = tied.tensors();
        tensors.insert("lm_head.weight".into(), Tensor { numbers, ..table.clone() });
        write_tensors(&directory.path().join("model.safetensors"), &tensors, Dtype::F16);
        open(&directory).unwrap()
    };
    let same = with_head(table.numbers.clone());
    assert!(same.config().tie_word_embeddings && same.remarks().is_empty());
    let other = with_head(table.numbers.iter().map(|x| x * 0.5).collect());
    assert!(!other.config().tie_word_embeddings);
    assert!(other.remarks()[0].contains("another head is stored"), "{:?}", other.remarks());
}

/// As `AutoModel` saves it, which has no head.
#[test]
fn a_model_that_was_saved_without_its_head_is_read() {
    let (tied, untied) = (SyntheticModel::default(), SyntheticModel { tied: false, ..SyntheticModel::default() });
    let without = |model: &SyntheticModel| {
        let directory = model.write_temporary();
        let config = model.config().to_string().replace("LlamaForCausalLM", "LlamaModel");
        std::fs::write(directory.path().join("config.json"), config).unwrap();
        let inner = |(name, tensor): (String, Tensor)| Some((name.strip_prefix("model.")?.to_string(), tensor));
        write_tensors(&directory.path().join("model.safetensors"), &model.tensors().into_iter().filter_map(inner).collect(), Dtype::F16);
        directory
    };
    let (found, directory) = (without(&tied), tied.write_temporary());
    let (found, whole) = (open(&found).unwrap(), open(&directory).unwrap());
    assert!(found.tensor_names().eq(whole.tensor_names()) && found.fingerprint() == whole.fingerprint());
    refused(open(&without(&untied)), &["lm_head.weight", "missing"]);
}

#[test]
fn tensors_of_a_gguf_are_accounted_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let with = |edit: &dyn Fn(&mut Gguf)| {
        let mut file = SyntheticModel::default().gguf();
        edit(&mut file);
        file.write(&path);
        Checkpoint::open(&path)
    };
    let add = |name: &'static str| {
        move |file: &mut Gguf| {
            let norm = file.tensors.iter().find(|tensor| tensor.name == "blk.0.attn_norm.weight").unwrap().clone();
            file.tensors.push(common::gguf::Encoded { name: name.into(), ..norm });
        }
    };
    with(&|_| ()).unwrap();
    refused(with(&add("blk.0.attn_q_norm.weight")), &["self_attn.q_norm.weight", "model.gguf"]);
    refused(with(&add("blk.3.attn_norm.weight")), &["layers.3", "only 3 layers"]);
    refused(with(&add("blk.0.ffn_gate_inp.weight")), &["blk.0.ffn_gate_inp.weight"]);
    refused(with(&add("v.patch_embd.weight")), &["v.patch_embd.weight"]);
    refused(with(&|file| file.set("general.type", Meta::Text("adapter".into()))), &["LoRA adapter", "merge_and_unload"]);
    refused(with(&|file| file.set("general.type", Meta::Text("mmproj".into()))), &["no model", "mmproj"]);
    with(&|file| file.set("general.type", Meta::Text("model".into()))).unwrap();
}

#[test]
fn what_is_no_model_is_named_for_what_it_is() {
    let pointer =
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n";
    for file in ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        let directory = model(&json!({}), &[]);
        std::fs::write(directory.path().join(file), pointer).unwrap();
        let opened = open(&directory).and_then(|checkpoint| {
            checkpoint.tokenizer()?;
            checkpoint.chat_template().map(|_| checkpoint)
        });
        refused(opened, &[file, "Git LFS pointer", "git lfs pull"]);
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.gguf");
    std::fs::write(&file, pointer).unwrap();
    refused(Checkpoint::open(&file), &["a.gguf", "Git LFS pointer"]);
    // A directory that holds only a .gguf.
    refused(open(&directory), &["is a directory of GGUF files (a.gguf)", "name the file itself", "a.gguf"]);

    let empty = || tempfile::tempdir().unwrap();
    let peft = empty();
    std::fs::write(peft.path().join("adapter_config.json"), json!({ "base_model_name_or_path": "owner/base" }).to_string()).unwrap();
    refused(open(&peft), &["is a LoRA adapter for owner/base", "merge_and_unload"]);
    // The same, and its file, in the place of what `compress` makes.
    let lora = peft.path().join("adapter_model.safetensors");
    let tensor = Tensor { shape: vec![2, 2], numbers: vec![1.0; 4] };
    write_tensors(&lora, &[("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight".to_string(), tensor)].into(), Dtype::F16);
    let whole = model(&json!({}), &[]);
    refused(Checkpoint::open_with(whole.path(), peft.path()), &["is a LoRA adapter for owner/base"]);
    refused(Checkpoint::open_with(whole.path(), &lora), &["lora_A", "LoRA adapter", "merge_and_unload"]);
    refused(Checkpoint::open(&lora), &["is a file of weights alone", "directory"]);
    for (name, words) in [("model.bin", "pickled"), ("weights.npz", "another package"), ("notes.txt", "neither a checkpoint directory")] {
        let file = peft.path().join(name);
        std::fs::write(&file, "something else").unwrap();
        refused(Checkpoint::open(&file), &[name, words]);
    }
    let makers = empty();
    for file in ["params.json", "consolidated.00.pth"] {
        std::fs::write(makers.path().join(file), "{}").unwrap();
    }
    refused(open(&makers), &["consolidated", "Hugging Face form"]);
    let pickled = model(&json!({}), &[]);
    std::fs::rename(pickled.path().join("model.safetensors"), pickled.path().join("pytorch_model.bin")).unwrap();
    refused(open(&pickled), &["pickled weights", "converted to safetensors"]);
}

#[test]
fn weights_of_other_packages_are_refused_by_name() {
    for (settings, parts) in [
        (json!({ "quantization_config": { "quant_method": "gptq", "bits": 4 } }), ["gptq", "a GGUF of it"]),
        (json!({ "quantization_config": { "quant_method": "awq", "bits": 4 } }), ["awq", "float checkpoint"]),
        (json!({ "quantization_config": { "quant_method": "bitsandbytes", "load_in_4bit": true } }), ["bitsandbytes", "a GGUF of it"]),
        (json!({ "quantization_config": { "quant_method": "fp8" } }), ["fp8", "a GGUF of it"]),
        (json!({ "quantization": { "group_size": 64, "bits": 4 } }), ["MLX", "a GGUF of it"]),
    ] {
        refused(open(&model(&settings, &[])), &parts);
    }
}

/// Where a file has both spellings transformers takes the older one; what disagrees is refused.
#[test]
fn rope_settings_in_both_spellings_agree_or_are_refused() {
    let read = |settings: Value| open(&model(&settings, &[])).map(|checkpoint| checkpoint.config().ropes[0].clone());
    let (plain, linear) = (json!({ "rope_type": "default", "rope_theta": 1e4 }), json!({ "rope_type": "linear", "factor": 2.0 }));
    let rope = read(json!({ "rope_scaling": linear, "rope_parameters": plain })).unwrap();
    assert_eq!((rope.scaling, rope.theta), (RopeScaling::Linear { factor: 2.0 }, 1e4));
    let yarn = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128 });
    let settings = json!({ "rope_theta": null, "rope_scaling": yarn, "rope_parameters": plain });
    let of_qwen = written(SyntheticModel { architecture: Architecture::Qwen3, ..SyntheticModel::default() }, &settings, &[]);
    let found = open(&of_qwen).unwrap().config().ropes[0].scaling.clone();
    assert!(matches!(found, RopeScaling::Yarn { factor: 4.0, original_max_position_embeddings: 128.0, .. }), "{found:?}");
    // The same twice, and nothing in the older one.
    let twice = json!({ "type": "linear", "factor": 2 });
    assert_eq!(read(json!({ "rope_scaling": twice, "rope_parameters": linear })).unwrap().scaling, RopeScaling::Linear { factor: 2.0 });
    assert_eq!(read(json!({ "rope_scaling": {}, "rope_parameters": linear })).unwrap().scaling, RopeScaling::Linear { factor: 2.0 });
    let both_names = json!({ "rope_type": "longrope", "type": "su", "short_factor": vec![1.0; 6], "long_factor": vec![1.0; 6] });
    read(json!({ "rope_scaling": both_names })).unwrap();

    let refuse = |settings: Value, parts: &[&str]| {
        let error = read(settings).unwrap_err();
        assert!(error.kind() == "unsupported" && parts.iter().all(|part| error.to_string().contains(part)), "{parts:?} in {error}");
    };
    let other = json!({ "rope_type": "linear", "factor": 4.0 });
    refuse(json!({ "rope_scaling": linear, "rope_parameters": other }), &["rope_scaling", "rope_parameters", "disagree"]);
    refuse(json!({ "rope_scaling": { "rope_type": "default" }, "rope_parameters": other }), &["disagree"]);
    let far = json!({ "rope_type": "default", "rope_theta": 1e6 });
    refuse(json!({ "rope_scaling": linear, "rope_parameters": far }), &["disagree", "1000000"]);
    refuse(json!({ "rope_theta": 1e4, "rope_parameters": far }), &["rope_theta is 10000", "in rope_parameters it is 1000000"]);
    refuse(json!({ "rope_scaling": { "factor": 4.0 } }), &["rope_scaling", "factor is 4", "no rope_type"]);
    refuse(json!({ "rope_parameters": { "rope_theta": 1e4, "factor": 4.0 } }), &["rope_parameters", "factor is 4"]);
    refuse(json!({ "rope_parameters": { "rope_type": "default", "low_freq_factor": 4.0 } }), &["low_freq_factor"]);
    refuse(json!({ "rope_scaling": { "rope_type": "yarn", "type": "linear", "factor": 2.0 } }), &["rope_type is \"yarn\"", "type is \"linear\""]);
}

/// A model in `count` files, as llama-gguf-split cuts it.
fn split(directory: &Path, count: usize) -> Vec<std::path::PathBuf> {
    let whole = SyntheticModel::default().gguf();
    let path = |index: usize| directory.join(format!("model-{:05}-of-{count:05}.gguf", index + 1));
    let share = whole.tensors.len().div_ceil(count);
    for (index, tensors) in whole.tensors.chunks(share).enumerate() {
        let mut part = Gguf { metadata: if index == 0 { whole.metadata.clone() } else { Vec::new() }, tensors: tensors.to_vec() };
        part.set("split.no", Meta::U32(index as u32));
        part.set("split.count", Meta::U32(count as u32));
        part.set("split.tensors.count", Meta::U32(whole.tensors.len() as u32));
        part.write(&path(index));
    }
    (0..count).map(path).collect()
}

#[test]
fn a_split_gguf_is_read_as_one() {
    let directory = tempfile::tempdir().unwrap();
    let whole = directory.path().join("whole.gguf");
    SyntheticModel::default().gguf().write(&whole);
    let whole = Checkpoint::open(&whole).unwrap();
    let parts = split(directory.path(), 3);
    let found = Checkpoint::open(&parts[0]).unwrap();
    assert_eq!(found.weight_files().collect::<Vec<_>>(), parts);
    assert!(found.tensor_names().eq(whole.tensor_names()) && found.config() == whole.config());
    for name in whole.tensor_names() {
        let shape = whole.shape(name).unwrap();
        assert_eq!(found.f32(name, shape).unwrap(), whole.f32(name, shape).unwrap(), "{name}");
    }
    assert_eq!(found.fingerprint(), whole.fingerprint());
    found.tokenizer().unwrap();

    refused(Checkpoint::open(&parts[1]), &["is part 2 of 3 of a split GGUF", "model-00001-of-00003.gguf"]);
    let renamed = directory.path().join("first.gguf");
    std::fs::copy(&parts[0], &renamed).unwrap();
    refused(Checkpoint::open(&renamed), &["first of 3 parts", "-00001-of-00003.gguf"]);
    std::fs::copy(&parts[1], &parts[2]).unwrap();
    refused(Checkpoint::open(&parts[0]), &["is part 2 of 3", "has part 3 of 3"]);
    std::fs::remove_file(&parts[2]).unwrap();
    refused(Checkpoint::open(&parts[0]), &["cannot read", "model-00003-of-00003.gguf"]);
}

#[test]
fn a_vocabulary_that_does_not_name_its_rule_is_remarked_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let mut file = SyntheticModel::default().gguf();
    file.write(&path);
    assert!(Checkpoint::open(&path).unwrap().remarks().is_empty());
    file.metadata.retain(|(key, _)| key != "tokenizer.ggml.pre");
    file.write(&path);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(checkpoint.remarks()[0].contains("tokenizer.ggml.pre is missing"), "{:?}", checkpoint.remarks());
    checkpoint.tokenizer().unwrap();
}

/// Several templates of which none is the default, and files of templates.
#[test]
fn which_template_is_the_models() {
    let directory = SyntheticModel::default().write_temporary();
    let with = |template: Value| {
        std::fs::write(directory.path().join("tokenizer_config.json"), json!({ "chat_template": template }).to_string()).unwrap();
        open(&directory).unwrap()
    };
    assert!(!with(Value::Null).has_chat_template().unwrap());
    assert!(with(json!("{% if %}")).has_chat_template().unwrap() && with(json!("{% if %}")).chat_template().is_err());
    let error = with(json!([{ "name": "rag", "template": "a" }, { "name": "tool_use", "template": "b" }])).has_chat_template().unwrap_err();
    assert!(error.to_string().contains("rag, tool_use"), "{error}");
}
