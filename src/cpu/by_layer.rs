//! A model's layers one at a time, each on whole texts, forward and backward: all texts can go
//! through one layer before the next, so that weights are needed a layer at a time.

use super::backward::LayerGradients;
use super::cache::Cache;
use super::layer::{ForwardPass, before, before_backward};
use super::rope::Ropes;
use super::sequence::CpuSequence;
use super::{Heads, Model, Observer, RowType};
use crate::kv::{Call, Exact};
use crate::{Error, Result};
use nalgebra::DMatrix;
use rayon::prelude::*;

/// The layers of a dense model.
pub struct ByLayer<'a> {
    model: &'a Model,
    ropes: Ropes,
}

/// Shown what one layer does, which is the only one of its cache, under its number in the model.
struct Numbered<'a> {
    layer: usize,
    observer: &'a mut dyn Observer,
}

impl Observer for Numbered<'_> {
    fn residual(&mut self, state: usize, position: usize, x: &DMatrix<f32>) {
        self.observer.residual(2 * self.layer + state, position, x);
    }

    fn heads(&mut self, _: usize, position: usize, heads: &Heads) {
        self.observer.heads(self.layer, position, heads);
    }
}

impl<'a> ByLayer<'a> {
    /// Tokens whose logits exist at once.
    pub const HEAD_BLOCK: usize = 128;
    /// Tokens that go back through an MLP at once.
    pub const MLP_BLOCK: usize = 1024;

    /// For texts of up to `longest` tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] where the model's rows are coded.
    pub fn new(model: &'a Model, longest: usize) -> Result<ByLayer<'a>> {
        if model.rows.is_some() {
            return Err(Error::Argument { name: "model".into(), message: "has coded rows; gradients are those of a dense model".into() });
        }
        let mut ropes = Ropes::new(&model.config, longest);
        ropes.reach(longest);
        Ok(ByLayer { model, ropes })
    }

    /// What enters the first layer, `[hidden_size, tokens]`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where the model's file has been changed meanwhile.
    pub fn embed(&self, tokens: &[u32]) -> Result<DMatrix<f32>> {
        self.model.files.check()?;
        Ok(self.model.embed(tokens))
    }

    /// Runs `x: [hidden_size, tokens]`, a text from its beginning, through a layer in place.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where the model's file has been changed meanwhile.
    pub fn forward(&self, layer: usize, x: &mut DMatrix<f32>, observer: &mut dyn Observer) -> Result<()> {
        self.model.files.check()?;
        let this = &self.model.layers[layer];
        self.chunks(layer, x.ncols(), |cache, call| {
            let mut chunk = x.columns_range(call.tokens.clone()).into_owned();
            let pass = ForwardPass { call, ropes: &self.ropes };
            this.apply(&mut chunk, 0, cache, pass, Some(&mut Numbered { layer, observer }));
            x.columns_range_mut(call.tokens.clone()).copy_from(&chunk);
        });
        Ok(())
    }

    /// A text's tokens in chunks, with a cache of a layer.
    fn chunks(&self, layer: usize, tokens: usize, mut each: impl FnMut(&mut Cache, &Call)) {
        let mut cache = Cache::new(layer..layer + 1, self.model.config.geometry().kv_width(), tokens, RowType::F32, None);
        for start in (0..tokens).step_by(CpuSequence::CHUNK) {
            each(&mut cache, &Call::exact(start..(start + CpuSequence::CHUNK).min(tokens)));
        }
    }

    /// The gradient of a loss with respect to `output: [hidden_size, tokens]`, what leaves the last
    /// layer.
    ///
    /// The loss is a sum over the positions from `first` on, of what `loss` makes of a position's
    /// logits `[vocab]`: it puts its gradient in their place.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where the model's file has been changed meanwhile.
    pub fn loss(&self, output: &DMatrix<f32>, first: usize, loss: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<DMatrix<f32>> {
        self.model.files.check()?;
        let (model, tokens) = (self.model, output.ncols());
        let mut gradient = DMatrix::zeros(output.nrows(), tokens);
        for start in (first..tokens).step_by(Self::HEAD_BLOCK) {
            let x = output.columns(start, Self::HEAD_BLOCK.min(tokens - start)).into_owned();
            let mut logits = model.head(&x);
            // The slope of what is done to logits after the product, which the cap's value tells.
            let cap = model.config.design.logit_cap;
            let slopes = cap.map(|cap| logits.map(|logit| 1.0 - (logit / cap) * (logit / cap)));
            logits.as_mut_slice().par_chunks_mut(model.config.vocab_size).enumerate().for_each(|(j, column)| loss(start + j, column));
            if let Some(slopes) = slopes {
                logits.component_mul_assign(&slopes);
            }
            logits *= model.config.design.logit_scale;
            let here = model.final_norm.backward(&x, model.head_weight().backward(&logits));
            gradient.columns_mut(start, x.ncols()).copy_from(&here);
        }
        Ok(gradient)
    }

    /// Runs `gradient`, with respect to what leaves a layer, back through it in place.
    ///
    /// `entered`: what entered its attention and its MLP; `[hidden_size, tokens]` all.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where the model's file has been changed meanwhile.
    pub fn backward(&self, layer: usize, entered: [&DMatrix<f32>; 2], gradient: &mut DMatrix<f32>, exact: Exact) -> Result<LayerGradients> {
        self.model.files.check()?;
        let [before_attention, before_mlp] = entered;
        let (number, layer) = (layer, &self.model.layers[layer]);
        // An MLP takes tokens by themselves.
        for start in (0..gradient.ncols()).step_by(Self::MLP_BLOCK) {
            let count = Self::MLP_BLOCK.min(gradient.ncols() - start);
            let x = before_mlp.columns(start, count).into_owned();
            let inner = before(&layer.mlp_norm, &x);
            let made = layer.add_backward(&gradient.columns(start, count).into_owned(), &layer.after_mlp, || layer.mlp.apply(&inner));
            let mut here = gradient.columns_mut(start, count);
            here += before_backward(&layer.mlp_norm, &x, layer.mlp.backward(&inner, &made));
        }
        let made = layer.add_backward(gradient, &layer.after_attention, || {
            let mut all = DMatrix::zeros(before_attention.nrows(), before_attention.ncols());
            self.chunks(number, before_attention.ncols(), |cache, call| {
                let chunk = before_attention.columns_range(call.tokens.clone()).into_owned();
                let made = layer.attended(&chunk, 0, cache, ForwardPass { call, ropes: &self.ropes }, None);
                all.columns_range_mut(call.tokens.clone()).copy_from(&made);
            });
            all
        });
        let (inner, gradients) = layer.attention.backward(&before(&layer.attention_norm, before_attention), &made, &self.ropes, exact);
        *gradient += before_backward(&layer.attention_norm, before_attention, inner);
        Ok(gradients)
    }

    /// Lets go of a layer's weights where they are in a file: the next to need them reads them
    /// again.
    pub fn release(&self, layer: usize) {
        self.model.layers[layer].weights().for_each(|weight| weight.release());
    }

    /// Lets go of the weights of the head, or of the table that it is.
    pub fn release_head(&self) {
        self.model.head_weight().release();
    }
}
