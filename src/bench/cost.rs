//! What a decode step costs at the least: the bytes that must be moved and the multiplications that
//! must be made, counted from shapes.
//!
//! A step reads every weight of the layers and the head once, one row of the embedding, and every
//! cached row once. Per cached token it makes what [`Price`] says, and in a layer with `H` query
//! heads of width `d`:
//!
//! - where tokens are chosen: `2·H·d` for every landmark, one for two tokens, and the price for
//!   those chosen;
//! - where tokens are evicted: as dense for those that are exact and for every column of what is
//!   left of evicted tokens, and the price for rows that the others leave.
//!
//! One multiplication and one addition are two operations. Norms, RoPE, softmax and activations are
//! left out: they are below a hundredth of the rest.

use crate::Result;
use crate::checkpoint::{Checkpoint, Config, NormKind, QkNormOver};
use crate::kv::{Exact, LatentSet, LatentSpec, Price, Read, Selection, Stores};
use crate::sequence::{Sequence, SequenceOptions};

/// The least cost of a step, apart from how many tokens are cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of weights read.
    pub weight_bytes: u64,
    /// Operations with weights, whatever the depth.
    pub linear_flops: u64,
    /// Operations in attention for each cached token that is read.
    pub flops_per_cached_token: u64,
    /// Bytes of landmarks read, and operations with them, for each cached token.
    ///
    /// Nothing where all are read.
    pub landmarks: [u64; 2],
    /// The most coded tokens that are read.
    pub most: usize,
    /// Where tokens are evicted.
    pub eviction: Option<EvictionCost>,
}

/// What is read instead of all tokens where some are evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EvictionCost {
    /// Tokens that are exact at the most, and the bytes of one.
    pub kept: usize,
    /// See [`kept`](Self::kept).
    pub exact_bytes: u64,
    /// Operations for each exact token, and for each column of evicted tokens.
    pub exact_flops: u64,
    /// Columns that stand for evicted tokens, and bytes they are read from, in all layers.
    pub evicted: [u64; 2],
    /// Bytes of the row that each of the others leaves, if they leave any.
    pub row_bytes: u64,
}

/// What is known of the rows that a model comes with, beside what its sequences say.
///
/// Nothing where it is dense.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowsMade {
    /// What stays exact beside them.
    pub exact: Option<Exact>,
    /// By row, frequency pairs in which a mean rotates ([`LatentSet::mean_pairs`]).
    pub mean_pairs: Vec<usize>,
}

impl RowsMade {
    /// The rows of `checkpoint`.
    ///
    /// # Errors
    /// Those of reading their means.
    pub fn of(checkpoint: &Checkpoint) -> Result<RowsMade> {
        Ok(RowsMade { exact: checkpoint.factored().map(|factored| factored.exact), mean_pairs: checkpoint.mean_pairs()? })
    }
}

/// What weights take in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightBytes {
    /// Bytes of the matrices of all layers and the head.
    pub matrices: u64,
    /// Bytes of the embedding, of which a step reads one row; 0 where it is the head.
    pub embedding: u64,
    /// Bytes of each other number.
    pub number: u64,
}

impl WeightBytes {
    /// So many for each weight.
    pub fn each(config: &Config, bytes: u64) -> WeightBytes {
        WeightBytes { matrices: bytes * matrix_weights(config), embedding: bytes * embedding_weights(config), number: bytes }
    }

    /// Those of all weights of such a model.
    pub fn all(&self, config: &Config) -> u64 {
        self.matrices + self.embedding + self.number * (parameters(config) - matrix_weights(config) - embedding_weights(config))
    }
}

/// Weights of the matrices of all layers and the head that a step reads.
fn matrix_weights(config: &Config) -> u64 {
    let [d, heads, layers, vocab] = [config.hidden_size, config.num_attention_heads, config.num_hidden_layers, config.vocab_size].map(|n| n as u64);
    let q_width = heads * config.head_dim as u64;
    let kv_width = (config.num_key_value_heads * config.head_dim) as u64;
    let [read, _] = mlp_weights(config);
    layers * (2 * d * q_width + 2 * d * kv_width + read) + vocab * d
}

