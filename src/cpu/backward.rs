//! The backward pass: how a loss depends on the keys and values of every layer.
//!
//! A window of text runs forward once, under the eyes of an observer that keeps the residual stream
//! ([`Residuals`]). On the way back each layer computes again what it needs besides, so that memory
//! grows with the stream alone, and hands over its [`LayerGradients`]. It is the chain rule, layer
//! by layer, in f32.
//!
//! A cache that keeps the first tokens and the newest as they are disturbs a key or value only for
//! queries that are further away. [`Exact`] says which: the gradients handed over pass through such
//! queries alone, while what flows on to the layers below is complete, as those see every
//! disturbance of the layers above undone.

use super::activation::soft_cap;
use super::attention::{Attention, causal_softmax};
use super::rope::Ropes;
use super::{ByLayer, Model, Observer};
use crate::Result;
use crate::checkpoint::Config;
use crate::kv::Exact;
use crate::linalg::{outer_products, product, stack, tr_product};
use nalgebra::DMatrix;
use rayon::prelude::*;

/// The residual stream of one window, before each of its RMSNorms.
pub struct Residuals {
    /// As [`Observer::residual`] numbers them, `[hidden_size, tokens]` each.
    states: Vec<DMatrix<f32>>,
}

impl Residuals {
    /// Room for `tokens` tokens of a model.
    pub fn new(config: &Config, tokens: usize) -> Residuals {
        Residuals { states: vec![DMatrix::zeros(config.hidden_size, tokens); 2 * config.num_hidden_layers + 1] }
    }

    /// Tokens that there is room for.
    pub fn tokens(&self) -> usize {
        self.output().ncols()
    }

    /// What enters `layer`.
    pub(super) fn before_attention(&self, layer: usize) -> &DMatrix<f32> {
        &self.states[2 * layer]
    }

    /// What enters the MLP of `layer`.
    fn before_mlp(&self, layer: usize) -> &DMatrix<f32> {
        &self.states[2 * layer + 1]
    }

    /// What leaves the last layer, `[hidden_size, tokens]`.
    pub fn output(&self) -> &DMatrix<f32> {
        &self.states[self.states.len() - 1]
    }
}

impl Observer for Residuals {
    /// # Panics
    /// Where it is of another model, or of more tokens than there is room for.
    fn residual(&mut self, state: usize, position: usize, x: &DMatrix<f32>) {
        self.states[state].columns_mut(position, x.ncols()).copy_from(x);
    }
}

/// How a loss depends on one layer: its gradients. A token is a column.
pub struct LayerGradients {
    /// With respect to keys before RoPE, `[H_kv·d, tokens]`.
    ///
    /// After QK-norm, and through queries that do not see them exactly.
    pub keys: DMatrix<f32>,
    /// With respect to values, likewise.
    pub values: DMatrix<f32>,
    /// With respect to the key projection's weight, `[hidden_size, H_kv·d]`, through all queries.
    pub key_weight: DMatrix<f32>,
    /// With respect to the value projection's weight, likewise.
    pub value_weight: DMatrix<f32>,
}

impl Model {
    /// Runs a loss back through the model, last layer to first, and shows `visit` gradients.
    ///
    /// The loss is that of [`ByLayer::loss`].
    ///
    /// # Errors
    /// Those of [`ByLayer`], and of `visit`.
    pub fn backward(
        &self,
        residuals: &Residuals,
        first: usize,
        loss: &(dyn Fn(usize, &mut [f32]) + Sync),
        exact: Exact,
        visit: &mut dyn FnMut(usize, LayerGradients) -> Result<()>,
    ) -> Result<()> {
        let layers = ByLayer::new(self, residuals.tokens())?;
        let mut gradient = layers.loss(residuals.output(), first, loss)?;
        for index in (0..self.config.num_hidden_layers).rev() {
            let entered = [residuals.before_attention(index), residuals.before_mlp(index)];
            visit(index, layers.backward(index, entered, &mut gradient, exact)?)?;
        }
        Ok(())
    }
}

/// The gradients of one query head, `[d, tokens]` each.
struct HeadGradients {
    query: DMatrix<f32>,
    key: DMatrix<f32>,
    value: DMatrix<f32>,
    /// Through queries that do not see the key exactly.
    far_key: DMatrix<f32>,
    far_value: DMatrix<f32>,
}

