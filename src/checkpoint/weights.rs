//! The tensors of a checkpoint, wherever their bytes are: one map from name to byte range over
//! files, and one way to turn a range into numbers.
//!
//! Safetensors and GGUF differ in how the map is read ([`super::safetensors`], [`super::gguf`]);
//! from here on they are the same. Nothing is decoded until it is asked for, and what is asked for
//! is checked: shape, finiteness, and that nothing overflows f16.

use super::encoding::Encoding;
use super::file::ModelFile;
use super::matrix::{Bytes, HeadOrder, StoredMatrix, half_split};
use super::storage::WeightStorage;
use super::strewn::Strewn;
use crate::{Error, Result};
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Numbers decoded by one task: a multiple of every block's length.
const CHUNK: usize = 1 << 15;

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
    /// The order of heads' rows, where it is another than the decoders'.
    ///
    /// They are brought into that.
    pub order: Option<HeadOrder>,
    /// How a matrix' numbers stand in its range, where that is not one behind the other.
    pub strewn: Option<Strewn>,
}

impl Stored {
    /// How many numbers there are.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes that its numbers take.
    fn bytes(&self) -> usize {
        match (&self.strewn, self.encoding) {
            (Some(_), Some(encoding)) => encoding.bytes(self.len()),
            _ => self.range.len(),
        }
    }
}

/// All tensors of a checkpoint by their Hugging Face names.
#[derive(Default)]
pub(super) struct Weights {
    files: Vec<Arc<ModelFile>>,
    tensors: BTreeMap<String, Stored>,
}

impl Weights {
    /// Adds a file and its tensors, whose `file` is overwritten.
    pub fn add(&mut self, file: ModelFile, tensors: Vec<(String, Stored)>) -> Result<()> {
        let index = self.files.len();
        for (name, stored) in tensors {
            if let Some(before) = self.tensors.get(&name) {
                let other = self.files.get(before.file).map_or(&file, |other| other);
                return Err(Error::Tensor { path: file.path.clone(), name, message: format!("stored twice, also in {}", other.path.display()) });
            }
            self.tensors.insert(name, Stored { file: index, ..stored });
        }
        self.files.push(Arc::new(file));
        Ok(())
    }

    /// Adds a file whose tensors take the place of others of their names.
    pub fn replace(&mut self, file: ModelFile, tensors: Vec<(String, Stored)>) {
        let index = self.files.len();
        self.tensors.extend(tensors.into_iter().map(|(name, stored)| (name, Stored { file: index, ..stored })));
        self.files.push(Arc::new(file));
    }

    /// Puts `parts`, which are in the same file, in the place of a tensor.
    pub fn take_apart(&mut self, name: &str, parts: Vec<(String, Stored)>) {
        self.tensors.remove(name);
        self.tensors.extend(parts);
    }

    /// Gives a tensor another name.
    ///
    /// # Errors
    /// [`Error::Tensor`] where that is another's.
    pub fn rename(&mut self, name: &str, to: String) -> Result<()> {
        let Some(stored) = self.tensors.remove(name) else { return Ok(()) };
        if self.tensors.contains_key(&to) {
            return Err(self.error(&stored, name, format!("is stored twice, also as {to}")));
        }
        self.tensors.insert(to, stored);
        Ok(())
    }

    /// Says in which order the heads' rows of weight and bias are.
    pub fn order(&mut self, name: &str, order: HeadOrder) {
        for kind in ["weight", "bias"] {
            self.tensors.get_mut(&format!("{name}.{kind}")).into_iter().for_each(|stored| stored.order = Some(order));
        }
    }

