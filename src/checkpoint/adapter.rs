//! An adapter file, `NAME.lowkey`: what compression made for a model, opened beside the model as it
//! is.
//!
//! It is one safetensors file. Its `__metadata__` has one entry, `lowkey`: the JSON object
//! [`Factored`], whose `source` names the model. Its tensors are the bases of the rows, as in a
//! factored checkpoint, and those of the model's own that the method replaces, in Hugging Face's
//! names and conventions.

use super::factored::row_tensors;
use super::file::ModelFile;
use super::foreign;
use super::safetensors;
use super::weights::Stored;
use super::{Checkpoint, Factored, Source};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// What an adapter file's name ends with, after the dot, and the key of its metadata.
pub const ADAPTER: &str = "lowkey";

/// Whether a path is that of an adapter file, by its name; a directory is none.
pub fn is_adapter(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(ADAPTER)) && !path.is_dir()
}

/// An adapter file that has been opened; the model is still to be found.
pub(super) struct Adapter {
    file: ModelFile,
    tensors: Vec<(String, Stored)>,
    factored: Factored,
    source: Source,
}

impl Adapter {
    /// Reads the header.
    pub fn open(path: &Path) -> Result<Adapter> {
        let bad = |message: String| Error::Checkpoint { path: path.into(), message };
        if path.join(foreign::ADAPTER_CONFIG).is_file() {
            return Err(foreign::adapter(path));
        }
        let file = ModelFile::open(path)?;
        let header = safetensors::read_header(path, &file.bytes)?;
        if let Some((name, advice)) = header.tensors.iter().find_map(|(name, _)| Some((name, foreign::tensor(name)?))) {
            return Err(Error::Unsupported { path: path.into(), message: format!("has a tensor {name}: {advice}") });
        }
        let Some(text) = header.metadata[ADAPTER].as_str() else {
            return Err(bad(format!("is no adapter file that `compress` has written: its metadata has no {ADAPTER:?}")));
        };
        let value = serde_json::from_str(text).map_err(|e| bad(format!("its metadata's {ADAPTER:?} is not valid JSON: {e}")))?;
        let factored = Factored::parse(&value, path)?;
        let source = factored.source.clone().ok_or_else(|| bad("does not say which model it was made for".into()))?;
        Ok(Adapter { file, tensors: header.tensors, factored, source })
    }

    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// The model that it was made for.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Whether `model` is the one that it was made for.
    pub fn fits(&self, model: &Checkpoint) -> bool {
        model.factored.is_none() && model.fingerprint() == self.source.fingerprint
    }

    /// `model` with its rows, and with its tensors in the place of the model's own.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where `model` is another than it was made for or has been compressed
    /// already, or where the rows do not fit it; [`Error::Tensor`] for a tensor that is missing, of
    /// another shape, or of no use.
    pub fn attach(self, mut model: Checkpoint) -> Result<Checkpoint> {
        let path = self.path().to_path_buf();
        let bad = |message: String| Err(Error::Checkpoint { path: path.clone(), message });
        if model.factored.is_some() {
            return bad(format!("goes with {}, and {} has been compressed already; give the dense model", self.source.name, model.path.display()));
        }
        if !self.fits(&model) {
            return bad(format!(
                "was made for {}, and {} is another model: {}",
                self.source.describe(),
                model.path.display(),
                Source::of(&model).describe()
            ));
        }
        self.factored.check(&model.config, &path)?;
        let head_dim = model.config.head_dim;
        let rows: BTreeMap<String, Vec<usize>> =
            self.factored.rows.iter().enumerate().flat_map(|(index, spec)| row_tensors(index, spec, head_dim)).collect();
        for (name, stored) in &self.tensors {
            let message = match rows.get(name).map(Vec::as_slice).or(model.shape(name)) {
                Some(shape) if shape == stored.shape => continue,
                Some(shape) => format!("has shape {:?} where the model needs {shape:?}", stored.shape),
                None => "belongs neither to the rows nor to the model".into(),
            };
            return Err(Error::Tensor { path, name: name.clone(), message });
        }
        model.weights.replace(self.file, self.tensors);
        model.factored = Some(self.factored);
        model.adapter = Some(path);
        model.check_tensors()?;
        Ok(model)
    }
}
