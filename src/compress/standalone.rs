//! Writes a checkpoint that stands alone: the model with what was made, complete or not at all.
//!
//! `config.json` is the source's with one object more, `"lowkey"` ([`Factored`]); the weights are
//! safetensors, in shards with an index above 4 GiB; the tokenizer comes along. Tensors are written
//! one at a time: only the factors are held in memory, all others pass through.

use super::tensors::{Float, MadeTensors, all, encode, little_endian_f16, little_endian_f32};
use super::{Made, Output};
use crate::checkpoint::{Checkpoint, Factored, HeadRows, STORED};
use crate::task::{OnProgress, report};
use crate::{Error, Result, task};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Shards are kept below this many bytes.
const SHARD: u64 = 4 << 30;

/// Writes `source` to the new directory `output.path`, with the tensors that were made, in place of
/// its own where these have their names.
///
/// # Errors
/// [`Error::Exists`] where it is taken, [`Error::Numeric`] where a made number is not finite or too
/// large, [`Error::Interrupted`], and those of reading and writing. Nothing is left behind then.
pub(super) fn write(source: &Checkpoint, factored: &Factored, made: &Made, output: &Output, on_progress: OnProgress<'_>) -> Result<()> {
    let Output { path, float, .. } = output;
    let float = *float;
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
        header.insert(tensor.name.clone(), json!({ "dtype": format!("{:?}", float.dtype()), "shape": tensor.shape, "data_offsets": [start, end] }));
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
            (Some((_, numbers)), float) => put(&encode(name, numbers, float)?)?,
            (None, Float::F16) => put(&little_endian_f16(&source.f16(name, shape)?))?,
            (None, Float::F32) => put(&little_endian_f32(&source.f32(name, shape)?))?,
        }
        written(name)?;
    }
    let file = file.into_inner().map_err(|e| Error::io("write", path)(e.into_error()))?;
    file.sync_all().map_err(Error::io("write", path))
}

/// The source's `config.json` with the object `"lowkey"`.
fn config(source: &Checkpoint, factored: &Factored, float: Float) -> Result<Value> {
    let failed = |message: String| Error::Checkpoint { path: source.path().join("config.json"), message };
    let mut config = source.config_json().clone();
    let object = config.as_object_mut().ok_or_else(|| failed("is not a JSON object".into()))?;
    let lowkey = serde_json::to_value(factored).map_err(|e| failed(format!("its lowkey object cannot be written: {e}")))?;
    object.insert("lowkey".into(), lowkey);
    // Heads' rows are written in the order in which they are read.
    if source.config().design.head_rows != HeadRows::Halves || source.config().ropes.iter().any(|rope| rope.dims != source.config().head_dim) {
        let gains = if source.config().design.gains_less_one { "less one" } else { "plain" };
        object.insert(STORED.into(), json!({ "rows": "plain", "gains": gains }));
    }
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
}
