//! Reading GGUF, versions 2 and 3: metadata by key, tensors by name. What they mean is in
//! [`super::gguf_model`].
//!
//! `"GGUF"`, version, counts, then key/value pairs, then tensor descriptions, then (aligned) the
//! data; little-endian. Every length in the file is checked against the bytes that are left before
//! anything is allocated, and every error says at which byte. (Format:
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.)

use super::encoding::Encoding;
use super::foreign;
use super::weights::Stored;
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// A metadata value. Integers of every width are one kind, floats another.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Integer(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array(Vec<Value>),
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Value::Integer(n) => write!(f, "{n}"),
            Value::Float(x) => write!(f, "{x}"),
            Value::Bool(flag) => write!(f, "{flag}"),
            Value::String(text) => write!(f, "{text:?}"),
            Value::Array(values) => write!(f, "a list of {}", values.len()),
        }
    }
}

/// All metadata by key.
pub(super) type Metadata = BTreeMap<String, Value>;

/// The header of a GGUF file.
pub(super) struct Header {
    pub metadata: Metadata,
    /// Tensors by the file's own names; shapes row-major, outermost first.
    pub tensors: Vec<(String, Stored)>,
}

const MAGIC: &[u8; 4] = b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
/// More dimensions than ggml itself has.
const MAX_DIMENSIONS: u32 = 4;
/// Arrays of arrays of arrays occur nowhere; a bound keeps a hostile file from exhausting the
/// stack.
const MAX_NESTING: usize = 4;
/// The largest vocabularies have a sixtieth of this.
const MAX_ELEMENTS: usize = 1 << 24;

/// Reads and checks the header of `bytes`, the whole file at `path`.
pub(super) fn read_header(path: &Path, bytes: &[u8]) -> Result<Header> {
    let mut reader = Reader { path, bytes, at: 0, what: "the header".into() };
    if reader.take(4)? != MAGIC {
        let unknown = "is neither a checkpoint directory nor a GGUF file (it does not begin with \"GGUF\") nor an adapter file (its name does not end with .lowkey)";
        return Err(Error::Unsupported { path: path.into(), message: foreign::file(path).unwrap_or(unknown).into() });
    }
    match reader.u32()? {
        2 | 3 => {}
        version if version.swap_bytes() <= 3 => {
            return Err(Error::Unsupported { path: path.into(), message: "is a big-endian GGUF file; lowkey reads little-endian ones".into() });
        }
        version => return Err(Error::Unsupported { path: path.into(), message: format!("has GGUF version {version}; lowkey reads 2 and 3") }),
    }
    // The shortest pair is an empty key and one byte; the shortest tensor an empty name without
    // dimensions.
    let tensor_count = reader.count("tensors", 8 + 4 + 4 + 8)?;
    let pair_count = reader.count("metadata pairs", 8 + 4 + 1)?;

    let mut metadata = Metadata::new();
    for index in 0..pair_count {
        reader.what = format!("the key of metadata pair {index}");
        let key = reader.string()?;
        reader.what = format!("metadata {key}");
        let kind = reader.u32()?;
        let value = reader.value(kind, 0)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(reader.error("occurs twice"));
        }
    }

    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(Value::Integer(n)) if *n > 0 && *n <= 1 << 20 && (*n as u64).is_power_of_two() => *n as u64,
        Some(other) => {
            let message = format!("metadata general.alignment is {other}; a power of two is expected");
            return Err(Error::Checkpoint { path: path.into(), message });
        }
    };
    let mut descriptions = Vec::with_capacity(tensor_count);
    for index in 0..tensor_count {
        descriptions.push(reader.description(index)?);
    }
    let data_start = (reader.at as u64).next_multiple_of(alignment);
    let mut tensors = Vec::with_capacity(tensor_count);
    for description in descriptions {
        let stored = description.place(data_start, alignment, bytes.len() as u64).map_err(|message| Error::Tensor {
            path: path.into(),
            name: description.name.clone(),
            message,
        })?;
        tensors.push((description.name, stored));
    }
    check_disjoint(path, &tensors)?;
    Ok(Header { metadata, tensors })
}

fn check_disjoint(path: &Path, tensors: &[(String, Stored)]) -> Result<()> {
    let mut names = BTreeSet::new();
    let mut places: Vec<_> = tensors.iter().map(|(name, stored)| (stored.range.start, stored.range.end, name)).collect();
    places.sort();
    for pair in places.windows(2) {
        if pair[1].0 < pair[0].1 {
            return Err(Error::Tensor { path: path.into(), name: pair[1].2.clone(), message: format!("its bytes overlap those of {}", pair[0].2) });
        }
    }
    match tensors.iter().find(|(name, _)| !names.insert(name)) {
        None => Ok(()),
        Some((name, _)) => Err(Error::Tensor { path: path.into(), name: name.clone(), message: "occurs twice".into() }),
    }
}

struct Description {
    name: String,
    /// As in the file: innermost first.
    dimensions: Vec<u64>,
    kind: u32,
    offset: u64,
}

