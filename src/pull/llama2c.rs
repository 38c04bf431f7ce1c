//! llama2.c's `model.bin` and `tokenizer.bin`, one after the other in a file, into a checkpoint
//! directory with the Hugging Face names and conventions.
//!
//! `model.bin` is seven little-endian `i32` (width, MLP width, layers, heads, key/value heads,
//! vocabulary, context) and then f32 tensors, each for all layers at once: embedding, attention
//! norm, W_Q, W_K, W_V, W_O, MLP norm, W1 (gate), W2 (down), W3 (up), last norm, and two tables of
//! RoPE factors that nobody needs. The output head is the embedding where the vocabulary's sign is
//! positive. Its RoPE turns neighbouring dimensions, `(2i, 2i+1)`; here it is `(i, i + d/2)`, so
//! the rows of W_Q and W_K are reordered within every head: row `2i + j` goes to row `j·d/2 + i`.
//!
//! `tokenizer.bin` is an `i32` (longest token) and for every token its score (f32), length (`i32`)
//! and bytes: SentencePiece BPE, with spaces for `▁`. Tokens 0 to 2 are unknown, start and end, 3
//! to 258 the bytes.

use crate::{Error, Result};
use half::f16;
use safetensors::{Dtype, View};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// Reads the file `data` and writes `config.json`, `model.safetensors` (f16), `tokenizer.json` and
/// `tokenizer_config.json` into the directory `into`.
pub(super) fn convert(data: &Path, into: &Path) -> Result<()> {
    let bytes = fs::read(data).map_err(Error::io("read", data))?;
    let (config, tensors, tokenizer) =
        read(&bytes).ok_or_else(|| Error::Checkpoint { path: data.into(), message: "is no llama2.c model followed by its tokenizer".into() })?;
    let write = |name: &str, json: &Value| {
        let path = into.join(name);
        fs::write(&path, json.to_string()).map_err(Error::io("write", &path))
    };
    write("config.json", &config)?;
    write("tokenizer.json", &tokenizer)?;
    write("tokenizer_config.json", &tokenizer_config(&config))?;
    let path = into.join("model.safetensors");
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(tensors, Some(metadata), &path)
        .map_err(|error| Error::Checkpoint { path, message: format!("cannot be written: {error}") })
}

/// What is left to be read. Everything is `None` past the end.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn bytes(&mut self, n: usize) -> Option<&[u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }

    fn i32(&mut self) -> Option<i32> {
        Some(i32::from_le_bytes(self.bytes(4)?.try_into().ok()?))
    }

    fn size(&mut self) -> Option<usize> {
        usize::try_from(self.i32()?).ok()
    }

    fn f16s(&mut self, n: usize) -> Option<Vec<f16>> {
        let words = self.bytes(n.checked_mul(4)?)?.as_chunks().0;
        Some(words.iter().map(|&word| f16::from_f32(f32::from_le_bytes(word))).collect())
    }
}

/// An f16 tensor on its way into a file.
struct Tensor {
    shape: Vec<usize>,
    values: Vec<f16>,
}

