//! The decoder in plain Rust: the specification of what the GPU computes, the oracle of its tests,
//! the engine of calibration, and `--device cpu`.
//!
//! It reads top to bottom as the model does: `Model::forward` is embedding, layers, final norm and
//! head; `layer.rs` is attention and MLP on the residual stream; `attention.rs` is the one
//! attention, and `cache.rs` what it reads: rows that are exact, coded, or both. All of it is
//! column-major: a token is a column, so an activation is `[width, tokens]`, and a weight
//! `[out, in]` of a checkpoint is, read in place, the matrix `[in, out]` that is applied as `Wᵀx`.
//! Arithmetic is f32; weights are f32, or what the file has, decoded as they are multiplied; the
//! cached rows are f16, as on a GPU, or f32 for calibration and the strictest tests.
//!
//! Speed comes from matrix products over whole chunks of tokens and from sharing those out over the
//! cores, nothing else.

mod absorb;
mod activation;
mod attention;
mod backward;
mod by_layer;
mod cache;
mod columns;
mod disturb;
mod eviction;
mod experts;
mod feed_forward;
mod landmarks;
mod latents;
mod layer;
mod linear;
mod memory;
mod mlp;
mod prompt;
mod rope;
mod rows;
mod sequence;
mod turn;
mod weight;

pub use attention::Heads;
pub use backward::{LayerGradients, Residuals};
pub use by_layer::ByLayer;
pub use disturb::Disturbance;
pub use memory::plan_memory;
pub use rows::RowType;
pub use sequence::CpuSequence;

use crate::checkpoint::{Checkpoint, Config, OpenFiles, WeightStorage};
use crate::kv::LatentSet;
use crate::sequence::{Logits, SequenceOptions};
use crate::task::{OnProgress, each_layer, quietly};
use crate::{Error, Result};
use activation::soft_cap;
use cache::Cache;
use layer::{ForwardPass, Layer};
use linear::{Norm, Source};
use nalgebra::DMatrix;
use std::collections::BTreeMap;
use std::sync::Arc;
use weight::Weight;

/// Looks at activations on their way through the model. Calibration is one.
pub trait Observer {
    /// The residual stream, `[hidden_size, tokens]`, the first column at `position`: `state` 2·l is
    /// what enters the attention of layer l, before its RMSNorm, 2·l + 1 what enters its MLP,
    /// 2·layers what enters the final norm.
    fn residual(&mut self, _state: usize, _position: usize, _x: &DMatrix<f32>) {}

    /// The heads of `layer`; the first column is at `position`.
    fn heads(&mut self, _layer: usize, _position: usize, _heads: &Heads) {}
}

/// A checkpoint's weights, and the bases of its latents if it has any.
///
/// Shared by any number of sequences.
pub struct Model {
    config: Config,
    /// `[hidden_size, vocab]`: a token's embedding is a column.
    embedding: Weight,
    layers: Vec<Layer>,
    final_norm: Norm,
    /// `None` where the head is the embedding table.
    head: Option<Weight>,
    rows: Option<Arc<LatentSet>>,
    /// In which weights are read where they are.
    files: OpenFiles,
}

impl Model {
    /// Reads all weights into memory, in f32: four bytes for each parameter.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a tensor that is missing, has another shape than the configuration
    /// asks for, or is not finite; those of reading.
    pub fn load(checkpoint: &Checkpoint) -> Result<Model> {
        Model::with_latents(checkpoint, checkpoint.rows()?)
    }

    /// Takes weights as `storage` says. Those that are stored so are not read into memory: they are
    /// multiplied where they are, in the file.
    ///
    /// # Errors
    /// As [`load`](Self::load), and [`Error::Interrupted`] where `on_progress`, which is told how
    /// many layers have been looked at, says so.
    pub fn load_as(checkpoint: &Checkpoint, storage: WeightStorage, on_progress: OnProgress<'_>) -> Result<Model> {
        Model::of(Source { checkpoint, storage }, checkpoint.rows()?, on_progress)
    }

    /// [`load`](Self::load) with other latents than the checkpoint's own, or none.
    ///
    /// # Errors
    /// As [`load`](Self::load), and [`Error::Argument`] where the rows are another model's.
    pub fn with_latents(checkpoint: &Checkpoint, rows: Option<LatentSet>) -> Result<Model> {
        Model::of(Source { checkpoint, storage: WeightStorage::F32 }, rows, &mut quietly)
    }

    fn of(source: Source, rows: Option<LatentSet>, on_progress: OnProgress<'_>) -> Result<Model> {
        let Source { checkpoint, storage } = source;
        if let Some(rows) = &rows {
            LatentSet::check(&rows.specs, &checkpoint.config().geometry()).map_err(|message| Error::Argument { name: "rows".into(), message })?;
        }
        let config = checkpoint.config().clone();
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let table = |name: &str| Weight::load(checkpoint, name, [vocab, hidden], storage);
        let mut each = each_layer(config.num_hidden_layers, on_progress);
        Ok(Model {
            embedding: table("model.embed_tokens.weight")?,
            layers: (0..config.num_hidden_layers).map(|index| each(index).and_then(|()| Layer::load(source, index))).collect::<Result<_>>()?,
            final_norm: Norm::load(checkpoint, "model.norm", hidden)?,
            head: if config.tie_word_embeddings { None } else { Some(table("lm_head.weight")?) },
            rows: rows.map(Arc::new),
            files: checkpoint.files(),
            config,
        })
    }

