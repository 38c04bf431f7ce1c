//! What type weights are in once they are loaded.

use super::encoding::Encoding;
use super::ggml::GROUP;
use crate::{Error, Result};
use std::str::FromStr;

/// What weights are in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightStorage {
    /// What they are in the file, and blocks stay blocks; on a GPU floats are f16.
    #[default]
    Stored,
    /// All of them f32, on the processor alone: what everything else is compared with.
    F32,
    /// All of them f16.
    F16,
    /// Floats are made blocks of 8 bits as Q8_0's, blocks stay as they are.
    Q8,
    /// Floats are made blocks of 4 bits as Q4_0's, blocks stay as they are.
    Q4,
}

impl WeightStorage {
    /// Those that can be asked for.
    pub const ALL: [WeightStorage; 5] = [WeightStorage::Stored, WeightStorage::F32, WeightStorage::F16, WeightStorage::Q8, WeightStorage::Q4];

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            WeightStorage::Stored => "stored",
            WeightStorage::F32 => "f32",
            WeightStorage::F16 => "f16",
            WeightStorage::Q8 => "q8",
            WeightStorage::Q4 => "q4",
        }
    }

    /// What rows of `cols` numbers become that are stored as `encoding`.
    pub(super) fn encoding(self, encoding: Encoding, cols: usize) -> Encoding {
        let blocks = !encoding.is_quantised() && cols.is_multiple_of(GROUP);
        match self {
            WeightStorage::Stored => encoding,
            WeightStorage::F32 => Encoding::F32,
            WeightStorage::F16 => Encoding::F16,
            WeightStorage::Q8 if blocks => Encoding::Q8_0,
            WeightStorage::Q4 if blocks => Encoding::Q4_0,
            WeightStorage::Q8 | WeightStorage::Q4 => encoding,
        }
    }
}

impl FromStr for WeightStorage {
    type Err = Error;

    fn from_str(text: &str) -> Result<WeightStorage> {
        let names = || WeightStorage::ALL.map(WeightStorage::name).join(", ");
        let found = WeightStorage::ALL.into_iter().find(|storage| storage.name() == text);
        found.ok_or_else(|| Error::Argument { name: "weights".into(), message: format!("{text:?} is none of {}", names()) })
    }
}
