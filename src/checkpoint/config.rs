//! A model's geometry, in the words of Hugging Face's `config.json`; read from that file or from
//! GGUF metadata.
//!
//! What a file asks for is either honoured or refused by name: a setting that changes the
//! mathematics and is not implemented is never ignored.

use super::family::{Architecture, RopeScaling};
use super::fields::Fields;
use crate::kv::Geometry;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;

/// The geometry of a decoder-only transformer with RMSNorm, RoPE and a gated SiLU MLP.
///
/// RoPE is in half-split layout.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Config {
    /// The family.
    pub architecture: Architecture,
    /// Width of the residual stream, `D`.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads, `H`.
    pub num_attention_heads: usize,
    /// Key/value heads, `H_kv`; divides `H`.
    pub num_key_value_heads: usize,
    /// Width of a head, `d`; even.
    pub head_dim: usize,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// The context that the model was trained for.
    pub max_position_embeddings: usize,
    /// RMSNorm's epsilon.
    pub rms_norm_eps: f32,
    /// RoPE's base, `θ`.
    pub rope_theta: f64,
    /// RoPE's scaling.
    pub rope_scaling: RopeScaling,
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Whether query, key and value projections have a bias.
    pub attention_bias: bool,
    /// Whether query and key heads are normalised before RoPE.
    pub qk_norm: bool,
    /// Keys further back than this are not attended to; `None` for all.
    pub sliding_window: Option<usize>,
    /// The token that starts a text.
    pub bos_token_id: Option<u32>,
    /// The tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
}

impl Config {
    /// A Llama of two layers, for tests: four heads on two, 16 wide.
    #[cfg(test)]
    pub(crate) fn example() -> Config {
        Config {
            architecture: Architecture::Llama,
            hidden_size: 64,
            intermediate_size: 96,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            vocab_size: 100,
            max_position_embeddings: 8192,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            tie_word_embeddings: true,
            attention_bias: false,
            qk_norm: false,
            sliding_window: None,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        }
    }

    /// What the cache depends on.
    pub fn geometry(&self) -> Geometry {
        Geometry { layers: self.num_hidden_layers, heads: self.num_attention_heads, kv_heads: self.num_key_value_heads, head_dim: self.head_dim }
    }

    /// Query heads per key/value head, `g`.
    pub fn group_size(&self) -> usize {
        self.geometry().group_size()
    }

