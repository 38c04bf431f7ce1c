//! Grouped-query attention over a sequence's cached keys and values, whatever they are kept as
//! ([`super::cache`]). The softmax scale is `1/√head_dim` of the original head.
//!
//! Where the family has a soft cap, what it leaves of a score is what the softmax sees; where heads
//! have attention sinks, a weight for nothing joins its sum.

use super::absorb::Absorbed;
use super::activation::soft_cap;
use super::columns::Columns;
use super::linear::{Linear, Source};
use super::rope::Ropes;
use super::turn::Turn;
use crate::Result;
use crate::kv::fade;
use crate::linalg::{product, stack, tr_product};
use crate::logits::exponential::exp;
use nalgebra::{DMatrix, DMatrixView, DVector};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Grouped-query attention with its projections.
pub(super) struct Attention {
    /// `d`.
    pub(super) head_dim: usize,
    /// Query heads for each key/value head, `g`.
    pub(super) group_size: usize,
    /// Keys at this distance or further back are not attended to.
    pub(super) window: usize,
    /// What scores, as the softmax has them, are capped at.
    pub(super) cap: Option<f32>,
    /// What the softmax has besides its scores, by head.
    pub(super) sinks: Option<Vec<f32>>,
    pub(super) query: Linear,
    pub(super) query_turn: Turn,
    pub(super) key: Linear,
    pub(super) key_turn: Turn,
    pub(super) value: Linear,
    pub(super) output: Linear,
}

/// What enters the attention of a layer, all heads stacked, a token per column.
pub struct Heads<'a> {
    /// `[H·d, tokens]`, after RoPE, and scaled so that scores are `q·k/√d`.
    pub queries: &'a DMatrix<f32>,
    /// `[H_kv·d, tokens]`, with bias and after QK-norm where the family has them, before RoPE.
    pub keys: &'a DMatrix<f32>,
    /// `[H_kv·d, tokens]`, after RoPE.
    pub post_rope_keys: &'a DMatrix<f32>,
    /// `[H_kv·d, tokens]`, with bias where the family has one.
    pub values: &'a DMatrix<f32>,
}

impl Attention {
    pub(super) fn load(source: Source, layer: usize) -> Result<Attention> {
        let checkpoint = source.checkpoint;
        let config = checkpoint.config();
        let (hidden, d, bias) = (config.hidden_size, config.head_dim, config.design.attention_bias);
        let (query_width, kv_width) = (config.num_attention_heads * d, config.num_key_value_heads * d);
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        let linear = |part: &str, inputs, outputs, bias| Linear::load(source, &name(part), [outputs, inputs], bias);
        Ok(Attention {
            head_dim: d,
            group_size: config.group_size(),
            window: config.layers[layer].window.unwrap_or(usize::MAX),
            cap: config.design.attention_cap,
            sinks: config.design.sinks.then(|| checkpoint.f32(&name("sinks"), &[config.num_attention_heads])).transpose()?,
            query: linear("q_proj", hidden, query_width, bias)?,
            query_turn: Turn::load(checkpoint, layer, 0)?,
            key: linear("k_proj", hidden, kv_width, bias)?,
            key_turn: Turn::load(checkpoint, layer, 1)?,
            value: linear("v_proj", hidden, kv_width, bias)?,
            output: linear("o_proj", query_width, hidden, checkpoint.has(&name("o_proj.bias")))?,
        })
    }

    /// Queries, keys and values, `[heads·d, tokens]` each, of `x: [hidden, tokens]`, whose first
    /// token stands at `position`; the first two normalised and rotated. `look` is shown them on
    /// the way.
    pub(super) fn project(&self, x: &DMatrix<f32>, position: usize, ropes: &Ropes, look: Option<&mut dyn FnMut(&Heads)>) -> [DMatrix<f32>; 3] {
        let queries = self.query_turn.apply(self.query.apply(x), ropes, position);
        let (keys, values) = (self.key.apply(x), self.value.apply(x));
        let Some(look) = look else { return [queries, self.key_turn.apply(keys, ropes, position), values] };
        let [before, keys] = self.key_turn.apply_both(keys, ropes, position);
        look(&Heads { queries: &queries, keys: &before, post_rope_keys: &keys, values: &values });
        [queries, keys, values]
    }

