//! One attention over cached rows, for dense and factored checkpoints.
//!
//! A layer caches two rows for a token, and differs in what they are and in what is done with them at reading:
//!
//! | | key row | scored as | value row | summed as |
//! |---|---|---|---|---|
//! | dense | `RoPE(norm(Wᵀx + b))`, all heads | `q · row` | `Wᵀx + b`, all heads | a head's slice of the row |
//! | factored | latent `z = Aᵀx`, a slice for each group of heads | `q · RoPE(norm(Bᵀz + b))`: rebuilt | latent `z = Aᵀx` likewise | its group's slice, then `Bᵀ(Σ p·z) + b` |
//!
//! The value bias may be added after the sum because the weights `p` sum to one. Where the output projection has swallowed `B` (`fused`), the summed
//! latents go straight into it. The softmax scale is `1/√head_dim` of the original head, whatever the width of a row.

use super::linear::{Linear, RmsNorm, add_to_columns};
use super::rope::Rope;
use super::rows::{RowType, Rows};
use crate::Result;
use crate::checkpoint::{Checkpoint, Group};
use crate::linalg::{tr_product, tr_product_into};
use nalgebra::{DMatrix, DVector};
use rayon::prelude::*;
use std::ops::Range;

/// Grouped-query attention with its projections.
pub(super) struct Attention {
    /// `d`.
    pub(super) head_dim: usize,
    /// Query heads for each key/value head, `g`.
    pub(super) group_size: usize,
    /// Keys at this distance or further back are not attended to.
    pub(super) window: usize,
    pub(super) query: Linear,
    pub(super) query_norm: Option<RmsNorm>,
    pub(super) key: Linear,
    pub(super) key_norm: Option<RmsNorm>,
    /// How a key is rebuilt from its row; `None` where the row is the key.
    key_up: Option<Up>,
    pub(super) value: Linear,
    /// By key/value head: its slice of a value row.
    value_slices: Vec<Range<usize>>,
    /// How a head's sum is brought back to `head_dim`; `None` where the output projection takes it as it is.
    value_up: Option<Up>,
    pub(super) output: Linear,
}

/// The up-projections of one side: `y = Bᵀz + b`, group by group.
struct Up {
    groups: Vec<UpGroup>,
    /// `[H_kv·d]`.
    bias: Option<DVector<f32>>,
}

struct UpGroup {
    /// The group's slice of a row.
    slice: Range<usize>,
    /// `B`, `[rank, s·d]`.
    weight: DMatrix<f32>,
}

/// What enters the attention of a dense layer, all heads stacked, a token per column.
pub struct Heads<'a> {
    /// `[H·d, tokens]`, after RoPE.
    pub queries: &'a DMatrix<f32>,
    /// `[H_kv·d, tokens]`, with bias and after QK-norm where the family has them, before RoPE.
    pub keys: &'a DMatrix<f32>,
    /// `[H_kv·d, tokens]`, after RoPE.
    pub turned_keys: &'a DMatrix<f32>,
    /// `[H_kv·d, tokens]`, with bias where the family has one.
    pub values: &'a DMatrix<f32>,
}

/// The cached rows of one layer.
pub(super) struct LayerRows {
    pub(super) keys: Rows,
    pub(super) values: Rows,
}

