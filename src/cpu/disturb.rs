//! What the model makes of a window when one layer's keys or values are not what they were.
//!
//! Everything below that layer is as it was, so the pass starts from the residual stream of an
//! undisturbed one.

use super::attention::{Attention, causal_softmax};
use super::backward::clear_exact;
use super::cache::Cache;
use super::layer::{ForwardPass, before};
use super::rope::Ropes;
use super::{Model, Residuals, RowType};
use crate::kv::Call;
use crate::kv::Exact;
use crate::linalg::{product, stack, tr_product};
use crate::{Error, Result};
use nalgebra::DMatrix;
use rayon::prelude::*;

/// What is added to keys or values: `[H_kv·d, tokens]`.
#[derive(Debug, Clone, Copy)]
pub enum Disturbance<'a> {
    /// To keys before RoPE (after QK-norm).
    Keys(&'a DMatrix<f32>),
    /// To values.
    Values(&'a DMatrix<f32>),
}

impl Model {
    /// What leaves the last layer, `[hidden_size, tokens]`, with a disturbance in `layer`.
    ///
    /// It is added for the queries that do not see a key or value `exact`ly, in a window that left
    /// `residuals`.
    ///
    /// # Errors
    /// [`Error::Argument`] where the model is factored.
    ///
    /// # Panics
    /// Where the layer does not exist or shapes do not fit.
    pub fn disturbed(&self, residuals: &Residuals, layer: usize, disturbance: Disturbance, exact: Exact) -> Result<DMatrix<f32>> {
        if self.rows.is_some() {
            return Err(Error::Argument { name: "model".into(), message: "has coded rows; disturb a dense model".into() });
        }
        let mut x = residuals.before_attention(layer).clone();
        let mut ropes = Ropes::new(&self.config, x.ncols());
        ropes.reach(x.ncols());
        let first = &self.layers[layer];
        let made = first.attention.apply_disturbed(&before(&first.attention_norm, &x), &ropes, disturbance, exact);
        first.add(&mut x, made, &first.after_attention);
        let made = first.mlp.apply(&before(&first.mlp_norm, &x));
        first.add(&mut x, made, &first.after_mlp);
        let (tokens, width) = (residuals.tokens(), self.config.num_key_value_heads * self.config.head_dim);
        for (index, layer) in self.layers.iter().enumerate().skip(layer + 1) {
            let mut cache = Cache::new(index..index + 1, width, tokens, RowType::F32, None);
            let call = Call::exact(0..tokens);
            layer.apply(&mut x, 0, &mut cache, ForwardPass { call: &call, ropes: &ropes }, None);
        }
        Ok(x)
    }
}

impl Attention {
    /// Attention from position 0 on, without a cache.
    fn apply_disturbed(&self, x: &DMatrix<f32>, ropes: &Ropes, disturbance: Disturbance, exact: Exact) -> DMatrix<f32> {
        let d = self.head_dim;
        let [queries, keys, values] = self.project(x, 0, ropes, None);
        // RoPE is linear: noise added before it is the same noise, rotated, added after it.
        let (key_noise, value_noise) = match disturbance {
            Disturbance::Keys(noise) => {
                let mut noise = noise.clone();
                self.key_turn.rotate_only(&mut noise, ropes);
                (Some(noise), None)
            }
            Disturbance::Values(noise) => (None, Some(noise)),
        };
        let heads: Vec<DMatrix<f32>> = (0..queries.nrows() / d)
            .into_par_iter()
            .map(|head| {
                let (row, kv_row) = (head * d, head / self.group_size * d);
                let query = queries.rows(row, d);
                let mut weights = tr_product(keys.rows(kv_row, d), query);
                if let Some(noise) = &key_noise {
                    let mut moved = tr_product(noise.rows(kv_row, d), query);
                    clear_exact(exact, &mut moved);
                    weights += moved;
                }
                self.cap(&mut weights);
                causal_softmax(&mut weights, 0, self.window, 1.0 / (d as f32).sqrt(), self.sink(head));
                let mut sum = product(values.rows(kv_row, d), weights.as_view());
                if let Some(noise) = value_noise {
                    clear_exact(exact, &mut weights);
                    sum += product(noise.rows(kv_row, d), weights.as_view());
                }
                sum
            })
            .collect();
        self.output.apply(&stack(&heads))
    }
}
