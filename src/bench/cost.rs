//! What a decode step costs at the least: the bytes that must be moved and the multiplications that must be made, counted from shapes.
//!
//! A step reads every weight of the layers and the head once, one row of the embedding, and every cached row once. Per cached token it makes, in a layer
//! with `H` query heads of width `d`:
//!
//! - dense: `2·H·d` operations for scores and as many for values;
//! - rebuilt keys: first `2·Σ rank·s·d` to rebuild the keys of each group of `s` heads, then `2·H·d` for scores;
//! - values summed as rows: `2·Σ rank` over query heads, each with its group's rank.
//!
//! One multiplication and one addition are two operations. Norms, RoPE, softmax and activations are left out: they are below a hundredth of the rest.

use crate::checkpoint::{Config, Factored, FactoredLayer, Group};

/// The least cost of a step, apart from how many tokens are cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of weights read.
    pub weight_bytes: u64,
    /// Operations with weights, whatever the depth.
    pub linear_flops: u64,
    /// Operations in attention for each cached token.
    pub flops_per_cached_token: u64,
}

impl Cost {
    /// Counts from a model's shapes, with `bytes_per_weight` bytes for each weight.
    pub fn of(config: &Config, factored: Option<&Factored>, bytes_per_weight: u64) -> Cost {
        let [d, i, heads, layers, vocab] =
            [config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_hidden_layers, config.vocab_size].map(|n| n as u64);
        let q_width = heads * config.head_dim as u64;
        let kv_width = (config.num_key_value_heads * config.head_dim) as u64;

        // Per layer: numbers in weights, operations with them, operations per cached token.
        let common = d * q_width + 3 * d * i;
        let mut weights = layers * common + vocab * d + d;
        let mut linear = 2 * (layers * common + vocab * d);
        let mut attention = 0;
        for layer in 0..config.num_hidden_layers {
            let (layer_weights, layer_linear, per_token) = match factored.and_then(|f| f.layers.get(layer)) {
                None => {
                    let projections = 2 * d * kv_width + q_width * d;
                    (projections, 2 * projections, 4 * q_width)
                }
                Some(factors) => attention_of(config, factors),
            };
            weights += layer_weights;
            linear += layer_linear;
            attention += per_token;
        }
        Cost { weight_bytes: weights * bytes_per_weight, linear_flops: linear, flops_per_cached_token: attention }
    }

    /// Bytes that a step moves at `depth`.
    pub fn bytes(&self, depth: usize, kv_bytes_per_token: u64) -> u64 {
        self.weight_bytes + depth as u64 * kv_bytes_per_token
    }

    /// Operations that a step makes at `depth`.
    pub fn flops(&self, depth: usize) -> u64 {
        self.linear_flops + depth as u64 * self.flops_per_cached_token
    }
}

/// A factored layer's key, value and output side: numbers in weights, operations with them, operations per cached token.
fn attention_of(config: &Config, layer: &FactoredLayer) -> (u64, u64, u64) {
    let (d, head) = (config.hidden_size as u64, config.head_dim as u64);
    let q_width = config.num_attention_heads as u64 * head;
    let group_size = config.group_size() as u64;
    let ranks = |groups: &[Group]| groups.iter().map(|g| g.rank as u64).sum::<u64>();
    let up = |groups: &[Group]| groups.iter().map(|g| g.rank as u64 * g.kv_heads as u64 * head).sum::<u64>();
    // The width of all query heads' sums: each has its group's rank.
    let summed: u64 = layer.value_groups.iter().map(|g| g.rank as u64 * g.kv_heads as u64 * group_size).sum();

    let down = (ranks(&layer.key_groups) + ranks(&layer.value_groups)) * d;
    let (value_up, value_up_use, output) = if layer.fused { (0, 0, summed * d) } else { (up(&layer.value_groups), summed * head, q_width * d) };
    let weights = down + up(&layer.key_groups) + value_up + output;
    let linear = 2 * (down + value_up_use + output);
    let per_token = 2 * (up(&layer.key_groups) + q_width + summed);
    (weights, linear, per_token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Architecture, RopeScaling};

    fn config() -> Config {
        Config {
            architecture: Architecture::Llama,
            hidden_size: 10,
            intermediate_size: 20,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 8,
            vocab_size: 100,
            max_position_embeddings: 64,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            tie_word_embeddings: true,
            attention_bias: false,
            qk_norm: false,
            sliding_window: None,
            bos_token_id: None,
            eos_token_ids: vec![],
        }
    }

    fn factored(fused: bool) -> Factored {
        let layer = FactoredLayer { key_groups: vec![Group { kv_heads: 2, rank: 6 }], value_groups: vec![Group { kv_heads: 1, rank: 3 }; 2], fused };
        Factored {
            format: Factored::FORMAT,
            method: "recalkv".into(),
            keep: 0.5,
            achieved_keep: 0.5,
            kv_bytes_per_token: 0,
            calibration_digest: String::new(),
            source_digest: String::new(),
            layers: vec![layer.clone(), layer],
        }
    }

    #[test]
    fn a_dense_model_is_counted_by_hand() {
        let cost = Cost::of(&config(), None, 2);
        // Query 10×32, key and value 10×16 each, output 32×10, MLP 3×10×20; twice. Head 100×10 and one embedding row.
        let matrices = 2 * (320 + 320 + 320 + 600) + 1000;
        assert_eq!(cost.weight_bytes, 2 * (matrices + 10));
        assert_eq!(cost.flops(0), 2 * matrices);
        assert_eq!(cost.flops(5) - cost.flops(4), 2 * 4 * 32);
        assert_eq!(cost.bytes(3, 128) - cost.bytes(0, 128), 384);
    }

    #[test]
    fn a_factored_model_is_counted_by_hand() {
        let shared = 320 + 600 + (6 + 6) * 10;
        let apart = Cost::of(&config(), Some(&factored(false)), 1);
        // Key up 6×16; value up twice 3×8, used by two query heads each; output 32×10.
        assert_eq!(apart.weight_bytes, 2 * (shared + 96 + 48 + 320) + 1010);
        assert_eq!(apart.flops(0), 2 * (2 * (shared + 4 * 3 * 8 + 320) + 1000));
        let fused = Cost::of(&config(), Some(&factored(true)), 1);
        assert_eq!(fused.weight_bytes, 2 * (shared + 96 + 12 * 10) + 1010);
        // Rebuild 6×16, score 4×8, sum 4×3.
        assert_eq!(fused.flops_per_cached_token, 2 * 2 * (96 + 32 + 12));
        assert_eq!(fused.flops_per_cached_token, apart.flops_per_cached_token);
    }
}