impl Attention {
    pub(super) fn load(checkpoint: &Checkpoint, layer: usize) -> Result<Attention> {
        let config = checkpoint.config();
        let (hidden, d, bias) = (config.hidden_size, config.head_dim, config.attention_bias);
        let (query_width, kv_width) = (config.num_attention_heads * d, config.num_key_value_heads * d);
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        let linear = |part: &str, inputs, outputs, bias| Linear::load(checkpoint, &name(part), inputs, outputs, bias);
        let head_norm = |part: &str| config.qk_norm.then(|| RmsNorm::load(checkpoint, &name(part), d)).transpose();
        let output = |inputs| linear("o_proj", inputs, hidden, checkpoint.has(&name("o_proj.bias")));

        let (key, key_up, value, value_slices, value_up, output) = match checkpoint.factored().map(|factored| &factored.layers[layer]) {
            None => {
                let slices = (0..config.num_key_value_heads).map(|head| head * d..(head + 1) * d).collect();
                (linear("k_proj", hidden, kv_width, bias)?, None, linear("v_proj", hidden, kv_width, bias)?, slices, None, output(query_width)?)
            }
            Some(factors) => {
                let rank = |groups: &[Group]| groups.iter().map(|group| group.rank).sum();
                let key = linear("k_down", hidden, rank(&factors.key_groups), false)?;
                let key_up = Up::load(checkpoint, &name("k_up"), &factors.key_groups, bias.then(|| name("k_proj.bias")))?;
                let value = linear("v_proj", hidden, rank(&factors.value_groups), false)?;
                let slices: Vec<_> = slices(&factors.value_groups)
                    .zip(&factors.value_groups)
                    .flat_map(|(slice, group)| std::iter::repeat_n(slice, group.kv_heads))
                    .collect();
                let (value_up, width) = if factors.fused {
                    (None, slices.iter().map(|slice| slice.len() * config.group_size()).sum())
                } else {
                    (Some(Up::load(checkpoint, &name("v_up"), &factors.value_groups, bias.then(|| name("v_proj.bias")))?), query_width)
                };
                (key, Some(key_up), value, slices, value_up, output(width)?)
            }
        };
        Ok(Attention {
            head_dim: d,
            group_size: config.group_size(),
            window: config.sliding_window.unwrap_or(usize::MAX),
            query: linear("q_proj", hidden, query_width, bias)?,
            query_norm: head_norm("q_norm")?,
            key,
            key_norm: head_norm("k_norm")?,
            key_up,
            value,
            value_slices,
            value_up,
            output,
        })
    }

    /// An empty cache for `capacity` tokens.
    pub(super) fn rows(&self, capacity: usize, row_type: RowType) -> LayerRows {
        LayerRows { keys: Rows::new(self.key.weight.ncols(), capacity, row_type), values: Rows::new(self.value.weight.ncols(), capacity, row_type) }
    }

    /// Numbers that a token adds to the cache.
    pub(super) fn row_width(&self) -> usize {
        self.key.weight.ncols() + self.value.weight.ncols()
    }

    /// Whether rows are keys and values themselves.
    pub(super) fn is_dense(&self) -> bool {
        self.key_up.is_none() && self.value_slices.iter().all(|slice| slice.len() == self.head_dim) && self.value_up.is_none()
    }

    /// Appends the rows of `x: [hidden, tokens]`, the first at `position`, and attends: `[hidden, tokens]`. `look` is shown the heads of a dense layer.
    pub(super) fn apply(
        &self,
        x: &DMatrix<f32>,
        position: usize,
        cache: &mut LayerRows,
        rope: &Rope,
        look: Option<&mut dyn FnMut(&Heads)>,
    ) -> DMatrix<f32> {
        let mut queries = self.query.apply(x);
        finish(&mut queries, &self.query_norm, rope, position);
        let mut key_rows = self.key.apply(x);
        let value_rows = self.value.apply(x);
        if self.key_up.is_none() {
            normalise(&mut key_rows, &self.key_norm);
            let keys = look.is_some().then(|| key_rows.clone());
            rope.turn(&mut key_rows, position);
            if let (Some(look), Some(keys)) = (look, keys) {
                look(&Heads { queries: &queries, keys: &keys, turned_keys: &key_rows, values: &value_rows });
            }
        }
        cache.keys.write(position, &key_rows);
        cache.values.write(position, &value_rows);

        let cached = position + x.ncols();
        let mut keys = cache.keys.read(cached);
        if let Some(up) = &self.key_up {
            keys = up.rebuild(&keys);
            finish(&mut keys, &self.key_norm, rope, 0);
        }
        let values = cache.values.read(cached);

        let d = self.head_dim;
        let heads: Vec<DMatrix<f32>> = (0..queries.nrows() / d)
            .into_par_iter()
            .map(|head| {
                let kv_head = head / self.group_size;
                let mut weights = tr_product(keys.rows(kv_head * d, d), queries.rows(head * d, d));
                causal_softmax(&mut weights, position, self.window, 1.0 / (d as f32).sqrt());
                let slice = &self.value_slices[kv_head];
                let sum = values.rows(slice.start, slice.len()) * weights;
                match &self.value_up {
                    Some(up) => up.rebuild_head(kv_head, d, &sum),
                    None => sum,
                }
            })
            .collect();
        self.output.apply(&stack(&heads))
    }
}

