//! Reading safetensors: eight bytes of header length, a JSON header from tensor name to type, shape
//! and byte range, then the data.
//!
//! The header is read here and not by the `safetensors` crate, because a damaged file must be
//! refused with the tensor's name, and a name that occurs twice must be refused at all. (Format:
//! <https://github.com/huggingface/safetensors#format>.)

use super::encoding::Encoding;
use super::file::ModelFile;
use super::foreign;
use super::weights::{Stored, Weights};
use crate::{Error, Result};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The format's own bound on the header.
const MAX_HEADER: u64 = 100_000_000;

/// Reads the headers of `model.safetensors`, or of all files that `model.safetensors.index.json`
/// names.
pub(super) fn open(directory: &Path) -> Result<Weights> {
    let mut weights = Weights::default();
    let single = directory.join(SINGLE);
    if single.is_file() {
        add(&mut weights, &single)?;
        return Ok(weights);
    }
    let index = directory.join(INDEX);
    if !index.is_file() {
        if directory.join(foreign::ADAPTER_CONFIG).is_file() {
            return Err(foreign::adapter(directory));
        }
        let found = foreign::weights(directory).map_or(String::new(), |kind| format!(", but {kind}"));
        let message =
            format!("there is neither {SINGLE} nor {INDEX}{found}; weights in other formats have to be converted to safetensors or GGUF first");
        return Err(Error::Checkpoint { path: directory.into(), message });
    }
    let damaged = |message: String| Error::Checkpoint { path: index.clone(), message };
    let text = std::fs::read(&index).map_err(Error::io("read", &index))?;
    let value: Value = serde_json::from_slice(&text).map_err(|e| damaged(format!("not valid JSON: {e}")))?;
    let map = value["weight_map"].as_object().ok_or_else(|| damaged("has no object \"weight_map\"".into()))?;
    let mut shards = BTreeSet::new();
    for (tensor, shard) in map {
        let shard = shard.as_str().ok_or_else(|| damaged(format!("tensor {tensor}: its file is not a string")))?;
        if shard.contains(['/', '\\']) || shard == ".." {
            return Err(damaged(format!("tensor {tensor}: its file {shard:?} is outside the directory")));
        }
        shards.insert(shard);
    }
    for shard in shards {
        add(&mut weights, &directory.join(shard))?;
    }
    for (tensor, shard) in map {
        if weights.get(tensor).is_none() {
            let path: PathBuf = directory.join(shard.as_str().unwrap_or_default());
            return Err(Error::Tensor { path, name: tensor.clone(), message: format!("missing, though {INDEX} says that it is there") });
        }
    }
    Ok(weights)
}

fn add(weights: &mut Weights, path: &Path) -> Result<()> {
    let file = ModelFile::open(path)?;
    let header = read_header(path, &file.bytes)?;
    weights.add(file, header.tensors)
}

/// What the header of one file says.
pub(super) struct Header {
    /// `__metadata__`; null where there is none.
    pub metadata: Value,
    /// In the order of their bytes.
    pub tensors: Vec<(String, Stored)>,
}

/// The header of one file, every byte range checked against the file's length and against each
/// other.
pub(super) fn read_header(path: &Path, bytes: &[u8]) -> Result<Header> {
    let damaged = |message: String| Error::Checkpoint { path: path.into(), message };
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(damaged(format!("truncated: {} bytes are no safetensors file", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER || length > rest.len() as u64 {
        let message = format!("the header is said to have {length} bytes, but only {} follow: truncated, or not a safetensors file", rest.len());
        return Err(damaged(message));
    }
    let (header, data) = rest.split_at(length as usize);
    let Entries(entries) = serde_json::from_slice(header).map_err(|e| damaged(format!("the header is not valid: {e}")))?;

    let (mut metadata, mut tensors) = (Value::Null, Vec::with_capacity(entries.len()));
    for (name, entry) in entries {
        if name == "__metadata__" {
            metadata = entry;
        } else {
            let stored = read_entry(&entry, 8 + length as usize, data.len()).map_err(|message| Error::Tensor {
                path: path.into(),
                name: name.clone(),
                message,
            })?;
            tensors.push((name, stored));
        }
    }
    tensors.sort_by_key(|(_, stored)| (stored.range.start, stored.range.end));
    for pair in tensors.windows(2) {
        let [(before, a), (name, b)] = pair else { continue };
        if b.range.start < a.range.end {
            return Err(Error::Tensor { path: path.into(), name: name.clone(), message: format!("its bytes overlap those of {before}") });
        }
    }
    Ok(Header { metadata, tensors })
}

fn read_entry(entry: &Value, data_start: usize, data_length: usize) -> Result<Stored, String> {
    let integers = |key: &str| -> Result<Vec<usize>, String> {
        let list = entry[key].as_array().ok_or_else(|| format!("has no list {key:?} in the header"))?;
        list.iter().map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok()).ok_or_else(|| format!("{key:?} holds {n}, which is no size"))).collect()
    };
    let dtype = entry["dtype"].as_str().ok_or("has no \"dtype\" in the header")?;
    let shape = integers("shape")?;
    let [start, end] = integers("data_offsets")?[..] else { return Err("\"data_offsets\" are not two numbers".into()) };
    if start > end || end > data_length {
        return Err(format!("its bytes {start}..{end} lie outside the file's {data_length} bytes of data: the file is truncated or damaged"));
    }
    let encoding = match dtype {
        "F32" => Some(Encoding::F32),
        "F16" => Some(Encoding::F16),
        "BF16" => Some(Encoding::BF16),
        _ => None,
    };
    if let Some(encoding) = encoding {
        let needed = shape.iter().try_fold(encoding.block().1, |bytes, n| bytes.checked_mul(*n));
        if needed != Some(end - start) {
            return Err(format!("shape {shape:?} in {dtype} does not fill its {} bytes", end - start));
        }
    }
    Ok(Stored { file: 0, range: data_start + start..data_start + end, shape, dtype: dtype.into(), encoding, order: None, strewn: None })
}

/// A JSON object whose keys occur once.
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entries, D::Error> {
        struct Once;
        impl<'de> Visitor<'de> for Once {
            type Value = Entries;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object from tensor names to their places")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let (mut entries, mut seen) = (Vec::new(), BTreeSet::new());
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if !seen.insert(name.clone()) {
                        return Err(serde::de::Error::custom(format!("tensor {name} occurs twice")));
                    }
                    entries.push((name, value));
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Once)
    }
}
