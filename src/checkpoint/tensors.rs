//! The tensors that a model of a given geometry consists of, and their shapes: checked when a
//! checkpoint is opened, before any number is read.

use super::design::{NormKind, QkNormOver};
use super::factored::row_tensors;
use super::{Config, Factored};

/// A tensor's name and shape.
pub(super) type Expected = (String, Vec<usize>);

/// What must be there.
pub(super) fn required(config: &Config, factored: Option<&Factored>) -> Vec<Expected> {
    let (hidden, ffn, head, design) = (config.hidden_size, config.intermediate_size, config.head_dim, &config.design);
    let (q_width, kv_width) = (config.num_attention_heads * head, config.num_key_value_heads * head);
    let mut list: Vec<Expected> = Vec::new();
    list.push(("model.embed_tokens.weight".into(), vec![config.vocab_size, hidden]));
    list.push(("model.norm.weight".into(), vec![hidden]));
    if !config.tie_word_embeddings {
        list.push(("lm_head.weight".into(), vec![config.vocab_size, hidden]));
    }
    for layer in 0..config.num_hidden_layers {
        let mut add = |name: &str, shape: &[usize]| list.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        design.norms.names().for_each(|norm| add(&format!("{norm}.weight"), &[hidden]));
        let mut mlp = |prefix: &str, ffn: usize| {
            let parts = [(design.mlp.gate, ffn, hidden), (Some(design.mlp.up), ffn, hidden), (Some(design.mlp.down), hidden, ffn)];
            for (name, rows, cols) in parts.into_iter().filter_map(|(name, rows, cols)| Some((name?, rows, cols))) {
                add(&format!("{prefix}.{name}.weight"), &[rows, cols]);
                if design.mlp.bias {
                    add(&format!("{prefix}.{name}.bias"), &[rows]);
                }
            }
        };
        match &design.experts {
            None => mlp("mlp", ffn),
            Some(experts) => {
                (0..experts.count).for_each(|expert| mlp(&format!("mlp.experts.{expert}"), experts.width));
                experts.shared.iter().for_each(|width| mlp("mlp.shared_expert", *width));
                add("mlp.router.weight", &[experts.count, hidden]);
                if design.mlp.bias {
                    add("mlp.router.bias", &[experts.count]);
                }
                if experts.shared.is_some() {
                    add("mlp.shared_expert_gate.weight", &[1, hidden]);
                }
            }
        }
        if design.sinks {
            add("self_attn.sinks", &[config.num_attention_heads]);
        }
        for (name, width) in [("q_proj", q_width), ("k_proj", kv_width), ("v_proj", kv_width)] {
            add(&format!("self_attn.{name}.weight"), &[width, hidden]);
            if design.attention_bias {
                add(&format!("self_attn.{name}.bias"), &[width]);
            }
        }
        add("self_attn.o_proj.weight", &[hidden, q_width]);
        if let Some(norm) = design.qk_norm {
            for (name, all) in norm.names.into_iter().zip([q_width, kv_width]) {
                add(&format!("self_attn.{name}.weight"), &[if norm.over == QkNormOver::Projection { all } else { head }]);
            }
        }
    }
    for [mean, _, up] in rows(config, factored) {
        list.extend([mean, up]);
    }
    list
}

/// What may be there, and is used if it is.
pub(super) fn optional(config: &Config, factored: Option<&Factored>) -> Vec<Expected> {
    let norms: Vec<_> = config.design.norms.names().filter(|_| config.design.norm == NormKind::Layer).collect();
    let biases = (0..config.num_hidden_layers).flat_map(|layer| {
        let names = norms.iter().copied().chain(["self_attn.o_proj"]);
        names.map(move |name| (format!("model.layers.{layer}.{name}.bias"), vec![config.hidden_size])).collect::<Vec<_>>()
    });
    let last = (config.design.norm == NormKind::Layer).then(|| ("model.norm.bias".into(), vec![config.hidden_size]));
    biases.chain(last).chain(rows(config, factored).map(|[_, down, _]| down)).collect()
}

/// Mean, down and up of every latent.
fn rows(config: &Config, factored: Option<&Factored>) -> impl Iterator<Item = [Expected; 3]> {
    factored.into_iter().flat_map(|factored| factored.rows.iter().enumerate()).map(|(index, spec)| row_tensors(index, spec, config.head_dim))
}
