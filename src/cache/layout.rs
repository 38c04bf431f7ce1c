//! What a row of the cache holds, per layer: which slice of it every key/value head reads, for keys and for values.

use crate::checkpoint::{Config, FactoredLayer, Group};
use crate::gpu::pad;

/// A run of a row that consecutive key/value heads share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// The first of these heads, and how many.
    pub first_head: usize,
    /// Heads that share the slice.
    pub kv_heads: usize,
    /// Where the slice begins in the row, in numbers; a multiple of four.
    pub at: usize,
    /// Numbers that mean something.
    pub rank: usize,
    /// Numbers stored: `rank` rounded up to four.
    pub width: usize,
}

/// One side (keys or values) of a layer's rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Side {
    /// The slices, in order; together they cover all key/value heads.
    pub slices: Vec<Slice>,
    /// Numbers stored per token.
    pub row: usize,
}

impl Side {
    fn new(groups: impl Iterator<Item = Group>) -> Side {
        let (mut slices, mut first_head, mut row) = (Vec::new(), 0, 0);
        for group in groups {
            let width = pad(group.rank);
            slices.push(Slice { first_head, kv_heads: group.kv_heads, at: row, rank: group.rank, width });
            first_head += group.kv_heads;
            row += width;
        }
        Side { slices, row }
    }

    /// The slice that a key/value head reads.
    pub fn of_head(&self, kv_head: usize) -> &Slice {
        let i = self.slices.partition_point(|s| s.first_head + s.kv_heads <= kv_head);
        &self.slices[i]
    }
}

/// A layer's rows: how keys are scored and values summed follows from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Keys: whole heads after RoPE (*direct*), or latent rows before it (*rebuilt*).
    pub keys: Side,
    /// Whether keys are direct.
    pub direct: bool,
    /// Values: whole heads, or latent rows.
    pub values: Side,
    /// Whether a summed value row still needs its up-projection. Otherwise it is the head itself, or the output projection takes it as it is.
    pub up: bool,
}

impl Layout {
    /// The layout of one layer: dense where there are no factors.
    pub fn new(config: &Config, factors: Option<&FactoredLayer>) -> Layout {
        let dense = || Side::new((0..config.num_key_value_heads).map(|_| Group { kv_heads: 1, rank: config.head_dim }));
        match factors {
            None => Layout { keys: dense(), direct: true, values: dense(), up: false },
            Some(f) => Layout {
                keys: Side::new(f.key_groups.iter().copied()),
                direct: false,
                values: Side::new(f.value_groups.iter().copied()),
                up: !f.fused,
            },
        }
    }

    /// Where each query head's sum begins when all are laid end to end, in numbers, and their total.
    pub fn sums(&self, config: &Config) -> (Vec<usize>, usize) {
        let mut total = 0;
        let at = (0..config.num_attention_heads).map(|head| {
            let at = total;
            total += self.values.of_head(head / config.group_size()).width;
            at
        });
        (at.collect(), total)
    }
}
