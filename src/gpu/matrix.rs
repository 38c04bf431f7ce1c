//! A weight matrix on the device: f16 or f32, row-major, rows padded to whole vectors, split by rows where one binding would be too large.

use super::Device;
use crate::{Error, Result};

/// Rounds a width up to the four numbers that one load takes.
pub const fn pad(width: usize) -> usize {
    width.next_multiple_of(4)
}

/// Consecutive rows of a [`Matrix`].
pub struct Part {
    pub(crate) buffer: wgpu::Buffer,
    pub(crate) first: u32,
    pub(crate) rows: u32,
}

/// `[rows][pad(cols)]`, the padding zero.
pub struct Matrix {
    pub(crate) parts: Vec<Part>,
    /// Output width.
    pub rows: u32,
    /// Input width, as its producer pads it.
    pub stride: u32,
    /// Whether numbers are f32, not f16.
    pub(crate) full: bool,
}

impl Matrix {
    /// Uploads row-major `[rows][cols]` numbers, f16 or f32. Every part but the last has a multiple of `align` rows (at most 128).
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with the label.
    pub fn upload<T: bytemuck::Pod>(device: &Device, label: &str, data: &[T], rows: usize, cols: usize, align: usize) -> Result<Matrix> {
        debug_assert_eq!(data.len(), rows * cols);
        let stride = pad(cols);
        Matrix::by_parts(device, label, [rows, cols], size_of::<T>(), align, |first, count| {
            let chunk = &data[first * cols..(first + count) * cols];
            if stride == cols {
                return device.upload(label, chunk);
            }
            let mut padded = vec![T::zeroed(); count * stride];
            for (to, from) in padded.chunks_exact_mut(stride).zip(chunk.chunks_exact(cols)) {
                to[..cols].copy_from_slice(from);
            }
            device.upload(label, &padded)
        })
    }

    /// Of numbers that take `bytes` each, made part by part: `make` is given the first row and how many.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with the label, and those of `make`.
    pub(crate) fn by_parts(
        device: &Device,
        label: &str,
        [rows, cols]: [usize; 2],
        bytes: usize,
        align: usize,
        mut make: impl FnMut(usize, usize) -> Result<wgpu::Buffer>,
    ) -> Result<Matrix> {
        let stride = pad(cols);
        let fitting = (device.max_binding() / (bytes * stride) as u64) as usize / align * align;
        if fitting == 0 {
            return Err(Error::OutOfMemory { what: format!("{label}: {align} rows"), bytes: (bytes * stride * align) as u64 });
        }
        let mut parts = Vec::new();
        let mut first = 0;
        while first < rows {
            let count = fitting.min(rows - first);
            parts.push(Part { buffer: make(first, count)?, first: first as u32, rows: count as u32 });
            first += count;
        }
        Ok(Matrix { parts, rows: rows as u32, stride: stride as u32, full: bytes == 4 })
    }
}
