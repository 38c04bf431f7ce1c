//! What a GGUF file says, in Hugging Face's words: the config in its metadata, the names of its
//! tensors, and the layout of its query and key rows.
//!
//! Files of the `llama` architecture (which includes Mistral) hold queries and keys in RoPE's
//! interleaved layout; their rows are brought into half-split order as they are read. Qwen's are
//! half-split already.

use super::gguf::{Header, Metadata, Value};
use super::weights::Stored;
use super::{Architecture, Config, RopeScaling};
use crate::{Error, Result};
use std::path::Path;

/// Llama 3's stretched frequencies, which GGUF holds as one divisor per frequency.
const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// Metadata under the architecture's prefix that changes what a layer computes, with the values
/// that change nothing.
const MATHEMATICS: [(&str, f64); 11] = [
    ("expert_count", 0.0),
    ("expert_used_count", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.scale", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("embedding_scale", 1.0),
    ("residual_scale", 1.0),
    ("rope.scaling.attn_factor", 1.0),
];

/// The model's geometry; `bytes` is the whole file.
pub(super) fn config(path: &Path, header: &Header, bytes: &[u8]) -> Result<Config> {
    let fields = Fields { path, metadata: &header.metadata };
    let unsupported = |message: String| Error::Unsupported { path: path.into(), message };
    let name = fields.string("general.architecture")?;
    let mut architecture = Architecture::from_model_type(name)
        .ok_or_else(|| unsupported(format!("the architecture {name} is not supported (supported in GGUF: llama, mistral, qwen2, qwen3)")))?;
    if fields.integer("split.count")?.is_some_and(|count| count > 1) {
        return Err(unsupported("is one part of a split GGUF; merge the parts first (llama-gguf-split --merge)".into()));
    }
    let key = |suffix: &str| format!("{name}.{suffix}");
    for (suffix, neutral) in MATHEMATICS {
        if let Some(value) = fields.number(&key(suffix))?
            && value != neutral
        {
            return Err(unsupported(format!("metadata {} = {value} is not supported", key(suffix))));
        }
    }

    let has = |tensor: &str| header.tensors.iter().any(|(name, _)| name == tensor);
    let num_attention_heads = fields.size(&key("attention.head_count"))?;
    let hidden_size = fields.size(&key("embedding_length"))?;
    let head_dim = match fields.integer(&key("attention.key_length"))? {
        Some(_) => fields.size(&key("attention.key_length"))?,
        None if num_attention_heads == 0 || !hidden_size.is_multiple_of(num_attention_heads) => {
            let message = format!("metadata {}: {hidden_size} cannot be divided among {num_attention_heads} heads", key("embedding_length"));
            return Err(Error::Checkpoint { path: path.into(), message });
        }
        None => hidden_size / num_attention_heads,
    };
    for suffix in ["attention.value_length", "rope.dimension_count"] {
        if let Some(other) = fields.integer(&key(suffix))?
            && other != head_dim as i64
        {
            return Err(unsupported(format!("metadata {} = {other} differs from the head's width {head_dim}", key(suffix))));
        }
    }
    let max_position_embeddings = fields.size(&key("context_length"))?;
    let sliding_window = match fields.integer(&key("attention.sliding_window"))? {
        Some(window) if window > 0 && window < max_position_embeddings as i64 => Some(window as usize),
        _ => None,
    };
    match (architecture, sliding_window) {
        // The converters call Mistral a llama; only its window tells.
        (Architecture::Llama, Some(_)) => architecture = Architecture::Mistral,
        (Architecture::Qwen2 | Architecture::Qwen3, Some(window)) => {
            return Err(unsupported(format!("metadata {} = {window} is not supported", key("attention.sliding_window"))));
        }
        _ => {}
    }
    let embeddings = "token_embd.weight";
    let vocab_size = match header.tensors.iter().find(|(name, _)| name == embeddings) {
        Some((_, stored)) => stored.shape.first().copied().unwrap_or(0),
        None => return Err(Error::Tensor { path: path.into(), name: embeddings.into(), message: "missing".into() }),
    };
    let mut config = Config {
        architecture,
        hidden_size,
        intermediate_size: fields.size(&key("feed_forward_length"))?,
        num_hidden_layers: fields.size(&key("block_count"))?,
        num_attention_heads,
        num_key_value_heads: match fields.integer(&key("attention.head_count_kv"))? {
            Some(_) => fields.size(&key("attention.head_count_kv"))?,
            None => num_attention_heads,
        },
        head_dim,
        vocab_size,
        max_position_embeddings,
        rms_norm_eps: fields
            .number(&key("attention.layer_norm_rms_epsilon"))?
            .ok_or_else(|| fields.error(&key("attention.layer_norm_rms_epsilon"), "is missing"))? as f32,
        rope_theta: fields.number(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: !has("output.weight"),
        attention_bias: architecture == Architecture::Qwen2 || has("blk.0.attn_q.bias"),
        qk_norm: architecture == Architecture::Qwen3,
        sliding_window,
        bos_token_id: fields.token("tokenizer.ggml.bos_token_id")?,
        eos_token_ids: Vec::new(),
    };
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        if let Some(id) = fields.token(key)?
            && !config.eos_token_ids.contains(&id)
        {
            config.eos_token_ids.push(id);
        }
    }
    config.rope_scaling = linear_scaling(&fields, name)?;
    config.validate(path)?;
    if let Some((_, stored)) = header.tensors.iter().find(|(name, _)| name == ROPE_DIVISORS) {
        config.rope_scaling = divisors_scaling(path, &fields, name, &config, stored, bytes)?;
    }
    Ok(config)
}

fn linear_scaling(fields: &Fields, architecture: &str) -> Result<RopeScaling> {
    let kind = format!("{architecture}.rope.scaling.type");
    let factor = match fields.number(&format!("{architecture}.rope.scaling.factor"))? {
        Some(factor) => Some(factor),
        // The key before scaling had types.
        None => fields.number(&format!("{architecture}.rope.scale_linear"))?,
    };
    match (fields.metadata.get(&kind), factor) {
        (None, Some(factor)) if factor != 1.0 => Ok(RopeScaling::Linear { factor }),
        (None, _) => Ok(RopeScaling::None),
        (Some(Value::String(kind)), _) if kind == "none" => Ok(RopeScaling::None),
        (Some(Value::String(kind)), Some(factor)) if kind == "linear" => Ok(RopeScaling::Linear { factor }),
        (Some(Value::String(kind)), None) if kind == "linear" => Err(fields.error(&format!("{architecture}.rope.scaling.factor"), "is missing")),
        (Some(other), _) => {
            let message = format!("metadata {kind} = {other} is not supported (supported: none, linear, and Llama 3's {ROPE_DIVISORS})");
            Err(Error::Unsupported { path: fields.path.into(), message })
        }
    }
}

/// GGUF stores the divisors that Llama 3's rule yields, not its parameters. All published models
/// have `low_freq_factor` 1 and `high_freq_factor` 4 (only their quotient and the original context
/// matter), and the largest divisor is the factor; what these give is compared with what is stored.
fn divisors_scaling(path: &Path, fields: &Fields, architecture: &str, config: &Config, stored: &Stored, bytes: &[u8]) -> Result<RopeScaling> {
    let error = |message: String| Error::Tensor { path: path.into(), name: ROPE_DIVISORS.into(), message };
    let (Some(encoding), [count]) = (stored.encoding.filter(|e| !e.is_quantised()), &stored.shape[..]) else {
        return Err(error("is not one list of floats".into()));
    };
    if *count != config.head_dim / 2 {
        return Err(error(format!("has {count} divisors for {} frequencies", config.head_dim / 2)));
    }
    let mut divisors = vec![0f32; *count];
    encoding.decode(&bytes[stored.range.clone()], &mut divisors);
    if divisors.iter().all(|divisor| *divisor == 1.0) {
        return Ok(config.rope_scaling);
    }
    if config.rope_scaling != RopeScaling::None {
        return Err(error("divides frequencies that metadata scales already".into()));
    }
    let factor = divisors.iter().copied().fold(0f32, f32::max) as f64;
    let original = fields.number(&format!("{architecture}.rope.scaling.original_context_length"))?.unwrap_or(8192.0);
    let scaling = RopeScaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings: original };
    let scaled = Config { rope_scaling: scaling, ..config.clone() };
    let plain = Config { rope_scaling: RopeScaling::None, ..config.clone() }.rope_frequencies();
    let fits = plain
        .iter()
        .zip(scaled.rope_frequencies())
        .zip(&divisors)
        .all(|((plain, scaled), divisor)| (plain / scaled / *divisor as f64 - 1.0).abs() < 1e-3);
    match fits && scaled.validate(path).is_ok() {
        true => Ok(scaling),
        false => Err(error("holds divisors that Llama 3's rule does not give; other scalings are not supported".into())),
    }
}

