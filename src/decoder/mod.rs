//! The decoder on a GPU: a model's weights on the device ([`Model`]) and sequences of tokens being
//! decoded with them ([`GpuSequence`]).
//!
//! What is computed is what [`crate::cpu`] computes, and in the order it stands there. A token's
//! way through a layer is seven or eight dispatches, listed in [`crate::kernels`]; all that a step
//! needs is planned when a sequence is made, so that a step only records, submits once and reads
//! back eight bytes.

mod ahead;
mod attention;
mod coding;
mod decode;
mod executor;
mod expert_plan;
mod experts;
mod feed_forward;
mod latents;
mod memory;
mod norms;
mod prefill;
mod prompt;
mod random;
mod reach;
mod saved;
mod scratch;
mod sequence;
mod step;
mod stored;
mod verify;
mod weights;

pub use memory::plan_memory;
pub use sequence::GpuSequence;

use crate::Result;
use crate::cache::CacheShape;
use crate::checkpoint::{Checkpoint, Config, QkNormOver, WeightStorage};
use crate::gpu::{Device, Matrix, Part};
use crate::kernels::{AttentionShape, HeadNorm, QueryScaling};
use crate::kv::LatentSet;
use crate::sequence::SequenceOptions;
use crate::task::{OnProgress, each_layer, quietly};
use executor::Executor;
use latents::Latents;
use std::collections::BTreeMap;
use std::sync::Arc;
use stored::Source;
use weights::{Ends, Layer};

/// A checkpoint's weights on a device, and the bases of its latents if it has any.
///
/// Shared by any number of sequences.
pub struct Model {
    device: Arc<Device>,
    config: Config,
    layers: Vec<Layer>,
    ends: Ends,
    coded: Option<Arc<Latents>>,
    executor: Executor,
}

impl Model {
    /// Uploads all weights as they are stored, layer by layer.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for head widths that the kernels do not take,
    /// [`crate::Error::OutOfMemory`] where the device is too small, and those of reading.
    pub fn load(checkpoint: &Checkpoint, device: Arc<Device>) -> Result<Model> {
        Model::load_as(checkpoint, WeightStorage::Stored, device, &mut quietly)
    }

    /// Uploads all weights as `storage` says, and reports how many layers have been.
    ///
    /// # Errors
    /// As [`load`](Self::load), and [`crate::Error::Interrupted`] where `on_progress` says so.
    pub fn load_as(checkpoint: &Checkpoint, storage: WeightStorage, device: Arc<Device>, on_progress: OnProgress<'_>) -> Result<Model> {
        Model::of(Source { checkpoint, storage }, checkpoint.rows()?, device, on_progress)
    }

    /// [`load`](Self::load) with other latents than the checkpoint's own, or none.
    ///
    /// # Errors
    /// As [`load`](Self::load), [`crate::Error::Argument`] where the rows are another model's, and
    /// [`crate::Error::Numeric`] where a basis does not fit 16 bits.
    pub fn with_latents(checkpoint: &Checkpoint, rows: Option<LatentSet>, device: Arc<Device>) -> Result<Model> {
        Model::of(Source { checkpoint, storage: WeightStorage::Stored }, rows, device, &mut quietly)
    }

    fn of(source: Source, rows: Option<LatentSet>, device: Arc<Device>, on_progress: OnProgress<'_>) -> Result<Model> {
        let checkpoint = source.checkpoint;
        weights::check(checkpoint)?;
        let config = checkpoint.config().clone();
        if let Some(rows) = &rows {
            latents::check(&rows.specs, checkpoint)?;
        }
        let mut each = each_layer(config.num_hidden_layers, on_progress);
        let layers = (0..config.num_hidden_layers).map(|l| each(l).and_then(|()| Layer::load(&device, source, l))).collect::<Result<_>>()?;
        each(config.num_hidden_layers)?;
        let ends = Ends::load(&device, source)?;
        let coded = rows.map(|rows| Latents::load(&device, &config, &rows)).transpose()?.map(Arc::new);
        device.wait()?;
        Ok(Model { config, layers, ends, coded, device, executor: Executor::new() })
    }

    /// Matrices that a step reads: those of all layers, and the head.
    fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        self.layers.iter().flat_map(Layer::matrices).chain([self.ends.head()])
    }

    /// Bytes of the matrices that a step reads: those of all layers, and the head.
    ///
    /// Of experts, those that one token goes through.
    pub fn matrix_bytes(&self) -> u64 {
        self.layers.iter().map(Layer::read_bytes).chain(self.ends.head().parts.iter().map(Part::bytes)).sum()
    }

    /// Bytes of the embedding; 0 where it is the head.
    pub fn embedding_bytes(&self) -> u64 {
        if self.ends.head.is_some() { self.ends.embedding.parts.iter().map(Part::bytes).sum() } else { 0 }
    }

    /// The types of their weights, those of most of them first: `q4 q6`.
    pub fn weight_type(&self) -> String {
        let mut bytes: BTreeMap<&str, u64> = BTreeMap::new();
        self.matrices().flat_map(|matrix| &matrix.parts).for_each(|part| *bytes.entry(part.kind.name()).or_default() += part.bytes());
        let mut names: Vec<_> = bytes.into_iter().collect();
        names.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        names.into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(" ")
    }

    /// The model's geometry.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What a cache of this model for `capacity` tokens is like.
    fn cache_shape(&self, capacity: usize) -> CacheShape {
        CacheShape { attention: attention_shape(&self.config), layers: self.config.num_hidden_layers, capacity }
    }

    /// The device it is on.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// A new sequence; everything it will ever need is allocated here.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Argument`] for a capacity of zero,
    /// [`crate::Error::Gpu`] where the driver refuses a kernel.
    pub fn sequence(self: &Arc<Self>, options: impl Into<SequenceOptions>) -> Result<GpuSequence> {
        GpuSequence::new(self.clone(), self.coded.clone(), options.into())
    }
}

/// The attention of every layer, without what differs between them.
fn attention_shape(config: &Config) -> AttentionShape {
    AttentionShape {
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        window: None,
        qk_norm: config.design.qk_norm.map(|norm| match norm.over {
            QkNormOver::Heads => HeadNorm::Heads,
            QkNormOver::RotatedHeads => HeadNorm::RotatedHeads,
            QkNormOver::Projection => HeadNorm::Projection,
        }),
        epsilon: config.norm_eps,
        cap: config.design.attention_cap,
        scaling: None,
    }
}

/// The attention of one layer.
fn layer_attention(config: &Config, layer: usize) -> AttentionShape {
    let (scales, rope) = (config.query_scales(layer), &config.ropes[config.layers[layer].rope]);
    let temperature = rope.temperature.map_or([0.0, 1.0], |temperature| [temperature.beta as f32, temperature.period as f32]);
    let scaling = QueryScaling { scales, pairs: (rope.dims / 2) as u32, temperature };
    let any = scales != [1.0; 2] || rope.temperature.is_some();
    AttentionShape { window: config.layers[layer].window, scaling: any.then_some(scaling), ..attention_shape(config) }
}
