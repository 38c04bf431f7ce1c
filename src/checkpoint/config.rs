//! A model's geometry, in the words of Hugging Face's `config.json`; read from that file or from GGUF metadata.

/// The families that lowkey runs. They differ in three details of attention; everything else is in [`Config`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// Llama 1 to 3, SmolLM, TinyLlama.
    Llama,
    /// Mistral.
    Mistral,
    /// Qwen2 and 2.5: bias on query, key and value.
    Qwen2,
    /// Qwen3: RMSNorm on every query and key head before RoPE.
    Qwen3,
}

/// How positions are stretched beyond the trained context.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every position divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths longer than the original context divided by this are divided by `factor`.
        low_freq_factor: f64,
        /// Wavelengths shorter than the original context divided by this are kept.
        high_freq_factor: f64,
        /// The context that the frequencies were trained for.
        original_max_position_embeddings: f64,
    },
}

/// The geometry of a decoder-only transformer with RMSNorm, RoPE (half-split layout) and a gated SiLU MLP.
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
    /// Query heads per key/value head, `g`.
    pub fn group_size(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// RoPE's angular frequencies `[head_dim / 2]`, scaling applied: position `p` turns pair `i` by `p · f[i]`.
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

    /// Bytes that a dense f16 cache grows by per token, over the whole model.
    pub fn dense_kv_bytes_per_token(&self) -> u64 {
        (2 * 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim) as u64
    }
}