impl View for Tensor {
    fn dtype(&self) -> Dtype {
        Dtype::F16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    fn data_len(&self) -> usize {
        2 * self.values.len()
    }
}

/// `config.json`, the weights by name, and `tokenizer.json`.
type Converted = (Value, Vec<(String, Tensor)>, Value);

fn read(bytes: &[u8]) -> Option<Converted> {
    let mut reader = Reader(bytes);
    let [width, mlp, layers, heads, kv_heads] = [(); 5].map(|()| reader.size());
    let (width, mlp, layers, heads, kv_heads) = (width?, mlp?, layers?, heads?, kv_heads?);
    let vocabulary = reader.i32()?;
    let (tied, vocabulary) = (vocabulary > 0, usize::try_from(vocabulary.unsigned_abs()).ok()?);
    let context = reader.size()?;
    let head = width.checked_div(heads)?;
    if head * heads != width || head % 2 != 0 || kv_heads == 0 || heads % kv_heads != 0 {
        return None;
    }
    let kv = head * kv_heads;

    let mut tensors = Vec::new();
    let mut all = |reader: &mut Reader, name: &str, count: Option<usize>, shape: &[usize]| -> Option<()> {
        let size = shape.iter().try_fold(1_usize, |size, &n| size.checked_mul(n))?;
        for layer in 0..count.unwrap_or(1) {
            let name = if count.is_some() { format!("model.layers.{layer}.{name}.weight") } else { format!("{name}.weight") };
            tensors.push((name, Tensor { shape: shape.to_vec(), values: reader.f16s(size)? }));
        }
        Some(())
    };
    let each = Some(layers);
    all(&mut reader, "model.embed_tokens", None, &[vocabulary, width])?;
    all(&mut reader, "input_layernorm", each, &[width])?;
    all(&mut reader, "self_attn.q_proj", each, &[width, width])?;
    all(&mut reader, "self_attn.k_proj", each, &[kv, width])?;
    all(&mut reader, "self_attn.v_proj", each, &[kv, width])?;
    all(&mut reader, "self_attn.o_proj", each, &[width, width])?;
    all(&mut reader, "post_attention_layernorm", each, &[width])?;
    all(&mut reader, "mlp.gate_proj", each, &[mlp, width])?;
    all(&mut reader, "mlp.down_proj", each, &[width, mlp])?;
    all(&mut reader, "mlp.up_proj", each, &[mlp, width])?;
    all(&mut reader, "model.norm", None, &[width])?;
    reader.bytes(context.checked_mul(head)?.checked_mul(4)?)?; // RoPE's cosines and sines
    if !tied {
        all(&mut reader, "lm_head", None, &[vocabulary, width])?;
    }
    for (_, tensor) in tensors.iter_mut().filter(|(name, _)| name.ends_with("q_proj.weight") || name.ends_with("k_proj.weight")) {
        tensor.values = half_split(&tensor.values, head, width);
    }

    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": null,
        "hidden_act": "silu",
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    });
    Some((config, tensors, read_tokenizer(&mut reader, vocabulary)?))
}

/// A projection `[heads · head][width]` whose heads' rows go from interleaved to half-split order.
fn half_split(rows: &[f16], head: usize, width: usize) -> Vec<f16> {
    let row = |row: usize| {
        let (first, within) = (row / head * head, row % head);
        let from = first + 2 * (within % (head / 2)) + within / (head / 2);
        &rows[from * width..(from + 1) * width]
    };
    (0..rows.len() / width).flat_map(row).copied().collect()
}

/// The vocabulary with its scores, as a `tokenizer.json` of the BPE kind: what merges first is what
/// has the higher score.
fn read_tokenizer(reader: &mut Reader, vocabulary: usize) -> Option<Value> {
    reader.i32()?; // the longest token's length
    let mut pieces = Vec::new();
    for id in 0..vocabulary {
        let score = f32::from_bits(reader.i32()? as u32);
        let length = reader.size()?;
        let bytes = reader.bytes(length)?;
        let piece = match id {
            0 => "<unk>".to_string(),
            1 => "<s>".to_string(),
            2 => "</s>".to_string(),
            3..=258 => format!("<0x{:02X}>", id - 3), // bytes, in the file as characters of their own
            _ => std::str::from_utf8(bytes).ok()?.replace(' ', "▁"),
        };
        pieces.push((piece, score));
    }

    let ids: HashMap<&str, usize> = pieces.iter().enumerate().map(|(id, (piece, _))| (piece.as_str(), id)).collect();
    let mut merges = Vec::new();
    for (piece, score) in &pieces {
        let splits = piece.char_indices().skip(1).map(|(at, _)| piece.split_at(at));
        let mut pairs: Vec<_> = splits.filter_map(|(left, right)| Some((*ids.get(left)?, *ids.get(right)?))).collect();
        pairs.sort_unstable();
        merges.extend(pairs.into_iter().map(|pair| (*score, pair)));
    }
    merges.sort_by(|(a, _), (b, _)| b.total_cmp(a)); // stable: equal scores stay in the vocabulary's order
    let merges: Vec<_> = merges.iter().map(|(_, (left, right))| format!("{} {}", pieces[*left].0, pieces[*right].0)).collect();

    let special = |id: usize, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let start = |sequence: u8| json!({"SpecialToken": {"id": "<s>", "type_id": sequence}});
    let text = |name: &str, sequence: u8| json!({"Sequence": {"id": name, "type_id": sequence}});
    Some(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start(0), text("A", 0)],
            "pair": [start(0), text("A", 0), start(1), text("B", 1)],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": "<unk>",
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": pieces.iter().enumerate().map(|(id, (piece, _))| (piece.clone(), json!(id))).collect::<Map<_, _>>(),
            "merges": merges,
        },
    }))
}

fn tokenizer_config(config: &Value) -> Value {
    json!({
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": true,
        "add_eos_token": false,
        "clean_up_tokenization_spaces": false,
        "model_max_length": config["max_position_embeddings"],
    })
}
