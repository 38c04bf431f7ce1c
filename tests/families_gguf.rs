//! Families in GGUF: the checkpoints of tests/data/families, as llama.cpp's converter would write
//! them, are the same models.

mod common;

use common::gguf::{Encoded, Gguf, Meta, interleave};
use common::nmse;
use half::f16;
use lowkey::checkpoint::Checkpoint;
use lowkey::cpu::{Model, RowType};
use lowkey::sequence::{Logits, Sequence};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// What llama.cpp calls the parts of a layer; of those with two names the family's norms decide.
const PARTS: [(&str, &str); 31] = [
    ("self_attn.sinks", "attn_sinks.weight"),
    ("mlp.router.", "ffn_gate_inp."),
    ("block_sparse_moe.router.layer.", "ffn_gate_inp."),
    ("block_sparse_moe.gate.", "ffn_gate_inp."),
    ("mlp.gate.", "ffn_gate_inp."),
    ("mlp.shared_expert_gate.", "ffn_gate_inp_shexp."),
    ("mlp.shared_expert.gate_proj.", "ffn_gate_shexp."),
    ("mlp.shared_expert.up_proj.", "ffn_up_shexp."),
    ("mlp.shared_expert.down_proj.", "ffn_down_shexp."),
    ("input_layernorm.", "attn_norm."),
    ("post_self_attn_layernorm.", "post_attention_norm."),
    ("post_mlp_layernorm.", "post_ffw_norm."),
    ("pre_feedforward_layernorm.", "ffn_norm."),
    ("post_feedforward_layernorm.", "post_ffw_norm."),
    ("post_attention_layernorm.", "ffn_norm."),
    ("self_attn.q_proj.", "attn_q."),
    ("self_attn.k_proj.", "attn_k."),
    ("self_attn.v_proj.", "attn_v."),
    ("self_attn.qkv_proj.", "attn_qkv."),
    ("self_attn.o_proj.", "attn_output."),
    ("self_attn.q_norm.", "attn_q_norm."),
    ("self_attn.k_norm.", "attn_k_norm."),
    ("self_attn.query_layernorm.", "attn_q_norm."),
    ("self_attn.key_layernorm.", "attn_k_norm."),
    ("mlp.gate_up_proj.", "ffn_up."),
    ("mlp.gate_proj.", "ffn_gate."),
    ("mlp.up_proj.", "ffn_up."),
    ("mlp.down_proj.", "ffn_down."),
    ("mlp.c_fc.", "ffn_up."),
    ("mlp.c_proj.", "ffn_down."),
    ("model.norm.", "output_norm."),
];

