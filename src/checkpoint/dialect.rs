//! What GGUF's architectures call their settings and tensors: llama.cpp's words.

use serde_json::Value;

/// One of GGUF's architectures.
pub(super) struct Dialect {
    /// `general.architecture`.
    pub name: &'static str,
    /// What `config.json` has for it.
    pub model_type: &'static str,
    /// The same where there is a window; `None` where there cannot be.
    pub windowed: Option<&'static str>,
    /// Whether queries' and keys' pairs are neighbours: llama.cpp's rope type NORM.
    pub interleaved: bool,
    /// Whether some of a head may not rotate.
    pub partial: bool,
    /// Whether the family's own files have gains or heads' rows otherwise than this one.
    pub stored_plain: bool,
    /// The norms' epsilon, here and in `config.json`.
    pub epsilon: (&'static str, &'static str),
    /// What `config.json` calls the biases of query, key and value.
    pub bias: &'static str,
    /// Other numbers that are honoured, here and there.
    pub settings: &'static [(&'static str, &'static str)],
    /// Tensors of a layer that have other words than Llama's, here and there.
    pub tensors: &'static [(&'static str, &'static str)],
    /// What no metadata says.
    pub more: fn(&mut Value),
}

const LLAMA: Dialect = Dialect {
    name: "llama",
    model_type: "llama",
    windowed: Some("mistral"),
    interleaved: true,
    partial: false,
    stored_plain: false,
    epsilon: ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    bias: "attention_bias",
    settings: &[],
    tensors: &[],
    more: |_| (),
};

/// Pairs half a head apart, and no window.
const QWEN2: Dialect = Dialect { name: "qwen2", model_type: "qwen2", windowed: None, interleaved: false, ..LLAMA };

/// Gains are stored whole.
const GEMMA: Dialect = Dialect { name: "gemma", model_type: "gemma", stored_plain: true, ..QWEN2 };

const GEMMA2: Dialect = Dialect {
    name: "gemma2",
    model_type: "gemma2",
    windowed: Some("gemma2"),
    settings: &[("attn_logit_softcapping", "attn_logit_softcapping"), ("final_logit_softcapping", "final_logit_softcapping")],
    tensors: &[("post_attention_norm", "post_attention_layernorm"), ("ffn_norm", "pre_feedforward_layernorm")],
    more: |json| gemma_scale(json, 46),
    ..GEMMA
};

/// Part of a head may stand still.
const PARTIAL: Dialect = Dialect { partial: true, stored_plain: true, ..QWEN2 };

const STABLELM: Dialect = Dialect {
    name: "stablelm",
    model_type: "stablelm",
    epsilon: ("attention.layer_norm_epsilon", "layer_norm_eps"),
    bias: "use_qkv_bias",
    ..PARTIAL
};

/// Norms of what attention and MLP make.
const AFTER: &[(&str, &str)] = &[("post_attention_norm", "post_attention_layernorm")];

/// All that are read.
pub(super) const DIALECTS: &[Dialect] = &[
    LLAMA,
    QWEN2,
    Dialect { name: "qwen3", model_type: "qwen3", ..QWEN2 },
    Dialect { name: "seed_oss", model_type: "seed_oss", tensors: AFTER, ..QWEN2 },
    Dialect { name: "smollm3", model_type: "smollm3", windowed: None, ..LLAMA },
    Dialect { name: "arcee", model_type: "arcee", windowed: None, ..LLAMA },
    Dialect { name: "ernie4_5", model_type: "ernie4_5", windowed: None, stored_plain: true, bias: "use_bias", ..LLAMA },
    Dialect {
        name: "granite",
        model_type: "granite",
        windowed: None,
        settings: &[
            ("attention.scale", "attention_multiplier"),
            ("embedding_scale", "embedding_multiplier"),
            ("residual_scale", "residual_multiplier"),
            ("logit_scale", "logits_scaling"),
        ],
        ..LLAMA
    },
    Dialect {
        name: "hunyuan-dense",
        model_type: "hunyuan_v1_dense",
        tensors: &[("attn_q_norm", "self_attn.query_layernorm"), ("attn_k_norm", "self_attn.key_layernorm")],
        ..QWEN2
    },
    Dialect { name: "olmo2", model_type: "olmo2", tensors: AFTER, ..QWEN2 },
    Dialect { name: "exaone4", model_type: "exaone4", windowed: Some("exaone4"), tensors: AFTER, ..QWEN2 },
    GEMMA,
    GEMMA2,
    Dialect { name: "gemma3", model_type: "gemma3_text", windowed: Some("gemma3_text"), more: |json| gemma_scale(json, 62), ..GEMMA2 },
    Dialect { name: "phi3", model_type: "phi3", windowed: Some("phi3"), tensors: &[("ffn_up", "mlp.gate_up_proj")], ..PARTIAL },
    Dialect {
        name: "glm4",
        model_type: "glm4",
        interleaved: true,
        tensors: &[("post_attention_norm", "post_self_attn_layernorm"), ("post_ffw_norm", "post_mlp_layernorm"), ("ffn_up", "mlp.gate_up_proj")],
        ..PARTIAL
    },
    STABLELM,
    Dialect {
        name: "starcoder2",
        model_type: "starcoder2",
        windowed: Some("starcoder2"),
        partial: false,
        stored_plain: false,
        epsilon: ("attention.layer_norm_epsilon", "norm_epsilon"),
        bias: "use_bias",
        tensors: &[("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj")],
        ..STABLELM
    },
];

/// What Gemma's scores are divided by the root of: the width of a head, or in the largest model, of
/// so many layers, what each head has of the residual stream.
fn gemma_scale(json: &mut Value, largest: usize) {
    let width = match json["num_hidden_layers"] == largest {
        true => json["hidden_size"].as_f64().unwrap_or(0.0) / json["num_attention_heads"].as_f64().unwrap_or(1.0),
        false => json["head_dim"].as_f64().unwrap_or(0.0),
    };
    json["query_pre_attn_scalar"] = width.into();
}