    /// `[hidden, tokens]` of queries from `position` on, and where the sequence evicts, what each
    /// column received over all heads and queries. Columns that are `absorbed` follow the others.
    pub(super) fn attend(&self, queries: &DMatrix<f32>, position: usize, cached: &Columns, absorbed: Option<&Absorbed>) -> (DMatrix<f32>, Vec<f32>) {
        let (d, tokens) = (self.head_dim, queries.ncols());
        let heads = queries.nrows() / d;
        // What a query gives fades until the last of them.
        let later = DVector::from_fn(tokens, |j, _| fade(tokens - 1 - j));
        let by_line = DMatrixView::from_slice(queries.as_slice(), d, heads * tokens);
        let more = absorbed.map(|absorbed| absorbed.scores(by_line, [heads, self.group_size]));
        let rows = cached.keys.ncols();
        let of_head = |head: usize| {
            let first = head / self.group_size * d;
            let mut weights = tr_product(cached.keys.rows(first, d), queries.rows(head * d, d));
            if let Some(more) = &more {
                weights = weights.resize_vertically(rows + more.ncols(), 0.0);
                for (token, mut column) in weights.column_iter_mut().enumerate() {
                    column.rows_mut(rows, more.ncols()).tr_copy_from(&more.row(token * heads + head));
                }
            }
            self.cap(&mut weights);
            cached.multiply(&mut weights, d);
            self.softmax(&mut weights, position, cached, head);
            let received = cached.evicted.is_some().then(|| &weights * &later);
            (product(cached.values.rows(first, d), weights.rows(0, rows)), (received, weights))
        };
        let (sums, (received, weights)): (Vec<_>, (Vec<_>, Vec<_>)) = (0..heads).into_par_iter().map(of_head).unzip();
        let mut attended = stack(&sums);
        if let Some(absorbed) = absorbed {
            let by_line = DMatrix::from_fn(heads * tokens, absorbed.len(), |line, column| weights[line % heads][(rows + column, line / heads)]);
            let mut sums = DMatrix::from_vec(d, heads * tokens, attended.data.into());
            absorbed.add_values(&by_line, [heads, self.group_size], &mut sums);
            attended = DMatrix::from_vec(heads * d, tokens, sums.data.into());
        }
        let received = received.into_iter().flatten().reduce(|sum: DVector<f32>, head| sum + head);
        (self.output.apply(&attended), received.map_or(Vec::new(), |received| received.data.into()))
    }

    /// Caps scores that are still to be divided by `√head_dim`.
    pub(super) fn cap(&self, scores: &mut DMatrix<f32>) {
        if let Some(cap) = self.cap {
            let root = (self.head_dim as f32).sqrt();
            scores.apply(|score| *score = root * soft_cap(cap, *score / root).0);
        }
    }

    /// The sink of a head.
    pub(super) fn sink(&self, head: usize) -> Option<f32> {
        self.sinks.as_ref().map(|sinks| sinks[head])
    }

    /// Turns `scores: [columns, tokens]` of a head into attention weights, column by column, over
    /// what each query sees.
    fn softmax(&self, scores: &mut DMatrix<f32>, position: usize, cached: &Columns, head: usize) {
        let (scale, kv_head) = (1.0 / (self.head_dim as f32).sqrt(), head / self.group_size);
        let sink = self.sink(head).map_or(f32::NEG_INFINITY, |sink| sink / scale);
        for (j, mut column) in scores.column_iter_mut().enumerate() {
            let (seen, scores) = (cached.seen(position + j, self.window, kv_head), column.as_mut_slice());
            let highest = seen.iter().flat_map(|range| &scores[range.clone()]).copied().fold(sink, f32::max);
            let mut sum = ((sink - highest) * scale).exp();
            for range in &seen {
                Arch::new().dispatch(Exponentials { scores: &mut scores[range.clone()], highest, scale });
                sum += scores[range.clone()].iter().sum::<f32>();
            }
            let mut next = 0;
            for range in seen {
                scores[next..range.start].fill(0.0);
                scores[range.clone()].iter_mut().for_each(|weight| *weight /= sum);
                next = range.end;
            }
            scores[next..].fill(0.0);
        }
    }
}

/// `e^(scale·(s − highest))` for every score, compiled for every instruction set.
struct Exponentials<'a> {
    scores: &'a mut [f32],
    highest: f32,
    scale: f32,
}

impl WithSimd for Exponentials<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Exponentials { scores, highest, scale } = self;
        for score in scores {
            let x = (*score - highest) * scale;
            *score = if x.is_nan() { x } else { exp(x) };
        }
    }
}

/// Turns `scores: [cached, tokens]` into attention weights, column by column. The query of column
/// `j` stands at `position + j`; it sees itself and the `window − 1` tokens before it, and a sink
/// if the head has one.
pub(super) fn causal_softmax(scores: &mut DMatrix<f32>, position: usize, window: usize, scale: f32, sink: Option<f32>) {
    let sink = sink.map_or(f32::NEG_INFINITY, |sink| sink / scale);
    for (j, mut column) in scores.column_iter_mut().enumerate() {
        let end = position + j + 1;
        let (past, rest) = column.as_mut_slice().split_at_mut(end);
        let (forgotten, seen) = past.split_at_mut(end.saturating_sub(window));
        forgotten.fill(0.0);
        rest.fill(0.0);
        let highest = seen.iter().copied().fold(sink, f32::max);
        Arch::new().dispatch(Exponentials { scores: seen, highest, scale });
        let sum = ((sink - highest) * scale).exp() + seen.iter().sum::<f32>();
        for weight in seen {
            *weight /= sum;
        }
    }
}
