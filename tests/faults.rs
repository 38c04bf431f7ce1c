//! What is promised of bad input: an error that names the thing, never a panic. Here of
//! checkpoints.

mod common;

use common::gguf::{Gguf, Meta};
use common::{Random, SyntheticModel, Tensors, families, write_tensors};
use lowkey::checkpoint::{Architecture, Checkpoint, Factored, Message};
use lowkey::{Error, Result};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::path::Path;
use tempfile::TempDir;

/// Opens, and reads everything there is to read.
fn read_everything(path: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open(path)?;
    for name in checkpoint.tensor_names() {
        let shape = checkpoint.shape(name).unwrap_or_default();
        checkpoint.f16(name, shape)?;
        checkpoint.f32(name, shape)?;
    }
    let tokenizer = checkpoint.tokenizer()?;
    let tokens = tokenizer.encode("the thing 🦀", true)?;
    tokenizer.decode(&tokens)?;
    checkpoint.chat_template()?.render(&[Message::new("user", "hi")], true)?;
    Ok(())
}

/// Fails, with an error of this kind whose message holds all of these.
#[track_caller]
fn assert_refused(path: &Path, kind: &str, parts: &[&str]) {
    let error = read_everything(path).expect_err("must be refused");
    let message = error.to_string();
    assert_eq!(error.kind(), kind, "{message}");
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
    assert!(message.contains(path.file_name().unwrap().to_str().unwrap()), "no file in: {message}");
}

/// A sound checkpoint, to be damaged.
fn sound() -> TempDir {
    let directory = SyntheticModel::default().write_temporary();
    read_everything(directory.path()).unwrap();
    directory
}

fn with_config(edit: impl FnOnce(&mut Value)) -> TempDir {
    with_config_of(SyntheticModel::default(), edit)
}

fn with_config_of(model: SyntheticModel, edit: impl FnOnce(&mut Value)) -> TempDir {
    let directory = model.write_temporary();
    let mut config = model.config();
    edit(&mut config);
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    directory
}

fn with_tensors(dtype: Dtype, edit: impl FnOnce(&mut Tensors)) -> TempDir {
    let model = SyntheticModel::default();
    let directory = model.write_temporary();
    let mut tensors = model.tensors();
    edit(&mut tensors);
    write_tensors(&directory.path().join("model.safetensors"), &tensors, dtype);
    directory
}

/// A safetensors file with this header and so many bytes of data.
fn with_header(header: &Value, data: usize) -> TempDir {
    with_header_text(&header.to_string(), data)
}

fn with_header_text(header: &str, data: usize) -> TempDir {
    let directory = SyntheticModel::default().write_temporary();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    std::fs::write(directory.path().join("model.safetensors"), bytes).unwrap();
    directory
}

#[test]
fn nothing_there() {
    let error = Checkpoint::open(Path::new("/no/such/model")).err().unwrap();
    assert_eq!((error.kind(), error.to_string().contains("/no/such/model")), ("io", true), "{error}");
    let directory = tempfile::tempdir().unwrap();
    let error = Checkpoint::open(directory.path()).err().unwrap();
    assert!(matches!(&error, Error::Io { path, .. } if path.ends_with("config.json")), "{error}");
    let text = directory.path().join("notes.txt");
    std::fs::write(&text, "no model").unwrap();
    assert_refused(&text, "unsupported", &["neither a checkpoint directory nor a GGUF file"]);
    std::fs::write(&text, "").unwrap();
    assert!(read_everything(&text).is_err());
}