/// A fixture as a file of an architecture: what of its `config.json` no metadata can say, and the
/// metadata that the architecture has besides.
struct Case {
    fixture: &'static str,
    architecture: &'static str,
    config: Value,
    metadata: Vec<(&'static str, Meta)>,
    /// Whether every expert has tensors of its own, as in files of 2024.
    apart: bool,
}

fn cases() -> Vec<Case> {
    let case = |fixture, architecture, config, metadata| Case { fixture, architecture, config, metadata, apart: false };
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
    let experts = |count, chosen| vec![("expert_count", Meta::U32(count)), ("expert_used_count", Meta::U32(chosen))];
    let width = |width| vec![("expert_feed_forward_length", Meta::U32(width))];
    let sliding_yarn = [yarn.clone(), vec![("attention.sliding_window", Meta::U32(24))]].concat();
    vec![
        plain("seed_oss", "seed_oss"),
        case("smollm3", "smollm3", json!({ "no_rope_layers": [1, 1, 1, 0], "use_sliding_window": false }), vec![]),
        case("arcee", "arcee", json!({}), yarn.clone()),
        plain("ernie4_5", "ernie4_5"),
        case("granite", "granite", json!({}), multipliers.clone()),
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
        case("mixtral", "llama", json!({}), experts(5, 2)),
        Case { apart: true, ..case("mixtral", "llama", json!({}), experts(5, 2)) },
        case("qwen3_moe", "qwen3moe", json!({}), [experts(9, 4), width(12)].concat()),
        case("qwen2_moe", "qwen2moe", json!({}), [experts(6, 2), width(12), vec![("expert_shared_feed_forward_length", Meta::U32(36))]].concat()),
        case("olmoe", "olmoe", json!({}), experts(6, 3)),
        case("granitemoe", "granitemoe", json!({}), [experts(5, 2), multipliers].concat()),
        case("gpt_oss", "gpt-oss", json!({ "swiglu_limit": 7.0 }), [experts(6, 4), width(32), sliding_yarn.clone()].concat()),
        case("gpt_oss-plain", "gpt-oss", json!({ "swiglu_limit": 7.0, "swiglu_alpha": 1.702 }), [experts(6, 4), sliding_yarn].concat()),
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
        let mut stacks = Stacks::default();
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            if tensor.dtype() == Dtype::U8 {
                stacks.packed(&name, tensor.shape(), tensor.data());
                continue;
            }
            let numbers: Vec<f32> = tensor.data().chunks_exact(2).map(|half| f16::from_le_bytes(half.try_into().unwrap()).to_f32()).collect();
            if !stacks.add(&name, tensor.shape(), &numbers) {
                self.add(&mut file, &name, tensor.shape(), numbers, head_dim as usize);
            }
        }
        stacks.write(&mut file, self.apart);
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
        let permuted = ["smollm3", "arcee", "granite", "llama", "granitemoe"].contains(&self.architecture);
        if permuted && (name.contains("q_proj") || name.contains("k_proj")) {
            numbers = interleave(&numbers, head_dim, numbers.len() / shape[0]);
        }
        let after = ["seed_oss", "olmo2", "exaone4", "gemma2", "gemma3", "gpt-oss"].contains(&self.architecture);
        let own = if after { name.replace("post_attention_layernorm", "post_attention_norm") } else { name.into() };
        let outside = own.replace("model.embed_tokens", "token_embd").replace("lm_head", "output").replace("model.layers", "blk");
        let translated = PARTS.iter().find(|(part, _)| outside.contains(part)).map_or(outside.clone(), |(from, to)| outside.replace(from, to));
        let matrix = shape.len() > 1;
        let bytes = match matrix {
            true => numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            false => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        let dimensions = shape.iter().rev().map(|n| *n as u64).collect();
        file.tensors.push(Encoded { name: translated, dimensions, kind: matrix as u32, bytes });
    }
}

/// A shape and what is in it.
type Shaped<T> = (Vec<usize>, Vec<T>);

/// The matrices of experts, which GGUF has one behind the other in one tensor.
#[derive(Default)]
struct Stacks {
    /// By layer, what the converter calls them, and expert: shape and numbers.
    matrices: BTreeMap<(String, &'static str), BTreeMap<usize, Shaped<f32>>>,
    /// MXFP4's, as ggml has them: scales and codes of gpt-oss' files, until there are both.
    bytes: BTreeMap<(String, String), Shaped<u8>>,
}

impl Stacks {
    /// Takes a tensor, if it is one of experts.
    fn add(&mut self, name: &str, shape: &[usize], numbers: &[f32]) -> bool {
        let Some((layer, part)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else { return false };
        let words: Vec<&str> = part.split('.').skip(1).collect();
        let mut put = |to, expert, shape: Vec<usize>, numbers| {
            self.matrices.entry((layer.into(), to)).or_default().insert(expert, (shape, numbers));
        };
        // Of a tensor by expert, every so manieth of its runs.
        let each = |expert: usize, first: usize, step: usize, run: usize| -> Vec<f32> {
            let of_expert = &numbers[expert * numbers.len() / shape[0]..(expert + 1) * numbers.len() / shape[0]];
            of_expert.chunks_exact(run).skip(first).step_by(step).flatten().copied().collect()
        };
        match words[..] {
            ["experts", expert, matrix, "weight"] => {
                let to = match matrix {
                    "w1" | "gate_proj" => "ffn_gate_exps.weight",
                    "w3" | "up_proj" => "ffn_up_exps.weight",
                    _ => "ffn_down_exps.weight",
                };
                put(to, expert.parse().unwrap(), shape.to_vec(), numbers.to_vec());
            }
            ["input_linear", "weight"] => (0..shape[0]).for_each(|expert| {
                let half = numbers.len() / shape[0] / 2;
                put("ffn_gate_exps.weight", expert, vec![shape[1] / 2, shape[2]], each(expert, 0, 2, half));
                put("ffn_up_exps.weight", expert, vec![shape[1] / 2, shape[2]], each(expert, 1, 2, half));
            }),
            ["output_linear", "weight"] => {
                (0..shape[0]).for_each(|expert| put("ffn_down_exps.weight", expert, shape[1..].to_vec(), each(expert, 0, 1, 1)));
            }
            ["experts", "gate_up_proj_bias"] => (0..shape[0]).for_each(|expert| {
                put("ffn_gate_exps.bias", expert, vec![shape[1] / 2], each(expert, 0, 2, 1));
                put("ffn_up_exps.bias", expert, vec![shape[1] / 2], each(expert, 1, 2, 1));
            }),
            ["experts", "down_proj_bias"] => {
                (0..shape[0]).for_each(|expert| put("ffn_down_exps.bias", expert, vec![shape[1]], each(expert, 0, 1, 1)))
            }
            // By input first: every so manieth number is a row's.
            ["experts", "gate_up_proj"] => (0..shape[0]).for_each(|expert| {
                let rows = |second: usize| (0..shape[2] / 2).flat_map(|row| each(expert, 2 * row + second, shape[2], 1)).collect();
                put("ffn_gate_exps.weight", expert, vec![shape[2] / 2, shape[1]], rows(0));
                put("ffn_up_exps.weight", expert, vec![shape[2] / 2, shape[1]], rows(1));
            }),
            ["experts", "down_proj"] => (0..shape[0]).for_each(|expert| {
                let rows = (0..shape[2]).flat_map(|row| each(expert, row, shape[2], 1)).collect();
                put("ffn_down_exps.weight", expert, vec![shape[2], shape[1]], rows);
            }),
            _ => return false,
        }
        true
    }

    /// Takes scales or codes `[experts][rows][blocks][16]`.
    fn packed(&mut self, name: &str, shape: &[usize], bytes: &[u8]) {
        let (layer, part) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
        self.bytes.insert((layer.into(), part.rsplit_once('.').unwrap().1.into()), (shape.to_vec(), bytes.to_vec()));
    }

    fn write(self, file: &mut Gguf, apart: bool) {
        let mut put = |layer: &str, to: &str, shape: &[usize], kind: u32, bytes: Vec<u8>| {
            let dimensions = shape.iter().rev().map(|n| *n as u64).collect();
            file.tensors.push(Encoded { name: format!("blk.{layer}.{to}"), dimensions, kind, bytes });
        };
        for ((layer, to), experts) in self.matrices.iter().filter(|_| apart) {
            for (expert, (shape, numbers)) in experts {
                let bytes = numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
                put(layer, &to.replace("_exps", &format!(".{expert}")), shape, 1, bytes);
            }
        }
        for ((layer, to), experts) in self.matrices.iter().filter(|_| !apart) {
            let shape = [&[experts.len()], &experts[&0].0[..]].concat();
            let numbers = experts.values().flat_map(|(_, numbers)| numbers.iter());
            match to.ends_with("weight") {
                true => put(layer, to, &shape, 1, numbers.flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect()),
                false => put(layer, to, &shape, 0, numbers.flat_map(|x| x.to_le_bytes()).collect()),
            }
        }
        for ((layer, part), (shape, codes)) in self.bytes.iter().filter(|((_, part), _)| part.ends_with("_blocks")) {
            let (of, blocks) = (part.trim_end_matches("_blocks"), shape[2]);
            let scales = &self.bytes[&(layer.clone(), format!("{of}_scales"))].1;
            let block = |at: usize| {
                let code = |i: usize| codes[16 * at + i / 2] >> (4 * (i % 2)) & 15;
                std::iter::once(scales[at]).chain((0..16).map(move |i| code(i) | code(i + 16) << 4)).collect::<Vec<_>>()
            };
            let every: &[(&str, usize, usize)] =
                if of == "down_proj" { &[("ffn_down_exps", 0, 1)] } else { &[("ffn_gate_exps", 0, 2), ("ffn_up_exps", 1, 2)] };
            for (to, first, step) in every {
                let rows = (*first..shape[0] * shape[1]).step_by(*step);
                let bytes = rows.flat_map(|row| (0..blocks).flat_map(move |i| block(row * blocks + i))).collect();
                put(layer, &format!("{to}.weight"), &[shape[0], shape[1] / step, 32 * blocks], 39, bytes);
            }
        }
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
