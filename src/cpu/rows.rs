//! The rows of one side (keys or values) of one layer.

use half::f16;
use half::slice::HalfFloatSliceExt;
use nalgebra::DMatrix;

/// How cached numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RowType {
    /// Two bytes, as a GPU's cache.
    #[default]
    F16,
    /// Four bytes: for calibration, and for tests that leave rounding out.
    F32,
}

impl RowType {
    /// Bytes of a number.
    pub(super) fn bytes(self) -> usize {
        match self {
            RowType::F16 => 2,
            RowType::F32 => 4,
        }
    }
}

/// A row for each of `capacity` tokens, allocated at once.
pub(super) struct Rows {
    width: usize,
    numbers: Numbers,
}

/// `[capacity][width]`.
enum Numbers {
    F16(Vec<f16>),
    F32(Vec<f32>),
}

impl Rows {
    pub(super) fn new(width: usize, capacity: usize, row_type: RowType) -> Rows {
        let numbers = match row_type {
            RowType::F16 => Numbers::F16(vec![f16::ZERO; width * capacity]),
            RowType::F32 => Numbers::F32(vec![0.0; width * capacity]),
        };
        Rows { width, numbers }
    }

    /// Writes the columns of `rows: [width, tokens]` as the rows from `position` on.
    pub(super) fn write(&mut self, position: usize, rows: &DMatrix<f32>) {
        let range = position * self.width..(position + rows.ncols()) * self.width;
        match &mut self.numbers {
            Numbers::F16(numbers) => numbers[range].convert_from_f32_slice(rows.as_slice()),
            Numbers::F32(numbers) => numbers[range].copy_from_slice(rows.as_slice()),
        }
    }

    /// The first `count` rows, as the columns of `[width, count]`.
    pub(super) fn read(&self, count: usize) -> DMatrix<f32> {
        let mut rows = DMatrix::zeros(self.width, count);
        match &self.numbers {
            Numbers::F16(numbers) => numbers[..count * self.width].convert_to_f32_slice(rows.as_mut_slice()),
            Numbers::F32(numbers) => rows.as_mut_slice().copy_from_slice(&numbers[..count * self.width]),
        }
        rows
    }

    /// Bytes allocated.
    pub(super) fn bytes(&self) -> usize {
        match &self.numbers {
            Numbers::F16(numbers) => numbers.capacity() * size_of::<f16>(),
            Numbers::F32(numbers) => numbers.capacity() * size_of::<f32>(),
        }
    }
}
