//! What calibration found, and its file.

use crate::checkpoint::{Checkpoint, Config};
use crate::{Error, Result, output};
use nalgebra::DMatrix;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

/// Sums over calibration tokens, independent of any plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    /// SHA-256 of the source checkpoint's weights.
    pub source: String,
    /// SHA-256 of the text.
    pub text: String,
    /// Tokens counted.
    pub tokens: usize,
    /// Tokens that were run together.
    pub window: usize,
    /// Positions at the start of each window that together count as much as all others.
    pub sinks: usize,
    /// By layer: `C`, the weighted mean of `xᵀx`, `[D, D]`, symmetric, of what enters attention after its RMSNorm.
    pub attention_inputs: Vec<DMatrix<f32>>,
}

impl Statistics {
    /// The version of the file's layout.
    const FORMAT: &str = "1";

    /// Writes one safetensors file: `layers.{l}.attention_input`, f32, and all else as metadata. It appears under its name only when it is complete.
    ///
    /// # Errors
    /// [`Error::Exists`] where there already is such a file, [`Error::Io`] where it cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut file = output::file(path)?;
        let metadata = HashMap::from(
            [
                ("lowkey_statistics", Self::FORMAT.to_string()),
                ("source", self.source.clone()),
                ("text", self.text.clone()),
                ("tokens", self.tokens.to_string()),
                ("window", self.window.to_string()),
                ("sinks", self.sinks.to_string()),
            ]
            .map(|(key, value)| (key.to_string(), value)),
        );
        let mut tensors = Vec::new();
        for (layer, gram) in self.attention_inputs.iter().enumerate() {
            let view = TensorView::new(Dtype::F32, vec![gram.nrows(), gram.ncols()], bytemuck::cast_slice(gram.as_slice()))
                .map_err(|e| Error::Numeric { what: format!("the statistics of layer {layer}"), message: e.to_string() })?;
            tensors.push((tensor_name(layer), view));
        }
        // Through the file's own handle: `serialize_to_file` would put another file in its place.
        let bytes = safetensors::serialize(tensors, Some(metadata)).map_err(|e| Error::io("write", path)(std::io::Error::other(e.to_string())))?;
        file.write_all(&bytes).map_err(Error::io("write", path))?;
        output::publish_file(file, path)
    }

    /// Reads what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where the file is damaged, of another version or not a statistics file; [`Error::Tensor`] where a matrix is missing, not square
    /// and symmetric, or not finite.
    pub fn load(path: &Path) -> Result<Statistics> {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let damaged = |message: String| Error::Checkpoint { path: path.into(), message };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(format!("not a complete safetensors file: {e}")))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| damaged(format!("not a complete safetensors file: {e}")))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let word = |key: &str| metadata.get(key).cloned().ok_or_else(|| damaged(format!("not a statistics file: its metadata has no `{key}`")));
        let number = |key: &str| word(key)?.parse::<usize>().map_err(|e| damaged(format!("its metadata's `{key}` is not a count: {e}")));
        let format = word("lowkey_statistics")?;
        if format != Self::FORMAT {
            return Err(damaged(format!("is of version {format}; this release reads version {}. Gather the statistics anew", Self::FORMAT)));
        }
        if file.is_empty() {
            return Err(damaged("holds no layers".into()));
        }
        let attention_inputs = (0..file.len()).map(|layer| matrix(path, &file, layer)).collect::<Result<Vec<_>>>()?;
        Ok(Statistics {
            source: word("source")?,
            text: word("text")?,
            tokens: number("tokens")?,
            window: number("window")?,
            sinks: number("sinks")?,
            attention_inputs,
        })
    }

    /// Whether these are statistics of `checkpoint`, whose digest is `source`.
    ///
    /// # Errors
    /// [`Error::Argument`] where they are another model's.
    pub fn check(&self, checkpoint: &Checkpoint, source: &str) -> Result<()> {
        let Config { num_hidden_layers: layers, hidden_size: hidden, .. } = *checkpoint.config();
        let message = if self.attention_inputs.len() != layers || self.attention_inputs.iter().any(|gram| gram.shape() != (hidden, hidden)) {
            format!("were gathered from a model of another shape than {} ({layers} layers, {hidden} wide)", checkpoint.path().display())
        } else if self.source != source {
            format!("were gathered from other weights than those of {}", checkpoint.path().display())
        } else {
            return Ok(());
        };
        Err(Error::Argument { name: "statistics".into(), message: format!("{message}; gather them anew") })
    }
}

fn tensor_name(layer: usize) -> String {
    format!("layers.{layer}.attention_input")
}

fn matrix(path: &Path, file: &SafeTensors<'_>, layer: usize) -> Result<DMatrix<f32>> {
    let name = tensor_name(layer);
    let fail = |message: String| Error::Tensor { path: path.into(), name: name.clone(), message };
    let tensor = file.tensor(&name).map_err(|_| fail(format!("missing, in a file of {} tensors", file.len())))?;
    let &[rows, columns] = tensor.shape() else { return Err(fail(format!("has shape {:?}, not that of a matrix", tensor.shape()))) };
    if tensor.dtype() != Dtype::F32 || rows != columns {
        return Err(fail(format!("is {:?} of {rows} by {columns}; a square matrix of F32 belongs here", tensor.dtype())));
    }
    let numbers: Vec<f32> = tensor.data().chunks_exact(4).map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]])).collect();
    let gram = DMatrix::from_vec(rows, columns, numbers);
    match gram.iter().find(|x| !x.is_finite()) {
        Some(x) => Err(fail(format!("holds {x}, which is not finite"))),
        None if gram != gram.transpose() => Err(fail("is not symmetric".into())),
        None => Ok(gram),
    }
}
