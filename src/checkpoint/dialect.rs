//! What GGUF's architectures call their settings and tensors: llama.cpp's words.

use super::gguf::{Metadata, Value as Number};
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
    /// Whether its MLPs are experts: a name may have both.
    pub experts: bool,
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
    experts: false,
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

/// How many experts there are, how many of them a token goes through, and how wide they are.
const EXPERTS: [(&str, &str); 3] =
    [("expert_count", "num_experts"), ("expert_used_count", "num_experts_per_tok"), ("expert_feed_forward_length", "intermediate_size")];

/// The same where there are other MLPs besides.
const EXPERTS_BESIDES: [(&str, &str); 4] = [
    EXPERTS[0],
    EXPERTS[1],
    ("expert_feed_forward_length", "moe_intermediate_size"),
    ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
];

const MIXTRAL: Dialect = Dialect { model_type: "mixtral", windowed: Some("mixtral"), experts: true, settings: &EXPERTS, ..LLAMA };

const QWEN2MOE: Dialect =
    Dialect { name: "qwen2moe", model_type: "qwen2_moe", experts: true, settings: &EXPERTS_BESIDES, bias: "qkv_bias", more: unnormalised, ..QWEN2 };

const GRANITE: Dialect = Dialect { name: "granite", model_type: "granite", windowed: None, settings: &MULTIPLIERS, ..LLAMA };

const MULTIPLIERS: [(&str, &str); 4] = [
    ("attention.scale", "attention_multiplier"),
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("logit_scale", "logits_scaling"),
];

/// Norms of what attention and MLP make.
const AFTER: &[(&str, &str)] = &[("post_attention_norm", "post_attention_layernorm")];

impl Dialect {
    /// That of an architecture, with experts or without.
    pub(super) fn of(name: &str, metadata: &Metadata) -> Option<&'static Dialect> {
        let experts = matches!(metadata.get(&format!("{name}.expert_count")), Some(Number::Integer(count)) if *count > 0);
        let named = || DIALECTS.iter().filter(|dialect| dialect.name == name);
        named().find(|dialect| dialect.experts == experts).or_else(|| named().next())
    }

    /// The Hugging Face name of a tensor.
    pub(super) fn translate(&self, name: &str) -> Option<String> {
        let (rest, kind) = name.rsplit_once('.')?;
        if !matches!(kind, "weight" | "bias") {
            return None;
        }
        let outside = match rest {
            "token_embd" => "model.embed_tokens",
            "output_norm" => "model.norm",
            "output" => "lm_head",
            _ => "",
        };
        if !outside.is_empty() {
            return Some(format!("{outside}.{kind}"));
        }
        let (layer, part) = rest.strip_prefix("blk.")?.split_once('.')?;
        let layer: usize = layer.parse().ok()?;
        // One expert's, as files of 2024 have them.
        if let Some((matrix, expert)) = part.split_once('.').filter(|_| self.experts) {
            let matrix = TENSORS.iter().find(|(name, _)| *name == matrix)?.1.strip_prefix("mlp.")?;
            return Some(format!("model.layers.{layer}.mlp.experts.{}.{matrix}.{kind}", expert.parse::<usize>().ok()?));
        }
        let known = |names: &[(&str, &'static str)]| names.iter().find(|(name, _)| *name == part).map(|(_, hugging_face)| *hugging_face);
        let part = known(self.tensors).or_else(|| known(if self.experts { &EXPERT_TENSORS } else { &[] })).or_else(|| known(&TENSORS))?;
        Some(format!("model.layers.{layer}.{part}.{kind}"))
    }
}

/// Those that only models with experts have.
const EXPERT_TENSORS: [(&str, &str); 10] = [
    ("attn_sinks", "self_attn.sinks"),
    ("ffn_gate_inp", "mlp.router"),
    ("ffn_gate_exps", "mlp.experts.gate_proj"),
    ("ffn_up_exps", "mlp.experts.up_proj"),
    ("ffn_gate_up_exps", "mlp.experts.gate_up_proj"),
    ("ffn_down_exps", "mlp.experts.down_proj"),
    ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
    ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
    ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
];

/// Tensors of a layer, where a dialect has no other word for them.
const TENSORS: [(&str, &str); 13] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

/// All that are read.
pub(super) const DIALECTS: &[Dialect] = &[
    LLAMA,
    QWEN2,
    Dialect { name: "qwen3", model_type: "qwen3", ..QWEN2 },
    Dialect { name: "seed_oss", model_type: "seed_oss", tensors: AFTER, ..QWEN2 },
    Dialect { name: "smollm3", model_type: "smollm3", windowed: None, ..LLAMA },
    Dialect { name: "arcee", model_type: "arcee", windowed: None, ..LLAMA },
    Dialect { name: "ernie4_5", model_type: "ernie4_5", windowed: None, stored_plain: true, bias: "use_bias", ..LLAMA },
    GRANITE,
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
    MIXTRAL,
    QWEN2MOE,
    Dialect { name: "qwen3moe", model_type: "qwen3_moe", bias: "attention_bias", more: |json| json["norm_topk_prob"] = true.into(), ..QWEN2MOE },
    Dialect { name: "gpt-oss", model_type: "gpt_oss", windowed: Some("gpt_oss"), experts: true, settings: &EXPERTS, tensors: AFTER, ..QWEN2 },
    Dialect { name: "olmoe", model_type: "olmoe", experts: true, settings: &EXPERTS, more: unnormalised, ..QWEN2 },
    Dialect {
        name: "granitemoe",
        model_type: "granitemoe",
        experts: true,
        settings: &[MULTIPLIERS[0], MULTIPLIERS[1], MULTIPLIERS[2], MULTIPLIERS[3], EXPERTS[0], EXPERTS[1], EXPERTS[2]],
        ..GRANITE
    },
];

/// Weights of those experts that are chosen do not sum to one.
fn unnormalised(json: &mut Value) {
    json["norm_topk_prob"] = false.into();
}

/// What Gemma's scores are divided by the root of: the width of a head, or in the largest model, of
/// so many layers, what each head has of the residual stream.
fn gemma_scale(json: &mut Value, largest: usize) {
    let width = match json["num_hidden_layers"] == largest {
        true => json["hidden_size"].as_f64().unwrap_or(0.0) / json["num_attention_heads"].as_f64().unwrap_or(1.0),
        false => json["head_dim"].as_f64().unwrap_or(0.0),
    };
    json["query_pre_attn_scalar"] = width.into();
}
