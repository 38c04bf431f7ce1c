//! How statistics are written and read: one safetensors file of named matrices.

use super::statistics::{ForwardStatistics, LayerStatistics, Sample, Sensitivity, Statistics};
use crate::linalg::Moments;
use crate::{Error, Result, task};
use nalgebra::{DMatrix, DVector};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

impl Statistics {
    /// The version of the file's layout.
    const FORMAT: &str = "4";

    /// Writes one safetensors file, matrices in f32 and all else as metadata.
    ///
    /// It appears under its name only when it is complete.
    ///
    /// # Errors
    /// [`Error::Exists`] where there already is such a file, [`Error::Io`] where it cannot be
    /// written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut file = task::file(path)?;
        let metadata = HashMap::from(
            [
                ("lowkey_statistics", Self::FORMAT.to_string()),
                ("source", self.source.clone()),
                ("text", self.text.clone()),
                ("tokens", self.tokens.to_string()),
                ("longest", self.longest.to_string()),
                ("sinks", self.sinks.to_string()),
                ("recent", self.recent.to_string()),
                ("span", self.span.to_string()),
                ("layers", self.layers.len().to_string()),
            ]
            .map(|(key, value)| (key.to_string(), value)),
        );
        // Through the file's own handle: `serialize_to_file` would put another file in its place.
        let bytes = serialize(self.tensors(), metadata)?;
        file.write_all(&bytes).map_err(Error::io("write", path))?;
        task::publish_file(file, path)
    }

    /// All that is saved as a tensor.
    fn tensors(&self) -> Vec<Named<'_>> {
        let mut all = Vec::new();
        for (group, moments) in self.moments.iter().enumerate() {
            all.extend(Named::group(group, moments));
        }
        for (index, layer) in self.layers.iter().enumerate() {
            all.extend(Named::forward(index, &layer.post_rope_keys, &layer.sample, &layer.queries));
            all.extend(layer.scalar.iter().map(|numbers| Named::line(layer_name(index, "scalar"), numbers)));
            all.extend(layer.fisher.iter().map(|numbers| Named::line(layer_name(index, "fisher"), numbers)));
            all.extend(layer.sensitivity.iter().flat_map(|sensitivity| Named::sensitivity(index, sensitivity)));
        }
        all
    }

    /// Reads what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where the file is damaged, of another version or not a statistics
    /// file; [`Error::Tensor`] where a tensor is missing, of another shape than the others ask for,
    /// not symmetric, or not finite.
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
        let (span, layers) = (number("span")?, number("layers")?);
        if ![1, 2, 4].contains(&span) || layers == 0 {
            return Err(damaged(format!("its metadata tells of {layers} layers in spans of {span}")));
        }
        let read = Reader { path, file: &file };
        let first = read.shape("layers.0.queries.0")?[0];
        let keys = read.shape("layers.0.turned_keys.mean")?[0];
        if first == 0 || keys == 0 || keys % first != 0 {
            return Err(damaged(format!("keys of {keys} numbers are not made of heads of {first}")));
        }
        let sampled = read.shape("layers.0.sample.rows")?[0];
        if sampled == 0 {
            return Err(damaged("its sample is of no tokens".into()));
        }
        let moments = |group: usize| read.group(group, span.min(layers - group * span) * 2 * keys);
        let layer = |index: usize| {
            let ForwardStatistics { post_rope_keys, sample, queries } = read.forward(index, [keys, first, sampled])?;
            let sensitivity = read.has("layers.0.sensitivity.keys").then(|| read.sensitivity(index, keys)).transpose()?;
            Ok(LayerStatistics {
                post_rope_keys,
                sample,
                queries,
                scalar: read.pair("scalar", index)?,
                fisher: read.pair("fisher", index)?,
                sensitivity,
            })
        };
        Ok(Statistics {
            source: word("source")?,
            text: word("text")?,
            tokens: number("tokens")?,
            longest: number("longest")?,
            sinks: number("sinks")?,
            recent: number("recent")?,
            span,
            moments: (0..layers.div_ceil(span)).map(moments).collect::<Result<_>>()?,
            layers: (0..layers).map(layer).collect::<Result<_>>()?,
        })
    }
}

/// A tensor to be written. Symmetric matrices are the same row by row and column by column.
pub(super) struct Named<'a> {
    name: String,
    shape: Vec<usize>,
    numbers: &'a [f32],
}

