//! The tensors of a checkpoint, wherever their bytes are: one map from name to byte range over
//! memory-mapped files, and one way to turn a range into numbers.
//!
//! Safetensors and GGUF differ in how the map is read ([`super::safetensors`], [`super::gguf`]);
//! from here on they are the same. Nothing is decoded until it is asked for, and what is asked for
//! is checked: shape, finiteness, and that nothing overflows f16.

use super::blocks::{Blocks, GROUP};
use super::encoding::Encoding;
use crate::{Error, Result};
use half::f16;
use half::slice::HalfFloatSliceExt;
use memmap2::Mmap;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Numbers decoded by one task: a multiple of every block's length.
const CHUNK: usize = 1 << 15;

/// A memory-mapped file.
pub(super) struct MappedFile {
    pub path: PathBuf,
    pub bytes: Mmap,
}

impl MappedFile {
    pub fn open(path: &Path) -> Result<MappedFile> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        // SAFETY: the mapping is read-only and private to this struct. As with every mapped model,
        // a file that another program truncates meanwhile ends the process; lowkey itself never
        // writes to an existing checkpoint.
        let bytes = unsafe { Mmap::map(&file) }.map_err(Error::io("read", path))?;
        Ok(MappedFile { path: path.to_path_buf(), bytes })
    }
}

/// Where one tensor is and how it is stored.
pub(super) struct Stored {
    /// Index of its file.
    pub file: usize,
    /// Its bytes in that file, known to lie inside it.
    pub range: Range<usize>,
    /// Row-major, outermost first.
    pub shape: Vec<usize>,
    /// The file's word for how numbers are stored.
    pub dtype: String,
    /// How to decode them; `None` where lowkey cannot.
    pub encoding: Option<Encoding>,
    /// Width of the attention heads whose rows are in interleaved RoPE layout, if they are.
    ///
    /// They are brought into half-split layout.
    pub interleaved_head: Option<usize>,
}

/// All tensors of a checkpoint by their Hugging Face names.
#[derive(Default)]
pub(super) struct Weights {
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Stored>,
}

impl Weights {
    /// Adds a file and its tensors, whose `file` is overwritten.
    pub fn add(&mut self, file: MappedFile, tensors: Vec<(String, Stored)>) -> Result<()> {
        let index = self.files.len();
        for (name, stored) in tensors {
            if let Some(before) = self.tensors.get(&name) {
                let other = self.files.get(before.file).unwrap_or(&file);
                return Err(Error::Tensor { path: file.path.clone(), name, message: format!("stored twice, also in {}", other.path.display()) });
            }
            self.tensors.insert(name, Stored { file: index, ..stored });
        }
        self.files.push(file);
        Ok(())
    }

    /// Adds a file whose tensors take the place of others of their names.
    pub fn replace(&mut self, file: MappedFile, tensors: Vec<(String, Stored)>) {
        let index = self.files.len();
        self.tensors.extend(tensors.into_iter().map(|(name, stored)| (name, Stored { file: index, ..stored })));
        self.files.push(file);
    }

    pub fn get(&self, name: &str) -> Option<&Stored> {
        self.tensors.get(name)
    }

