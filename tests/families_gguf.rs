//! Families in GGUF: the checkpoints of tests/data/families, as llama.cpp's converter would write
//! them, are the same models.

mod common;

use common::gguf::{Encoded, Gguf, Meta, interleave};
use common::nmse;
use half::f16;
use lowkey::checkpoint::Checkpoint;
use lowkey::cpu::{Model, RowType};
use lowkey::sequence::{Logits, Sequence};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// What llama.cpp calls the parts of a layer; of those with two names the family's norms decide.
const PARTS: [(&str, &str); 22] = [
    ("input_layernorm", "attn_norm"),
    ("post_self_attn_layernorm", "post_attention_norm"),
    ("post_mlp_layernorm", "post_ffw_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.query_layernorm", "attn_q_norm"),
    ("self_attn.key_layernorm", "attn_k_norm"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.c_fc", "ffn_up"),
    ("mlp.c_proj", "ffn_down"),
    ("model.norm", "output_norm"),
];

/// A fixture as a file of an architecture: what of its `config.json` no metadata can say, and the
/// metadata that the architecture has besides.
struct Case {
    fixture: &'static str,
    architecture: &'static str,
    config: Value,
    metadata: Vec<(&'static str, Meta)>,
}

fn cases() -> Vec<Case> {
    let case = |fixture, architecture, config, metadata| Case { fixture, architecture, config, metadata };
    let number = |name, x| (name, Meta::F32(x));
    let plain = |fixture, architecture| case(fixture, architecture, json!({}), vec![]);
    let caps = vec![number("attn_logit_softcapping", 5.0), number("final_logit_softcapping", 8.0), ("attention.sliding_window", Meta::U32(24))];
    let yarn = vec![
        ("rope.scaling.type", Meta::Text("yarn".into())),
        number("rope.scaling.factor", 4.0),
        ("rope.scaling.original_context_length", Meta::U32(64)),
    ];
    let longrope = vec![
        ("rope.scaling.type", Meta::Text("longrope".into())),
        ("rope.scaling.original_context_length", Meta::U32(64)),
        number("rope.scaling.attn_factor", (1.0 + 8f32.ln() / 64f32.ln()).sqrt()),
        ("rope.dimension_count", Meta::U32(4)),
        ("attention.sliding_window", Meta::U32(96)),
    ];
    let linear = vec![
        ("rope.scaling.type", Meta::Text("linear".into())),
        number("rope.scaling.factor", 8.0),
        number("rope.freq_base", 1e6),
        ("attention.sliding_window", Meta::U32(24)),
    ];
    let multipliers = vec![number("embedding_scale", 6.0), number("residual_scale", 0.4), number("attention.scale", 0.2), number("logit_scale", 2.5)];
    vec![
        plain("seed_oss", "seed_oss"),
        case("smollm3", "smollm3", json!({ "no_rope_layers": [1, 1, 1, 0], "use_sliding_window": false }), vec![]),
        case("arcee", "arcee", json!({}), yarn),
        plain("ernie4_5", "ernie4_5"),
        case("granite", "granite", json!({}), multipliers),
        case("hunyuan", "hunyuan-dense", json!({}), vec![number("rope.freq_base", 1e4 * 50f32.powf(16.0 / 14.0))]),
        plain("olmo2", "olmo2"),
        case("exaone4", "exaone4", json!({}), vec![("attention.sliding_window", Meta::U32(24))]),
        plain("gemma", "gemma"),
        case("gemma2", "gemma2", json!({ "query_pre_attn_scalar": 16 }), caps),
        case("gemma3", "gemma3", json!({ "query_pre_attn_scalar": 16, "layer_types": vec!["sliding_attention"; 4] }), linear),
        case("phi3", "phi3", json!({}), longrope),
        case("glm4", "glm4", json!({}), vec![("rope.dimension_count", Meta::U32(8))]),
        case("stablelm", "stablelm", json!({}), vec![("rope.dimension_count", Meta::U32(4))]),
        case("starcoder2", "starcoder2", json!({}), vec![("attention.sliding_window", Meta::U32(24))]),
    ]
}

impl Case {
    /// `config.json` as the file can say it.
    fn config(&self, path: &Path) -> Value {
        let mut config: Value = serde_json::from_slice(&std::fs::read(path.join("config.json")).unwrap()).unwrap();
        self.config.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        config
    }

    /// How far the logits of the file are from those of the checkpoint in safetensors.
    fn difference(&self) -> f64 {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/families").join(self.fixture);
        let directory = tempfile::tempdir().unwrap();
        let config = self.config(&path);
        std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
        std::fs::copy(path.join("model.safetensors"), directory.path().join("model.safetensors")).unwrap();
        let file = directory.path().join("model.gguf");
        self.gguf(&path, &config).write(&file);
        let [found, expected] =
            [&file, directory.path()].map(|path| Checkpoint::open(path).unwrap_or_else(|error| panic!("{}: {error}", self.fixture)));
        nmse(&logits(&found), &logits(&expected))
    }

    fn gguf(&self, path: &Path, config: &Value) -> Gguf {
        let (mut file, architecture) = (Gguf::default(), self.architecture);
        file.set("general.architecture", Meta::Text(architecture.into()));
        let size = |name: &str| config[name].as_u64().unwrap() as u32;
        let head_dim = config["head_dim"].as_u64().map_or(size("hidden_size") / size("num_attention_heads"), |width| width as u32);
        let mut set = |key: &str, value: Meta| file.set(&format!("{architecture}.{key}"), value);
        for (key, value) in [
            ("context_length", size("max_position_embeddings")),
            ("embedding_length", size("hidden_size")),
            ("block_count", size("num_hidden_layers")),
            ("feed_forward_length", size("intermediate_size")),
            ("attention.head_count", size("num_attention_heads")),
            ("attention.head_count_kv", size("num_key_value_heads")),
            ("attention.key_length", head_dim),
            ("attention.value_length", head_dim),
            ("rope.dimension_count", head_dim),
        ] {
            set(key, Meta::U32(value));
        }
        let epsilon = ["rms_norm_eps", "layer_norm_eps", "norm_epsilon"].into_iter().find_map(|name| config[name].as_f64()).unwrap();
        let layer_norm = config["rms_norm_eps"].is_null();
        set(if layer_norm { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" }, Meta::F32(epsilon as f32));
        set("rope.freq_base", Meta::F32(config["rope_parameters"]["rope_theta"].as_f64().unwrap_or(1e4) as f32));
        self.metadata.iter().for_each(|(key, value)| set(key, value.clone()));

        let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let numbers: Vec<f32> = tensor.data().chunks_exact(2).map(|half| f16::from_le_bytes(half.try_into().unwrap()).to_f32()).collect();
            self.add(&mut file, &name, tensor.shape(), numbers, head_dim as usize);
        }
        for (name, key) in [("rope_factors_short.weight", "short_factor"), ("rope_factors_long.weight", "long_factor")] {
            if let Some(list) = config["rope_parameters"][key].as_array() {
                let bytes = list.iter().flat_map(|x| (x.as_f64().unwrap() as f32).to_le_bytes()).collect();
                file.tensors.push(Encoded { name: name.into(), dimensions: vec![list.len() as u64], kind: 0, bytes });
            }
        }
        file
    }

    /// A tensor as the converter has it: Gemma's gains whole, and the pairs of the architectures
    /// whose converter is Llama's as neighbours.
    fn add(&self, file: &mut Gguf, name: &str, shape: &[usize], mut numbers: Vec<f32>, head_dim: usize) {
        if self.architecture.starts_with("gemma") && name.ends_with("norm.weight") {
            numbers.iter_mut().for_each(|gain| *gain += 1.0);
        }
        let permuted = ["smollm3", "arcee", "granite"].contains(&self.architecture);
        if permuted && (name.contains("q_proj") || name.contains("k_proj")) {
            numbers = interleave(&numbers, head_dim, numbers.len() / shape[0]);
        }
        let after = ["seed_oss", "olmo2", "exaone4", "gemma2", "gemma3"].contains(&self.architecture);
        let own = if after { name.replace("post_attention_layernorm", "post_attention_norm") } else { name.into() };
        let outside = own.replace("model.embed_tokens", "token_embd").replace("lm_head", "output").replace("model.layers", "blk");
        let translated =
            PARTS.iter().find(|(part, _)| outside.contains(&format!("{part}."))).map_or(outside.clone(), |(from, to)| outside.replace(from, to));
        let matrix = shape.len() > 1;
        let bytes = match matrix {
            true => numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            false => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        let dimensions = shape.iter().rev().map(|n| *n as u64).collect();
        file.tensors.push(Encoded { name: translated, dimensions, kind: matrix as u32, bytes });
    }
}

fn logits(checkpoint: &Checkpoint) -> Vec<f32> {
    let tokens = common::Random(4).tokens(150, checkpoint.config().vocab_size);
    Arc::new(Model::load(checkpoint).unwrap()).sequence(150, RowType::F32).unwrap().forward(&tokens, Logits::All).unwrap()
}

#[test]
fn a_family_in_gguf_is_the_same_model() {
    let found: Vec<_> = cases().iter().map(|case| (case.fixture, case.difference())).collect();
    found.iter().for_each(|(name, error)| println!("{name}: {error:.1e}"));
    let bad: Vec<_> = found.iter().filter(|(_, error)| error.is_nan() || *error > 1e-9).collect();
    assert!(bad.is_empty(), "{bad:?}");
}
