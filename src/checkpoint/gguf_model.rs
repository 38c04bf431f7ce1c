//! What a GGUF file says, in Hugging Face's words: the config in its metadata, the names of its
//! tensors, and the layout of its query and key rows.
//!
//! What architectures do differently here is [`super::dialect`]'s. Many hold queries and keys in
//! RoPE's interleaved layout; their rows are brought into the decoders' order as they are read.

use super::config::STORED;
use super::dialect::{DIALECTS, Dialect};
use super::file::ModelFile;
use super::foreign;
use super::gguf::{Header, Metadata, Value};
use super::weights::Stored;
use super::{HeadRows, Rope, RopeScaling};
use crate::{Error, Result};
use serde_json::{Value as Json, json};
use std::path::Path;

/// Stretched frequencies, which GGUF holds as one divisor per frequency.
const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// LongRoPE's divisors, of short contexts and of long ones.
const LONG_FACTORS: [&str; 2] = ["rope_factors_short.weight", "rope_factors_long.weight"];

/// Metadata under the architecture's prefix that changes what a layer computes, with the values
/// that change nothing.
const MATHEMATICS: [(&str, f64); 18] = [
    ("expert_count", 0.0),
    ("expert_used_count", 0.0),
    ("expert_shared_count", 0.0),
    ("expert_shared_feed_forward_length", 0.0),
    ("expert_gating_func", 1.0),
    ("expert_weights_scale", 1.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.scale", 0.0),
    ("attention.temperature_scale", 0.0),
    ("use_parallel_residual", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("embedding_scale", 1.0),
    ("residual_scale", 1.0),
    ("rope.scaling.yarn_attn_factor", 1.0),
    ("rope.scaling.yarn_ext_factor", 1.0),
];

/// The model's configuration, as its `config.json` would be; `files` are those of its tensors.
pub(super) fn config(path: &Path, header: &Header, files: &[ModelFile]) -> Result<Json> {
    let fields = Fields { path, metadata: &header.metadata };
    let unsupported = |message: String| Error::Unsupported { path: path.into(), message };
    match header.metadata.get("general.type") {
        None => {}
        Some(Value::String(kind)) if kind == "model" => {}
        Some(Value::String(kind)) if kind == "adapter" => return Err(unsupported(format!("is a LoRA adapter, and no model. {}", foreign::MERGE))),
        Some(kind) => return Err(unsupported(format!("is no model: its general.type is {kind}"))),
    }
    let name = fields.string("general.architecture")?;
    let dialect = Dialect::of(name, &header.metadata).ok_or_else(|| {
        let known: Vec<_> = DIALECTS.iter().map(|dialect| dialect.name).collect();
        unsupported(format!("the architecture {name} is not supported (supported in GGUF: {})", known.join(", ")))
    })?;
    let key = |suffix: &str| format!("{name}.{suffix}");
    for (suffix, neutral) in MATHEMATICS.into_iter().filter(|(suffix, _)| !dialect.settings.iter().any(|(known, _)| known == suffix)) {
        let value = match header.metadata.get(&key(suffix)) {
            Some(Value::Bool(flag)) => Some(f64::from(u8::from(*flag))),
            _ => fields.number(&key(suffix))?,
        };
        if let Some(value) = value.filter(|value| *value != neutral) {
            return Err(unsupported(format!("metadata {} = {value} is not supported", key(suffix))));
        }
    }

    let has = |tensor: &str| header.tensors.iter().any(|(name, _)| name == tensor);
    let heads = fields.size(&key("attention.head_count"))?;
    let hidden_size = fields.size(&key("embedding_length"))?;
    let head_dim = match fields.integer(&key("attention.key_length"))? {
        Some(_) => fields.size(&key("attention.key_length"))?,
        None if heads == 0 || !hidden_size.is_multiple_of(heads) => {
            let message = format!("metadata {}: {hidden_size} cannot be divided among {heads} heads", key("embedding_length"));
            return Err(Error::Checkpoint { path: path.into(), message });
        }
        None => hidden_size / heads,
    };
    if let Some(other) = fields.integer(&key("attention.value_length"))?
        && other != head_dim as i64
    {
        return Err(unsupported(format!("metadata {} = {other} differs from the head's width {head_dim}", key("attention.value_length"))));
    }
    let dims = fields.integer(&key("rope.dimension_count"))?.unwrap_or(head_dim as i64);
    if dims != head_dim as i64 && !dialect.partial || dims <= 0 || dims > head_dim as i64 || dims % 2 != 0 {
        return Err(unsupported(format!("metadata {} = {dims} differs from the head's width {head_dim}", key("rope.dimension_count"))));
    }
    let context = fields.size(&key("context_length"))?;
    let window = fields.integer(&key("attention.sliding_window"))?.filter(|window| *window > 0 && *window < context as i64);
    // The converters call Mistral a llama, and OLMo 3 an olmo2; only their windows tell.
    let model_type = if window.is_some() { dialect.windowed } else { Some(dialect.model_type) };
    let model_type = model_type
        .ok_or_else(|| unsupported(format!("metadata {} = {} is not supported", key("attention.sliding_window"), window.unwrap_or_default())))?;
    let embeddings = "token_embd.weight";
    let vocab_size = match header.tensors.iter().find(|(name, _)| name == embeddings) {
        Some((_, stored)) => stored.shape.first().copied().unwrap_or(0),
        None => return Err(Error::Tensor { path: path.into(), name: embeddings.into(), message: "missing".into() }),
    };
    let mut ends: Vec<u32> = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ends.extend(fields.token(key)?.filter(|id| !ends.contains(id)));
    }
    let epsilon = key(dialect.epsilon.0);
    let epsilon = fields.number(&epsilon)?.ok_or_else(|| fields.error(&epsilon, "is missing"))? as f32;
    let rope =
        Rope { scaling: metadata_scaling(&fields, name)?, ..Rope::new(fields.number(&key("rope.freq_base"))?.unwrap_or(10_000.0), dims as usize) };
    let mut json = json!({
        "model_type": model_type,
        "hidden_size": hidden_size,
        "intermediate_size": fields.size(&key("feed_forward_length"))?,
        "num_hidden_layers": fields.size(&key("block_count"))?,
        "num_attention_heads": heads,
        "num_key_value_heads": match fields.integer(&key("attention.head_count_kv"))? {
            Some(_) => fields.size(&key("attention.head_count_kv"))?,
            None => heads,
        },
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": context,
        "rope_theta": rope.theta,
        "partial_rotary_factor": dims as f64 / head_dim as f64,
        "tie_word_embeddings": !has("output.weight"),
        "sliding_window": window,
        "use_sliding_window": window.is_some(),
        "bos_token_id": fields.token("tokenizer.ggml.bos_token_id")?,
        "eos_token_id": ends,
        "torch_dtype": "float16",
    });
    json[dialect.epsilon.1] = shortest(epsilon).into();
    if has("blk.0.attn_q.bias") || has("blk.0.attn_qkv.bias") {
        json[dialect.bias] = true.into();
    }
    if has("blk.0.ffn_up.bias") && dialect.bias != "use_bias" {
        json["mlp_bias"] = true.into();
    }
    let attention = fields.number(&key("rope.scaling.attn_factor"))?.filter(|factor| *factor != 1.0);
    if let Some(factor) = attention.filter(|_| !has(LONG_FACTORS[0])) {
        return Err(unsupported(format!("metadata {} = {factor} is not supported", key("rope.scaling.attn_factor"))));
    }
    for (suffix, setting) in dialect.settings {
        if let Some(number) = fields.number(&key(suffix))? {
            json[*setting] = if number.fract() == 0.0 { (number as i64).into() } else { number.into() };
        }
    }
    if dialect.stored_plain {
        json[STORED] = json!({ "rows": "plain", "gains": "plain" });
    }
    (dialect.more)(&mut json);
    // Of those whose experts' weights always sum to one no file is to say that they do not.
    match fields.flag(&key("expert_weights_norm"))? {
        Some(normalised) if !json["norm_topk_prob"].is_null() => json["norm_topk_prob"] = normalised.into(),
        Some(false) => return Err(unsupported(format!("metadata {} = false is not supported", key("expert_weights_norm")))),
        _ => {}
    }
    let floats = |name: &str| floats(&fields, header, name, files);
    let factors = [floats(LONG_FACTORS[0])?, floats(LONG_FACTORS[1])?];
    let scaling = match (floats(ROPE_DIVISORS)?, factors) {
        (Some(divisors), _) => divisors_scaling(&fields, name, (rope, head_dim), &divisors)?,
        (None, [Some(short), Some(long)]) => RopeScaling::Longrope {
            short,
            long,
            original_max_position_embeddings: fields.number(&key("rope.scaling.original_context_length"))?.unwrap_or(context as f64),
            attention_factor: fields.number(&key("rope.scaling.attn_factor"))?.unwrap_or(1.0),
        },
        _ => rope.scaling,
    };
    json["rope_scaling"] = match scaling {
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings as u64,
        }),
        RopeScaling::Yarn { factor, beta_fast, beta_slow, truncate, original_max_position_embeddings, .. } => json!({
            "rope_type": "yarn",
            "truncate": truncate,
            "factor": factor,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
        RopeScaling::Longrope { short, long, original_max_position_embeddings, attention_factor } => json!({
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": original_max_position_embeddings,
            "attention_factor": attention_factor,
        }),
        _ => Json::Null,
    };
    Ok(json)
}

fn metadata_scaling(fields: &Fields, architecture: &str) -> Result<RopeScaling> {
    let kind = format!("{architecture}.rope.scaling.type");
    let scaling = |suffix: &str| fields.number(&format!("{architecture}.rope.scaling.{suffix}"));
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
        // Its divisors are tensors.
        (Some(Value::String(kind)), _) if kind == "longrope" => Ok(RopeScaling::None),
        (Some(Value::String(kind)), Some(factor)) if kind == "yarn" => {
            let original = format!("{architecture}.rope.scaling.original_context_length");
            Ok(RopeScaling::Yarn {
                factor,
                beta_fast: scaling("yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: scaling("yarn_beta_slow")?.unwrap_or(1.0),
                truncate: architecture != "gpt-oss",
                original_max_position_embeddings: fields.number(&original)?.ok_or_else(|| fields.error(&original, "is missing"))?,
                attention_factor: 1.0,
            })
        }
        (Some(Value::String(kind)), None) if kind == "linear" || kind == "yarn" => {
            Err(fields.error(&format!("{architecture}.rope.scaling.factor"), "is missing"))
        }
        (Some(other), _) => {
            let message =
                format!("metadata {kind} = {other} is not supported (supported: none, linear, yarn, longrope, and Llama 3's {ROPE_DIVISORS})");
            Err(Error::Unsupported { path: fields.path.into(), message })
        }
    }
}

/// A list of floats, where there is one of this name.
fn floats(fields: &Fields, header: &Header, name: &str, files: &[ModelFile]) -> Result<Option<Vec<f64>>> {
    let Some((_, stored)) = header.tensors.iter().find(|(known, _)| known == name) else { return Ok(None) };
    let (Some(encoding), [count]) = (stored.encoding.filter(|e| !e.is_quantised()), &stored.shape[..]) else {
        return Err(Error::Tensor { path: fields.path.into(), name: name.into(), message: "is not one list of floats".into() });
    };
    let mut numbers = vec![0f32; *count];
    encoding.decode(&files[stored.file].bytes[stored.range.clone()], &mut numbers);
    Ok(Some(numbers.into_iter().map(f64::from).collect()))
}

/// GGUF stores the divisors that Llama 3's rule yields, not its parameters. All published models
/// have `low_freq_factor` 1 and `high_freq_factor` 4 (only their quotient and the original context
/// matter), and the largest divisor is the factor; what these give is compared with what is stored.
fn divisors_scaling(fields: &Fields, architecture: &str, (rope, head_dim): (Rope, usize), divisors: &[f64]) -> Result<RopeScaling> {
    let error = |message: String| Error::Tensor { path: fields.path.into(), name: ROPE_DIVISORS.into(), message };
    if divisors.len() != head_dim / 2 {
        return Err(error(format!("has {} divisors for {} frequencies", divisors.len(), head_dim / 2)));
    }
    if divisors.iter().all(|divisor| *divisor == 1.0) {
        return Ok(rope.scaling);
    }
    if rope.scaling != RopeScaling::None {
        return Err(error("divides frequencies that metadata scales already".into()));
    }
    let factor = divisors.iter().copied().fold(0.0, f64::max);
    let original = fields.number(&format!("{architecture}.rope.scaling.original_context_length"))?.unwrap_or(8192.0);
    let scaling = RopeScaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings: original };
    let scaled = Rope { scaling, ..rope.clone() };
    let [plain, frequencies] = [&rope, &scaled].map(|rope| rope.frequencies(head_dim, 1));
    let fits = plain.iter().zip(frequencies).zip(divisors).all(|((plain, scaled), divisor)| (plain / scaled / divisor - 1.0).abs() < 1e-3);
    match fits && scaled.fault(head_dim).is_none() {
        true => Ok(scaled.scaling),
        false => Err(error("holds divisors that Llama 3's rule does not give; other scalings are not supported".into())),
    }
}

/// The tensors under their Hugging Face names, and how heads' rows are stored in them.
pub(super) fn tensors(path: &Path, metadata: &Metadata, tensors: Vec<(String, Stored)>) -> Result<(Vec<(String, Stored)>, HeadRows)> {
    let name = (Fields { path, metadata }).string("general.architecture")?;
    let dialect = Dialect::of(name, metadata).unwrap_or(&DIALECTS[0]);
    let tensors = tensors.into_iter().filter(|(name, _)| name != ROPE_DIVISORS && !LONG_FACTORS.contains(&name.as_str()));
    let tensors = tensors.map(|(name, stored)| match dialect.translate(&name) {
        Some(hugging_face) => Ok((hugging_face, stored)),
        None => Err(Error::Tensor { path: path.into(), name, message: "is no part of a supported architecture".into() }),
    });
    Ok((tensors.collect::<Result<_>>()?, if dialect.interleaved { HeadRows::Interleaved } else { HeadRows::Halves }))
}

/// An f32 as the f64 of its shortest decimal form: `1e-5` and not `9.99999974…e-6`.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(x as f64)
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