/// The tensors under their Hugging Face names.
pub(super) fn tensors(path: &Path, tensors: Vec<(String, Stored)>, config: &Config) -> Result<Vec<(String, Stored)>> {
    let interleaved = matches!(config.architecture, Architecture::Llama | Architecture::Mistral);
    tensors
        .into_iter()
        .filter(|(name, _)| name != ROPE_DIVISORS)
        .map(|(name, mut stored)| {
            let Some(hugging_face) = translate(&name) else {
                let message = "is no part of a supported architecture".into();
                return Err(Error::Tensor { path: path.into(), name, message });
            };
            if interleaved && (hugging_face.contains(".q_proj.") || hugging_face.contains(".k_proj.")) {
                stored.interleaved_head = Some(config.head_dim);
            }
            Ok((hugging_face, stored))
        })
        .collect()
}

fn translate(name: &str) -> Option<String> {
    let outside = match name {
        "token_embd.weight" => "model.embed_tokens.weight",
        "output_norm.weight" => "model.norm.weight",
        "output.weight" => "lm_head.weight",
        _ => "",
    };
    if !outside.is_empty() {
        return Some(outside.into());
    }
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let (part, kind) = part.rsplit_once('.')?;
    let part = match part {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    matches!(kind, "weight" | "bias").then(|| format!("model.layers.{layer}.{part}.{kind}"))
}

/// Metadata read with errors that name the key.
pub(super) struct Fields<'a> {
    pub path: &'a Path,
    pub metadata: &'a Metadata,
}

