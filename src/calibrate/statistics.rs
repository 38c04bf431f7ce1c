//! What calibration found, and its file.

use crate::checkpoint::{Checkpoint, Config};
use crate::linalg::Moments;
use crate::{Error, Result, task};
use nalgebra::{DMatrix, DVector};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::collections::HashMap;
use std::io::Write;
use std::ops::Range;
use std::path::Path;

/// Sums over calibration tokens, independent of any plan.
///
/// The [module](super) says what `y`, `n`, `d` are.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    /// SHA-256 of the source checkpoint's weights.
    pub source: String,
    /// SHA-256 of the text.
    pub text: String,
    /// Tokens that were run.
    pub tokens: usize,
    /// Tokens that were run together, at most.
    pub longest: usize,
    /// Positions at the start of each window that are left out of all sums.
    pub sinks: usize,
    /// Gradients reach a key or value only from queries at least this far behind it.
    pub recent: usize,
    /// Consecutive layers whose rows `y` are moments together; the last group may be smaller.
    pub span: usize,
    /// By group of `span` layers: moments of its layers' rows `y`, one under the other.
    pub moments: Vec<Moments>,
    /// What is known of each layer by itself.
    pub layers: Vec<LayerStatistics>,
}

/// Some tokens' keys and values themselves, spread evenly over the text.
///
/// A column for each, the same tokens in every layer. They tell what no moment does, as how much
/// energies vary from token to token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The rows `y`, `[2n, tokens]`.
    pub rows: DMatrix<f32>,
    /// Keys after RoPE, `[n, tokens]`.
    pub post_rope_keys: DMatrix<f32>,
}

/// One layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerStatistics {
    /// Keys after RoPE, `[n]`.
    pub post_rope_keys: Moments,
    /// Some tokens of those that the sums are over.
    pub sample: Sample,
    /// By key/value head, `[d, d]`.
    ///
    /// The mean over tokens (from position `recent` on) of `Σ q qᵀ` over the head's queries, after
    /// RoPE.
    pub queries: Vec<DMatrix<f32>>,
    /// Mean diagonal entry of the sensitivity of keys and of values.
    ///
    /// Estimated from forward passes alone.
    pub scalar: Option<[f32; 2]>,
    /// Mean root of the loss's squared gradient with respect to key and value weights.
    ///
    /// The mean is over the projection's entries, the mean square over windows.
    pub fisher: Option<[f32; 2]>,
    /// The sensitivity in full.
    pub sensitivity: Option<Sensitivity>,
}

/// Sums over tokens of `g gᵀ`, for each position whose loss counted: `[n, n]`, symmetric.
///
/// `g` is the gradient of the loss of all positions in a window.
#[derive(Debug, Clone, PartialEq)]
pub struct Sensitivity {
    /// With respect to keys before RoPE.
    pub keys: DMatrix<f32>,
    /// With respect to values.
    pub values: DMatrix<f32>,
}

impl Moments {
    /// Those of the numbers in `range` alone.
    ///
    /// # Panics
    /// Where there are fewer numbers.
    pub fn part(&self, range: Range<usize>) -> Moments {
        Moments {
            mean: self.mean.rows_range(range.clone()).into_owned(),
            second: self.second.view((range.start, range.start), (range.len(), range.len())).into_owned(),
        }
    }
}

impl Statistics {
    /// The version of the file's layout.
    const FORMAT: &str = "4";

