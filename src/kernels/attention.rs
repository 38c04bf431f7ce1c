//! The shape of a layer's attention, and what its kernels hand on to each other.

use crate::gpu::{Tensor, pad};

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
    /// What is normalised of queries and keys.
    pub qk_norm: Option<HeadNorm>,
    /// That norm's epsilon.
    pub epsilon: f32,
    /// A score `s`, divided by `√d`, becomes `c·tanh(s / c)`.
    pub cap: Option<f32>,
    /// What queries are multiplied by, where they are.
    pub scaling: Option<QueryScaling>,
}

/// RMSNorm of queries and of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadNorm {
    /// Every head, before RoPE.
    Heads,
    /// Every head, after RoPE.
    RotatedHeads,
    /// All heads of a side together, before RoPE.
    Projection,
}

/// What queries are multiplied by after all else, for scores to be divided by `√d`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueryScaling {
    /// The first pairs of a head, and the others.
    pub scales: [f32; 2],
    /// How many the first are.
    pub pairs: u32,
    /// `[β, n]`: position `p` also by `1 + β·ln(1 + ⌊p / n⌋)`; `β` is 0 where it does not.
    pub temperature: [f32; 2],
}

impl AttentionShape {
    /// Attention of so many heads.
    pub(crate) fn of(qk_norm: bool, window: Option<usize>, heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
        AttentionShape { heads, kv_heads, head_dim, window, qk_norm: qk_norm.then_some(HeadNorm::Heads), epsilon: 1e-5, cap: None, scaling: None }
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

/// What the kernels of attention hand on to each other, f32 unless said.
///
/// Of a model, for all layers in turn. Clones are the same buffers.
#[derive(Clone)]
pub struct AttentionBuffers {
    /// Query heads, key heads and value heads
    /// `[n][`[`projection_row`](AttentionShape::projection_row)`]`.
    pub(crate) projected: Tensor,
    /// RoPE's [`rope_table`](super::rope_table).
    pub(crate) rope: Tensor,
    /// After RoPE `[n][H][pad(head_dim)]`, and behind those of a token the absorbed ones.
    pub(crate) queries: wgpu::Buffer,
    /// The number of `queries` from which on it stands what was too large for 16 bits:
    /// [`super::prepare::record_len`].
    pub(crate) record: u32,
    /// `[block tokens][H][columns]`.
    pub(crate) scores: wgpu::Buffer,
    /// Columns of scores.
    pub(crate) columns: usize,
    /// Of splits: sums of values, `[tokens][splits][`[`sums`](super::values::sums)`]`, and weights,
    /// `[tokens][splits][H]` pairs.
    pub(crate) sums: wgpu::Buffer,
    pub(crate) weights: wgpu::Buffer,
    /// `[n][H][pad(head_dim)]`.
    pub(crate) attended: Tensor,
    /// Scores of landmarks, `[H][chunks]`, and the tokens that are chosen by them, u32
    /// `[H_kv][`[`tokens`](crate::kv::Selection::tokens)`]`.
    pub(crate) landmarks: wgpu::Buffer,
    pub(crate) chosen: wgpu::Buffer,
    /// Rebuilt keys, f16 `[columns][H_kv][pad(head_dim)]`.
    pub(crate) rebuilt: wgpu::Buffer,
    /// Rows that stand for several tokens each: keys and values, f16
    /// `[columns][H_kv][pad(head_dim)]`, and how many tokens, u32 `[columns]`.
    pub(crate) counted: [wgpu::Buffer; 2],
    pub(crate) counts: wgpu::Buffer,
    /// Of one layer: a score for every query head that stands for no key, f32 `[H]`.
    pub(crate) head_sinks: Option<wgpu::Buffer>,
}

impl AttentionBuffers {
    /// Bytes in all.
    pub(crate) fn bytes(&self) -> u64 {
        let AttentionBuffers { projected, rope, queries, scores, sums, weights, attended, landmarks, chosen, rebuilt, counts, .. } = self;
        let all: [&wgpu::Buffer; 11] = [projected, rope, queries, scores, sums, weights, attended, landmarks, chosen, rebuilt, counts];
        all.into_iter().chain(&self.counted).map(|buffer| buffer.size()).sum()
    }
}
