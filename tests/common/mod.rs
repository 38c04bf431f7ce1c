//! Small checkpoints with random but structured weights, made from a seed: what the tests run
//! instead of a download.
//!
//! Key and value projections have decaying spectra and heads that share directions, some channels
//! are much larger than the rest, and residual contributions are as large as the embeddings:
//! low-rank methods have something to find, and outputs are neither constant nor uniform. Sizes are
//! odd on purpose.

#![allow(dead_code)] // Each test binary uses its own part.

#[cfg(feature = "cli")]
pub mod cli;
pub mod gguf;
pub mod rows;

use half::{bf16, f16};
use lowkey::checkpoint::{Architecture, Checkpoint};
use lowkey::{calibrate, compress, cpu};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::json;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

/// A small deterministic generator (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 up to, and without, `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f32::consts::TAU * self.uniform()).cos()
    }

    pub fn normals(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| scale * self.normal()).collect()
    }

    /// Token ids for a model of this vocabulary.
    pub fn tokens(&mut self, count: usize, vocab: usize) -> Vec<u32> {
        (0..count).map(|_| self.below(vocab) as u32).collect()
    }
}

/// A tensor in f32: shape and numbers, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub numbers: Vec<f32>,
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// The geometry and seed of a synthetic model.
#[derive(Debug, Clone)]
pub struct SyntheticModel {
    pub architecture: Architecture,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub ffn: usize,
    /// At least 300: the tokenizer has that many entries.
    pub vocab: usize,
    pub tied: bool,
    pub context: usize,
    pub sliding_window: Option<usize>,
    pub rope_scaling: serde_json::Value,
    pub dtype: Dtype,
    pub seed: u64,
}

impl Default for SyntheticModel {
    /// Llama-shaped, 6 query heads on 3, tied.
    fn default() -> Self {
        SyntheticModel {
            architecture: Architecture::Llama,
            hidden: 60,
            layers: 3,
            heads: 6,
            kv_heads: 3,
            head_dim: 12,
            ffn: 172,
            vocab: 515,
            tied: true,
            context: 512,
            sliding_window: None,
            rope_scaling: serde_json::Value::Null,
            dtype: Dtype::F16,
            seed: 1,
        }
    }
}

/// One model of every supported family and shape, with its name.
pub fn families() -> Vec<(&'static str, SyntheticModel)> {
    let base = SyntheticModel::default;
    let llama3 =
        json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64 });
    vec![
        ("llama", base()),
        ("llama3", SyntheticModel { rope_scaling: llama3, heads: 8, kv_heads: 2, head_dim: 10, hidden: 80, tied: false, seed: 2, ..base() }),
        ("multi-head", SyntheticModel { heads: 5, kv_heads: 5, head_dim: 14, hidden: 70, ffn: 190, seed: 3, ..base() }),
        (
            "mistral",
            SyntheticModel {
                architecture: Architecture::Mistral,
                heads: 4,
                kv_heads: 1,
                head_dim: 22,
                hidden: 52,
                tied: false,
                sliding_window: Some(24),
                seed: 4,
                ..base()
            },
        ),
        ("qwen2", SyntheticModel { architecture: Architecture::Qwen2, heads: 4, kv_heads: 2, head_dim: 18, hidden: 72, seed: 5, ..base() }),
        (
            "qwen3",
            SyntheticModel { architecture: Architecture::Qwen3, heads: 6, kv_heads: 2, head_dim: 16, hidden: 54, tied: false, seed: 6, ..base() },
        ),
    ]
}

impl SyntheticModel {
    /// Writes `config.json`, `model.safetensors`, `tokenizer.json` and `tokenizer_config.json` into
    /// a new directory.
    pub fn write(&self, directory: &Path) {
        std::fs::create_dir_all(directory).unwrap();
        std::fs::write(directory.join("config.json"), serde_json::to_string_pretty(&self.config()).unwrap()).unwrap();
        write_tensors(&directory.join("model.safetensors"), &self.tensors(), self.dtype);
        write_tokenizer(directory);
    }

