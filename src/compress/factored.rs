//! Writes a factored checkpoint: a directory that stands alone, complete or not at all.
//!
//! `config.json` is the source's with one object more, `"lowkey"` ([`Factored`]); the weights are safetensors, in shards with an index above 4 GiB;
//! the tokenizer comes along. Tensors are written one at a time: only the factors are held in memory, all others pass through.

use super::Made;
use crate::checkpoint::{Checkpoint, Factored, row_tensors};
use crate::task::{OnProgress, report};
use crate::{Error, Result, task};
use half::f16;
use half::slice::HalfFloatSliceExt;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Float {
    /// Two bytes: what kernels read.
    #[default]
    F16,
    /// Four bytes: no rounding, for tests.
    F32,
}

impl Float {
    fn name(self) -> &'static str {
        match self {
            Float::F16 => "F16",
            Float::F32 => "F32",
        }
    }

    fn bytes(self) -> u64 {
        match self {
            Float::F16 => 2,
            Float::F32 => 4,
        }
    }
}

/// Shards are kept below this many bytes.
const SHARD: u64 = 4 << 30;

/// Tensors that were made, by name: shape and numbers, row-major.
pub(crate) type MadeTensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Writes `source` to the new directory `path`, with the tensors that were made, in place of its own where these have their names.
///
/// # Errors
/// [`Error::Exists`] where `path` is taken, [`Error::Numeric`] where a made number is not finite or too large, [`Error::Interrupted`], and those of reading
/// and writing. Nothing is left behind then.
pub(super) fn write(source: &Checkpoint, factored: &Factored, made: &Made, float: Float, path: &Path, on_progress: OnProgress<'_>) -> Result<()> {
    let directory = task::directory(path)?;
    let made = &all(made, source.config().head_dim);
    let tensors = list(source, made);
    let shards = cut(&tensors, float, SHARD);
    let mut places = Map::new();
    let mut done = 0;
    for (index, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_string(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        write_shard(source, made, shard, float, &directory.path().join(&name), &mut |_| {
            done += 1;
            report(on_progress, "write", done, tensors.len())
        })?;
        places.extend(shard.iter().map(|tensor| (tensor.name.clone(), Value::from(name.as_str()))));
    }
    if shards.len() > 1 {
        let total: u64 = tensors.iter().map(|tensor| tensor.bytes(float)).sum();
        write_json(&directory.path().join("model.safetensors.index.json"), &json!({ "metadata": { "total_size": total }, "weight_map": places }))?;
    }
    write_json(&directory.path().join("config.json"), &config(source, factored, float)?)?;
    source.write_tokenizer(directory.path())?;
    task::publish_directory(directory, path)
}

/// What the rows come to as tensors, beside those that the method replaces.
fn all(made: &Made, head_dim: usize) -> MadeTensors {
    let mut all = made.tensors.clone();
    for (index, (spec, coder)) in made.rows.specs.iter().zip(&made.rows.coders).enumerate() {
        // Column by column `[in, out]` is row by row `[out, in]`.
        let transposed;
        let down = match &coder.down {
            Some(down) => down,
            None => {
                transposed = coder.up.transpose();
                &transposed
            }
        };
        let numbers = [coder.mean.as_slice(), down.as_slice(), coder.up.as_slice()];
        for ((name, shape), numbers) in row_tensors(index, spec, head_dim).into_iter().zip(numbers) {
            all.insert(name, (shape, numbers.to_vec()));
        }
    }
    all
}

/// A tensor to be written.
struct Listed {
    name: String,
    shape: Vec<usize>,
}

impl Listed {
    fn bytes(&self, float: Float) -> u64 {
        self.shape.iter().map(|&length| length as u64).product::<u64>() * float.bytes()
    }
}

/// Everything that is made, and everything of the source's that is not replaced by it.
fn list(source: &Checkpoint, made: &MadeTensors) -> Vec<Listed> {
    let unused = |name: &str| name == "lm_head.weight" && source.config().tie_word_embeddings;
    let copied = source.tensor_names().filter(|name| !made.contains_key(*name) && !unused(name)).filter_map(|name| {
        let shape = source.shape(name)?.to_vec();
        Some(Listed { name: name.into(), shape })
    });
    let mut all: Vec<Listed> = copied.chain(made.iter().map(|(name, (shape, _))| Listed { name: name.clone(), shape: shape.clone() })).collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

/// Cuts the list into runs of at most `limit` bytes, or of one tensor that is larger.
fn cut(tensors: &[Listed], float: Float, limit: u64) -> Vec<&[Listed]> {
    let (mut shards, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (index, tensor) in tensors.iter().enumerate() {
        if index > start && bytes + tensor.bytes(float) > limit {
            shards.push(&tensors[start..index]);
            (start, bytes) = (index, 0);
        }
        bytes += tensor.bytes(float);
    }
    shards.push(&tensors[start..]);
    shards
}

/// One safetensors file: the header's length, the header, the numbers in its order.
fn write_shard(
    source: &Checkpoint,
    made: &MadeTensors,
    tensors: &[Listed],
    float: Float,
    path: &Path,
    written: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<()> {
    let mut header = Map::from_iter([("__metadata__".to_string(), json!({ "format": "pt" }))]);
    let mut end = 0;
    for tensor in tensors {
        let start = end;
        end += tensor.bytes(float);
        header.insert(tensor.name.clone(), json!({ "dtype": float.name(), "shape": tensor.shape, "data_offsets": [start, end] }));
    }
    let mut header = Value::Object(header).to_string();
    // Numbers start at a multiple of eight bytes.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));

    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(Error::io("create", path))?);
    let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(Error::io("write", path));
    put(&(header.len() as u64).to_le_bytes())?;
    put(header.as_bytes())?;
    for Listed { name, shape } in tensors {
        match (made.get(name), float) {
            (Some((_, numbers)), Float::F16) => put(&little_endian_f16(&round(name, numbers)?))?,
            (Some((_, numbers)), Float::F32) => put(&little_endian_f32(check(name, numbers, f32::MAX)?))?,
            (None, Float::F16) => put(&little_endian_f16(&source.f16(name, shape)?))?,
            (None, Float::F32) => put(&little_endian_f32(&source.f32(name, shape)?))?,
        }
        written(name)?;
    }
    let file = file.into_inner().map_err(|e| Error::io("write", path)(e.into_error()))?;
    file.sync_all().map_err(Error::io("write", path))
}

fn round(name: &str, numbers: &[f32]) -> Result<Vec<f16>> {
    let mut rounded = vec![f16::ZERO; numbers.len()];
    rounded.convert_from_f32_slice(check(name, numbers, f16::MAX.to_f32())?);
    Ok(rounded)
}

fn check<'a>(name: &str, numbers: &'a [f32], most: f32) -> Result<&'a [f32]> {
    match numbers.iter().find(|x| !x.is_finite() || x.abs() > most) {
        None => Ok(numbers),
        Some(x) => Err(Error::Numeric { what: format!("the factor {name}"), message: format!("holds {x}; numbers up to {most} can be stored") }),
    }
}

fn little_endian_f16(numbers: &[f16]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn little_endian_f32(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The source's `config.json` with the object `"lowkey"`.
fn config(source: &Checkpoint, factored: &Factored, float: Float) -> Result<Value> {
    let failed = |message: String| Error::Checkpoint { path: source.path().join("config.json"), message };
    let mut config = source.config_json().clone();
    let object = config.as_object_mut().ok_or_else(|| failed("is not a JSON object".into()))?;
    let lowkey = serde_json::to_value(factored).map_err(|e| failed(format!("its lowkey object cannot be written: {e}")))?;
    object.insert("lowkey".into(), lowkey);
    object.insert("torch_dtype".into(), if float == Float::F16 { "float16" } else { "float32" }.into());
    Ok(config)
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    std::fs::write(path, format!("{value:#}\n")).map_err(Error::io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_hold_what_fits_and_all_of_it() {
        let tensors: Vec<_> = [3, 4, 5, 20, 1, 1].iter().map(|&length| Listed { name: format!("{length}"), shape: vec![length] }).collect();
        let lengths: Vec<Vec<usize>> =
            cut(&tensors, Float::F16, 16).iter().map(|shard| shard.iter().map(|tensor| tensor.shape[0]).collect()).collect();
        assert_eq!(lengths, [vec![3, 4], vec![5], vec![20], vec![1, 1]]);
        assert_eq!(cut(&tensors, Float::F32, 1 << 20).len(), 1);
    }

    #[test]
    fn numbers_that_f16_cannot_hold_are_refused_by_name() {
        for bad in [f32::NAN, f32::INFINITY, 65520.0, -7e4] {
            let message = round("rows.3.down.weight", &[1.0, bad]).unwrap_err().to_string();
            assert!(message.contains("rows.3.down"), "{message}");
        }
        assert_eq!(round("x", &[65504.0]).unwrap(), [f16::MAX]);
    }
}
