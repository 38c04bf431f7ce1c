//! What of a model's shape its cache depends on.

/// Layers and attention heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Layers.
    pub layers: usize,
    /// Query heads of a layer, `H`.
    pub heads: usize,
    /// Key/value heads of a layer, `H_kv`; divides `H`.
    pub kv_heads: usize,
    /// Numbers of a head, `d`; even.
    pub head_dim: usize,
}

impl Geometry {
    /// Query heads that share a key/value head, `g`.
    pub fn group_size(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Numbers of a token's key, or value, in one layer, `n`.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Bytes that a token takes in an exact f16 cache, over all layers.
    pub fn dense_bytes_per_token(&self) -> u64 {
        (2 * 2 * self.layers * self.kv_width()) as u64
    }
}