    /// As [`write`](Self::write), into a temporary directory that lives as long as the result.
    pub fn write_temporary(&self) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        self.write(directory.path());
        directory
    }

    /// The value of `config.json`.
    pub fn config(&self) -> serde_json::Value {
        let (model_type, class) = match self.architecture {
            Architecture::Llama => ("llama", "LlamaForCausalLM"),
            Architecture::Mistral => ("mistral", "MistralForCausalLM"),
            Architecture::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            Architecture::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
            other => panic!("{other:?} is among tests/data/families"),
        };
        json!({
            "architectures": [class],
            "model_type": model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": self.rope_scaling,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "sliding_window": self.sliding_window,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        })
    }

    /// All tensors, by their Hugging Face names.
    pub fn tensors(&self) -> Tensors {
        let mut random = Random(self.seed);
        let (hidden, ffn, head) = (self.hidden, self.ffn, self.head_dim);
        let (q_width, kv_width) = (self.heads * head, self.kv_heads * head);
        let mut all = Tensors::new();
        let mut add = |name: String, shape: &[usize], numbers: Vec<f32>| {
            assert_eq!(shape.iter().product::<usize>(), numbers.len(), "{name}");
            all.insert(name, Tensor { shape: shape.to_vec(), numbers });
        };
        let unit = |width: usize| 1.0 / (width as f32).sqrt();

        // The scale of rows makes logits spread by about 2.5.
        add("model.embed_tokens.weight".into(), &[self.vocab, hidden], random.normals(self.vocab * hidden, 2.5 * unit(hidden)));
        if !self.tied {
            add("lm_head.weight".into(), &[self.vocab, hidden], random.normals(self.vocab * hidden, 2.5 * unit(hidden)));
        }
        add("model.norm.weight".into(), &[hidden], norm_weights(&mut random, hidden, 0));
        for layer in 0..self.layers {
            let mut add = |name: &str, shape: &[usize], numbers: Vec<f32>| add(format!("model.layers.{layer}.{name}"), shape, numbers);
            add("input_layernorm.weight", &[hidden], norm_weights(&mut random, hidden, 3));
            add("post_attention_layernorm.weight", &[hidden], norm_weights(&mut random, hidden, 2));

            add("self_attn.q_proj.weight", &[q_width, hidden], random.normals(q_width * hidden, 1.2 * unit(hidden)));
            let mut keys = shared_directions(&mut random, self.kv_heads, head, hidden, 1.1);
            for _ in 0..2 {
                // A key channel that is large for every token.
                let row = random.below(kv_width);
                keys[row * hidden..][..hidden].iter_mut().for_each(|x| *x *= 3.0);
            }
            add("self_attn.k_proj.weight", &[kv_width, hidden], keys);
            add("self_attn.v_proj.weight", &[kv_width, hidden], shared_directions(&mut random, self.kv_heads, head, hidden, 0.7));
            add("self_attn.o_proj.weight", &[hidden, q_width], random.normals(hidden * q_width, 0.9 * unit(q_width)));
            if self.architecture == Architecture::Qwen2 {
                add("self_attn.q_proj.bias", &[q_width], random.normals(q_width, 0.3));
                let mut bias = random.normals(kv_width, 0.3);
                bias[random.below(kv_width)] = 4.0;
                add("self_attn.k_proj.bias", &[kv_width], bias);
                add("self_attn.v_proj.bias", &[kv_width], random.normals(kv_width, 0.2));
            }
            if self.architecture == Architecture::Qwen3 {
                add("self_attn.q_norm.weight", &[head], norm_weights(&mut random, head, 1));
                add("self_attn.k_norm.weight", &[head], norm_weights(&mut random, head, 1));
            }

            add("mlp.gate_proj.weight", &[ffn, hidden], random.normals(ffn * hidden, unit(hidden)));
            add("mlp.up_proj.weight", &[ffn, hidden], random.normals(ffn * hidden, unit(hidden)));
            add("mlp.down_proj.weight", &[hidden, ffn], random.normals(hidden * ffn, 1.2 * unit(ffn)));
        }
        all
    }
}

/// Around one, with a few channels that are four times as large.
fn norm_weights(random: &mut Random, width: usize, outliers: usize) -> Vec<f32> {
    let mut weights: Vec<f32> = (0..width).map(|_| 1.0 + 0.1 * random.normal()).collect();
    for _ in 0..outliers {
        weights[random.below(width)] *= 4.0;
    }
    weights
}

/// A projection `[heads · head_dim, hidden]` whose heads mix the same directions of the residual
/// stream, of strength `(1 + i)^-decay`, with a little noise of their own.
fn shared_directions(random: &mut Random, heads: usize, head_dim: usize, hidden: usize, decay: f32) -> Vec<f32> {
    let rows = heads * head_dim;
    let rank = rows.min(hidden);
    let strengths: Vec<f32> = (0..rank).map(|i| (1.0 + i as f32).powf(-decay)).collect();
    let total: f32 = strengths.iter().map(|s| s * s).sum();
    let directions = random.normals(rank * hidden, 1.0 / (hidden as f32).sqrt());
    let common = random.normals(head_dim * rank, 1.0);
    let mut weights = random.normals(rows * hidden, 0.1 / (hidden as f32).sqrt());
    for (row, out) in weights.chunks_exact_mut(hidden).enumerate() {
        for (i, direction) in directions.chunks_exact(hidden).enumerate() {
            let mix = 0.7 * common[row % head_dim * rank + i] + 0.7 * random.normal();
            let gain = mix * strengths[i] / total.sqrt();
            out.iter_mut().zip(direction).for_each(|(x, d)| *x += gain * d);
        }
    }
    weights
}

/// Writes a safetensors file with all numbers in `dtype` (F32, F16 or BF16).
pub fn write_tensors(path: &Path, tensors: &Tensors, dtype: Dtype) {
    let encoded: Vec<(&String, &Vec<usize>, Vec<u8>)> =
        tensors.iter().map(|(name, tensor)| (name, &tensor.shape, encode(&tensor.numbers, dtype))).collect();
    let views = encoded.iter().map(|(name, shape, bytes)| (name.as_str(), TensorView::new(dtype, shape.to_vec(), bytes).unwrap()));
    serialize_to_file(views, None, path).unwrap();
}

fn encode(numbers: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::F16 => numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::BF16 => numbers.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        other => panic!("synthetic checkpoints are not written in {other:?}"),
    }
}

