//! A weight matrix on the device, split by rows where one binding would be too large.

use super::{Device, Element, ElementType, Packed, Quantised, Shape, Tensor, pad};
use crate::{Error, Result};
use half::f16;
use std::ops::Range;
use std::str::FromStr;

/// How weights are stored, and what a kernel that multiplies them has to know of that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// Half precision.
    F16,
    /// Single precision.
    F32,
    /// A few bits, with scales.
    Quantised(Quantised),
}

impl WeightType {
    /// What it is called: `f16`, `q4`.
    pub const fn name(self) -> &'static str {
        match self {
            WeightType::F16 => "f16",
            WeightType::F32 => "f32",
            WeightType::Quantised(kind) => kind.name(),
        }
    }

    /// The flags by which shaders read it.
    pub const fn flags(self) -> &'static [&'static str] {
        match self {
            WeightType::F16 => &[],
            WeightType::F32 => &["FULL"],
            WeightType::Quantised(kind) => kind.flags(),
        }
    }

    /// Constants of its shaders.
    pub fn constants(self) -> Vec<(&'static str, u32)> {
        match self {
            WeightType::F16 | WeightType::F32 => Vec::new(),
            WeightType::Quantised(kind) => vec![("OFFSET", kind.offset())],
        }
    }

    /// The planes of a matrix: the type of their numbers, and numbers of a row of so many weights,
    /// which is padded to whole loads.
    ///
    /// Weights or their codes; scales; upper bits of codes. Those that it has not are empty.
    fn planes(self, cols: usize) -> [(ElementType, usize); 3] {
        match self {
            WeightType::F16 => [(ElementType::F16, pad(cols)), (ElementType::F16, 0), (ElementType::F16, 0)],
            WeightType::F32 => [(ElementType::F32, pad(cols)), (ElementType::F32, 0), (ElementType::F32, 0)],
            WeightType::Quantised(kind) => kind.words(cols).map(|words| (ElementType::U32, words)),
        }
    }

    /// Planes beside the weights: scales, and upper bits of codes.
    pub(crate) fn beside(self) -> u32 {
        self.planes(1)[1..].iter().map(|(_, numbers)| u32::from(*numbers > 0)).sum()
    }

    /// Bytes of a row of so many weights.
    pub fn row_bytes(self, cols: usize) -> usize {
        self.planes(cols).iter().map(|(element, numbers)| element.bytes() * numbers).sum()
    }
}

/// Of those that the weights of a model can be: not single precision.
impl FromStr for WeightType {
    type Err = Error;

