//! The rows of one side (keys or values) of one layer.

use crate::{Error, Result};
use half::f16;
use half::slice::HalfFloatSliceExt;

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

    /// Numbers in a row.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Writes one row.
    pub(super) fn write(&mut self, slot: usize, row: &[f32]) {
        let range = slot * self.width..slot * self.width + row.len();
        match &mut self.numbers {
            Numbers::F16(numbers) => numbers[range].convert_from_f32_slice(row),
            Numbers::F32(numbers) => numbers[range].copy_from_slice(row),
        }
    }

    /// Reads the rows from `slot` on, one after the other, as many as fill `rows`.
    pub(super) fn read(&self, slot: usize, rows: &mut [f32]) {
        let range = slot * self.width..slot * self.width + rows.len();
        match &self.numbers {
            Numbers::F16(numbers) => numbers[range].convert_to_f32_slice(rows),
            Numbers::F32(numbers) => rows.copy_from_slice(&numbers[range]),
        }
    }

    /// Appends `count` rows from `slot` on to `saved`.
    ///
    /// # Errors
    /// [`Error::Argument`] where they are in f32: those are not for sessions.
    pub(super) fn save(&self, slot: usize, count: usize, saved: &mut Vec<f16>) -> Result<()> {
        match &self.numbers {
            Numbers::F16(numbers) => saved.extend_from_slice(&numbers[slot * self.width..(slot + count) * self.width]),
            Numbers::F32(_) => {
                let message = "its rows are in f32, and saved ones are in f16; save one whose rows are".into();
                return Err(Error::Argument { name: "session".into(), message });
            }
        }
        Ok(())
    }

    /// Writes rows from `slot` on.
    pub(super) fn restore(&mut self, slot: usize, rows: &[f16]) {
        let range = slot * self.width..slot * self.width + rows.len();
        match &mut self.numbers {
            Numbers::F16(numbers) => numbers[range].copy_from_slice(rows),
            Numbers::F32(numbers) => rows.convert_to_f32_slice(&mut numbers[range]),
        }
    }

    /// What would be read of a row that were written.
    pub(super) fn round(&self, row: &mut [f32]) {
        if let Numbers::F16(_) = self.numbers {
            row.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32());
        }
    }

    /// Bytes allocated.
    pub(super) fn bytes(&self) -> usize {
        match &self.numbers {
            Numbers::F16(numbers) => numbers.capacity() * size_of::<f16>(),
            Numbers::F32(numbers) => numbers.capacity() * size_of::<f32>(),
        }
    }
}