    /// Moments of the rows `y` of consecutive `layers`, one under the other.
    ///
    /// They may have been gathered over any span.
    ///
    /// # Errors
    /// [`Error::Argument`] where these layers were not correlated with each other, or do not exist.
    pub fn rows(&self, layers: Range<usize>) -> Result<Moments> {
        let group = layers.start / self.span;
        let first = group * self.span;
        let end = (first + self.span).min(self.layers.len());
        if layers.is_empty() || layers.end > end {
            let message = format!(
                "the statistics, over spans of {}, do not relate layers {} to {} to each other; gather them anew over a longer span",
                self.span,
                layers.start,
                layers.end.saturating_sub(1)
            );
            return Err(Error::Argument { name: "span".into(), message });
        }
        let moments = &self.moments[group];
        let width = moments.mean.len() / (end - first);
        Ok(moments.part((layers.start - first) * width..(layers.end - first) * width))
    }

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
        let tensors = self.tensors().into_iter().map(|Named { name, shape, numbers }| {
            TensorView::new(Dtype::F32, shape, bytemuck::cast_slice(numbers))
                .map(|view| (name.clone(), view))
                .map_err(|e| Error::Numeric { what: format!("{name} of the statistics"), message: e.to_string() })
        });
        let tensors = tensors.collect::<Result<Vec<_>>>()?;
        // Through the file's own handle: `serialize_to_file` would put another file in its place.
        let bytes = safetensors::serialize(tensors, Some(metadata)).map_err(|e| Error::io("write", path)(std::io::Error::other(e.to_string())))?;
        file.write_all(&bytes).map_err(Error::io("write", path))?;
        task::publish_file(file, path)
    }

    /// All that is saved as a tensor.
    fn tensors(&self) -> Vec<Named<'_>> {
        let mut all = Vec::new();
        for (group, moments) in self.moments.iter().enumerate() {
            all.extend(Named::moments(&format!("groups.{group}"), moments));
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let name = |part: &str| format!("layers.{index}.{part}");
            all.extend(Named::moments(&name("turned_keys"), &layer.post_rope_keys));
            all.push(Named::columns(name("sample.rows"), &layer.sample.rows));
            all.push(Named::columns(name("sample.turned_keys"), &layer.sample.post_rope_keys));
            all.extend(layer.queries.iter().enumerate().map(|(head, queries)| Named::matrix(name(&format!("queries.{head}")), queries)));
            all.extend(layer.scalar.iter().map(|numbers| Named::line(name("scalar"), numbers)));
            all.extend(layer.fisher.iter().map(|numbers| Named::line(name("fisher"), numbers)));
            if let Some(Sensitivity { keys, values }) = &layer.sensitivity {
                for (part, matrix) in [("keys", keys), ("values", values)] {
                    all.push(Named::matrix(name(&format!("sensitivity.{part}")), matrix));
                }
            }
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
        let moments = |group: usize| read.moments(&format!("groups.{group}"), span.min(layers - group * span) * 2 * keys);
        let layer = |index: usize| {
            let name = |part: &str| format!("layers.{index}.{part}");
            let square = |part: &str| read.square(&name(&format!("sensitivity.{part}")), keys);
            Ok(LayerStatistics {
                post_rope_keys: read.moments(&name("turned_keys"), keys)?,
                sample: Sample {
                    rows: read.columns(&name("sample.rows"), 2 * keys, sampled)?,
                    post_rope_keys: read.columns(&name("sample.turned_keys"), keys, sampled)?,
                },
                queries: (0..keys / first).map(|head| read.square(&name(&format!("queries.{head}")), first)).collect::<Result<_>>()?,
                scalar: read.pair("scalar", index)?,
                fisher: read.pair("fisher", index)?,
                sensitivity: match read.has("layers.0.sensitivity.keys") {
                    true => Some(Sensitivity { keys: square("keys")?, values: square("values")? }),
                    false => None,
                },
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

    /// Whether these are statistics of `checkpoint`, whose digest is `source`.
    ///
    /// # Errors
    /// [`Error::Argument`] where they are another model's.
    pub fn check(&self, checkpoint: &Checkpoint, source: &str) -> Result<()> {
        let Config { num_hidden_layers: layers, hidden_size: hidden, num_key_value_heads: heads, head_dim: d, .. } = *checkpoint.config();
        let alike = self.layers.len() == layers
            && self.layers.iter().all(|layer| layer.queries.len() == heads && layer.post_rope_keys.mean.len() == heads * d);
        let message = if !alike {
            format!("were gathered from a model of another shape than {} ({layers} layers, {hidden} wide)", checkpoint.path().display())
        } else if self.source != source {
            format!("were gathered from other weights than those of {}", checkpoint.path().display())
        } else {
            return Ok(());
        };
        Err(Error::Argument { name: "statistics".into(), message: format!("{message}; gather them anew") })
    }
}

/// A tensor to be written. Symmetric matrices are the same row by row and column by column.
struct Named<'a> {
    name: String,
    shape: Vec<usize>,
    numbers: &'a [f32],
}

impl<'a> Named<'a> {
    fn line(name: String, numbers: &'a [f32]) -> Named<'a> {
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
}

/// Tensors as they are expected.
struct Reader<'a> {
    path: &'a Path,
    file: &'a SafeTensors<'a>,
}

impl Reader<'_> {
    fn fail<T>(&self, name: &str, message: String) -> Result<T> {
        Err(Error::Tensor { path: self.path.into(), name: name.into(), message })
    }

    fn has(&self, name: &str) -> bool {
        self.file.tensor(name).is_ok()
    }

    /// The shape of a tensor that is no number by itself.
    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        match self.file.tensor(name) {
            Ok(tensor) if !tensor.shape().is_empty() => Ok(tensor.shape().to_vec()),
            Ok(_) => self.fail(name, "is a single number".into()),
            Err(_) => self.fail(name, format!("missing, in a file of {} tensors", self.file.len())),
        }
    }

    fn numbers(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
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

    /// What the first layer has, every layer has.
    fn pair(&self, part: &str, layer: usize) -> Result<Option<[f32; 2]>> {
        if !self.has(&format!("layers.0.{part}")) {
            return Ok(None);
        }
        Ok(self.numbers(&format!("layers.{layer}.{part}"), &[2])?.try_into().ok())
    }
}
