//! Every stored tensor is accounted for: a description uses it, or it is a buffer that is computed
//! anew, or the model is refused with its name. What nobody reads would silently be missing from
//! every result.
//!
//! What a family uses is [`super::tensors`]'s.

use super::Config;
use super::foreign;
use super::weights::Weights;
use crate::{Error, Result};

/// Ends of names of buffers that older files hold and that follow from the config.
const BUFFERS: [&str; 6] =
    ["rotary_emb.inv_freq", "rotary_emb.original_inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "attn.bias", "attn.masked_bias"];

/// Refuses adapters and weights that are stored in other packages' ways, by what their tensors are
/// called: before anything is said to be missing.
///
/// # Errors
/// [`Error::Unsupported`] that names the tensor and says what to do.
pub(super) fn refuse_other_packages(weights: &Weights) -> Result<()> {
    let found = weights.iter().find_map(|(name, stored)| Some((name, stored, foreign::tensor(name)?)));
    let Some((name, stored, advice)) = found else { return Ok(()) };
    Err(Error::Unsupported { path: weights.path(stored).into(), message: format!("has a tensor {name}: {advice}") })
}

/// Refuses the first tensor that is neither `known` nor a buffer.
///
/// # Errors
/// [`Error::Unsupported`] that names the tensor.
pub(super) fn refuse(weights: &Weights, config: &Config, known: impl Fn(&str) -> bool) -> Result<()> {
    let buffer = |name: &str| BUFFERS.iter().any(|end| name.ends_with(end));
    // A tied head may be stored beside its table; that it is the same is known by now.
    let tied = |name: &str| config.tie_word_embeddings && name == "lm_head.weight";
    let Some((name, stored)) = weights.iter().find(|(name, _)| !known(name) && !buffer(name) && !tied(name)) else { return Ok(()) };
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    let reason = match layer {
        Some(layer) if layer >= config.num_hidden_layers => {
            format!("and the config has only {} layers, 0 to {}", config.num_hidden_layers, config.num_hidden_layers - 1)
        }
        _ => "which no part of a model with this config uses".into(),
    };
    Err(Error::Unsupported { path: weights.path(stored).into(), message: format!("has a tensor {name}, {reason}; it would be ignored in silence") })
}
