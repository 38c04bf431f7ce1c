//! What a factored checkpoint adds to `config.json`: the object `"lowkey"`, and from it the shapes of the factors.
//!
//! A layer's key/value heads stand in consecutive *groups*; a group of `s` heads shares one latent row of `rank` numbers, `z = x·A`, and its heads are
//! `z·B`. Tensors of layer `l`, beside the ecosystem's (`[out, in]`, as all linear weights):
//!
//! | tensor | shape | what |
//! |---|---|---|
//! | `self_attn.k_down.weight` | `[Σ key ranks, D]` | all groups' `Aᵀ`, stacked |
//! | `self_attn.k_up.{g}.weight` | `[s·head_dim, rank]` | group `g`'s `Bᵀ` |
//! | `self_attn.k_proj.bias` | `[H_kv·head_dim]` | added after the key is rebuilt |
//! | `self_attn.v_proj.weight` | `[Σ value ranks, D]` | all groups' `Aᵀ`, stacked |
//! | `self_attn.v_up.{g}.weight` | `[s·head_dim, rank]` | group `g`'s `Bᵀ`; absent where `fused` |
//! | `self_attn.o_proj.weight` | `[D, H·head_dim]`, or `[D, Σ over query heads of their group's rank]` where `fused` | |
//! | `self_attn.v_proj.bias` | `[H_kv·head_dim]` | added after the up-projection; where `fused` it is inside `o_proj.bias` |
//! | `self_attn.o_proj.bias` | `[D]` | optional |

use super::Config;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// Consecutive key/value heads that share a latent row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// How many heads, `s`.
    pub kv_heads: usize,
    /// The width of their row.
    pub rank: usize,
}

/// One layer's groups; those of either side cover all key/value heads in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FactoredLayer {
    /// Keys: rebuilt from their rows before RoPE.
    pub key_groups: Vec<Group>,
    /// Values: summed as rows.
    pub value_groups: Vec<Group>,
    /// Whether the values' up-projection is folded into `o_proj`.
    pub fused: bool,
}

/// The object `"lowkey"` of a factored checkpoint's `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Factored {
    /// Version of this format: [`Factored::FORMAT`].
    pub format: u32,
    /// The method's name, as `--method` takes it.
    pub method: String,
    /// The kept fraction that was asked for.
    pub keep: f64,
    /// The kept fraction that was achieved: cached numbers per token divided by the dense model's.
    pub achieved_keep: f64,
    /// Achieved bytes per token, with f16 rows.
    pub kv_bytes_per_token: u64,
    /// SHA-256 of the calibration text.
    pub calibration_digest: String,
    /// SHA-256 of the source checkpoint's weights file(s).
    pub source_digest: String,
    /// By layer.
    pub layers: Vec<FactoredLayer>,
}

impl Factored {
    /// The version written and read by this release.
    pub const FORMAT: u32 = 1;

    /// Reads the object `"lowkey"` of a `config.json`; `path` names the file in errors.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another version of the format, [`Error::Checkpoint`] where the object is incomplete or does not fit the model.
    pub fn from_json(value: &Value, config: &Config, path: &Path) -> Result<Factored> {
        let bad = |message: String| Error::Checkpoint { path: path.into(), message };
        // The version comes first: a later format may well differ in everything else.
        match value["format"].as_u64() {
            Some(format) if format == Factored::FORMAT as u64 => {}
            Some(format) => {
                let message =
                    format!("\"lowkey\" has format {format}, and this release reads {}; compress the model again with it", Factored::FORMAT);
                return Err(Error::Unsupported { path: path.into(), message });
            }
            None => return Err(bad("\"lowkey\" has no format version".into())),
        }
        let factored = Factored::deserialize(value).map_err(|e| bad(format!("\"lowkey\" cannot be read: {e}")))?;
        if factored.layers.len() != config.num_hidden_layers {
            return Err(bad(format!("\"lowkey\" describes {} layers of a model of {}", factored.layers.len(), config.num_hidden_layers)));
        }
        for (index, layer) in factored.layers.iter().enumerate() {
            for (side, groups) in [("key", &layer.key_groups), ("value", &layer.value_groups)] {
                check_groups(groups, config).map_err(|message| bad(format!("\"lowkey\": layer {index}: {side} groups: {message}")))?;
            }
        }
        Ok(factored)
    }
}

fn check_groups(groups: &[Group], config: &Config) -> Result<(), String> {
    let mut heads = 0usize;
    for (index, group) in groups.iter().enumerate() {
        heads = heads.saturating_add(group.kv_heads);
        if group.kv_heads == 0 || heads > config.num_key_value_heads {
            return Err(format!("group {index} has {} heads; all groups together have the model's {}", group.kv_heads, config.num_key_value_heads));
        }
        let most = group.kv_heads * config.head_dim;
        if group.rank == 0 || group.rank > most {
            return Err(format!("group {index} has rank {}; its {} heads allow 1 to {most}", group.rank, group.kv_heads));
        }
    }
    match heads == config.num_key_value_heads {
        true => Ok(()),
        false => Err(format!("they cover {heads} of {} heads", config.num_key_value_heads)),
    }
}
