//! A buffer on the device, with what it holds: its shape and the type of its numbers.

use super::Device;
use crate::{Error, Result};
use half::f16;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// Rounds a width up to the four numbers that one load takes.
pub const fn pad(width: usize) -> usize {
    width.next_multiple_of(4)
}

/// How a buffer holds its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementType {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// Whole numbers, and words that hold packed codes.
    U32,
}

impl ElementType {
    /// Bytes of a number.
    pub const fn bytes(self) -> usize {
        match self {
            ElementType::F32 | ElementType::U32 => 4,
            ElementType::F16 => 2,
        }
    }
}

/// A number that tensors hold.
pub trait Element: bytemuck::Pod {
    /// Its type on the device.
    const TYPE: ElementType;
}

impl Element for f32 {
    const TYPE: ElementType = ElementType::F32;
}

impl Element for f16 {
    const TYPE: ElementType = ElementType::F16;
}

impl Element for u32 {
    const TYPE: ElementType = ElementType::U32;
}

/// `[rows][stride]`, of which the first `cols` of every row count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows: tokens, mostly.
    pub rows: usize,
    /// Numbers of a row.
    pub cols: usize,
    /// Numbers from one row to the next.
    pub stride: usize,
}

impl Shape {
    /// Rows that stand end to end.
    pub const fn dense(rows: usize, cols: usize) -> Shape {
        Shape { rows, cols, stride: cols }
    }

    /// Rows that are padded to whole loads.
    pub const fn padded(rows: usize, cols: usize) -> Shape {
        Shape { rows, cols, stride: pad(cols) }
    }

    /// Numbers in all, padding included; more than there can be where that overflows.
    fn len(&self) -> usize {
        self.rows.saturating_mul(self.stride)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}][{}]", self.rows, self.cols)?;
        if self.stride == self.cols { Ok(()) } else { write!(f, " every {}", self.stride) }
    }
}

/// A buffer with its shape, its type and its name. Clones are the same buffer.
#[derive(Clone)]
pub struct Tensor {
    buffer: wgpu::Buffer,
    label: Arc<str>,
    /// The type of its numbers.
    pub element: ElementType,
    /// Rows, columns and stride.
    pub shape: Shape,
}

/// For what asks no questions: copies, writes, sizes.
impl Deref for Tensor {
    type Target = wgpu::Buffer;

    fn deref(&self) -> &wgpu::Buffer {
        &self.buffer
    }
}

impl Tensor {
    /// Zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with the label, also where one binding may not be as large.
    pub(crate) fn zeroed(device: &Device, label: &str, element: ElementType, shape: Shape) -> Result<Tensor> {
        let bytes = (shape.len() as u64).checked_mul(element.bytes() as u64);
        let bytes = bytes.ok_or_else(|| Error::OutOfMemory { what: label.to_owned(), bytes: u64::MAX })?;
        Ok(Tensor { buffer: device.buffer(label, bytes)?, label: label.into(), element, shape })
    }

    /// Uploads `[rows][cols]` numbers; the padding is zero.
    ///
    /// # Errors
    /// As [`zeroed`](Self::zeroed).
    pub(crate) fn upload<T: Element>(device: &Device, label: &str, data: &[T], shape: Shape) -> Result<Tensor> {
        let Shape { rows, cols, stride } = shape;
        assert_eq!(data.len(), rows * cols, "{label}: numbers of {shape}");
        let buffer = if stride == cols {
            device.upload(label, data)?
        } else {
            let mut padded = vec![T::zeroed(); rows * stride];
            for (to, from) in padded.chunks_exact_mut(stride).zip(data.chunks_exact(cols)) {
                to[..cols].copy_from_slice(from);
            }
            device.upload(label, &padded)?
        };
        Ok(Tensor { buffer, label: label.into(), element: T::TYPE, shape })
    }

    /// Uploads one row, padded with zeros.
    ///
    /// # Errors
    /// As [`zeroed`](Self::zeroed).
    pub(crate) fn vector<T: Element>(device: &Device, label: &str, data: &[T]) -> Result<Tensor> {
        Tensor::upload(device, label, data, Shape::padded(1, data.len()))
    }

    /// The beginning of the same buffer as `shape`.
    ///
    /// # Panics
    /// Where it is too small.
    pub(crate) fn view(&self, shape: Shape) -> Tensor {
        assert!(shape.len() <= self.shape.len(), "{} has no room for {shape}", self);
        Tensor { shape, ..self.clone() }
    }

    /// Holds it against what `kernel` takes: the type, and the columns of a row.
    ///
    /// # Panics
    /// Where it is something else, with both.
    pub(crate) fn expect(&self, kernel: &str, element: ElementType, cols: usize) {
        assert!(self.element == element && self.shape.cols == cols, "{kernel}: {self} where rows of {cols} {element:?} are due");
    }

    /// [`expect`](Self::expect), of rows that are padded to whole loads.
    ///
    /// # Panics
    /// As [`expect`](Self::expect).
    pub(crate) fn expect_padded(&self, kernel: &str, element: ElementType, cols: usize) {
        self.expect(kernel, element, cols);
        assert!(self.shape.stride == pad(cols), "{kernel}: {self} where rows are padded to {}", pad(cols));
    }
}

impl fmt::Display for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} {:?}", self.label, self.shape, self.element)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Options;

    #[test]
    fn a_tensor_larger_than_anything_is_refused_by_name() {
        let device = Device::open(&Options { max_binding: Some(1 << 10), ..Default::default() }).unwrap();
        for (rows, bytes) in [(33, 33 * 32), (usize::MAX, u64::MAX)] {
            let refused = Tensor::zeroed(&device, "a large one", ElementType::F32, Shape::padded(rows, 7)).err().unwrap();
            assert!(matches!(&refused, Error::OutOfMemory { what, bytes: b } if what == "a large one" && *b == bytes), "{refused}");
        }
    }

    #[test]
    #[should_panic(expected = "norm: stream, [2][7] every 8 F32 where rows of 6 F32 are due")]
    fn a_mismatch_names_kernel_and_tensor() {
        let device = Device::open(&Options::default()).unwrap();
        Tensor::upload(&device, "stream", &[1f32; 14], Shape::padded(2, 7)).unwrap().expect("norm", ElementType::F32, 6);
    }
}