impl<'a> Named<'a> {
    pub(super) fn line(name: String, numbers: &'a [f32]) -> Named<'a> {
        Named { name, shape: vec![numbers.len()], numbers }
    }

    fn matrix(name: String, matrix: &'a DMatrix<f32>) -> Named<'a> {
        Named { name, shape: vec![matrix.nrows(), matrix.ncols()], numbers: matrix.as_slice() }
    }

    /// Column after column: in the file, a row for each.
    fn columns(name: String, columns: &'a DMatrix<f32>) -> Named<'a> {
        Named { name, shape: vec![columns.ncols(), columns.nrows()], numbers: columns.as_slice() }
    }

    fn moments(name: &str, moments: &'a Moments) -> [Named<'a>; 2] {
        [Named::line(format!("{name}.mean"), moments.mean.as_slice()), Named::matrix(format!("{name}.second"), &moments.second)]
    }

    /// The moments of a group of layers.
    pub(super) fn group(group: usize, moments: &'a Moments) -> [Named<'a>; 2] {
        Named::moments(&format!("groups.{group}"), moments)
    }

    /// What a layer's activations come to.
    pub(super) fn forward(layer: usize, post_rope_keys: &'a Moments, sample: &'a Sample, queries: &'a [DMatrix<f32>]) -> Vec<Named<'a>> {
        let name = |part: &str| layer_name(layer, part);
        let mut all = Vec::from(Named::moments(&name("turned_keys"), post_rope_keys));
        all.push(Named::columns(name("sample.rows"), &sample.rows));
        all.push(Named::columns(name("sample.turned_keys"), &sample.post_rope_keys));
        all.extend(queries.iter().enumerate().map(|(head, queries)| Named::matrix(name(&format!("queries.{head}")), queries)));
        all
    }

    /// What a layer's gradients come to.
    pub(super) fn sensitivity(layer: usize, Sensitivity { keys, values }: &'a Sensitivity) -> [Named<'a>; 2] {
        [("keys", keys), ("values", values)].map(|(part, matrix)| Named::matrix(layer_name(layer, &format!("sensitivity.{part}")), matrix))
    }
}

/// What a layer's part is called.
pub(super) fn layer_name(layer: usize, part: &str) -> String {
    format!("layers.{layer}.{part}")
}

/// A safetensors file's bytes.
///
/// # Errors
/// [`Error::Numeric`] where numbers are more or fewer than a shape says.
pub(super) fn serialize(tensors: Vec<Named<'_>>, metadata: HashMap<String, String>) -> Result<Vec<u8>> {
    let fail = |what: String, e: safetensors::SafeTensorError| Error::Numeric { what, message: e.to_string() };
    let tensors = tensors.into_iter().map(|Named { name, shape, numbers }| {
        let view = TensorView::new(Dtype::F32, shape, bytemuck::cast_slice(numbers));
        view.map(|view| (name.clone(), view)).map_err(|e| fail(format!("{name} of the statistics"), e))
    });
    safetensors::serialize(tensors.collect::<Result<Vec<_>>>()?, Some(metadata)).map_err(|e| fail("the statistics".into(), e))
}

/// Tensors as they are expected.
pub(super) struct Reader<'a> {
    pub(super) path: &'a Path,
    pub(super) file: &'a SafeTensors<'a>,
}

impl Reader<'_> {
    fn fail<T>(&self, name: &str, message: String) -> Result<T> {
        Err(Error::Tensor { path: self.path.into(), name: name.into(), message })
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.file.tensor(name).is_ok()
    }

    /// The shape of a tensor that is no number by itself.
    pub(super) fn shape(&self, name: &str) -> Result<Vec<usize>> {
        match self.file.tensor(name) {
            Ok(tensor) if !tensor.shape().is_empty() => Ok(tensor.shape().to_vec()),
            Ok(_) => self.fail(name, "is a single number".into()),
            Err(_) => self.fail(name, format!("missing, in a file of {} tensors", self.file.len())),
        }
    }

    pub(super) fn numbers(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let Ok(tensor) = self.file.tensor(name) else { return self.fail(name, format!("missing, in a file of {} tensors", self.file.len())) };
        if tensor.dtype() != Dtype::F32 || tensor.shape() != shape {
            return self.fail(name, format!("is {:?} of shape {:?}; F32 of shape {shape:?} belongs here", tensor.dtype(), tensor.shape()));
        }
        let numbers: Vec<f32> = tensor.data().chunks_exact(4).map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]])).collect();
        match numbers.iter().find(|x| !x.is_finite()) {
            Some(x) => self.fail(name, format!("holds {x}, which is not finite")),
            None => Ok(numbers),
        }
    }

    fn square(&self, name: &str, width: usize) -> Result<DMatrix<f32>> {
        let matrix = DMatrix::from_vec(width, width, self.numbers(name, &[width, width])?);
        if matrix != matrix.transpose() {
            return self.fail(name, "is not symmetric".into());
        }
        Ok(matrix)
    }

    fn columns(&self, name: &str, width: usize, count: usize) -> Result<DMatrix<f32>> {
        Ok(DMatrix::from_vec(width, count, self.numbers(name, &[count, width])?))
    }

    fn moments(&self, name: &str, width: usize) -> Result<Moments> {
        let mean = DVector::from_vec(self.numbers(&format!("{name}.mean"), &[width])?);
        Ok(Moments { mean, second: self.square(&format!("{name}.second"), width)? })
    }

    /// The moments of a group of layers, whose rows are `width` numbers together.
    pub(super) fn group(&self, group: usize, width: usize) -> Result<Moments> {
        self.moments(&format!("groups.{group}"), width)
    }

    /// What a layer's activations came to: keys of so many numbers, in heads of so many, and so
    /// many tokens in the sample.
    pub(super) fn forward(&self, layer: usize, [keys, head, sampled]: [usize; 3]) -> Result<ForwardStatistics> {
        let name = |part: &str| layer_name(layer, part);
        Ok(ForwardStatistics {
            post_rope_keys: self.moments(&name("turned_keys"), keys)?,
            sample: Sample {
                rows: self.columns(&name("sample.rows"), 2 * keys, sampled)?,
                post_rope_keys: self.columns(&name("sample.turned_keys"), keys, sampled)?,
            },
            queries: (0..keys / head).map(|index| self.square(&name(&format!("queries.{index}")), head)).collect::<Result<_>>()?,
        })
    }

    /// What a layer's gradients came to.
    pub(super) fn sensitivity(&self, layer: usize, keys: usize) -> Result<Sensitivity> {
        let square = |part: &str| self.square(&layer_name(layer, &format!("sensitivity.{part}")), keys);
        Ok(Sensitivity { keys: square("keys")?, values: square("values")? })
    }

    /// What the first layer has, every layer has.
    pub(super) fn pair(&self, part: &str, layer: usize) -> Result<Option<[f32; 2]>> {
        if !self.has(&format!("layers.0.{part}")) {
            return Ok(None);
        }
        Ok(self.numbers(&format!("layers.{layer}.{part}"), &[2])?.try_into().ok())
    }
}
