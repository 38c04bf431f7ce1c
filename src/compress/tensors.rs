//! What was made, as tensors: their names, and how their numbers are stored.

use super::Made;
use crate::checkpoint::row_tensors;
use crate::{Error, Result};
use half::f16;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;
use std::collections::BTreeMap;

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Float {
    /// Two bytes: what kernels read.
    #[default]
    F16,
    /// Four bytes: no rounding, for tests.
    F32,
}

impl Float {
    pub(super) fn dtype(self) -> Dtype {
        match self {
            Float::F16 => Dtype::F16,
            Float::F32 => Dtype::F32,
        }
    }

    /// Bytes of a number.
    pub(super) fn bytes(self) -> u64 {
        match self {
            Float::F16 => 2,
            Float::F32 => 4,
        }
    }
}

/// Tensors that were made, by name: shape and numbers, row-major.
pub(crate) type MadeTensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// What the rows come to as tensors, beside those that the method replaces.
pub(super) fn all(made: &Made, head_dim: usize) -> MadeTensors {
    let mut all = made.tensors.clone();
    for (index, (spec, coder)) in made.rows.specs.iter().zip(&made.rows.coders).enumerate() {
        let [mean, down, up] = row_tensors(index, spec, head_dim);
        // Column by column `[in, out]` is row by row `[out, in]`. Where there is no `down`, it is
        // read from `up`.
        if let Some(other) = coder.down.as_ref().filter(|other| **other != coder.up.transpose()) {
            all.insert(down.0, (down.1, other.as_slice().to_vec()));
        }
        for ((name, shape), numbers) in [(mean, coder.mean.as_slice()), (up, coder.up.as_slice())] {
            all.insert(name, (shape, numbers.to_vec()));
        }
    }
    all
}

/// Numbers in the bytes that a file holds them in.
///
/// # Errors
/// [`Error::Numeric`], with the tensor's `name`, where one is not finite or too large.
pub(super) fn encode(name: &str, numbers: &[f32], float: Float) -> Result<Vec<u8>> {
    Ok(match float {
        Float::F16 => little_endian_f16(&round(name, numbers)?),
        Float::F32 => little_endian_f32(check(name, numbers, f32::MAX)?),
    })
}

fn round(name: &str, numbers: &[f32]) -> Result<Vec<f16>> {
    let mut rounded = vec![f16::ZERO; numbers.len()];
    rounded.convert_from_f32_slice(check(name, numbers, f16::MAX.to_f32())?);
    Ok(rounded)
}

fn check<'a>(name: &str, numbers: &'a [f32], most: f32) -> Result<&'a [f32]> {
    match numbers.iter().find(|x| !x.is_finite() || x.abs() > most) {
        None => Ok(numbers),
        Some(x) => Err(Error::Numeric { what: format!("the factor {name}"), message: format!("holds {x}; numbers up to {most} can be stored") }),
    }
}

pub(super) fn little_endian_f16(numbers: &[f16]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

pub(super) fn little_endian_f32(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_f16_cannot_hold_are_refused_by_name() {
        for bad in [f32::NAN, f32::INFINITY, 65520.0, -7e4] {
            let message = round("rows.3.down.weight", &[1.0, bad]).unwrap_err().to_string();
            assert!(message.contains("rows.3.down"), "{message}");
        }
        assert_eq!(round("x", &[65504.0]).unwrap(), [f16::MAX]);
    }
}
