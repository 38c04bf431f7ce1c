//! Families of models, and what RoPE does in them.

/// The families that lowkey runs.
///
/// They differ in three details of attention; everything else is in [`Config`](super::Config).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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

impl Architecture {
    pub(super) const ALL: [Architecture; 4] = [Architecture::Llama, Architecture::Mistral, Architecture::Qwen2, Architecture::Qwen3];

    /// `model_type` and the class in `architectures`.
    pub(super) fn names(self) -> (&'static str, &'static str) {
        match self {
            Architecture::Llama => ("llama", "LlamaForCausalLM"),
            Architecture::Mistral => ("mistral", "MistralForCausalLM"),
            Architecture::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            Architecture::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
        }
    }

    /// By `model_type`, which is also `general.architecture` in GGUF.
    pub(super) fn from_model_type(name: &str) -> Option<Architecture> {
        Self::ALL.into_iter().find(|architecture| architecture.names().0 == name)
    }
}