impl Up {
    /// Reads `{name}.{g}.weight`, `[s·d, rank]`, of every group.
    fn load(checkpoint: &Checkpoint, name: &str, groups: &[Group], bias: Option<String>) -> Result<Up> {
        let d = checkpoint.config().head_dim;
        let weight = |index: usize, group: &Group| -> Result<DMatrix<f32>> {
            let shape = [group.kv_heads * d, group.rank];
            Ok(DMatrix::from_vec(group.rank, shape[0], checkpoint.f32(&format!("{name}.{index}.weight"), &shape)?))
        };
        let heads: usize = groups.iter().map(|group| group.kv_heads).sum();
        Ok(Up {
            groups: slices(groups)
                .zip(groups)
                .enumerate()
                .map(|(index, (slice, group))| Ok(UpGroup { slice, weight: weight(index, group)? }))
                .collect::<Result<_>>()?,
            bias: bias.map(|name| checkpoint.f32(&name, &[heads * d]).map(DVector::from_vec)).transpose()?,
        })
    }

    /// All heads `[H_kv·d, tokens]` of `rows: [Σ ranks, tokens]`.
    fn rebuild(&self, rows: &DMatrix<f32>) -> DMatrix<f32> {
        let mut heads = DMatrix::zeros(self.groups.iter().map(|group| group.weight.ncols()).sum(), rows.ncols());
        let mut first = 0;
        for UpGroup { slice, weight } in &self.groups {
            tr_product_into(weight.as_view(), rows.rows(slice.start, slice.len()), heads.rows_mut(first, weight.ncols()));
            first += weight.ncols();
        }
        if let Some(bias) = &self.bias {
            add_to_columns(&mut heads, bias);
        }
        heads
    }

    /// One head `[d, tokens]` of its group's slice `rows: [rank, tokens]`.
    fn rebuild_head(&self, head: usize, d: usize, rows: &DMatrix<f32>) -> DMatrix<f32> {
        let mut within = head * d;
        let group = self.groups.iter().find(|group| {
            let here = within < group.weight.ncols();
            within -= if here { 0 } else { group.weight.ncols() };
            here
        });
        let weight = &group.expect("groups cover all heads").weight;
        let mut values = tr_product(weight.columns(within, d), rows.as_view());
        if let Some(bias) = &self.bias {
            add_to_columns(&mut values, &bias.rows(head * d, d).into_owned());
        }
        values
    }
}

/// Where each group's latents stand in a row.
fn slices(groups: &[Group]) -> impl Iterator<Item = Range<usize>> {
    groups.iter().scan(0, |end, group| {
        let start = *end;
        *end += group.rank;
        Some(start..*end)
    })
}

/// What follows a query or key projection: the norm of each head where the family has one, then RoPE from position `first` on.
pub(super) fn finish(heads: &mut DMatrix<f32>, norm: &Option<RmsNorm>, rope: &Rope, first: usize) {
    normalise(heads, norm);
    rope.turn(heads, first);
}

/// The norm of each head, where there is one.
fn normalise(heads: &mut DMatrix<f32>, norm: &Option<RmsNorm>) {
    if let Some(norm) = norm {
        norm.apply_to_runs(heads);
    }
}

/// Turns `scores: [cached, tokens]` into attention weights, column by column. The query of column `j` stands at `position + j`; it sees itself and the
/// `window − 1` tokens before it.
pub(super) fn causal_softmax(scores: &mut DMatrix<f32>, position: usize, window: usize, scale: f32) {
    for (j, mut column) in scores.column_iter_mut().enumerate() {
        let end = position + j + 1;
        let (past, rest) = column.as_mut_slice().split_at_mut(end);
        let (forgotten, seen) = past.split_at_mut(end.saturating_sub(window));
        forgotten.fill(0.0);
        rest.fill(0.0);
        let highest = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for score in seen.iter_mut() {
            *score = ((*score - highest) * scale).exp();
            sum += *score;
        }
        for weight in seen {
            *weight /= sum;
        }
    }
}

/// One under the other.
pub(super) fn stack(parts: &[DMatrix<f32>]) -> DMatrix<f32> {
    let mut whole = DMatrix::zeros(parts.iter().map(DMatrix::nrows).sum(), parts[0].ncols());
    let mut first = 0;
    for part in parts {
        whole.rows_mut(first, part.nrows()).copy_from(part);
        first += part.nrows();
    }
    whole
}