    fn from_str(text: &str) -> Result<WeightType> {
        let all = || [WeightType::F16].into_iter().chain(Quantised::ALL.map(WeightType::Quantised));
        let names = || all().map(WeightType::name).collect::<Vec<_>>().join(", ");
        let found = all().find(|kind| kind.name() == text);
        found.ok_or_else(|| Error::Argument { name: "weights".into(), message: format!("{text:?} is none of {}", names()) })
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

/// Consecutive rows of a [`Matrix`], all of one type, in bindings.
pub struct Part {
    /// The matrix' row at which it begins.
    pub first: usize,
    /// How its weights are stored.
    pub kind: WeightType,
    /// `[rows][pad(cols)]`, the padding zero; or codes.
    pub(crate) weights: Tensor,
    /// A quantised matrix' scales, and what is above the lowest four bits of its codes.
    pub(crate) beside: Vec<Tensor>,
}

impl Part {
    /// Its rows.
    pub fn rows(&self) -> usize {
        self.weights.shape.rows
    }

    /// All that it is stored in: its weights, and what is beside them.
    pub(crate) fn planes(&self) -> impl Iterator<Item = &Tensor> {
        std::iter::once(&self.weights).chain(&self.beside)
    }

    /// Bytes of its rows.
    pub fn bytes(&self) -> u64 {
        self.planes().map(|plane| (plane.element.bytes() * plane.shape.rows * plane.shape.stride) as u64).sum()
    }
}

/// Rows of weights that are to be uploaded.
#[derive(Debug, Clone)]
pub enum Rows {
    /// Half precision, row by row.
    F16(Vec<f16>),
    /// A few bits each.
    Quantised(Packed),
}

/// Weights by output: row `i` makes number `i` of what they are multiplied to.
pub struct Matrix {
    /// In the order of their rows. Each has an even number of them, or is the last.
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
        let parts = by_parts(device, label, T::WEIGHT, [rows, cols], |part, _, _| {
            Tensor::upload(device, label, &data[part.start * cols..part.end * cols], Shape::padded(part.len(), cols))
        })?;
        Ok(Matrix { parts, rows, cols })
    }

    /// Uploads rows of several types, one behind the other, each `[n][cols]`.
    ///
    /// Where rows come in pairs, all but the last have an even number of them.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with the label.
    pub fn of(device: &Device, label: &str, all: &[Rows], cols: usize) -> Result<Matrix> {
        let mut matrix = Matrix { parts: Vec::new(), rows: 0, cols };
        for rows in all {
            let (parts, count) = match rows {
                Rows::F16(data) => {
                    let matrix = Matrix::upload(device, label, data, [data.len() / cols, cols])?;
                    (matrix.parts, matrix.rows)
                }
                Rows::Quantised(packed) => {
                    let kind = WeightType::Quantised(packed.kind);
                    let parts = by_parts(device, label, kind, [packed.rows, cols], |part, plane, words| {
                        let data = &packed.planes[plane][part.start * words..part.end * words];
                        Tensor::upload(device, label, data, Shape::dense(part.len(), words))
                    })?;
                    (parts, packed.rows)
                }
            };
            matrix.parts.extend(parts.into_iter().map(|part| Part { first: matrix.rows + part.first, ..part }));
            matrix.rows += count;
        }
        Ok(matrix)
    }

    /// Zeros, or codes and scales of zero.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn zeroed(device: &Device, label: &str, kind: WeightType, [rows, cols]: [usize; 2]) -> Result<Matrix> {
        let parts = by_parts(device, label, kind, [rows, cols], |part, plane, numbers| {
            let shape = Shape { rows: part.len(), cols: if numbers == pad(cols) { cols } else { numbers }, stride: numbers };
            Tensor::zeroed(device, label, kind.planes(cols)[plane].0, shape)
        })?;
        Ok(Matrix { parts, rows, cols })
    }

    /// Rows behind the others, in parts of their own.
    pub(crate) fn append(&mut self, more: Matrix) {
        self.parts.extend(more.parts.into_iter().map(|part| Part { first: self.rows + part.first, ..part }));
        self.rows += more.rows;
    }

    /// The most rows that stay in one part.
    pub(crate) fn most_rows(device: &Device, kind: WeightType, cols: usize) -> usize {
        let bytes = kind.planes(cols).iter().map(|(element, numbers)| (element.bytes() * numbers) as u64).max().unwrap_or(0);
        (device.max_binding() / bytes.max(1)) as usize / Matrix::ALIGN * Matrix::ALIGN
    }

    /// Bytes on the device.
    pub(crate) fn bytes(&self) -> u64 {
        self.parts.iter().flat_map(Part::planes).map(|plane| plane.size()).sum()
    }
}

/// As many rows in every part as one binding holds, of which `make` makes the planes: it is given
/// the rows, the plane's index and the numbers of a row there.
fn by_parts(
    device: &Device,
    label: &str,
    kind: WeightType,
    [rows, cols]: [usize; 2],
    mut make: impl FnMut(Range<usize>, usize, usize) -> Result<Tensor>,
) -> Result<Vec<Part>> {
    let planes = kind.planes(cols);
    let most = Matrix::most_rows(device, kind, cols);
    if most == 0 {
        let bytes = planes.iter().map(|(element, numbers)| (element.bytes() * numbers) as u64).max().unwrap_or(0);
        return Err(Error::OutOfMemory { what: format!("{label}: {} rows", Matrix::ALIGN), bytes: bytes * Matrix::ALIGN as u64 });
    }
    let part = |first: usize| {
        let mut plane = |index: usize| make(first..rows.min(first + most), index, planes[index].1);
        let weights = plane(0)?;
        let beside = (1..3).filter(|index| planes[*index].1 > 0).map(plane).collect::<Result<_>>()?;
        Ok(Part { first, kind, weights, beside })
    };
    (0..rows).step_by(most).map(part).collect()
}
