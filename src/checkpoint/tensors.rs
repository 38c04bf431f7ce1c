//! The tensors that a model of a given geometry consists of, and their shapes: checked when a
//! checkpoint is opened, before any number is read.

use super::factored::row_tensors;
use super::{Config, Factored};

/// A tensor's name and shape.
pub(super) type Expected = (String, Vec<usize>);

/// What must be there.
pub(super) fn required(config: &Config, factored: Option<&Factored>) -> Vec<Expected> {
    let (hidden, ffn, head) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let (q_width, kv_width) = (config.num_attention_heads * head, config.num_key_value_heads * head);
    let mut list: Vec<Expected> = Vec::new();
    list.push(("model.embed_tokens.weight".into(), vec![config.vocab_size, hidden]));
    list.push(("model.norm.weight".into(), vec![hidden]));
    if !config.tie_word_embeddings {
        list.push(("lm_head.weight".into(), vec![config.vocab_size, hidden]));
    }
    for layer in 0..config.num_hidden_layers {
        let mut add = |name: &str, shape: &[usize]| list.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        add("input_layernorm.weight", &[hidden]);
        add("post_attention_layernorm.weight", &[hidden]);
        add("mlp.gate_proj.weight", &[ffn, hidden]);
        add("mlp.up_proj.weight", &[ffn, hidden]);
        add("mlp.down_proj.weight", &[hidden, ffn]);
        add("self_attn.q_proj.weight", &[q_width, hidden]);
        if config.qk_norm {
            add("self_attn.q_norm.weight", &[head]);
            add("self_attn.k_norm.weight", &[head]);
        }
        if config.attention_bias {
            add("self_attn.q_proj.bias", &[q_width]);
            add("self_attn.k_proj.bias", &[kv_width]);
        }
        add("self_attn.k_proj.weight", &[kv_width, hidden]);
        add("self_attn.v_proj.weight", &[kv_width, hidden]);
        add("self_attn.o_proj.weight", &[hidden, q_width]);
        if config.attention_bias {
            add("self_attn.v_proj.bias", &[kv_width]);
        }
    }
    for [mean, _, up] in rows(config, factored) {
        list.extend([mean, up]);
    }
    list
}

/// What may be there, and is used if it is.
pub(super) fn optional(config: &Config, factored: Option<&Factored>) -> Vec<Expected> {
    let biases = (0..config.num_hidden_layers).map(|layer| (format!("model.layers.{layer}.self_attn.o_proj.bias"), vec![config.hidden_size]));
    biases.chain(rows(config, factored).map(|[_, down, _]| down)).collect()
}

/// Mean, down and up of every latent.
fn rows(config: &Config, factored: Option<&Factored>) -> impl Iterator<Item = [Expected; 3]> {
    factored.into_iter().flat_map(|factored| factored.rows.iter().enumerate()).map(|(index, spec)| row_tensors(index, spec, config.head_dim))
}
