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
    /// The order of heads' rows in the file, where it is another.
    pub(super) order: Option<HeadOrder>,
}

impl StoredMatrix {
    /// Numbers as they are, in memory.
    pub(super) fn f16(numbers: &[f16], shape: [usize; 2]) -> StoredMatrix {
        let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        StoredMatrix { bytes: Bytes::Memory(bytes), encoding: Encoding::F16, shape, order: None }
    }

    /// Numbers made blocks, in memory.
    pub(super) fn encode(numbers: &[f32], encoding: Encoding, shape: [usize; 2]) -> StoredMatrix {
        let [rows, cols] = shape;
        let mut bytes = vec![0; rows * encoding.bytes(cols)];
        bytes.par_chunks_mut(encoding.bytes(cols).max(1)).zip(numbers.par_chunks(cols.max(1))).for_each(|(bytes, row)| encoding.encode(row, bytes));
        StoredMatrix { bytes: Bytes::Memory(bytes), encoding, shape, order: None }
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
        &self.all()[source_row(row, self.order) * width..][..width]
    }

    /// Reads the bytes of a row, which this process's memory does not keep.
    fn read(&self, row: usize, bytes: &mut [u8]) -> Result<()> {
        match &self.bytes {
            Bytes::File(file, range) => file.read(range.start + source_row(row, self.order) * bytes.len(), bytes),
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

/// In which order a file has the rows of heads, whose pairs of RoPE are `i, i + width / 2` here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HeadOrder {
    /// Rows of a head.
    pub width: usize,
    /// Those that rotate, which come first.
    pub dims: usize,
    /// Whether a pair is rows `2i, 2i + 1` of them, and not `i, i + dims / 2`.
    pub interleaved: bool,
}

impl HeadOrder {
    /// Whether it is the order here.
    pub fn is_paired(&self) -> bool {
        !self.interleaved && self.dims == self.width
    }

    /// Which row of a head is stored in the place of row `within`.
    fn source(&self, within: usize) -> usize {
        let (pairs, half) = (self.dims / 2, self.width / 2);
        let (pair, second) = (within % half, within / half);
        match pair.checked_sub(pairs) {
            None if self.interleaved => 2 * pair + second,
            None => pair + second * pairs,
            Some(still) => self.dims + still + second * (half - pairs),
        }
    }
}

/// Which row is stored in the place of row `row`.
fn source_row(row: usize, order: Option<HeadOrder>) -> usize {
    let Some(order) = order else { return row };
    row / order.width * order.width + order.source(row % order.width)
}

/// Brings every head's rows into the order here.
pub(super) fn half_split<T: Copy>(numbers: Vec<T>, shape: &[usize], order: Option<HeadOrder>) -> Vec<T> {
    if order.is_none() {
        return numbers;
    }
    let width = numbers.len() / shape[0].max(1);
    (0..shape[0]).flat_map(|row| &numbers[source_row(row, order) * width..][..width]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_come_together_and_no_row_is_lost() {
        let rows = |dims, interleaved| (0..8).map(|row| HeadOrder { width: 8, dims, interleaved }.source(row)).collect::<Vec<_>>();
        assert_eq!(rows(8, true), [0, 2, 4, 6, 1, 3, 5, 7]);
        assert_eq!(rows(4, true), [0, 2, 4, 5, 1, 3, 6, 7]);
        assert_eq!(rows(4, false), [0, 1, 4, 5, 2, 3, 6, 7]);
        assert_eq!(rows(8, false), [0, 1, 2, 3, 4, 5, 6, 7]);
    }
}