#[test]
fn unsupported_models_are_refused_by_name_before_weights_are_read() {
    let refused = |edit: fn(&mut Value), parts: &[&str]| {
        let directory = with_config(edit);
        std::fs::remove_file(directory.path().join("model.safetensors")).unwrap();
        assert_refused(directory.path(), "unsupported", parts);
    };
    refused(|c| c["architectures"] = json!(["MixtralForCausalLM"]), &["MixtralForCausalLM", "LlamaForCausalLM"]);
    refused(|c| c["architectures"] = json!(["LlamaForSequenceClassification"]), &["LlamaForSequenceClassification"]);
    refused(|c| c["hidden_act"] = json!("tanh"), &["hidden_act", "tanh"]);
    refused(|c| c["logits_scaling"] = json!(8.0), &["logits_scaling", "8"]);
    refused(|c| c["no_rope_layers"] = json!([1, 0, 1]), &["no_rope_layers"]);
    refused(|c| c["final_logit_softcapping"] = json!(30.0), &["final_logit_softcapping"]);
    refused(|c| c["rope_scaling"] = json!({ "rope_type": "mrope", "factor": 4 }), &["rope_scaling", "mrope"]);
    refused(|c| c["rope_parameters"] = json!({ "rope_type": "default", "alpha": 4 }), &["rope_parameters", "alpha"]);
    refused(|c| c["rope_parameters"] = json!({ "rope_type": "default", "mrope_section": [4, 2] }), &["rope_parameters", "mrope_section"]);
    refused(|c| c["rope_parameters"] = json!({ "rope_type": "default", "partial_rotary_factor": 0.5 }), &["partial_rotary_factor"]);
    refused(|c| c["partial_rotary_factor"] = json!(0.5), &["partial_rotary_factor"]);
    refused(|c| c["quantization_config"] = json!({ "quant_method": "gptq" }), &["gptq"]);
}

#[test]
fn numbers_of_the_config_are_checked() {
    for (key, value, parts) in [
        ("num_hidden_layers", json!(0), &["num_hidden_layers", "0"][..]),
        ("num_attention_heads", json!(0), &["num_attention_heads"]),
        ("num_key_value_heads", json!(4), &["num_attention_heads 6", "num_key_value_heads 4"]),
        ("num_key_value_heads", json!(0), &["num_key_value_heads"]),
        ("head_dim", json!(11), &["head_dim is 11"]),
        ("hidden_size", json!(u64::MAX), &["hidden_size"]),
        ("hidden_size", json!(-4), &["hidden_size is -4"]),
        ("vocab_size", json!("many"), &["vocab_size", "many"]),
        ("intermediate_size", Value::Null, &["lacks intermediate_size"]),
        ("rms_norm_eps", json!(0.0), &["rms_norm_eps"]),
        ("rope_theta", json!(-1.0), &["rope_theta"]),
        ("rope_scaling", json!({ "rope_type": "linear", "factor": 0 }), &["rope_scaling", "factor"]),
        ("rope_scaling", json!({ "rope_type": "llama3", "factor": 8 }), &["rope_scaling", "low_freq_factor"]),
        ("rope_scaling", json!([1]), &["rope_scaling"]),
        ("eos_token_id", json!([2, 515]), &["eos_token_id", "515"]),
        ("tie_word_embeddings", json!("yes"), &["tie_word_embeddings"]),
    ] {
        let directory = with_config(|config| config[key] = value);
        let error = read_everything(directory.path()).expect_err(key);
        assert_eq!(error.kind(), "checkpoint", "{error}");
        assert!(parts.iter().all(|part| error.to_string().contains(part)), "{error}");
    }
    let directory = sound();
    std::fs::write(directory.path().join("config.json"), "{ \"model_type\": ").unwrap();
    assert!(read_everything(directory.path()).unwrap_err().to_string().contains("not valid JSON"));
}

#[test]
fn tensors_are_missed_by_name() {
    for (family, model) in families() {
        let names: Vec<String> = model.tensors().keys().cloned().collect();
        for missing in names {
            let directory = tempfile::tempdir().unwrap();
            model.write(directory.path());
            let mut tensors = model.tensors();
            tensors.remove(&missing);
            write_tensors(&directory.path().join("model.safetensors"), &tensors, Dtype::F16);
            let error = Checkpoint::open(directory.path()).err().unwrap_or_else(|| panic!("{family} opens without {missing}"));
            assert!(matches!(&error, Error::Tensor { name, .. } if *name == missing), "{family}: {error}");
        }
    }
}