/// Weights of the MLP of a layer, or of its experts and their router: those that a step reads, and
/// all others.
fn mlp_weights(config: &Config) -> [u64; 2] {
    let matrices = if config.design.mlp.gate.is_some() { 3 } else { 2 };
    let d = config.hidden_size as u64;
    let of_width = |width: usize| matrices * d * width as u64;
    let Some(experts) = &config.design.experts else { return [of_width(config.intermediate_size), 0] };
    let (each, shared) = (of_width(experts.width), experts.shared.map_or(0, |width| of_width(width) + d));
    [experts.chosen as u64 * each + shared + experts.count as u64 * d, (experts.count - experts.chosen) as u64 * each]
}

/// Weights of the embedding where it is another matrix than the head.
fn embedding_weights(config: &Config) -> u64 {
    if config.tie_word_embeddings { 0 } else { (config.vocab_size * config.hidden_size) as u64 }
}

/// All weights of a dense model of this shape: its matrices, its embedding, its norms and biases.
pub fn parameters(config: &Config) -> u64 {
    let [d, layers, heads, kv_heads, head] =
        [config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim].map(|n| n as u64);
    let design = &config.design;
    let gates = if design.mlp.gate.is_some() { 2 } else { 1 };
    let (count, width) = design.experts.map_or((1, config.intermediate_size), |experts| (experts.count as u64, experts.width));
    let mlp = count * (width as u64 * gates + d) + if design.experts.is_some() { count } else { 0 };
    let biases = [(design.attention_bias, (heads + 2 * kv_heads) * head), (design.mlp.bias, mlp), (design.sinks, heads)];
    let biases: u64 = biases.into_iter().filter_map(|(any, count)| any.then_some(count)).sum();
    // LayerNorm has a bias beside each gain.
    let norm = d * if design.norm == NormKind::Layer { 2 } else { 1 };
    let qk_norm = match design.qk_norm.map(|norm| norm.over) {
        None => 0,
        Some(QkNormOver::Projection) => (heads + kv_heads) * head,
        Some(_) => 2 * head,
    };
    let norms = norm * design.norms.names().count() as u64 + qk_norm;
    let [_, unread] = mlp_weights(config);
    matrix_weights(config) + embedding_weights(config) + layers * (norms + biases + unread) + norm
}

/// Counts what a decode step costs at the least, after the prompt.
///
/// `made`: the rows that the model comes with; its weights take `weights` in memory.
pub fn step_cost(config: &Config, options: SequenceOptions, made: RowsMade, weights: WeightBytes) -> impl Fn(&dyn Sequence) -> Cost + 'static {
    let (config, exact) = (config.clone(), options.exact.or(made.exact).unwrap_or_default());
    move |sequence| {
        let (rows, capacity) = (sequence.rows(), sequence.capacity());
        let cost = Cost::of(&config, (rows, &made.mean_pairs), options.method.read(), weights);
        let exact = Exact { sinks: exact.sinks.min(capacity), recent: exact.recent.min(capacity) };
        // A sequence whose stores are refused was never made.
        match options.method.eviction().and_then(|eviction| eviction.stores(&config.geometry(), rows, exact, capacity).ok()) {
            Some(stores) => cost.eviction(&config, &stores, exact, rows),
            None => cost,
        }
    }
}

impl Cost {
    /// Counts from a model's shapes, its latents and how many tokens are read.
    ///
    /// Latents are none where the model is dense; frequency pairs are as [`Price::of`] takes them;
    /// weights take `weights`.
    pub fn of(config: &Config, (rows, mean_pairs): (&[LatentSpec], &[usize]), read: Read, weights: WeightBytes) -> Cost {
        let (d, layers) = (config.hidden_size as u64, config.num_hidden_layers as u64);
        let q_width = (config.num_attention_heads * config.head_dim) as u64;
        let matrices = matrix_weights(config);
        // The norm at the end has the width of one more row.
        let price = Price::of(rows, mean_pairs, &config.geometry());
        let (chunk, select) = (Selection::CHUNK as u64, read.selection());
        Cost {
            weight_bytes: weights.matrices + (d + price.basis_numbers) * weights.number,
            linear_flops: 2 * matrices + price.flops_per_step,
            flops_per_cached_token: price.flops_per_cached_token,
            landmarks: select.map_or([0, 0], |_| {
                let words = config.num_key_value_heads * Selection::format(config.head_dim).words();
                [layers * 4 * words as u64 / chunk, layers * 2 * q_width / chunk]
            }),
            most: select.map_or(usize::MAX, |selection| selection.listed(usize::MAX)),
            eviction: None,
        }
    }