    /// RoPE's angular frequencies `[head_dim / 2]`, scaling applied.
    ///
    /// Position `p` rotates pair `i` by `p · f[i]`.
    pub fn rope_frequencies(&self) -> Vec<f64> {
        let d = self.head_dim as f64;
        (0..self.head_dim / 2)
            .map(|i| {
                let f = self.rope_theta.powf(-2.0 * i as f64 / d);
                match self.rope_scaling {
                    RopeScaling::None => f,
                    RopeScaling::Linear { factor } => f / factor,
                    RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                        let turns = original_max_position_embeddings * f / (2.0 * std::f64::consts::PI);
                        let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                        f * keep + f / factor * (1.0 - keep)
                    }
                }
            })
            .collect()
    }

    /// Reads `config.json`'s value; `path` names the file in errors.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an architecture or setting that lowkey does not run,
    /// [`Error::Checkpoint`] for a number that is missing or makes no sense.
    pub fn from_json(value: &Value, path: &Path) -> Result<Config> {
        let Value::Object(map) = value else {
            return Err(Error::Checkpoint { path: path.into(), message: "is not a JSON object".into() });
        };
        let fields = Fields { map, path };
        let architecture = fields.architecture()?;
        fields.refuse_unknown_mathematics()?;

        let num_attention_heads = fields.size("num_attention_heads", None)?;
        let hidden_size = fields.size("hidden_size", None)?;
        // Only Llama's default is safe to rely on: the others' are one model's numbers.
        let default_kv_heads = (architecture == Architecture::Llama).then_some(num_attention_heads);
        let head_dim = match fields.get("head_dim") {
            None if num_attention_heads == 0 || !hidden_size.is_multiple_of(num_attention_heads) => {
                return Err(fields.bad(format!("hidden_size {hidden_size} cannot be divided among num_attention_heads {num_attention_heads}")));
            }
            None => hidden_size / num_attention_heads,
            Some(_) => fields.size("head_dim", None)?,
        };
        let num_hidden_layers = fields.size("num_hidden_layers", None)?;
        let (rope_theta, rope_scaling) = fields.rope()?;
        let config = Config {
            architecture,
            hidden_size,
            intermediate_size: fields.size("intermediate_size", None)?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: fields.size("num_key_value_heads", default_kv_heads)?,
            head_dim,
            vocab_size: fields.size("vocab_size", None)?,
            max_position_embeddings: fields.size("max_position_embeddings", None)?,
            rms_norm_eps: fields.number("rms_norm_eps", Some(1e-6))? as f32,
            rope_theta,
            rope_scaling,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            attention_bias: fields.flag("attention_bias", architecture == Architecture::Qwen2)?,
            qk_norm: architecture == Architecture::Qwen3,
            sliding_window: fields.sliding_window(architecture, num_hidden_layers)?,
            bos_token_id: fields.tokens("bos_token_id")?.first().copied(),
            eos_token_ids: fields.tokens("eos_token_id")?,
        };
        config.validate(path)?;
        Ok(config)
    }

    /// Adds the tokens that `generation_config.json` ends answers with: chat models often name
    /// their end of turn only there.
    pub(super) fn add_end_tokens(&mut self, generation: &Value, path: &Path) -> Result<()> {
        let Value::Object(map) = generation else { return Ok(()) };
        for id in (Fields { map, path }).tokens("eos_token_id")? {
            if !self.eos_token_ids.contains(&id) {
                self.eos_token_ids.push(id);
            }
        }
        self.validate(path)
    }

    /// The inverse of [`from_json`](Self::from_json): what `config.json` says of this geometry.
    pub fn to_json(&self) -> Value {
        let (model_type, class) = self.architecture.names();
        let mut value = json!({
            "architectures": [class],
            "model_type": model_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": shortest(self.rms_norm_eps),
            "rope_theta": self.rope_theta,
            "rope_scaling": Value::Null,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "sliding_window": self.sliding_window,
            "use_sliding_window": self.sliding_window.is_some(),
            "max_window_layers": 0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids,
            "torch_dtype": "float16",
        });
        value["rope_scaling"] = match self.rope_scaling {
            RopeScaling::None => Value::Null,
            RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings as u64,
            }),
        };
        value
    }

    /// Checks that the numbers make sense together. Bounds are generous (a hundred times today's
    /// largest models); they keep products of sizes from overflowing.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the number.
    pub(super) fn validate(&self, path: &Path) -> Result<()> {
        let bad = |message: String| Err(Error::Checkpoint { path: path.into(), message });
        for (name, value, most) in [
            ("hidden_size", self.hidden_size, 1 << 20),
            ("intermediate_size", self.intermediate_size, 1 << 22),
            ("num_hidden_layers", self.num_hidden_layers, 1 << 12),
            ("num_attention_heads", self.num_attention_heads, 1 << 14),
            ("num_key_value_heads", self.num_key_value_heads, 1 << 14),
            ("head_dim", self.head_dim, 1 << 13),
            ("vocab_size", self.vocab_size, 1 << 24),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 30),
        ] {
            if value == 0 || value > most {
                return bad(format!("{name} is {value}; a number from 1 to {most} is expected"));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return bad(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return bad(format!("head_dim is {}; RoPE needs an even number", self.head_dim));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return bad(format!("rms_norm_eps is {}; a number above 0 and below 1 is expected", self.rms_norm_eps));
        }
        if !(self.rope_theta >= 1.0 && self.rope_theta <= 1e12) {
            return bad(format!("rope_theta is {}; a number from 1 to 1e12 is expected", self.rope_theta));
        }
        let positive = |x: f64| x.is_finite() && x > 0.0;
        match self.rope_scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } if positive(factor) => {}
            RopeScaling::Linear { factor } => return bad(format!("rope_scaling's factor is {factor}; a number above 0 is expected")),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let sound = [factor, low_freq_factor, high_freq_factor, original_max_position_embeddings].into_iter().all(positive);
                if !sound || low_freq_factor >= high_freq_factor {
                    return bad("rope_scaling: factors above 0 are expected, and low_freq_factor below high_freq_factor".into());
                }
            }
        }
        if self.sliding_window == Some(0) {
            return bad("sliding_window is 0; leave it out where there is none".into());
        }
        for (name, id) in self.bos_token_id.iter().map(|id| ("bos_token_id", id)).chain(self.eos_token_ids.iter().map(|id| ("eos_token_id", id))) {
            if *id as usize >= self.vocab_size {
                return bad(format!("{name} is {id}, outside the vocabulary of {}", self.vocab_size));
            }
        }
        Ok(())
    }

    /// Bytes that a dense f16 cache grows by per token, over the whole model.
    pub fn dense_kv_bytes_per_token(&self) -> u64 {
        self.geometry().dense_bytes_per_token()
    }
}

/// An f32 as the f64 of its shortest decimal form: `1e-5` and not `9.99999974…e-6`.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(x as f64)
}