#[test]
fn wrong_tensors_are_refused_by_name() {
    let name = "model.layers.1.self_attn.k_proj.weight";
    let transposed = with_tensors(Dtype::F16, |tensors| tensors.get_mut(name).unwrap().shape.reverse());
    let error = read_everything(transposed.path()).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("[60, 36]") && error.contains("[36, 60]"), "{error}");

    for (dtype, value, words) in [
        (Dtype::F16, f32::NAN, &["NaN", "row 2, column 5"][..]),
        (Dtype::F32, f32::INFINITY, &["inf", "row 2, column 5"]),
        (Dtype::F32, 1e6, &["1000000", "f16", "row 2, column 5"]),
        (Dtype::BF16, 1e6, &["f16", "row 2, column 5"]),
    ] {
        let directory = with_tensors(dtype, |tensors| tensors.get_mut(name).unwrap().numbers[2 * 60 + 5] = value);
        let error = read_everything(directory.path()).unwrap_err();
        assert_eq!(error.kind(), "tensor");
        let message = error.to_string();
        assert!(message.contains(name) && words.iter().all(|word| message.contains(word)), "{message}");
    }

    let biased = with_tensors(Dtype::F16, |tensors| {
        let bias = common::Tensor { shape: vec![36], numbers: vec![0.0; 36] };
        tensors.insert("model.layers.0.self_attn.k_proj.bias".into(), bias);
    });
    let error = read_everything(biased.path()).unwrap_err();
    assert!(error.kind() == "unsupported" && error.to_string().contains("model.layers.0.self_attn.k_proj.bias"), "{error}");

    // Asked for with a shape that it does not have.
    let directory = sound();
    let error = Checkpoint::open(directory.path()).unwrap().f32(name, &[3, 3]).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("[3, 3]"), "{error}");
}

#[test]
fn damaged_safetensors_say_what_is_damaged() {
    let entry = |start: usize, end: usize| json!({ "dtype": "F16", "shape": [2], "data_offsets": [start, end] });
    let refused = |directory: TempDir, parts: &[&str]| {
        let error = read_everything(directory.path()).unwrap_err().to_string();
        assert!(error.contains("model.safetensors") && parts.iter().all(|part| error.contains(part)), "{error}");
    };
    refused(with_header(&json!({ "a": entry(0, 4), "b": entry(2, 6) }), 6), &["tensor b", "overlap", "a"]);
    refused(with_header_text(&format!("{{\"a\": {}, \"a\": {}}}", entry(0, 4), entry(4, 8)), 8), &["a", "twice"]);
    refused(with_header(&json!({ "a": entry(0, 4) }), 3), &["tensor a", "0..4", "truncated"]);
    refused(with_header(&json!({ "a": entry(8, 4) }), 9), &["tensor a", "8..4"]);
    refused(with_header(&json!({ "a": entry(0, 6) }), 6), &["tensor a", "does not fill"]);
    refused(with_header(&json!({ "a": { "dtype": "F16", "shape": [u64::MAX, 2], "data_offsets": [0, 4] } }), 4), &["tensor a"]);
    refused(with_header(&json!({ "a": { "dtype": "F16", "shape": [-1], "data_offsets": [0, 4] } }), 4), &["tensor a", "-1"]);
    refused(with_header(&json!({ "a": { "shape": [2], "data_offsets": [0, 4] } }), 4), &["tensor a", "dtype"]);
    refused(with_header(&json!({ "a": 1 }), 4), &["tensor a"]);
    refused(with_header_text("[1, 2]", 0), &["header"]);
    refused(with_header_text("{\"a\":", 0), &["header"]);
    let unknown = with_header(&json!({ "model.embed_tokens.weight": { "dtype": "F8_E4M3", "shape": [515, 60], "data_offsets": [0, 30900] } }), 30900);
    refused(unknown, &["model.embed_tokens.weight", "F8_E4M3", "BF16"]);

    // Header lengths past the end, up to the largest number there is.
    for length in [1u64 << 20, 1 << 40, u64::MAX] {
        let directory = sound();
        let file = directory.path().join("model.safetensors");
        let mut bytes = std::fs::read(&file).unwrap();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        std::fs::write(&file, bytes).unwrap();
        refused(directory, &["header", &length.to_string()]);
    }
    // Cut anywhere.
    let directory = sound();
    let file = directory.path().join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    for keep in [0, 1, 7, 8, 9, 500, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&file, &bytes[..keep]).unwrap();
        let error = read_everything(directory.path()).unwrap_err().to_string();
        assert!(error.contains("model.safetensors"), "{keep}: {error}");
    }
}