impl Description {
    fn place(&self, data_start: u64, alignment: u64, file_length: u64) -> Result<Stored, String> {
        let (dtype, encoding) = encoding(self.kind);
        let shape = self.dimensions.iter().rev().map(|n| usize::try_from(*n)).collect::<Result<Vec<_>, _>>().map_err(|_| "is larger than memory")?;
        let numbers = self.dimensions.iter().try_fold(1u64, |product, n| product.checked_mul(*n));
        let numbers = numbers.ok_or_else(|| format!("its shape {shape:?} has more numbers than can be counted"))?;
        if !self.offset.is_multiple_of(alignment) {
            return Err(format!("its offset {} is not a multiple of the file's alignment {alignment}", self.offset));
        }
        let start = data_start.checked_add(self.offset).filter(|start| *start <= file_length);
        let start = start.ok_or_else(|| {
            format!("its data begins at offset {} past the end of the file's {file_length} bytes: the file is truncated", self.offset)
        })?;
        let bytes = match encoding {
            None => 0,
            Some(encoding) => {
                let (block, block_bytes) = encoding.block();
                let row = self.dimensions.first().copied().unwrap_or(1);
                if !row.is_multiple_of(block as u64) {
                    return Err(format!("its rows of {row} numbers are not whole {dtype} blocks of {block}"));
                }
                (numbers / block as u64).checked_mul(block_bytes as u64).ok_or("is larger than memory")?
            }
        };
        let end = start.checked_add(bytes).filter(|end| *end <= file_length);
        let end = end.ok_or_else(|| {
            format!("its {bytes} bytes from byte {start} on reach past the end of the file's {file_length} bytes: the file is truncated")
        })?;
        Ok(Stored { file: 0, range: start as usize..end as usize, shape, dtype, encoding, order: None, strewn: None })
    }
}

/// A ggml type's name, and how to decode it where that is known.
fn encoding(kind: u32) -> (String, Option<Encoding>) {
    let (name, encoding) = match kind {
        0 => ("F32", Some(Encoding::F32)),
        1 => ("F16", Some(Encoding::F16)),
        2 => ("Q4_0", Some(Encoding::Q4_0)),
        3 => ("Q4_1", Some(Encoding::Q4_1)),
        6 => ("Q5_0", Some(Encoding::Q5_0)),
        7 => ("Q5_1", Some(Encoding::Q5_1)),
        8 => ("Q8_0", Some(Encoding::Q8_0)),
        10 => ("Q2_K", None),
        11 => ("Q3_K", None),
        12 => ("Q4_K", Some(Encoding::Q4K)),
        13 => ("Q5_K", Some(Encoding::Q5K)),
        14 => ("Q6_K", Some(Encoding::Q6K)),
        16 => ("IQ2_XXS", None),
        17 => ("IQ2_XS", None),
        18 => ("IQ3_XXS", None),
        19 => ("IQ1_S", None),
        20 => ("IQ4_NL", None),
        21 => ("IQ3_S", None),
        22 => ("IQ2_S", None),
        23 => ("IQ4_XS", None),
        29 => ("IQ1_M", None),
        30 => ("BF16", Some(Encoding::BF16)),
        34 => ("TQ1_0", None),
        35 => ("TQ2_0", None),
        39 => ("MXFP4", Some(Encoding::Mxfp4)),
        other => return (format!("ggml type {other}"), None),
    };
    (name.into(), encoding)
}

/// Walks over the bytes; `what` is being read, for errors.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
    what: String,
}

impl<'a> Reader<'a> {
    fn error(&self, message: impl std::fmt::Display) -> Error {
        Error::Checkpoint { path: self.path.into(), message: format!("{} at byte {}: {message}", self.what, self.at) }
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        if length > self.left() {
            return Err(self.error(format!("needs {length} bytes, but only {} are left: the file is truncated or damaged", self.left())));
        }
        let taken = &self.bytes[self.at..][..length];
        self.at += length;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A number of things of at least `least` bytes each, which the rest of the file has to hold.
    fn count(&mut self, things: &str, least: usize) -> Result<usize> {
        let count = self.u64()?;
        let most = self.left() / least.max(1);
        match usize::try_from(count) {
            Ok(count) if count <= most => Ok(count),
            _ => Err(self.error(format!("announces {count} {things}, but only {} bytes are left: the file is truncated or damaged", self.left()))),
        }
    }

    fn string(&mut self) -> Result<String> {
        let length = self.count("bytes of text", 1)?;
        let bytes = self.take(length)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| self.error("the text is not UTF-8"))
    }

    fn value(&mut self, kind: u32, nesting: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::Integer(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Integer(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Integer(self.u32()?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()? != [0]),
            8 => Value::String(self.string()?),
            9 if nesting < MAX_NESTING => {
                let kind = self.u32()?;
                let least = match kind {
                    2 | 3 => 2,
                    4..=6 => 4,
                    8 | 10..=12 => 8,
                    9 => 12,
                    _ => 1,
                };
                let count = self.count("array elements", least)?;
                if count > MAX_ELEMENTS {
                    return Err(self.error(format!("has {count} array elements; at most {MAX_ELEMENTS} are read")));
                }
                let mut values = Vec::with_capacity(count);
                for _ in 0..count {
                    values.push(self.value(kind, nesting + 1)?);
                }
                Value::Array(values)
            }
            10 => {
                let n = self.u64()?;
                Value::Integer(i64::try_from(n).map_err(|_| self.error(format!("is {n}, which nothing in a model is")))?)
            }
            11 => Value::Integer(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            9 => return Err(self.error("arrays are nested too deeply")),
            other => return Err(self.error(format!("has the unknown value type {other}"))),
        })
    }

    fn description(&mut self, index: usize) -> Result<Description> {
        self.what = format!("the name of tensor {index}");
        let name = self.string()?;
        self.what = format!("tensor {name}");
        let count = self.u32()?;
        if count > MAX_DIMENSIONS {
            return Err(self.error(format!("has {count} dimensions; at most {MAX_DIMENSIONS} are possible")));
        }
        let dimensions = (0..count).map(|_| self.u64()).collect::<Result<Vec<_>>>()?;
        Ok(Description { name, dimensions, kind: self.u32()?, offset: self.u64()? })
    }
}
