//! Mean and second moment.

use nalgebra::{DMatrix, DVector};

/// Mean and second moment of something.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// `E[y]`, `[w]`.
    pub mean: DVector<f32>,
    /// `E[y yᵀ]`, `[w, w]`, around zero, symmetric.
    pub second: DMatrix<f32>,
}