#[test]
fn damaged_shards_say_what_is_damaged() {
    let model = SyntheticModel::default();
    let split = |map: &dyn Fn(&str) -> Option<&'static str>, duplicate: bool| {
        let directory = model.write_temporary();
        std::fs::remove_file(directory.path().join("model.safetensors")).unwrap();
        let mut parts = [Tensors::new(), Tensors::new()];
        let mut listed = serde_json::Map::new();
        for (name, tensor) in model.tensors() {
            let part = name.contains("mlp") as usize;
            listed.insert(name.clone(), json!(map(&name).unwrap_or(["a.safetensors", "b.safetensors"][part])));
            if duplicate && name == "model.norm.weight" {
                parts[1].insert(name.clone(), tensor.clone());
            }
            parts[part].insert(name, tensor);
        }
        for (part, name) in parts.iter().zip(["a.safetensors", "b.safetensors"]) {
            write_tensors(&directory.path().join(name), part, Dtype::F16);
        }
        std::fs::write(directory.path().join("model.safetensors.index.json"), json!({ "weight_map": listed }).to_string()).unwrap();
        directory
    };
    read_everything(split(&|_| None, false).path()).unwrap();
    let error = |directory: TempDir| read_everything(directory.path()).unwrap_err().to_string();
    let twice = error(split(&|_| None, true));
    assert!(twice.contains("model.norm.weight") && twice.contains("a.safetensors") && twice.contains("b.safetensors"), "{twice}");
    let outside = error(split(&|name| (name == "model.norm.weight").then_some("../a.safetensors"), false));
    assert!(outside.contains("model.norm.weight") && outside.contains("outside"), "{outside}");
    let gone = split(&|_| None, false);
    std::fs::remove_file(gone.path().join("b.safetensors")).unwrap();
    assert!(error(gone).contains("b.safetensors"));
    let neither = split(&|_| None, false);
    std::fs::remove_file(neither.path().join("model.safetensors.index.json")).unwrap();
    assert!(error(neither).contains("there is neither model.safetensors nor"));
}

