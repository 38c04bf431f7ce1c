//! Which model an adapter file was made for: its name, its shape, and a fingerprint that is
//! verified in no time.

use super::{Architecture, Checkpoint};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::Path;

/// Bytes that a fingerprint takes from either end of a tensor.
const SAMPLE: usize = 4096;

/// The model that something was made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The name of its file or directory.
    pub name: String,
    /// What `lowkey pull` fetches it by, where that is how it came.
    pub pull: Option<String>,
    /// Its family.
    pub architecture: Architecture,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// [`Checkpoint::fingerprint`].
    pub fingerprint: String,
}

impl Source {
    /// That of an open checkpoint.
    pub fn of(checkpoint: &Checkpoint) -> Source {
        let config = checkpoint.config();
        Source {
            name: name(checkpoint.path()),
            pull: fetched_by(checkpoint.path()),
            architecture: config.architecture,
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            hidden: config.hidden_size,
            fingerprint: checkpoint.fingerprint(),
        }
    }

    /// Name, shape and the beginning of the fingerprint.
    pub(super) fn describe(&self) -> String {
        let Source { name, layers, heads, kv_heads, head_dim, hidden, .. } = self;
        let architecture = format!("{:?}", self.architecture).to_lowercase();
        let fingerprint: String = self.fingerprint.chars().take(12).collect();
        format!(
            "{name} ({architecture}, {layers} layers of width {hidden}, {heads} heads on {kv_heads} of width {head_dim}, fingerprint {fingerprint})"
        )
    }
}

/// What a cache was computed with: a model, and the bases of its rows if it has any.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The model.
    pub model: Source,
    /// What compression added to it.
    pub rows: Option<RowsOrigin>,
}

/// What an adapter file, or a checkpoint that stands alone, adds to a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowsOrigin {
    /// The name of its file or directory.
    pub name: String,
    /// The method and its options, in words.
    pub method: String,
    /// SHA-256, in hexadecimal, of the object `"lowkey"` and of what tells all tensors apart.
    pub digest: String,
}

impl Origin {
    /// That of an open checkpoint.
    pub fn of(checkpoint: &Checkpoint) -> Origin {
        let (mut model, factored) = (Source::of(checkpoint), checkpoint.factored());
        let rows = factored.map(|factored| {
            let options = serde_json::to_string(factored).unwrap_or_default();
            RowsOrigin {
                name: name(checkpoint.adapter().unwrap_or(checkpoint.path())),
                method: format!("{}, {}", factored.method, factored.options),
                digest: format!("{:x}", Sha256::new_with_prefix(options).chain_update(&model.fingerprint).finalize()),
            }
        });
        if let (Some(source), Some(_)) = (factored.and_then(|factored| factored.source.as_ref()), checkpoint.adapter()) {
            model.fingerprint = source.fingerprint.clone();
        }
        Origin { model, rows }
    }

    /// Whether what was computed with `self` is of use to `other`.
    ///
    /// # Errors
    /// What differs, as a sentence without its beginning.
    pub(crate) fn check(&self, other: &Origin) -> Result<(), String> {
        if self.model.fingerprint != other.model.fingerprint {
            return Err(format!("was saved with {}, and this is another model: {}", self.model.describe(), other.model.describe()));
        }
        let digest = |origin: &Origin| origin.rows.as_ref().map(|rows| rows.digest.clone());
        if digest(self) == digest(other) {
            return Ok(());
        }
        let describe = |origin: &Origin| match &origin.rows {
            Some(RowsOrigin { name, method, digest }) => format!("{name} ({method}, digest {})", digest.chars().take(12).collect::<String>()),
            None => "no adapter".into(),
        };
        Err(format!("was saved with {}, and the model is opened with {}; open it with the same one", describe(self), describe(other)))
    }
}

impl Checkpoint {
    /// SHA-256, in hexadecimal, of what tells models apart without reading them whole.
    ///
    /// For each tensor, in the order of their names: its name, its type and its shape as they are
    /// stored, and the first and last 4 KiB of its bytes, or all where there are no more than 8
    /// KiB.
    pub fn fingerprint(&self) -> String {
        let mut sha = Sha256::new();
        for (name, stored) in self.weights.iter() {
            let bytes = self.weights.stored_bytes(stored);
            // Lengths keep apart what stands beside each other.
            for text in [name, &stored.dtype] {
                sha.update((text.len() as u64).to_le_bytes());
                sha.update(text);
            }
            sha.update((stored.shape.len() as u64).to_le_bytes());
            stored.shape.iter().for_each(|&length| sha.update((length as u64).to_le_bytes()));
            sha.update((bytes.len() as u64).to_le_bytes());
            match bytes.len() > 2 * SAMPLE {
                true => [&bytes[..SAMPLE], &bytes[bytes.len() - SAMPLE..]].iter().for_each(|part| sha.update(part)),
                false => sha.update(bytes),
            }
        }
        format!("{:x}", sha.finalize())
    }
}

/// The last part of a path, also of one like `.`.
fn name(path: &Path) -> String {
    let resolved = path.canonicalize();
    let name = path.file_name().or_else(|| resolved.as_ref().ok()?.file_name());
    name.map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

#[cfg(feature = "pull")]
fn fetched_by(path: &Path) -> Option<String> {
    crate::pull::Store::standard().ok()?.name_of(path)
}

#[cfg(not(feature = "pull"))]
fn fetched_by(_: &Path) -> Option<String> {
    None
}
