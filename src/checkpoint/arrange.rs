//! Brings a model's tensors under the names and into the order that decoders know: projections that
//! are stored in one come apart, and heads' rows are read pair by pair of RoPE.

use super::Config;
use super::design::HeadRows;
use super::matrix::HeadOrder;
use super::weights::{Stored, Weights};
use crate::Result;

/// Gives the parts of a model that was saved without its head the names that they have beside one,
/// as transformers does.
pub(super) fn beside_head(weights: &mut Weights) {
    if weights.get("embed_tokens.weight").is_some() && weights.get("model.embed_tokens.weight").is_none() {
        weights.rename_all(|name| if name.starts_with("lm_head.") { name } else { format!("model.{name}") });
    }
}

/// Takes apart what is stored in one.
///
/// # Errors
/// [`Error::Tensor`](crate::Error::Tensor) where a tensor has other rows than its parts.
pub(super) fn take_apart(weights: &mut Weights, config: &Config) -> Result<()> {
    let (head, ffn) = (config.head_dim, config.intermediate_size);
    let (queries, keys) = (config.num_attention_heads * head, config.num_key_value_heads * head);
    let mut replaced: Vec<(String, Vec<(String, Stored)>)> = Vec::new();
    for (name, stored) in weights.iter() {
        let Some((layer, part)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else { continue };
        let (fused, kind) = part.rsplit_once('.').unwrap_or((part, ""));
        let parts: &[(&str, usize)] = match fused {
            "self_attn.qkv_proj" => &[("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)],
            "mlp.gate_up_proj" => &[("mlp.gate_proj", ffn), ("mlp.up_proj", ffn)],
            _ => continue,
        };
        let rows: usize = parts.iter().map(|(_, rows)| rows).sum();
        if stored.shape.first() != Some(&rows) {
            return Err(weights.error(stored, name, format!("has shape {:?} where the model needs {rows} rows", stored.shape)));
        }
        // Every row takes as many bytes.
        let bytes = stored.range.len() / rows.max(1);
        let mut start = stored.range.start;
        let apart = parts.iter().map(|(part, rows)| {
            let range = start..start + rows * bytes;
            start = range.end;
            let shape = [&[*rows], &stored.shape[1..]].concat();
            (format!("model.layers.{layer}.{part}.{kind}"), Stored { range, shape, dtype: stored.dtype.clone(), strewn: None, ..*stored })
        });
        replaced.push((name.into(), apart.collect()));
    }
    replaced.into_iter().for_each(|(name, parts)| weights.take_apart(&name, parts));
    Ok(())
}

/// Says in which order heads' rows are, which are stored as `rows` say.
pub(super) fn order(weights: &mut Weights, config: &Config, rows: HeadRows) {
    for (layer, spec) in config.layers.iter().enumerate() {
        let dims = config.ropes[spec.rope].dims;
        // Where nothing rotates any order is as good, if it is the same for queries and keys.
        let (head, interleaved) = (config.head_dim, rows == HeadRows::Interleaved);
        let order = HeadOrder { width: head, dims: if dims == 0 { head } else { dims }, interleaved };
        if rows == HeadRows::Paired || order.is_paired() {
            continue;
        }
        let norms = config.design.qk_norm.iter().flat_map(|norm| norm.names);
        ["q_proj", "k_proj"].into_iter().chain(norms).for_each(|part| weights.order(&format!("model.layers.{layer}.self_attn.{part}"), order));
    }
}
