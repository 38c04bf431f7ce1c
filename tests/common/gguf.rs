//! Writes small GGUF files, version 3: the synthetic models as llama.cpp's converter would write
//! them.

use super::{BOS, EOS, SyntheticModel, vocabulary};
use half::f16;
use lowkey::checkpoint::Architecture;
use std::path::Path;

/// A metadata value.
#[derive(Debug, Clone)]
pub enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Integers(Vec<i32>),
    Floats(Vec<f32>),
}

/// A tensor as it stands in the file: dimensions innermost first, ggml's type number, encoded
/// numbers.
#[derive(Debug, Clone)]
pub struct Encoded {
    pub name: String,
    pub dimensions: Vec<u64>,
    pub kind: u32,
    pub bytes: Vec<u8>,
}

/// What a file consists of.
#[derive(Debug, Clone, Default)]
pub struct Gguf {
    pub metadata: Vec<(String, Meta)>,
    pub tensors: Vec<Encoded>,
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn value(out: &mut Vec<u8>, value: &Meta) {
    let list = |out: &mut Vec<u8>, kind: u32, count: usize| {
        out.extend(9u32.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((count as u64).to_le_bytes());
    };
    match value {
        Meta::U32(n) => out.extend([4u32.to_le_bytes(), n.to_le_bytes()].concat()),
        Meta::F32(x) => out.extend([6u32.to_le_bytes(), x.to_le_bytes()].concat()),
        Meta::Bool(flag) => {
            out.extend(7u32.to_le_bytes());
            out.push(*flag as u8);
        }
        Meta::Text(content) => {
            out.extend(8u32.to_le_bytes());
            text(out, content);
        }
        Meta::Texts(texts) => {
            list(out, 8, texts.len());
            texts.iter().for_each(|content| text(out, content));
        }
        Meta::Integers(integers) => {
            list(out, 5, integers.len());
            integers.iter().for_each(|n| out.extend(n.to_le_bytes()));
        }
        Meta::Floats(floats) => {
            list(out, 6, floats.len());
            floats.iter().for_each(|x| out.extend(x.to_le_bytes()));
        }
    }
}

impl Gguf {
    /// Sets a metadata value.
    pub fn set(&mut self, key: &str, value: Meta) {
        self.metadata.retain(|(name, _)| name != key);
        self.metadata.push((key.into(), value));
    }

    /// The file's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, meta) in &self.metadata {
            text(&mut out, key);
            value(&mut out, meta);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            out.extend((tensor.dimensions.len() as u32).to_le_bytes());
            tensor.dimensions.iter().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (tensor.bytes.len() as u64).next_multiple_of(32);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&tensor.bytes);
        }
        out
    }

    pub fn write(&self, path: &Path) {
        std::fs::write(path, self.bytes()).unwrap();
    }
}

impl SyntheticModel {
    /// The model as a GGUF file: matrices in f16, norms and biases in f32, queries and keys in the
    /// layout that the architecture has there.
    pub fn gguf(&self) -> Gguf {
        let mut file = Gguf::default();
        let architecture = match self.architecture {
            Architecture::Llama | Architecture::Mistral => "llama",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            other => panic!("{other:?} is among tests/data/families"),
        };
        file.set("general.architecture", Meta::Text(architecture.into()));
        for (key, value) in [
            ("context_length", self.context),
            ("embedding_length", self.hidden),
            ("block_count", self.layers),
            ("feed_forward_length", self.ffn),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", self.head_dim),
            ("attention.value_length", self.head_dim),
        ] {
            file.set(&format!("{architecture}.{key}"), Meta::U32(value as u32));
        }
        if let Some(window) = self.sliding_window {
            file.set(&format!("{architecture}.attention.sliding_window"), Meta::U32(window as u32));
        }
        file.set(&format!("{architecture}.attention.layer_norm_rms_epsilon"), Meta::F32(1e-5));
        file.set(&format!("{architecture}.rope.freq_base"), Meta::F32(10000.0));
        let (tokens, merges) = vocabulary();
        let kinds = (0..tokens.len()).map(|id| if id < 3 { 3 } else { 1 }).collect();
        file.set("tokenizer.ggml.model", Meta::Text("gpt2".into()));
        file.set("tokenizer.ggml.pre", Meta::Text("gpt-2".into()));
        file.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
        file.set("tokenizer.ggml.token_type", Meta::Integers(kinds));
        file.set("tokenizer.ggml.merges", Meta::Texts(merges));
        file.set("tokenizer.ggml.bos_token_id", Meta::U32(BOS));
        file.set("tokenizer.ggml.eos_token_id", Meta::U32(EOS));
        file.set("tokenizer.chat_template", Meta::Text(super::TEMPLATE.into()));

        for (name, tensor) in self.tensors() {
            let mut numbers = tensor.numbers;
            if architecture == "llama" && (name.contains("q_proj") || name.contains("k_proj")) {
                numbers = interleave(&numbers, self.head_dim, numbers.len() / tensor.shape[0]);
            }
            let matrix = tensor.shape.len() > 1;
            let bytes = match matrix {
                true => numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
                false => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
            };
            let dimensions = tensor.shape.iter().rev().map(|n| *n as u64).collect();
            file.tensors.push(Encoded { name: ggml_name(&name), dimensions, kind: matrix as u32, bytes });
        }
        file
    }
}

/// Within each head, row `i` of the first half goes to `2i`, row `i` of the second to `2i + 1`.
pub fn interleave(numbers: &[f32], head_dim: usize, width: usize) -> Vec<f32> {
    let mut out = vec![0.0; numbers.len()];
    for (index, row) in numbers.chunks_exact(width).enumerate() {
        let (head, i) = (index / head_dim, index % head_dim);
        let to = head * head_dim + if i < head_dim / 2 { 2 * i } else { 2 * (i - head_dim / 2) + 1 };
        out[to * width..][..width].copy_from_slice(row);
    }
    out
}

fn ggml_name(name: &str) -> String {
    let pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    pairs.iter().fold(name.to_string(), |name, (from, to)| name.replace(from, to))
}
