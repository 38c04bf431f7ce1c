//! The shape of a layer's attention.

use crate::gpu::pad;

/// Heads of a layer, and what is done with them besides.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads, `H`.
    pub heads: usize,
    /// Key/value heads, `H_kv`; divides `H`.
    pub kv_heads: usize,
    /// Numbers of a head, `d`; even.
    pub head_dim: usize,
    /// Keys further back than this are not attended to; `None` for all.
    pub window: Option<usize>,
    /// Whether query and key heads are normalised before RoPE.
    pub qk_norm: bool,
    /// That norm's epsilon.
    pub epsilon: f32,
}

impl AttentionShape {
    /// Attention of so many heads.
    pub(crate) fn of(qk_norm: bool, window: Option<usize>, heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
        AttentionShape { heads, kv_heads, head_dim, window, qk_norm, epsilon: 1e-5 }
    }

    /// Shapes as they occur.
    pub(super) fn examples() -> [AttentionShape; 5] {
        [
            AttentionShape::of(false, None, 9, 3, 64),
            AttentionShape::of(true, Some(100), 6, 3, 12),
            AttentionShape::of(true, None, 32, 8, 128),
            AttentionShape::of(false, Some(4096), 32, 32, 128),
            AttentionShape::of(true, None, 8, 2, 512),
        ]
    }

    /// Query heads that share a key/value head, `g`.
    pub fn group_size(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Numbers of a token's exact key, or value, each head padded to whole vectors.
    pub fn kv_row(&self) -> usize {
        self.kv_heads * pad(self.head_dim)
    }

    /// Numbers of a token's queries, each head padded to whole vectors.
    pub fn query_row(&self) -> usize {
        self.heads * pad(self.head_dim)
    }

    /// Numbers from one token to the next in a projection: query heads, key heads and value heads.
    pub fn projection_row(&self) -> usize {
        self.query_row() + 2 * self.kv_row()
    }
}
