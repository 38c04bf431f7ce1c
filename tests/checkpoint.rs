//! What is promised of reading checkpoints: every number comes back, in every encoding, from one file or several.

mod common;

use common::{SyntheticModel, Tensors, families, write_tensors};
use half::{bf16, f16};
use lowkey::checkpoint::{Architecture, Checkpoint, RopeScaling};
use safetensors::Dtype;
use serde_json::json;

#[test]
fn every_family_comes_back_as_it_was_written() {
    for (name, model) in families() {
        let directory = model.write_temporary();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let config = checkpoint.config();
        assert_eq!(config.architecture, model.architecture, "{name}");
        assert_eq!(
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim),
            (model.heads, model.kv_heads, model.head_dim),
            "{name}"
        );
        assert_eq!(config.attention_bias, model.architecture == Architecture::Qwen2, "{name}");
        assert_eq!(config.qk_norm, model.architecture == Architecture::Qwen3, "{name}");
        assert_eq!(config.sliding_window, model.sliding_window, "{name}");
        assert_eq!(config.tie_word_embeddings, model.tied, "{name}");
        let tensors = model.tensors();
        assert!(checkpoint.tensor_names().eq(tensors.keys().map(String::as_str)), "{name}");
        for (tensor, expected) in &tensors {
            assert_eq!(checkpoint.shape(tensor), Some(&expected.shape[..]));
            let halves: Vec<f16> = expected.numbers.iter().map(|x| f16::from_f32(*x)).collect();
            assert_eq!(checkpoint.f16(tensor, &expected.shape).unwrap(), halves, "{name} {tensor}");
            let floats: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
            assert_eq!(checkpoint.f32(tensor, &expected.shape).unwrap(), floats, "{name} {tensor}");
        }
    }
}

#[test]
fn f32_is_exact_in_f32_and_bf16() {
    for (dtype, stored) in [(Dtype::F32, (|x| x) as fn(f32) -> f32), (Dtype::BF16, |x| bf16::from_f32(x).to_f32())] {
        let model = SyntheticModel { dtype, ..Default::default() };
        let directory = model.write_temporary();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        for (name, tensor) in model.tensors() {
            let expected: Vec<f32> = tensor.numbers.iter().map(|x| stored(*x)).collect();
            assert_eq!(checkpoint.f32(&name, &tensor.shape).unwrap(), expected, "{dtype:?} {name}");
            let halves: Vec<f16> = expected.iter().map(|x| f16::from_f32(*x)).collect();
            assert_eq!(checkpoint.f16(&name, &tensor.shape).unwrap(), halves, "{dtype:?} {name}");
        }
    }
}

#[test]
fn shards_are_read_as_one() {
    let model = SyntheticModel::default();
    let directory = model.write_temporary();
    let path = directory.path();
    std::fs::remove_file(path.join("model.safetensors")).unwrap();
    let mut parts = [Tensors::new(), Tensors::new(), Tensors::new()];
    let mut map = serde_json::Map::new();
    for (index, (name, tensor)) in model.tensors().into_iter().enumerate() {
        map.insert(name.clone(), json!(format!("model-{}.safetensors", index % 3)));
        parts[index % 3].insert(name, tensor);
    }
    for (index, part) in parts.iter().enumerate() {
        write_tensors(&path.join(format!("model-{index}.safetensors")), part, Dtype::F16);
    }
    std::fs::write(path.join("model.safetensors.index.json"), json!({ "metadata": {}, "weight_map": map }).to_string()).unwrap();
    let checkpoint = Checkpoint::open(path).unwrap();
    assert_eq!(checkpoint.weight_files().count(), 3);
    for (name, tensor) in model.tensors() {
        let expected: Vec<f16> = tensor.numbers.iter().map(|x| f16::from_f32(*x)).collect();
        assert_eq!(checkpoint.f16(&name, &tensor.shape).unwrap(), expected);
    }
}

#[test]
fn config_survives_writing_and_reading() {
    for (name, model) in families() {
        let directory = model.write_temporary();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let again = lowkey::checkpoint::Config::from_json(&checkpoint.config().to_json(), directory.path()).unwrap();
        assert_eq!(&again, checkpoint.config(), "{name}");
    }
}

#[test]
fn rope_is_read_in_both_spellings() {
    let model = SyntheticModel::default();
    let read = |edit: &dyn Fn(&mut serde_json::Value)| {
        let mut config = model.config();
        edit(&mut config);
        lowkey::checkpoint::Config::from_json(&config, "config.json".as_ref()).unwrap()
    };
    let older = read(&|c| {
        c["rope_theta"] = json!(5e5);
        c["rope_scaling"] = json!({ "type": "linear", "factor": 4 });
    });
    let newer = read(&|c| c["rope_parameters"] = json!({ "rope_theta": 5e5, "rope_type": "linear", "factor": 4.0 }));
    assert_eq!(older.rope_scaling, RopeScaling::Linear { factor: 4.0 });
    assert_eq!((older.rope_theta, older.rope_scaling), (newer.rope_theta, newer.rope_scaling));
}

#[test]
fn a_window_counts_only_where_it_is_switched_on() {
    let read = |architecture, edit: serde_json::Value| {
        let mut config = SyntheticModel { architecture, sliding_window: Some(64), ..Default::default() }.config();
        edit.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        lowkey::checkpoint::Config::from_json(&config, "config.json".as_ref()).map(|config| config.sliding_window)
    };
    assert_eq!(read(Architecture::Mistral, json!({})).unwrap(), Some(64));
    assert_eq!(read(Architecture::Qwen2, json!({})).unwrap(), None);
    assert_eq!(read(Architecture::Qwen2, json!({ "use_sliding_window": true, "max_window_layers": 0 })).unwrap(), Some(64));
    assert_eq!(read(Architecture::Qwen2, json!({ "use_sliding_window": true, "max_window_layers": 3 })).unwrap(), None);
    let mixed = read(Architecture::Qwen2, json!({ "use_sliding_window": true, "max_window_layers": 1 })).unwrap_err();
    assert_eq!(mixed.kind(), "unsupported");
    assert!(mixed.to_string().contains("sliding window"), "{mixed}");
}
