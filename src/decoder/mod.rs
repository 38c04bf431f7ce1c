//! The decoder on a GPU: a model's weights on the device ([`Model`]) and sequences of tokens being
//! decoded with them ([`GpuSequence`]).
//!
//! What is computed is what [`crate::cpu`] computes, and in the order it stands there. A token's
//! way through a layer is eight dispatches, listed in [`crate::kernels`]; everything that a step
//! needs is planned when a sequence is made, so that a step only records, submits once and reads
//! back eight bytes.

mod attention;
mod coding;
mod decode;
mod executor;
mod latents;
mod prefill;
mod prompt;
mod random;
mod reach;
mod scratch;
mod sequence;
mod weights;

pub use sequence::GpuSequence;

use crate::Result;
use crate::cache::CacheShape;
use crate::checkpoint::{Checkpoint, Config};
use crate::gpu::Device;
use crate::kernels::AttentionShape;
use crate::kv::LatentSet;
use crate::sequence::SequenceOptions;
use executor::Executor;
use latents::Latents;
use std::sync::Arc;
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
    /// Uploads all weights in f16, layer by layer.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for head widths that the kernels do not take,
    /// [`crate::Error::OutOfMemory`] where the device is too small, and those of reading.
    pub fn load(checkpoint: &Checkpoint, device: Arc<Device>) -> Result<Model> {
        Model::with_latents(checkpoint, checkpoint.rows()?, device)
    }

    /// [`load`](Self::load) with other latents than the checkpoint's own, or none.
    ///
    /// # Errors
    /// As [`load`](Self::load), [`crate::Error::Argument`] where the rows are another model's, and
    /// [`crate::Error::Numeric`] where a basis does not fit 16 bits.
    pub fn with_latents(checkpoint: &Checkpoint, rows: Option<LatentSet>, device: Arc<Device>) -> Result<Model> {
        weights::check(checkpoint)?;
        let config = checkpoint.config().clone();
        if let Some(rows) = &rows {
            latents::check(&rows.specs, checkpoint)?;
        }
        let layers = (0..config.num_hidden_layers).map(|l| Layer::load(&device, checkpoint, l)).collect::<Result<_>>()?;
        let ends = Ends::load(&device, checkpoint)?;
        let coded = rows.map(|rows| Latents::load(&device, &config, &rows)).transpose()?.map(Arc::new);
        device.wait()?;
        Ok(Model { config, layers, ends, coded, device, executor: Executor::new() })
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

/// The attention of every layer.
fn attention_shape(config: &Config) -> AttentionShape {
    AttentionShape {
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        window: config.sliding_window,
        qk_norm: config.qk_norm,
        epsilon: config.rms_norm_eps,
    }
}
