//! The decoder on a GPU: a model's weights on the device ([`Model`]) and sequences of tokens being decoded with them ([`GpuSequence`]).
//!
//! What is computed is what [`crate::cpu`] computes, and in the order it stands there. A token's way through a layer is eight dispatches, listed in
//! [`crate::kernels`]; everything that a step needs is planned when a sequence is made, so that a step only records, submits once and reads back four bytes.

mod chunk;
mod sequence;
mod step;
mod weights;

pub use sequence::GpuSequence;

use crate::Result;
use crate::cache::Layout;
use crate::checkpoint::{Checkpoint, Config};
use crate::gpu::Device;
use std::sync::Arc;
use weights::{Ends, Layer};

/// A checkpoint's weights on a device, dense or factored. Shared by any number of sequences.
pub struct Model {
    device: Arc<Device>,
    config: Config,
    layers: Vec<Layer>,
    ends: Ends,
}

impl Model {
    /// Uploads all weights in f16, layer by layer.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for head widths that the kernels do not take, [`crate::Error::OutOfMemory`] where the device is too small, and those of reading.
    pub fn load(checkpoint: &Checkpoint, device: Arc<Device>) -> Result<Model> {
        weights::check(checkpoint)?;
        let layers = (0..checkpoint.config().num_hidden_layers).map(|l| Layer::load(&device, checkpoint, l)).collect::<Result<_>>()?;
        let ends = Ends::load(&device, checkpoint)?;
        device.wait(None)?;
        Ok(Model { config: checkpoint.config().clone(), layers, ends, device })
    }

    /// The model's geometry.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The device it is on.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The layers' rows.
    pub fn layouts(&self) -> Vec<Layout> {
        self.layers.iter().map(|l| l.layout.clone()).collect()
    }

    /// A new sequence with room for `capacity` tokens; everything it will ever need is allocated here.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Argument`] for a capacity of zero, [`crate::Error::Gpu`] where the driver refuses a kernel.
    pub fn sequence(self: &Arc<Self>, capacity: usize) -> Result<GpuSequence> {
        GpuSequence::new(self.clone(), capacity)
    }
}
