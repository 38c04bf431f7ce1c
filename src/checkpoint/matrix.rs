//! A matrix as it is stored, of which rows are decoded when they are needed.

use super::blocks::Blocks;
use super::dot::Vector;
use super::encoding::Encoding;
use super::file::ModelFile;
use super::ggml::GROUP;
use crate::Result;
use half::f16;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Rows taken apart by one task.
const ROWS: usize = 16;

/// Where a matrix's bytes are.
pub(super) enum Bytes {
    /// In a file, whose length was checked when it was opened.
    File(Arc<ModelFile>, Range<usize>),
    Memory(Vec<u8>),
}

/// A matrix in a file or in memory, in floats or in ggml's blocks, and all its numbers finite.
///
/// Rows are whole blocks, and in RoPE's half-split layout whatever the file's own.
pub struct StoredMatrix {
    pub(super) bytes: Bytes,
    pub(super) encoding: Encoding,
    /// Rows and columns.
    pub(super) shape: [usize; 2],
    /// The width of heads whose rows are interleaved in the file.
    pub(super) interleaved_head: Option<usize>,
}

impl StoredMatrix {
    /// Numbers as they are, in memory.
    pub(super) fn f16(numbers: &[f16], shape: [usize; 2]) -> StoredMatrix {
        let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        StoredMatrix { bytes: Bytes::Memory(bytes), encoding: Encoding::F16, shape, interleaved_head: None }
    }

    /// Numbers made blocks, in memory.
    pub(super) fn encode(numbers: &[f32], encoding: Encoding, shape: [usize; 2]) -> StoredMatrix {
        let [rows, cols] = shape;
        let mut bytes = vec![0; rows * encoding.bytes(cols)];
        bytes.par_chunks_mut(encoding.bytes(cols).max(1)).zip(numbers.par_chunks(cols.max(1))).for_each(|(bytes, row)| encoding.encode(row, bytes));
        StoredMatrix { bytes: Bytes::Memory(bytes), encoding, shape, interleaved_head: None }
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// What it takes, in a file or in memory.
    pub fn bytes(&self) -> usize {
        self.all().len()
    }

    /// Whether it is read where it is in a file.
    pub fn is_mapped(&self) -> bool {
        matches!(self.bytes, Bytes::File(..))
    }

    /// How its numbers are stored, as GGUF has it: `F16`, `Q4_K`.
    pub fn encoding(&self) -> &'static str {
        self.encoding.name()
    }

    /// Decodes rows from `first` on, as many as there is room for.
    ///
    /// # Panics
    /// Where there are not as many, or room is not for whole rows.
    pub fn decode(&self, first: usize, out: &mut [f32]) {
        for (index, out) in out.chunks_exact_mut(self.shape[1]).enumerate() {
            self.encoding.decode(self.row(first + index), out);
        }
    }

    /// The sum of products of a row and `x`, which is as long.
    ///
    /// # Panics
    /// Where there is no such row, or `x` is shorter.
    pub fn dot(&self, row: usize, x: &Vector) -> f32 {
        x.dot(self.encoding, self.row(row))
    }

    /// Its blocks taken apart.
    ///
    /// `None` where it is stored in floats, where rows are not whole groups, and where scales in
    /// f16 are not finite.
    ///
    /// # Errors
    /// Those of reading.
    pub fn blocks(&self) -> Result<Option<Blocks>> {
        let [rows, cols] = self.shape;
        let Some(form) = self.encoding.form().filter(|_| cols.is_multiple_of(GROUP)) else { return Ok(None) };
        let (mut codes, mut groups) = (vec![0; rows * cols], vec![[f16::ZERO; 2]; rows * cols / GROUP]);
        let places = codes.par_chunks_mut(ROWS * cols).zip(groups.par_chunks_mut(ROWS * cols / GROUP)).enumerate();
        places.try_for_each(|(index, (codes, groups))| {
            let (mut bytes, mut wide) = (vec![0; self.encoding.bytes(cols)], vec![[0f32; 2]; cols / GROUP]);
            for (row, (codes, groups)) in codes.chunks_exact_mut(cols).zip(groups.chunks_exact_mut(cols / GROUP)).enumerate() {
                self.read(index * ROWS + row, &mut bytes)?;
                self.encoding.unpack(&bytes, codes, &mut wide);
                let codes = codes.as_chunks::<GROUP>().0;
                groups.iter_mut().zip(codes.iter().zip(&wide)).for_each(|(group, (codes, wide))| *group = form.round(codes, *wide));
            }
            Ok::<_, crate::Error>(())
        })?;
        Ok(groups.as_flattened().iter().all(|x| x.is_finite()).then_some(Blocks { form, codes, groups }))
    }

    /// Lets go of the memory that reading it in its file has taken.
    pub fn release(&self) {
        if let Bytes::File(file, range) = &self.bytes {
            file.release(range.clone());
        }
    }

    fn all(&self) -> &[u8] {
        match &self.bytes {
            Bytes::File(file, range) => &file.bytes[range.clone()],
            Bytes::Memory(bytes) => bytes,
        }
    }

    /// The bytes of a row.
    fn row(&self, row: usize) -> &[u8] {
        let width = self.encoding.bytes(self.shape[1]);
        &self.all()[source_row(row, self.interleaved_head) * width..][..width]
    }

    /// Reads the bytes of a row, which this process's memory does not keep.
    fn read(&self, row: usize, bytes: &mut [u8]) -> Result<()> {
        match &self.bytes {
            Bytes::File(file, range) => file.read(range.start + source_row(row, self.interleaved_head) * bytes.len(), bytes),
            Bytes::Memory(_) => {
                bytes.copy_from_slice(self.row(row));
                Ok(())
            }
        }
    }
}

/// A matrix in memory, of the numbers that `number` makes in the order of rows.
#[cfg(test)]
pub(crate) fn test_matrix(encoding: &str, shape: [usize; 2], number: impl Fn(usize) -> f32) -> StoredMatrix {
    let numbers: Vec<f32> = (0..shape[0] * shape[1]).map(number).collect();
    let encoding = [Encoding::F16, Encoding::Q8_0, Encoding::Q4_0].into_iter().find(|known| known.name() == encoding).unwrap();
    StoredMatrix::encode(&numbers, encoding, shape)
}

/// Which row is stored in the place of row `row` of heads in half-split layout (pairs `i, i +
/// d/2`), where they are stored interleaved (pairs `2i, 2i + 1`).
fn source_row(row: usize, interleaved_head: Option<usize>) -> usize {
    let Some(head) = interleaved_head else { return row };
    let (start, within) = (row / head * head, row % head);
    start + if within < head / 2 { 2 * within } else { 2 * (within - head / 2) + 1 }
}

/// Brings every head's rows into half-split layout.
pub(super) fn half_split<T: Copy>(numbers: Vec<T>, shape: &[usize], interleaved_head: Option<usize>) -> Vec<T> {
    if interleaved_head.is_none() {
        return numbers;
    }
    let width = numbers.len() / shape[0].max(1);
    (0..shape[0]).flat_map(|row| &numbers[source_row(row, interleaved_head) * width..][..width]).copied().collect()
}