impl<'a> Fields<'a> {
    pub fn error(&self, key: &str, message: &str) -> Error {
        Error::Checkpoint { path: self.path.into(), message: format!("metadata {key} {message}") }
    }

    pub fn integer(&self, key: &str) -> Result<Option<i64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Integer(n)) => Ok(Some(*n)),
            Some(_) => Err(self.error(key, "is not one whole number")),
        }
    }

    fn size(&self, key: &str) -> Result<usize> {
        let n = self.integer(key)?.ok_or_else(|| self.error(key, "is missing"))?;
        usize::try_from(n).map_err(|_| self.error(key, "is negative"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Integer(n)) => Ok(Some(*n as f64)),
            Some(Value::Float(x)) => Ok(Some(*x)),
            Some(_) => Err(self.error(key, "is not a number")),
        }
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.error(key, "is not true or false")),
        }
    }

    pub fn string(&self, key: &str) -> Result<&'a str> {
        match self.metadata.get(key) {
            None => Err(self.error(key, "is missing")),
            Some(Value::String(text)) => Ok(text),
            Some(_) => Err(self.error(key, "is not a text")),
        }
    }

    pub fn array(&self, key: &str) -> Result<&'a [Value]> {
        match self.metadata.get(key) {
            None => Err(self.error(key, "is missing")),
            Some(Value::Array(values)) => Ok(values),
            Some(_) => Err(self.error(key, "is not a list")),
        }
    }

    /// A token id. The largest value of its type and negative ones mean "none".
    pub fn token(&self, key: &str) -> Result<Option<u32>> {
        match self.integer(key)? {
            None => Ok(None),
            Some(id) if id < 0 || id == u32::MAX as i64 => Ok(None),
            Some(id) => u32::try_from(id).map(Some).map_err(|_| self.error(key, "is no token id")),
        }
    }
}
