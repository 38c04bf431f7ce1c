//! How small a cache is to be.

use crate::{Error, Result};

/// How small the cache is to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// At most so many bytes per token, over the whole model.
    Bytes(u64),
    /// This share of the dense model's f16 cache, above 0 and up to 1.
    Keep(f64),
    /// So many times smaller than that.
    Times(f64),
}

impl Default for Budget {
    /// Eight times smaller than in f16.
    fn default() -> Budget {
        Budget::Times(8.0)
    }
}

impl Budget {
    /// In bytes per token of a model whose f16 cache takes `dense`.
    ///
    /// # Errors
    /// [`Error::Argument`] where it is no number of bytes above zero, or a share above one.
    pub fn bytes(self, dense: u64) -> Result<u64> {
        let refuse = |name: &str, message: String| Err(Error::Argument { name: name.into(), message });
        let bytes = match self {
            Budget::Bytes(bytes) => bytes,
            Budget::Keep(keep) if keep > 0.0 && keep <= 1.0 => (keep * dense as f64 + 1e-6) as u64,
            Budget::Keep(keep) => return refuse("keep", format!("{keep} is not a fraction to keep; choose one above 0, up to 1")),
            Budget::Times(times) if times >= 1.0 && times.is_finite() => (dense as f64 / times + 1e-6) as u64,
            Budget::Times(times) => return refuse("times", format!("{times} times smaller cannot be; choose 1 or more")),
        };
        match bytes {
            0 => refuse("kv-bytes", "nothing can be kept in no bytes".into()),
            bytes => Ok(bytes),
        }
    }
}
