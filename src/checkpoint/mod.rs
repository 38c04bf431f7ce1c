//! A model on disk: config, weights, tokenizer. Safetensors (one file or sharded) or GGUF, memory-mapped. Knows no GPU.

mod config;
mod factored;

pub use config::{Architecture, Config, RopeScaling};
pub use factored::{Factored, FactoredLayer, Group};

use crate::Result;
use std::path::{Path, PathBuf};

/// An open checkpoint. Weights stay on disk until they are asked for, by their Hugging Face names and in its conventions
/// (`[out, in]`, RoPE in half-split layout), whatever the file's own.
pub struct Checkpoint {
    path: PathBuf,
    config: Config,
    factored: Option<Factored>,
}

impl Checkpoint {
    /// Opens a directory (`config.json` and safetensors) or a `.gguf` file.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        todo!("{}", path.display())
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's geometry.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The factors' layout, where this is a factored checkpoint.
    pub fn factored(&self) -> Option<&Factored> {
        self.factored.as_ref()
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        todo!("{name}")
    }

    /// A tensor's numbers in f32, row-major; its shape must be `shape`. GGUF's quantised blocks are rounded to f16 first: in f16 they *are* the model.
    pub fn f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        todo!("{name} {shape:?}")
    }

    /// A tensor's numbers rounded to f16, row-major; its shape must be `shape`.
    pub fn f16(&self, name: &str, shape: &[usize]) -> Result<Vec<half::f16>> {
        todo!("{name} {shape:?}")
    }
}