#[test]
fn factored_metadata_is_checked_against_the_model() {
    let row = |layer: usize, holds: &str, first: usize, heads: usize| {
        let bands = if heads > 1 { json!([{ "bits": 4, "runs": 1 }, { "bits": 2, "runs": 1 }]) } else { json!([{ "bits": 4, "runs": 1 }]) };
        json!({ "first_layer": layer, "layers": 1, "holds": holds, "first_head": first, "kv_heads": heads,
                "format": { "bands": bands, "scale": "band" } })
    };
    let rows: Vec<Value> =
        (0..3).flat_map(|layer| [row(layer, "turned_keys", 0, 3), row(layer, "values", 0, 2), row(layer, "values", 2, 1)]).collect();
    let sound = json!({
        "format": Factored::FORMAT, "method": "lowkey", "options": "", "kv_bytes_per_token": 6 * 16 + 3 * 12, "calibration_digest": "", "source_digest": "",
        "exact": { "sinks": 4, "recent": 32 }, "rows": rows,
    });
    // Sound metadata gets as far as the bases, which are not there.
    let directory = with_config(|config| config["lowkey"] = sound.clone());
    let error = read_everything(directory.path()).unwrap_err();
    assert!(matches!(&error, Error::Tensor { name, .. } if name.starts_with("rows.0.")), "{error}");
    type Edit = fn(&mut Value);
    let edits: [(Edit, &str, &[&str]); 12] = [
        (|o| o["format"] = json!(99), "unsupported", &["format 99", "reads 4"]),
        (|o| o["format"] = Value::Null, "checkpoint", &["format"]),
        (|o| o["rows"].as_array_mut().unwrap().truncate(6), "checkpoint", &["keys of layer 2", "no row"]),
        (|o| o["rows"][1]["first_head"] = json!(1), "checkpoint", &["values of layer 0", "head 0"]),
        (|o| o["rows"][2]["first_head"] = json!(1), "checkpoint", &["values of layer 0", "two"]),
        (|o| o["rows"][8]["kv_heads"] = json!(2), "checkpoint", &["row 8", "2 heads from 2 on, of 3"]),
        (|o| o["rows"][8]["layers"] = json!(u64::MAX), "checkpoint", &["row 8", "layers"]),
        (|o| o["rows"][0]["format"]["bands"][0]["runs"] = json!(1u64 << 40), "checkpoint", &["row 0", "endless"]),
        (|o| o["rows"][0]["format"]["bands"][0]["runs"] = json!(3), "checkpoint", &["row 0", "64 coordinates of a vector of 36"]),
        (|o| o["rows"][4]["format"]["bands"][0]["bits"] = json!(7), "checkpoint", &["row 4", "7 bits"]),
        (|o| o["kv_bytes_per_token"] = json!(100), "checkpoint", &["100 bytes", "take 132"]),
        (|o| o["method"] = Value::Null, "checkpoint", &["method"]),
    ];
    for (edit, kind, parts) in edits {
        let directory = with_config(|config| {
            config["lowkey"] = sound.clone();
            edit(&mut config["lowkey"]);
        });
        let error = read_everything(directory.path()).unwrap_err();
        let message = error.to_string();
        // A missing string is no more than "invalid type" to serde, with what was expected.
        let named = parts.iter().all(|part| message.contains(part) || *part == "method" && message.contains("expected a string"));
        assert!(error.kind() == kind && named, "{message}");
    }
}

#[test]
fn missing_tokenizers_and_templates_are_named() {
    let directory = sound();
    std::fs::write(directory.path().join("tokenizer_config.json"), "{}").unwrap();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let error = checkpoint.chat_template().err().unwrap();
    assert!(error.kind() == "tokenizer" && error.to_string().contains("there is no chat template"), "{error}");
    std::fs::write(directory.path().join("tokenizer.json"), "{\"version\": \"1.0\"}").unwrap();
    let error = checkpoint.tokenizer().err().unwrap();
    assert!(error.kind() == "tokenizer" && error.to_string().contains("tokenizer.json"), "{error}");
    std::fs::remove_file(directory.path().join("tokenizer.json")).unwrap();
    let error = checkpoint.tokenizer().err().unwrap();
    assert!(error.kind() == "tokenizer" && error.to_string().contains("there is no tokenizer.json"), "{error}");
}

/// A GGUF file that has been changed.
fn with_gguf(edit: impl FnOnce(&mut Gguf)) -> (TempDir, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let mut file = SyntheticModel::default().gguf();
    edit(&mut file);
    file.write(&path);
    (directory, path)
}

