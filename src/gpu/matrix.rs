//! A weight matrix on the device, split by rows where one binding would be too large.

use super::{Device, Element, ElementType, Shape, Tensor, pad};
use crate::{Error, Result};
use half::f16;
use std::ops::Range;

/// How weights are stored, and what a kernel that multiplies them has to know of that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightType {
    /// Half precision.
    F16,
    /// Single precision.
    F32,
}

impl WeightType {
    /// The numbers of its tensor.
    pub const fn element(self) -> ElementType {
        match self {
            WeightType::F16 => ElementType::F16,
            WeightType::F32 => ElementType::F32,
        }
    }

    /// The flag by which shaders read it.
    pub const fn flag(self) -> Option<&'static str> {
        match self {
            WeightType::F16 => None,
            WeightType::F32 => Some("FULL"),
        }
    }

    /// Bytes of a row of so many weights, which is padded to whole loads.
    pub const fn row_bytes(self, cols: usize) -> usize {
        self.element().bytes() * pad(cols)
    }
}

/// A number that weights are uploaded as.
pub trait Weight: Element {
    /// Its type as a weight.
    const WEIGHT: WeightType;
}

impl Weight for f16 {
    const WEIGHT: WeightType = WeightType::F16;
}

impl Weight for f32 {
    const WEIGHT: WeightType = WeightType::F32;
}

/// Consecutive rows of a [`Matrix`], in one binding.
pub struct Part {
    /// The matrix' row at which it begins.
    pub first: usize,
    /// How its weights are stored.
    pub kind: WeightType,
    /// `[rows][pad(cols)]`, the padding zero.
    pub(crate) weights: Tensor,
}

impl Part {
    /// Its rows.
    pub fn rows(&self) -> usize {
        self.weights.shape.rows
    }

    /// Bytes of its rows.
    pub fn bytes(&self) -> u64 {
        (self.rows() * self.kind.row_bytes(self.weights.shape.cols)) as u64
    }
}

/// Weights by output: row `i` makes number `i` of what they are multiplied to.
pub struct Matrix {
    /// In the order of their rows. All but the last have a multiple of [`ALIGN`](Self::ALIGN).
    pub(crate) parts: Vec<Part>,
    /// Output width.
    pub rows: usize,
    /// Input width, without padding.
    pub cols: usize,
}

impl Matrix {
    /// Rows that stay in one part: a block of the widest kernel.
    pub const ALIGN: usize = 128;

    /// Uploads `[rows][cols]` numbers.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with the label.
    pub fn upload<T: Weight>(device: &Device, label: &str, data: &[T], [rows, cols]: [usize; 2]) -> Result<Matrix> {
        Matrix::by_parts(device, label, T::WEIGHT, [rows, cols], |part| {
            let shape = Shape::padded(part.len(), cols);
            Tensor::upload(device, label, &data[part.start * cols..part.end * cols], shape)
        })
    }

    /// Zeros.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn zeroed(device: &Device, label: &str, kind: WeightType, [rows, cols]: [usize; 2]) -> Result<Matrix> {
        Matrix::by_parts(device, label, kind, [rows, cols], |part| Tensor::zeroed(device, label, kind.element(), Shape::padded(part.len(), cols)))
    }

    /// As many rows in every part as one binding holds, of which `make` makes the tensor.
    fn by_parts(
        device: &Device,
        label: &str,
        kind: WeightType,
        [rows, cols]: [usize; 2],
        mut make: impl FnMut(Range<usize>) -> Result<Tensor>,
    ) -> Result<Matrix> {
        let bytes = kind.row_bytes(cols) as u64;
        let most = (device.max_binding() / bytes) as usize / Self::ALIGN * Self::ALIGN;
        if most == 0 {
            return Err(Error::OutOfMemory { what: format!("{label}: {} rows", Self::ALIGN), bytes: bytes * Self::ALIGN as u64 });
        }
        let part = |first: usize| Ok(Part { first, kind, weights: make(first..rows.min(first + most))? });
        Ok(Matrix { parts: (0..rows).step_by(most).map(part).collect::<Result<_>>()?, rows, cols })
    }

    /// Bytes on the device.
    pub(crate) fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.weights.size()).sum()
    }
}