impl Attention {
    /// The gradient with respect to `x`, what entered from position 0 on, and those within, from
    /// `upstream`, that with respect to what attention makes of it.
    pub(super) fn backward(&self, x: &DMatrix<f32>, upstream: &DMatrix<f32>, ropes: &Ropes, exact: Exact) -> (DMatrix<f32>, LayerGradients) {
        let d = self.head_dim;
        let (projected_queries, projected_keys, values) = (self.query.apply(x), self.key.apply(x), self.value.apply(x));
        let queries = self.query_turn.apply(projected_queries.clone(), ropes, 0);
        let keys = self.key_turn.apply(projected_keys.clone(), ropes, 0);
        let upstream = self.output.backward(upstream);

        let heads: Vec<HeadGradients> = (0..queries.nrows() / d)
            .into_par_iter()
            .map(|head| {
                let kv_rows = head / self.group_size * d;
                let [query, upstream] = [&queries, &upstream].map(|all| all.rows(head * d, d).into_owned());
                let [key, value] = [&keys, &values].map(|all| all.rows(kv_rows, d).into_owned());
                self.head_backward([&query, &key, &value, &upstream], self.sink(head), exact)
            })
            .collect();
        // Query heads that share a key/value head both disturb it.
        let sum = |part: fn(&HeadGradients) -> &DMatrix<f32>| -> DMatrix<f32> {
            stack(&heads.chunks(self.group_size).map(|group| group.iter().map(part).sum()).collect::<Vec<_>>())
        };
        let (key, value, mut far_key, far_value) =
            (sum(|head| &head.key), sum(|head| &head.value), sum(|head| &head.far_key), sum(|head| &head.far_value));
        let query = stack(&heads.into_iter().map(|head| head.query).collect::<Vec<_>>());

        let query = self.query_turn.backward(&projected_queries, query, ropes);
        let key = self.key_turn.backward(&projected_keys, key, ropes);
        self.key_turn.rotate_back(&mut far_key, ropes);
        let gradients =
            LayerGradients { keys: far_key, values: far_value, key_weight: outer_products(x, &key), value_weight: outer_products(x, &value) };
        (self.query.backward(&query) + self.key.backward(&key) + self.value.backward(&value), gradients)
    }

    /// Queries that are gone through at once: they see no keys after them, and what they make of
    /// keys before is not held for all queries together.
    const QUERIES: usize = 256;

    /// Through `softmax(KᵀQ/√d)` and the weighted sum of values, from `upstream`, the gradient with
    /// respect to that sum; `[d, tokens]` all. A `sink` is a key like others whose value is zero.
    fn head_backward(&self, [query, key, value, upstream]: [&DMatrix<f32>; 4], sink: Option<f32>, exact: Exact) -> HeadGradients {
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let (d, tokens) = query.shape();
        let none = || DMatrix::zeros(d, tokens);
        let mut sums = HeadGradients { query: none(), key: none(), value: none(), far_key: none(), far_value: none() };
        for first in (0..tokens).step_by(Self::QUERIES) {
            let count = Self::QUERIES.min(tokens - first);
            let low = (first + 1).saturating_sub(self.window);
            let seen = first + count - low;
            let (keys, values) = (key.columns(low, seen), value.columns(low, seen));
            let (queries, upstream) = (query.columns(first, count), upstream.columns(first, count));
            let mut weights = tr_product(keys, queries);
            let slopes = self.cap.map(|cap| weights.map(|score| soft_cap(cap, score * scale).1));
            self.cap(&mut weights);
            causal_softmax(&mut weights, first - low, self.window, scale, sink);
            // With respect to the weights, then the scores: ds = p∘(dp − ⟨dp, p⟩)/√d, query by
            // query.
            let mut scores = tr_product(values, upstream);
            for (mut scores, weights) in scores.column_iter_mut().zip(weights.column_iter()) {
                let mean = scores.dot(&weights);
                scores.zip_apply(&weights, |score, weight| *score = (*score - mean) * weight * scale);
            }
            if let Some(slopes) = slopes {
                scores.component_mul_assign(&slopes);
            }
            sums.query.columns_mut(first, count).copy_from(&product(keys, scores.as_view()));
            // Each key's or value's sum over queries of weight times what the query brings: few by
            // few where it is exact, in one product where it is not.
            for (weights, brought, near, far) in
                [(&mut scores, queries, &mut sums.key, &mut sums.far_key), (&mut weights, upstream, &mut sums.value, &mut sums.far_value)]
            {
                for (index, mut weights) in weights.column_iter_mut().enumerate() {
                    for token in exact_tokens(exact, first + index).filter(|token| *token >= low) {
                        near.column_mut(token).axpy(std::mem::take(&mut weights[token - low]), &brought.column(index), 1.0);
                    }
                }
                let mut far = far.columns_mut(low, seen);
                far += product(weights.as_view(), brought.transpose().as_view()).transpose();
            }
        }
        sums.key += &sums.far_key;
        sums.value += &sums.far_value;
        sums
    }
}

/// The tokens whose keys and values the query of a token sees exactly: the sinks, and the newest up
/// to itself.
fn exact_tokens(exact: Exact, query: usize) -> impl Iterator<Item = usize> {
    let far = (query + 1).saturating_sub(exact.recent);
    (0..exact.sinks.min(far)).chain(far..=query)
}

/// Keeps, in the columns of `weights: [tokens, tokens]` (a query each), the rows that are not
/// exact; the others become zero.
pub(super) fn clear_exact(exact: Exact, weights: &mut DMatrix<f32>) {
    for (query, mut column) in weights.column_iter_mut().enumerate() {
        exact_tokens(exact, query).for_each(|token| column[token] = 0.0);
    }
}