#[test]
fn gguf_that_asks_for_something_else_is_refused_by_name() {
    let refused = |edit: &dyn Fn(&mut Gguf), kind: &str, parts: &[&str]| {
        let (_directory, path) = with_gguf(edit);
        assert_refused(&path, kind, parts);
    };
    let (_directory, path) = with_gguf(|_| {});
    read_everything(&path).unwrap();
    let text = |text: &str| Meta::Text(text.into());
    refused(&|f| f.set("general.architecture", text("mamba")), "unsupported", &["mamba", "qwen2"]);
    refused(&|f| f.set("llama.expert_used_count", Meta::U32(2)), "unsupported", &["expert_used_count", "2"]);
    refused(&|f| f.set("llama.expert_count", Meta::U32(8)), "checkpoint", &["num_experts_per_tok"]);
    let experts = |f: &mut Gguf, count, chosen| {
        f.set("llama.expert_count", Meta::U32(count));
        f.set("llama.expert_used_count", Meta::U32(chosen));
    };
    refused(&|f| experts(f, 8, 9), "checkpoint", &["num_experts_per_tok is 9", "from 1 to 8"]);
    refused(&|f| experts(f, 8, 0), "checkpoint", &["num_experts_per_tok is 0"]);
    refused(&|f| experts(f, 8, 2), "tensor", &["mlp.experts.0.", "missing"]);
    refused(&|f| f.set("llama.rope.scaling.type", text("mrope")), "unsupported", &["rope.scaling.type", "mrope"]);
    refused(&|f| f.set("llama.rope.scaling.type", text("yarn")), "checkpoint", &["rope.scaling.factor", "missing"]);
    refused(&|f| f.set("llama.use_parallel_residual", Meta::Bool(true)), "unsupported", &["use_parallel_residual"]);
    refused(&|f| f.set("llama.rope.dimension_count", Meta::U32(6)), "unsupported", &["rope.dimension_count", "6", "12"]);
    refused(&|f| f.set("split.count", Meta::U32(3)), "unsupported", &["split"]);
    refused(&|f| f.set("llama.attention.head_count", text("six")), "checkpoint", &["llama.attention.head_count"]);
    refused(&|f| f.set("llama.attention.head_count", Meta::U32(0)), "checkpoint", &["num_attention_heads is 0"]);
    refused(&|f| f.metadata.retain(|(key, _)| key != "llama.block_count"), "checkpoint", &["llama.block_count", "missing"]);
    refused(&|f| f.set("general.alignment", Meta::U32(24)), "checkpoint", &["general.alignment", "24"]);
    refused(&|f| f.metadata.push(("general.architecture".into(), text("llama"))), "checkpoint", &["general.architecture", "twice"]);
    refused(&|f| f.tensors[2].name = "blk.0.ffn_gate_exps.weight".into(), "tensor", &["blk.0.ffn_gate_exps.weight"]);
    refused(&|f| f.tensors[2].name = f.tensors[1].name.clone(), "tensor", &["blk.0.attn_norm.weight", "twice"]);
    refused(&|f| f.tensors.retain(|t| t.name != "token_embd.weight"), "tensor", &["token_embd.weight", "missing"]);
    refused(&|f| f.tensors.retain(|t| t.name != "output_norm.weight"), "tensor", &["model.norm.weight", "missing"]);
    refused(&|f| f.tensors.iter_mut().find(|t| t.name == "token_embd.weight").unwrap().kind = 23, "tensor", &["model.embed_tokens.weight", "IQ4_XS"]);
    refused(&|f| f.tensors.iter_mut().find(|t| t.name == "token_embd.weight").unwrap().kind = 12, "tensor", &["token_embd.weight", "60", "Q4_K"]);
    refused(&|f| f.tensors[1].kind = 7777, "tensor", &["7777"]);
    refused(&|f| f.tensors[1].dimensions = vec![u64::MAX, 2], "tensor", &["numbers"]);
    refused(&|f| f.tensors[1].dimensions = vec![1 << 40], "tensor", &["truncated"]);
    refused(&|f| f.tensors[1].dimensions = vec![1; 9], "checkpoint", &["9 dimensions"]);
    refused(&|f| f.set("tokenizer.ggml.model", text("bert")), "tokenizer", &["bert"]);
    refused(&|f| f.set("tokenizer.ggml.pre", text("klingon")), "tokenizer", &["klingon", "llama-bpe"]);
    refused(&|f| f.metadata.retain(|(key, _)| !key.starts_with("tokenizer")), "tokenizer", &["no tokenizer"]);
    refused(&|f| f.metadata.retain(|(key, _)| key != "tokenizer.chat_template"), "tokenizer", &["no chat template"]);
    refused(&|f| f.set("tokenizer.ggml.merges", Meta::Texts(vec!["abc".into()])), "checkpoint", &["tokenizer.ggml.merges", "abc"]);
    refused(&|f| f.set("tokenizer.ggml.merges", Meta::Texts(vec!["a zzz".into()])), "tokenizer", &["zzz"]);
    refused(&|f| f.set("tokenizer.ggml.token_type", Meta::Integers(vec![1])), "checkpoint", &["token_type", "1 entries"]);
}

