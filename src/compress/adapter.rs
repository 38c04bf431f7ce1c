//! Writes an adapter file: what was made and nothing else, complete or not at all.

use super::tensors::{all, encode};
use super::{Made, Output};
use crate::checkpoint::{ADAPTER, Factored};
use crate::task::{OnProgress, report};
use crate::{Error, Result, task};
use safetensors::tensor::{TensorView, serialize};
use std::collections::HashMap;
use std::io::Write;

/// Writes the new file `output.path`.
///
/// # Errors
/// [`Error::Exists`] where it is taken, [`Error::Numeric`] where a made number is not finite or too
/// large, [`Error::Interrupted`], and those of writing. Nothing is left behind then.
pub(super) fn write(factored: &Factored, made: &Made, head_dim: usize, output: &Output, on_progress: OnProgress<'_>) -> Result<()> {
    let Output { path, float, .. } = output;
    let mut file = task::file(path)?;
    let failed = |reason: String| Error::io("write", path)(std::io::Error::other(reason));
    let tensors = all(made, head_dim);
    let mut encoded = Vec::with_capacity(tensors.len());
    for (name, (shape, numbers)) in &tensors {
        encoded.push((name, shape, encode(name, numbers, *float)?));
        report(on_progress, "write", encoded.len(), tensors.len())?;
    }
    let views = encoded
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(float.dtype(), shape.to_vec(), bytes).map_err(|e| failed(e.to_string()))?)));
    let views = views.collect::<Result<Vec<_>>>()?;
    let metadata = serde_json::to_string(factored).map_err(|e| failed(e.to_string()))?;
    // Through the file's own handle: `serialize_to_file` would put another file in its place.
    let bytes = serialize(views, Some(HashMap::from([(ADAPTER.to_string(), metadata)]))).map_err(|e| failed(e.to_string()))?;
    file.write_all(&bytes).map_err(Error::io("write", path))?;
    task::publish_file(file, path)
}