    /// All tensors, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Stored)> {
        self.tensors.iter().map(|(name, stored)| (name.as_str(), stored))
    }

    /// A tensor as it is stored.
    pub fn stored_bytes(&self, stored: &Stored) -> &[u8] {
        &self.files[stored.file].bytes[stored.range.clone()]
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The files' paths, in the order in which they were added.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|stored| stored.range.len() as u64).sum()
    }

    pub fn error(&self, stored: &Stored, name: &str, message: String) -> Error {
        Error::Tensor { path: self.files[stored.file].path.clone(), name: name.into(), message }
    }

    /// Checks that the tensor is there, in this shape and in numbers that can be decoded.
    pub fn expect(&self, checkpoint: &Path, name: &str, shape: &[usize]) -> Result<(&Stored, Encoding)> {
        let Some(stored) = self.get(name) else {
            return Err(Error::Tensor {
                path: checkpoint.into(),
                name: name.into(),
                message: format!("missing; the model needs it with shape {shape:?}"),
            });
        };
        if stored.shape != shape {
            return Err(self.error(stored, name, format!("has shape {:?} where the model needs {shape:?}", stored.shape)));
        }
        match stored.encoding {
            Some(encoding) => Ok((stored, encoding)),
            None => {
                Err(self.error(stored, name, format!("is stored as {}, which lowkey does not read (it reads {})", stored.dtype, Encoding::NAMES)))
            }
        }
    }

    pub fn f32(&self, checkpoint: &Path, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let (stored, encoding) = self.expect(checkpoint, name, shape)?;
        let numbers = self.decode(name, stored, encoding, |chunk: &[f32], out: &mut [f32]| {
            if encoding.is_quantised() {
                let mut rounded = vec![f16::ZERO; chunk.len()];
                rounded.convert_from_f32_slice(chunk);
                rounded.convert_to_f32_slice(out);
            } else {
                out.copy_from_slice(chunk);
            }
        })?;
        Ok(half_split(numbers, stored))
    }

    pub fn f16(&self, checkpoint: &Path, name: &str, shape: &[usize]) -> Result<Vec<f16>> {
        let (stored, encoding) = self.expect(checkpoint, name, shape)?;
        let numbers = self.decode(name, stored, encoding, |chunk: &[f32], out: &mut [f16]| out.convert_from_f32_slice(chunk))?;
        Ok(half_split(numbers, stored))
    }

    /// A quantised tensor as it is; `None` where it is stored in floats, or holds what is not
    /// finite, which decoding it says.
    pub fn blocks(&self, checkpoint: &Path, name: &str, shape: &[usize]) -> Result<Option<Blocks>> {
        let (stored, encoding) = self.expect(checkpoint, name, shape)?;
        let (Some(form), Some(row)) = (encoding.form(), shape.last()) else { return Ok(None) };
        if !row.is_multiple_of(GROUP) {
            return Ok(None);
        }
        let bytes = self.stored_bytes(stored);
        let mut codes = vec![0; encoding.numbers(bytes.len())];
        let mut groups = vec![[f16::ZERO; 2]; codes.len() / GROUP];
        let places = codes.par_chunks_mut(CHUNK).zip(groups.par_chunks_mut(CHUNK / GROUP));
        places.zip(bytes.par_chunks(encoding.bytes(CHUNK))).for_each(|((codes, groups), bytes)| {
            let mut wide = vec![[0f32; 2]; groups.len()];
            encoding.unpack(bytes, codes, &mut wide);
            groups.iter_mut().zip(wide).for_each(|(group, wide)| *group = wide.map(f16::from_f32));
        });
        if !groups.as_flattened().iter().all(|x| x.is_finite()) {
            return Ok(None);
        }
        Ok(Some(Blocks { form, codes: half_split(codes, stored), groups: half_split(groups, stored) }))
    }

    /// Decodes in parallel: `finish` takes a chunk of numbers in f32 and stores them.
    fn decode<T: Copy + Send + Default + Into<f64>>(
        &self,
        name: &str,
        stored: &Stored,
        encoding: Encoding,
        finish: impl Fn(&[f32], &mut [T]) + Sync,
    ) -> Result<Vec<T>> {
        let bytes = self.stored_bytes(stored);
        let mut numbers = vec![T::default(); encoding.numbers(bytes.len())];
        let bad = numbers
            .par_chunks_mut(CHUNK)
            .zip(bytes.par_chunks(encoding.bytes(CHUNK)))
            .enumerate()
            .filter_map(|(index, (out, bytes))| {
                let mut chunk = vec![0f32; out.len()];
                encoding.decode(bytes, &mut chunk);
                let original = first_not_finite(&chunk).map(|at| (index * CHUNK + at, chunk[at]));
                original.or_else(|| {
                    finish(&chunk, out);
                    let at = out.iter().position(|x| !(*x).into().is_finite())?;
                    Some((index * CHUNK + at, chunk[at]))
                })
            })
            .min_by_key(|&(at, _)| at);
        let Some((at, value)) = bad else { return Ok(numbers) };
        let row = stored.shape.last().copied().unwrap_or(1).max(1);
        let place = if stored.shape.len() > 1 { format!("row {}, column {}", at / row, at % row) } else { format!("position {at}") };
        let message = match value.is_finite() {
            false => format!("holds {value} at {place}: the file is damaged, or its training diverged"),
            true => format!("holds {value} at {place}, more than f16 can hold (65504)"),
        };
        Err(self.error(stored, name, message))
    }
}

/// Cheaply, by a sum that is finite only where all are (and small), before looking for the place.
fn first_not_finite(numbers: &[f32]) -> Option<usize> {
    let probe: f32 = numbers.iter().map(|x| x * 0.0).sum();
    if probe == 0.0 { None } else { numbers.iter().position(|x| !x.is_finite()) }
}

/// Brings every head's rows from RoPE's interleaved layout (pairs `2i, 2i+1`) into half-split
/// layout (pairs `i, i + d/2`).
fn half_split<T: Copy>(numbers: Vec<T>, stored: &Stored) -> Vec<T> {
    let Some(head) = stored.interleaved_head else { return numbers };
    let rows = stored.shape[0];
    let width = numbers.len() / rows.max(1);
    let mut out = Vec::with_capacity(numbers.len());
    for row in 0..rows {
        let (start, within) = (row / head * head, row % head);
        let from = start + if within < head / 2 { 2 * within } else { 2 * (within - head / 2) + 1 };
        out.extend_from_slice(&numbers[from * width..][..width]);
    }
    out
}
