//! Keys and values themselves, rotated and quantised: no calibration, no factors. What llama.cpp's users know as `-ctk q8_0` and `q4_0`, with the Hadamard rotation that QuaRot
//! (Ashkboos et al., arXiv 2404.00456) puts before the rounding.
//!
//! A row is one head's key after RoPE, or its value: `round((y·H − least) / step)` in 4 or 8 bits, least and step in f16 for each row.

use super::basis::Basis;
use super::coder::coder;
use crate::checkpoint::Config;
use crate::rows::{Band, Exact, Format, Holds, RUN, RowSet, RowSpec, Scale};
use nalgebra::{DMatrix, DVector};

/// The rows of any model of this shape.
pub fn rotated(config: &Config, bits: u8, exact: Exact) -> RowSet {
    let d = config.head_dim;
    let runs = d.div_ceil(RUN);
    let format = match bits {
        4 | 8 => Format { bands: vec![Band { bits, runs }], scale: Scale::Affine },
        _ => Format::half(runs),
    };
    let one = DVector::repeat(d, 1.0);
    let identity = || DMatrix::identity(d, d);
    let basis = Basis { mean: DVector::zeros(d), down: identity(), up: identity(), variance: one.clone(), loss: one };
    let coder = coder(&basis, &format);
    let mut specs = Vec::new();
    for first_layer in 0..config.num_hidden_layers {
        for holds in [Holds::TurnedKeys, Holds::Values] {
            let spec = |first_head| RowSpec { first_layer, layers: 1, holds, first_head, kv_heads: 1, format: format.clone() };
            specs.extend((0..config.num_key_value_heads).map(spec));
        }
    }
    RowSet { coders: vec![coder; specs.len()], specs, exact }
}