#[test]
fn damaged_gguf_says_where() {
    let (_directory, path) = with_gguf(|_| {});
    let bytes = std::fs::read(&path).unwrap();
    for keep in [3, 4, 7, 23, 24, 30, 1000, 3000, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..keep]).unwrap();
        let error = read_everything(&path).unwrap_err().to_string();
        assert!(error.contains("truncated") && error.contains("model.gguf"), "{keep}: {error}");
    }
    let changed = |at: usize, with: &[u8], parts: &[&str]| {
        let mut bytes = bytes.clone();
        bytes[at..][..with.len()].copy_from_slice(with);
        std::fs::write(&path, bytes).unwrap();
        let error = read_everything(&path).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    changed(4, &1u32.to_le_bytes(), &["version 1", "2 and 3"]);
    changed(4, &3u32.to_be_bytes(), &["big-endian"]);
    for count in [1u64 << 32, u64::MAX] {
        changed(8, &count.to_le_bytes(), &[&count.to_string(), "tensors", "at byte 16"]);
        changed(16, &count.to_le_bytes(), &[&count.to_string(), "metadata pairs", "at byte 24"]);
        changed(24, &count.to_le_bytes(), &[&count.to_string(), "metadata pair 0", "at byte 32"]);
    }
    // The first pair: eight bytes of length, "general.architecture", then the value's type.
    changed(24 + 8 + 20, &99u32.to_le_bytes(), &["general.architecture", "unknown value type 99"]);
    changed(24 + 8, &[0xff], &["metadata pair 0", "UTF-8"]);
}

/// Thousands of damaged files, cut or with bits flipped: most are refused, some are still sound,
/// none panics or is read out of bounds.
#[test]
fn no_damage_makes_it_panic() {
    let model = SyntheticModel {
        layers: 1,
        hidden: 12,
        heads: 2,
        kv_heads: 1,
        head_dim: 6,
        ffn: 10,
        vocab: 300,
        architecture: Architecture::Qwen2,
        ..Default::default()
    };
    let directory = model.write_temporary();
    let gguf = directory.path().join("model.gguf");
    model.gguf().write(&gguf);
    let mut random = Random(7);
    // In GGUF and safetensors alike what can go wrong is in front.
    let header = |bytes: &[u8]| bytes.len() - model.tensors().values().map(|tensor| 2 * tensor.numbers.len()).sum::<usize>();
    for (file, path) in [
        (directory.path().join("model.safetensors"), directory.path()),
        (gguf.clone(), &gguf),
        (directory.path().join("config.json"), directory.path()),
    ] {
        let sound = std::fs::read(&file).unwrap();
        read_everything(path).unwrap();
        let front = if file.ends_with("config.json") { sound.len() } else { header(&sound) };
        let mut refused = 0;
        for round in 0..1500 {
            let mut bytes = sound.clone();
            for _ in 0..1 + random.below(4) {
                let at = if random.below(8) == 0 { random.below(bytes.len()) } else { random.below(front) };
                match random.below(3) {
                    0 => bytes[at] ^= 1 << random.below(8),
                    1 => bytes[at] = random.next() as u8,
                    _ => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
                }
            }
            if random.below(5) == 0 {
                bytes.truncate(random.below(bytes.len()));
            }
            std::fs::write(&file, &bytes).unwrap();
            match std::panic::catch_unwind(|| read_everything(path)) {
                Ok(result) => refused += result.is_err() as usize,
                Err(_) => panic!("round {round} on {} panicked", file.display()),
            }
        }
        assert!(refused > 500, "{refused} of 1500 damaged {} refused", file.display());
        std::fs::write(&file, sound).unwrap();
    }
}
