//! Families of models: what their files call them.

use serde::{Deserialize, Serialize};

/// The families that lowkey runs.
///
/// What they do differently is [`Design`](super::Design)'s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// Llama 1 to 3, SmolLM, TinyLlama.
    Llama,
    /// Mistral.
    Mistral,
    /// Ministral of 2024: windows in some layers.
    Ministral,
    /// Ministral 3.
    Ministral3,
    /// Qwen2 and 2.5: bias on query, key and value.
    Qwen2,
    /// Qwen3: RMSNorm on every query and key head before RoPE.
    Qwen3,
    /// SmolLM3: some layers know no positions.
    Smollm3,
    /// Seed-OSS.
    SeedOss,
    /// Arcee: no gate, and squared ReLU.
    Arcee,
    /// Ernie 4.5: interleaved RoPE.
    Ernie45,
    /// InternLM 3.
    Internlm3,
    /// HunYuan dense: queries and keys are normalised after RoPE.
    HunyuanDense,
    /// Exaone 4: norms after attention and MLP, and no positions where attention is not windowed.
    Exaone4,
    /// Granite 3: four multipliers.
    Granite,
    /// OLMo 2: norms after attention and MLP, and QK-norm over all heads.
    Olmo2,
    /// OLMo 3: OLMo 2 with windows.
    Olmo3,
    /// Gemma.
    Gemma,
    /// Gemma 2: soft caps, alternating windows, four norms.
    Gemma2,
    /// Gemma 3, text: QK-norm, and two RoPE bases.
    Gemma3,
    /// VaultGemma: Gemma 2 with norms before attention and MLP alone.
    Vaultgemma,
    /// Phi-3 and Phi-4: one projection for query, key and value, one for gate and up.
    Phi3,
    /// GLM-4 of 2024: half of a head rotates, interleaved.
    Glm,
    /// GLM-4 of 2025: GLM with four norms.
    Glm4,
    /// Helium: interleaved RoPE.
    Helium,
    /// StarCoder 2: LayerNorm, biases, no gate.
    Starcoder2,
    /// Nemotron: LayerNorm whose gains are stored less one, squared ReLU, half of a head rotates.
    Nemotron,
    /// StableLM: LayerNorm, a quarter of a head rotates.
    Stablelm,
    /// Mixtral: Mistral with experts.
    Mixtral,
    /// Qwen2 and 1.5 with experts, and one that all tokens share.
    Qwen2Moe,
    /// Qwen3 with experts.
    Qwen3Moe,
    /// gpt-oss: experts, windows in every other layer, attention sinks.
    GptOss,
    /// OLMoE: experts, and QK-norm over all heads.
    Olmoe,
    /// Granite 3 with experts.
    GraniteMoe,
}

use Architecture::*;

/// Each with its `model_type`, the class in `architectures`, and `general.architecture` in GGUF.
const NAMES: [(Architecture, &str, &str); 33] = [
    (Llama, "llama", "LlamaForCausalLM"),
    (Mistral, "mistral", "MistralForCausalLM"),
    (Ministral, "ministral", "MinistralForCausalLM"),
    (Ministral3, "ministral3", "Ministral3ForCausalLM"),
    (Qwen2, "qwen2", "Qwen2ForCausalLM"),
    (Qwen3, "qwen3", "Qwen3ForCausalLM"),
    (Smollm3, "smollm3", "SmolLM3ForCausalLM"),
    (SeedOss, "seed_oss", "SeedOssForCausalLM"),
    (Arcee, "arcee", "ArceeForCausalLM"),
    (Ernie45, "ernie4_5", "Ernie4_5ForCausalLM"),
    (Internlm3, "internlm3", "InternLM3ForCausalLM"),
    (HunyuanDense, "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM"),
    (Exaone4, "exaone4", "Exaone4ForCausalLM"),
    (Granite, "granite", "GraniteForCausalLM"),
    (Olmo2, "olmo2", "Olmo2ForCausalLM"),
    (Olmo3, "olmo3", "Olmo3ForCausalLM"),
    (Gemma, "gemma", "GemmaForCausalLM"),
    (Gemma2, "gemma2", "Gemma2ForCausalLM"),
    (Gemma3, "gemma3_text", "Gemma3ForCausalLM"),
    (Vaultgemma, "vaultgemma", "VaultGemmaForCausalLM"),
    (Phi3, "phi3", "Phi3ForCausalLM"),
    (Glm, "glm", "GlmForCausalLM"),
    (Glm4, "glm4", "Glm4ForCausalLM"),
    (Helium, "helium", "HeliumForCausalLM"),
    (Starcoder2, "starcoder2", "Starcoder2ForCausalLM"),
    (Nemotron, "nemotron", "NemotronForCausalLM"),
    (Stablelm, "stablelm", "StableLmForCausalLM"),
    (Mixtral, "mixtral", "MixtralForCausalLM"),
    (Qwen2Moe, "qwen2_moe", "Qwen2MoeForCausalLM"),
    (Qwen3Moe, "qwen3_moe", "Qwen3MoeForCausalLM"),
    (GptOss, "gpt_oss", "GptOssForCausalLM"),
    (Olmoe, "olmoe", "OlmoeForCausalLM"),
    (GraniteMoe, "granitemoe", "GraniteMoeForCausalLM"),
];

impl Architecture {
    /// By `model_type`.
    pub(super) fn from_model_type(name: &str) -> Option<Architecture> {
        NAMES.into_iter().find(|(_, model_type, _)| *model_type == name).map(|(architecture, ..)| architecture)
    }

    /// By the class in `architectures`.
    pub(super) fn from_class(name: &str) -> Option<Architecture> {
        NAMES.into_iter().find(|(.., class)| *class == name).map(|(architecture, ..)| architecture)
    }

    /// The classes of all families.
    pub(super) fn classes() -> impl Iterator<Item = &'static str> {
        NAMES.into_iter().map(|(.., class)| class)
    }
}