    /// The model's geometry.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Matrices that a step reads: those of all layers, and the head.
    fn weights(&self) -> impl Iterator<Item = &Weight> {
        self.layers.iter().flat_map(Layer::weights).chain([self.head_weight()])
    }

    /// Weights of a layer's matrices, and of the head.
    pub fn layer_weights(&self) -> [usize; 2] {
        let layer = self.layers.first().map_or(0, |layer| layer.weights().map(|weight| weight.len()).sum());
        [layer, self.head_weight().len()]
    }

    /// Bytes of weights that are in memory while the model runs [layer by layer](ByLayer): all that
    /// are held there, and of those that are in a file the largest layer's or the head's.
    pub fn resident_bytes(&self) -> u64 {
        let (held, mapped) = self.weights().fold((0, 0), |(held, mapped), weight| match weight.is_mapped() {
            false => (held + weight.bytes(), mapped),
            true => (held, mapped + weight.bytes()),
        });
        let layer = |layer: &Layer| layer.weights().filter(|weight| weight.is_mapped()).map(|weight| weight.bytes()).sum();
        let most = self.layers.iter().map(layer).chain([self.head_weight().bytes()]).max().unwrap_or(0);
        (held + most.min(mapped)) as u64
    }

    /// Bytes of the matrices that a step reads; of experts, those that one token goes through.
    pub fn matrix_bytes(&self) -> u64 {
        self.layers.iter().map(Layer::read_bytes).chain([self.head_weight().bytes() as u64]).sum()
    }

    /// Bytes of the embedding; 0 where it is the head.
    pub fn embedding_bytes(&self) -> u64 {
        if self.head.is_some() { self.embedding.bytes() as u64 } else { 0 }
    }

    /// The types of those matrices, that of most bytes first: `q4_k q6_k`.
    pub fn weight_type(&self) -> String {
        let mut bytes: BTreeMap<&str, usize> = BTreeMap::new();
        self.weights().for_each(|weight| *bytes.entry(weight.encoding()).or_default() += weight.bytes());
        let mut types: Vec<_> = bytes.into_iter().collect();
        types.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        types.into_iter().map(|(name, _)| name.to_lowercase()).collect::<Vec<_>>().join(" ")
    }

    /// The latents.
    pub fn rows(&self) -> Option<&LatentSet> {
        self.rows.as_deref()
    }

    /// A new sequence, its exact rows stored as `row_type`.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] where the capacity is zero or too large to be counted.
    pub fn sequence(self: &Arc<Self>, options: impl Into<SequenceOptions>, row_type: RowType) -> Result<CpuSequence> {
        CpuSequence::with_latents(self.clone(), self.rows.clone(), options.into(), row_type)
    }

    /// Runs `tokens` through the model: appends their rows to `cache` and returns the logits asked
    /// for, `[vocab, tokens]`.
    fn forward(&self, tokens: &[u32], pass: ForwardPass, cache: &mut Cache, logits: Logits, mut observer: Option<&mut dyn Observer>) -> DMatrix<f32> {
        let mut x = self.embed(tokens);
        for (index, layer) in self.layers.iter().enumerate() {
            let observer = observer.as_mut().map(|observer| &mut **observer as &mut dyn Observer);
            layer.apply(&mut x, index, cache, pass, observer);
        }
        if let Some(observer) = observer {
            observer.residual(2 * self.layers.len(), pass.call.tokens.start, &x);
        }
        let wanted = match logits {
            Logits::None => return DMatrix::zeros(self.config.vocab_size, 0),
            Logits::Last => x.columns(tokens.len() - 1, 1).into_owned(),
            Logits::All => x,
        };
        self.head(&wanted)
    }

    /// What enters the first layer, `[hidden_size, tokens]`.
    fn embed(&self, tokens: &[u32]) -> DMatrix<f32> {
        let mut x = DMatrix::zeros(self.config.hidden_size, tokens.len());
        for (mut column, &token) in x.column_iter_mut().zip(tokens) {
            self.embedding.column(token as usize, column.as_mut_slice());
        }
        let scale = self.config.design.embedding_scale;
        if scale != 1.0 {
            x *= scale;
        }
        x
    }

    /// Logits `[vocab, tokens]` of what leaves the last layer, `x: [hidden_size, tokens]`.
    pub fn head(&self, x: &DMatrix<f32>) -> DMatrix<f32> {
        let mut logits = self.head_weight().apply(&self.final_norm.apply(x));
        let (scale, cap) = (self.config.design.logit_scale, self.config.design.logit_cap);
        if scale != 1.0 {
            logits *= scale;
        }
        if let Some(cap) = cap {
            logits.apply(|logit| *logit = soft_cap(cap, *logit).0);
        }
        logits
    }

    /// `[hidden_size, vocab]`.
    fn head_weight(&self) -> &Weight {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}