    /// The same for a sequence that evicts.
    ///
    /// `stores` has room for some tokens beside those that stay `exact`.
    pub fn eviction(self, config: &Config, stores: &Stores, exact: Exact, rows: &[LatentSpec]) -> Cost {
        let layers = config.num_hidden_layers as u64;
        let exact_flops = 4 * layers * (config.num_attention_heads * config.head_dim) as u64;
        let kept = exact.sinks + exact.recent + Exact::BLOCK / 2 + stores.candidates;
        let evicted = [stores.evicted_columns() as u64, layers * stores.evicted_bytes() as u64];
        Cost {
            eviction: Some(EvictionCost {
                kept,
                exact_bytes: config.dense_kv_bytes_per_token(),
                exact_flops,
                evicted,
                row_bytes: LatentSet::bytes_per_token(rows),
            }),
            ..self
        }
    }

    /// Bytes that a step moves at `depth`, where a token takes so many.
    ///
    /// Where tokens are evicted it is counted what each of them takes.
    pub fn bytes(&self, depth: usize, kv_bytes_per_token: u64) -> u64 {
        if let Some(EvictionCost { kept, exact_bytes, evicted, row_bytes, .. }) = self.eviction {
            let exact = depth.min(kept);
            let others = match (depth - exact, row_bytes) {
                (0, _) => 0,
                (_, 0) => evicted[1],
                (others, row) => others as u64 * row,
            };
            return self.weight_bytes + exact as u64 * exact_bytes + others;
        }
        let [landmarks, _] = self.landmarks;
        let rows = kv_bytes_per_token.saturating_sub(landmarks);
        self.weight_bytes + depth.min(self.most) as u64 * rows + depth as u64 * landmarks
    }