/// The token that starts a text.
pub const BOS: u32 = 0;
/// The token that ends an answer.
pub const EOS: u32 = 2;

/// ChatML.
pub const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
     {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// The tokens of a byte-level BPE tokenizer, and its merges: three special tokens, the 256 bytes, a
/// few words.
pub fn vocabulary() -> (Vec<String>, Vec<String>) {
    let merges = ["t h", "th e", "i n", "e r", "a n", "an d", "o n", "Ġ a", "Ġ the", "Ġ and", "in g", "o r", "r e", "Ġ i"];
    let bytes = (0..=255u8).map(|byte| byte_level(byte).to_string());
    let merged = merges.iter().map(|merge| merge.replace(' ', ""));
    let tokens = SPECIAL.iter().map(|token| token.to_string()).chain(bytes).chain(merged).collect();
    (tokens, merges.iter().map(|merge| merge.to_string()).collect())
}

/// Writes that tokenizer, with [`TEMPLATE`].
pub fn write_tokenizer(directory: &Path) {
    let (vocabulary, merges) = vocabulary();
    let ids: serde_json::Map<_, _> = vocabulary.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let added = SPECIAL.iter().enumerate().map(|(id, token)| {
        json!({ "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true })
    });
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "vocab": ids, "merges": merges,
        },
    });
    let config = json!({ "bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "add_bos_token": false, "chat_template": TEMPLATE });
    std::fs::write(directory.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(directory.join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// GPT-2's printable character for a byte.
fn byte_level(byte: u8) -> char {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match printable(&byte) {
        true => byte as char,
        false => char::from_u32(256 + (0..byte).filter(|b| !printable(b)).count() as u32).unwrap(),
    }
}

/// `Σ(a−b)² / Σb²`.
pub fn nmse(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    a.iter().zip(b).map(|(a, b)| square(a - b)).sum::<f64>() / b.iter().map(|&b| square(b)).sum::<f64>()
}

/// The device of a test. There is no skipping: `make test` installs a driver where there is none.
pub fn device(options: lowkey::gpu::Options) -> std::sync::Arc<lowkey::gpu::Device> {
    lowkey::gpu::Device::open(&options).unwrap()
}

/// `checkpoint` compressed with ReCalKV in groups of `heads`, calibrated on a few hundred random
/// tokens, by an adapter file at `output`.
pub fn compressed(checkpoint: &Checkpoint, keep: f64, heads: usize, output: &Path) -> Checkpoint {
    compressed_as(checkpoint, keep, heads, &compress::Output::adapter(output));
    Checkpoint::open_with(checkpoint.path(), output).unwrap()
}

/// The same, in either form.
pub fn compressed_as(checkpoint: &Checkpoint, keep: f64, heads: usize, output: &compress::Output) {
    let model = Arc::new(cpu::Model::load(checkpoint).unwrap());
    let tokens = Random(7).tokens(320, model.config().vocab_size);
    let (source, text) = (calibrate::source_digest(checkpoint).unwrap(), calibrate::text_digest(&["random"]));
    let options = calibrate::Options { window: 160, sensitivity: calibrate::SensitivityKind::None, ..Default::default() };
    let (statistics, _) = calibrate::gather(&model, &[tokens], source, text, &options, &mut |_| ControlFlow::Continue(())).unwrap();
    let low_rank = compress::LowRank { budget: compress::Budget::Keep(keep), ranks: Some(compress::Ranks::Uniform), bits: 16 };
    let recalkv = compress::ReCalKv { low_rank, group_heads: heads, ..Default::default() };
    let plan = compress::Plan::new(compress::Method::ReCalKv(recalkv));
    compress::run(checkpoint, &plan, Some(&statistics), output, &mut |_| ControlFlow::Continue(())).unwrap();
}
