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

/// All that are read.
pub(super) const DIALECTS: &[Dialect] = &[LLAMA, QWEN2, Dialect { name: "qwen3", model_type: "qwen3", ..QWEN2 }];