    /// Operations that a step makes at `depth`.
    pub fn flops(&self, depth: usize) -> u64 {
        if let Some(EvictionCost { kept, exact_flops, evicted, row_bytes, .. }) = self.eviction {
            let exact = depth.min(kept);
            let others = match (depth - exact, row_bytes) {
                (0, _) => 0,
                (_, 0) => evicted[0] * exact_flops,
                (others, _) => others as u64 * self.flops_per_cached_token,
            };
            return self.linear_flops + exact as u64 * exact_flops + others;
        }
        self.linear_flops + depth.min(self.most) as u64 * self.flops_per_cached_token + depth as u64 * self.landmarks[1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Design, QkNorm};
    use crate::kv::{Evicted, Format, LatentKind};

    fn config() -> Config {
        Config { hidden_size: 10, intermediate_size: 20, head_dim: 8, ..Config::example() }
    }

    fn rows(kind: LatentKind) -> Vec<LatentSpec> {
        let row = |first_layer, kind, runs| LatentSpec { first_layer, layers: 1, kind, first_head: 0, kv_heads: 2, format: Format::half(runs) };
        (0..2).flat_map(|layer| [row(layer, kind, 2), row(layer, LatentKind::Values, 1)]).collect()
    }

    #[test]
    fn a_dense_model_is_counted_by_hand() {
        let cost = Cost::of(&config(), (&[], &[]), Read::All, WeightBytes::each(&config(), 2));
        // Query 10×32, key and value 10×16 each, output 32×10, MLP 3×10×20; twice. Head 100×10 and
        // one embedding row.
        let matrices = 2 * (320 + 320 + 320 + 600) + 1000;
        assert_eq!(cost.weight_bytes, 2 * (matrices + 10));
        assert_eq!(cost.flops(0), 2 * matrices);
        assert_eq!(cost.flops(5) - cost.flops(4), 2 * 4 * 32);
        assert_eq!(cost.bytes(3, 128) - cost.bytes(0, 128), 384);
    }

    #[test]
    fn all_weights_are_counted() {
        // As llama.cpp counts SmolLM2-135M.
        let config = crate::bench::Shape::M135.config();
        assert_eq!(parameters(&config), 134_515_008);
        assert_eq!(WeightBytes::each(&config, 2).all(&config), 2 * 134_515_008);
        let design = Design { qk_norm: Some(QkNorm::HEADS), attention_bias: true, ..config.design.clone() };
        let untied = Config { tie_word_embeddings: false, design, ..config.clone() };
        let (head, layers) = (49_152 * 576, 30);
        assert_eq!(parameters(&untied), parameters(&config) + head + layers * (2 * 64 + (9 + 2 * 3) * 64));
        assert_eq!(WeightBytes::each(&untied, 1).all(&untied), parameters(&untied));
    }

    #[test]
    fn a_factored_model_is_counted_by_hand() {
        let dense = Cost::of(&config(), (&[], &[]), Read::All, WeightBytes::each(&config(), 1));
        // Two heads of eight from ranks of 32 and 16, in two layers; four query heads.
        let ups = [16 * 32, 16 * 16];
        let rebuilt = Cost::of(&config(), (&rows(LatentKind::PreRopeKeys), &[]), Read::All, WeightBytes::each(&config(), 1));
        assert_eq!(rebuilt.weight_bytes, dense.weight_bytes + 2 * (ups[0] + ups[1]));
        assert_eq!(rebuilt.flops(0), dense.flops(0) + 2 * 2 * 2 * ups[1]);
        assert_eq!(rebuilt.flops_per_cached_token, 2 * 2 * (ups[0] + 4 * 8 + 4 * 16));
        let direct = Cost::of(&config(), (&rows(LatentKind::PostRopeKeys), &[]), Read::All, WeightBytes::each(&config(), 1));
        assert_eq!(direct.weight_bytes, rebuilt.weight_bytes);
        assert_eq!(direct.flops(0), dense.flops(0) + 2 * 2 * 2 * (ups[0] + ups[1]));
        assert_eq!(direct.flops_per_cached_token, 2 * 2 * (4 * 32 + 4 * 16));
        // A mean that rotates in three pairs, scored by two query heads.
        let mean_pairs = Cost::of(&config(), (&rows(LatentKind::PostRopeKeys), &[3]), Read::All, WeightBytes::each(&config(), 1));
        assert_eq!(mean_pairs.flops_per_cached_token, direct.flops_per_cached_token + 2 * 2 * 2 * 3);
        assert_eq!(mean_pairs.weight_bytes, direct.weight_bytes + 2 * 3);
    }

    #[test]
    fn evicted_tokens_are_not_read() {
        let exact = Exact { sinks: 4, recent: 12 };
        let dense = Cost::of(&config(), (&[], &[]), Read::All, WeightBytes::each(&config(), 1));
        let stores = |evicted| Stores::some(2 * config().geometry().kv_width(), evicted, 20, 5, 400);
        // 4, 12 and half a block are exact, and 20 candidates.
        let none = dense.eviction(&config(), &stores(Evicted::None), exact, &[]);
        assert_eq!((none.bytes(52, 9), none.bytes(300, 9)), (dense.bytes(52, 128), dense.bytes(52, 128)));
        assert_eq!(none.flops(300), dense.flops(52));
        // Two columns a bucket, of 32 sums of four bytes in two layers; and as long a mean.
        let shrunk = dense.eviction(&config(), &stores(Evicted::Shrunk), exact, &[]);
        assert_eq!(shrunk.bytes(40, 9), dense.bytes(40, 128));
        assert_eq!(shrunk.bytes(300, 9), dense.bytes(52, 128) + 2 * 6 * 4 * 32);
        assert_eq!(shrunk.flops(300), dense.flops(62));
        let coded = Cost::of(&config(), (&rows(LatentKind::PreRopeKeys), &[]), Read::All, WeightBytes::each(&config(), 1));
        let eviction = coded.eviction(&config(), &stores(Evicted::Rows), exact, &rows(LatentKind::PreRopeKeys));
        assert_eq!(eviction.bytes(300, 9), coded.weight_bytes + 52 * 128 + 248 * 192);
        assert_eq!(eviction.flops(300), coded.flops(248) + 52 * 2 * 4 * 32);
    }

    #[test]
    fn what_is_chosen_is_read_and_every_landmark() {
        let all = Cost::of(&config(), (&rows(LatentKind::PreRopeKeys), &[]), Read::All, WeightBytes::each(&config(), 1));
        let some = Cost::of(&config(), (&rows(LatentKind::PreRopeKeys), &[]), Read::top(Some(64)), WeightBytes::each(&config(), 1));
        // 64 tokens; two layers' landmarks of two heads, three words each for two tokens, scored by
        // four heads of eight.
        assert_eq!(some.bytes(800, 200), all.weight_bytes + 64 * (200 - 24) + 800 * 24);
        assert_eq!(some.flops(800), all.flops(64) + 800 * 2 * 2 * 32 / 2);
        assert_eq!(some.flops(40) - all.flops(40), 40 * 2 * 2 * 32 / 2);
    }
}