    pub fn get_mut(&mut self, name: &str) -> Option<&mut Stored> {
        self.tensors.get_mut(name)
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

    /// Gives all tensors other names.
    pub fn rename_all(&mut self, name: impl Fn(String) -> String) {
        self.tensors = std::mem::take(&mut self.tensors).into_iter().map(|(old, stored)| (name(old), stored)).collect();
    }

    /// Whether a tensor is the same as another, byte by byte, or is not there.
    pub fn is_same(&self, name: &str, other: &str) -> bool {
        match (self.get(name), self.get(other)) {
            (Some(a), Some(b)) => a.dtype == b.dtype && a.shape == b.shape && self.stored_bytes(a) == self.stored_bytes(b),
            _ => true,
        }
    }

    /// The file that holds a tensor.
    pub fn path(&self, stored: &Stored) -> &Path {
        &self.files[stored.file].path
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The files, in the order in which they were added.
    pub fn files(&self) -> &[Arc<ModelFile>] {
        &self.files
    }

    /// The files' paths, in the order in which they were added.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|stored| stored.bytes() as u64).sum()
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
        Ok(half_split(numbers, &stored.shape, stored.order))
    }

    pub fn f16(&self, checkpoint: &Path, name: &str, shape: &[usize]) -> Result<Vec<f16>> {
        let (stored, encoding) = self.expect(checkpoint, name, shape)?;
        let numbers = self.decode(name, stored, encoding, |chunk: &[f32], out: &mut [f16]| out.convert_from_f32_slice(chunk))?;
        Ok(half_split(numbers, &stored.shape, stored.order))
    }

    /// A matrix in the type that is asked for, in place where it is stored so, which is not looked
    /// at.
    pub fn matrix(&self, checkpoint: &Path, name: &str, shape: [usize; 2], storage: WeightStorage) -> Result<StoredMatrix> {
        let (stored, encoding) = self.expect(checkpoint, name, &shape)?;
        let wanted = storage.encoding(encoding, shape[1]);
        if wanted == encoding {
            let bytes = match self.gathered(stored)? {
                Some(bytes) => Bytes::Memory(bytes),
                None => Bytes::File(self.files[stored.file].clone(), stored.range.clone()),
            };
            return Ok(StoredMatrix { bytes, encoding, shape, order: stored.order });
        }
        let numbers = match wanted {
            Encoding::F16 => return Ok(StoredMatrix::f16(&self.f16(checkpoint, name, &shape)?, shape)),
            _ => self.f32(checkpoint, name, &shape)?,
        };
        Ok(StoredMatrix::encode(&numbers, wanted, shape))
    }

    /// Decodes in parallel: `finish` takes a chunk of numbers in f32 and stores them.
    fn decode<T: Copy + Send + Default + Into<f64>>(
        &self,
        name: &str,
        stored: &Stored,
        encoding: Encoding,
        finish: impl Fn(&[f32], &mut [T]) + Sync,
    ) -> Result<Vec<T>> {
        let (mut numbers, gathered) = (vec![T::default(); stored.len()], self.gathered(stored)?);
        let bad = numbers.par_chunks_mut(CHUNK).enumerate().map(|(index, out)| {
            let chunk = self.chunk(stored, gathered.as_deref(), encoding, index)?;
            let original = first_not_finite(&chunk).map(|at| (index * CHUNK + at, chunk[at]));
            Ok(original.or_else(|| {
                finish(&chunk, out);
                let at = out.iter().position(|x| !(*x).into().is_finite())?;
                Some((index * CHUNK + at, chunk[at]))
            }))
        });
        self.refuse_first(name, stored, bad)?;
        Ok(numbers)
    }

    /// Checks that all numbers of a tensor are finite.
    pub fn check_finite(&self, checkpoint: &Path, name: &str, shape: [usize; 2]) -> Result<()> {
        let (stored, encoding) = self.expect(checkpoint, name, &shape)?;
        let (chunks, gathered) = (stored.len().div_ceil(CHUNK), self.gathered(stored)?);
        let bad = (0..chunks).into_par_iter().map(|index| {
            let chunk = self.chunk(stored, gathered.as_deref(), encoding, index)?;
            Ok(first_not_finite(&chunk).map(|at| (index * CHUNK + at, chunk[at])))
        });
        self.refuse_first(name, stored, bad)
    }

    /// The bytes of a matrix whose numbers do not stand one behind the other.
    fn gathered(&self, stored: &Stored) -> Result<Option<Vec<u8>>> {
        let Some(strewn) = &stored.strewn else { return Ok(None) };
        let shape = match stored.shape[..] {
            [rows, cols] => [rows, cols],
            _ => [1, stored.len()],
        };
        let read = |file: usize, range: Range<usize>| {
            let mut bytes = vec![0; range.len()];
            self.files[file].read(range.start, &mut bytes).map(|()| bytes)
        };
        strewn.gather(shape, (stored.file, stored.range.clone()), &read).map(Some)
    }

    /// The numbers of chunk `index` of a tensor, read from its file, or from what has been gathered
    /// of it: a file that has been cut short meanwhile is an error here, and would end the process
    /// if its mapping were read.
    fn chunk(&self, stored: &Stored, gathered: Option<&[u8]>, encoding: Encoding, index: usize) -> Result<Vec<f32>> {
        let step = encoding.bytes(CHUNK);
        let bytes = match gathered {
            Some(all) => all[index * step..all.len().min((index + 1) * step)].to_vec(),
            None => {
                let start = stored.range.start + index * step;
                let mut bytes = vec![0; step.min(stored.range.end - start)];
                self.files[stored.file].read(start, &mut bytes)?;
                bytes
            }
        };
        let mut numbers = vec![0f32; encoding.numbers(bytes.len())];
        encoding.decode(&bytes, &mut numbers);
        Ok(numbers)
    }

    /// The error for the first number, by place and value, that cannot be used.
    fn refuse_first(&self, name: &str, stored: &Stored, bad: impl ParallelIterator<Item = Result<Option<(usize, f32)>>>) -> Result<()> {
        let first = bad.try_reduce(|| None, |a, b| Ok([a, b].into_iter().flatten().min_by_key(|&(at, _)| at)))?;
        let Some((at, value)) = first else { return Ok(()) };
        let row = stored.shape.last().copied().unwrap_or(1).max(1);
        let place = if stored.shape.len() > 1 { format!("row {}, column {}", at / row, at % row) } else { format!("position {at}") };
        let message = match value.is_finite() {
            false => format!("holds {value} at {place}: the file is damaged, or its training diverged"),
            true => format!("holds {value} at {place}, more than f16 can hold (65504)"),
        };
        Err(self.error(stored, name, message))
    }
}

/// Cheaply, by the largest of all in size, which vectors find, before looking for the place.
fn first_not_finite(numbers: &[f32]) -> Option<usize> {
    let largest = numbers.iter().fold(0, |most, x| (x.to_bits() & !(1 << 31)).max(most));
    if largest < f32::INFINITY.to_bits() { None } else { numbers.iter().position(|x| !x.is_finite()) }
}
