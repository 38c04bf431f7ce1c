//! Keys and values themselves, rotated and quantised: no calibration, no factors. What llama.cpp's
//! users know as `-ctk q8_0` and `q4_0`, with the Hadamard rotation that QuaRot (Ashkboos et al.,
//! arXiv 2404.00456) puts before the rounding.
//!
//! A row is one head's key after RoPE, or its value: `round((y·H − least) / step)` in 4 or 8 bits,
//! least and step in f16 for each row.

use super::basis::Basis;
use super::coder::coder;
use crate::Result;
use crate::checkpoint::{Checkpoint, Config};
use crate::kv::{Band, Exact, Format, LatentKind, LatentSet, LatentSpec, RUN, Scale};
use nalgebra::{DMatrix, DVector};

/// How much of a bias's energy is taken out of the keys; what is left is no larger than keys are
/// without one, and each pair of RoPE in which the mean rotates costs a key two multiply-adds more.
const COVERED: f64 = 0.999;

/// Has keys coded about their projection's bias, as it rotates with the position, and values about
/// theirs. A key bias of a norm of hundreds, as in Qwen2, leaves nothing of the rest of the key in
/// 4 bits.
///
/// # Errors
/// Those of reading.
pub(super) fn about_biases(rows: &mut LatentSet, checkpoint: &Checkpoint) -> Result<()> {
    let (config, d) = (checkpoint.config(), checkpoint.config().head_dim);
    for (spec, coder) in rows.specs.iter().zip(&mut rows.coders) {
        // With QK-norm a bias is no mean.
        let (part, norm) = if spec.kind == LatentKind::PostRopeKeys { ("k_proj", config.design.qk_norm.is_some()) } else { ("v_proj", false) };
        let name = format!("model.layers.{}.self_attn.{part}.bias", spec.first_layer);
        if norm || !checkpoint.has(&name) {
            continue;
        }
        let bias = checkpoint.f32(&name, &[config.num_key_value_heads * d])?;
        let mut mean = DVector::from_column_slice(&bias[spec.first_head * d..][..d]);
        if spec.kind == LatentKind::PostRopeKeys {
            keep_largest(&mut mean);
        }
        coder.mean = mean;
    }
    Ok(())
}

/// Leaves of a head's bias the fewest pairs of RoPE that have [`COVERED`] of its energy.
fn keep_largest(bias: &mut DVector<f32>) {
    let half = bias.len() / 2;
    let energy = |p: usize| f64::from(bias[p]).powi(2) + f64::from(bias[p + half]).powi(2);
    let mut pairs: Vec<(usize, f64)> = (0..half).map(|p| (p, energy(p))).collect();
    pairs.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mut left: f64 = pairs.iter().map(|(_, energy)| energy).sum();
    let enough = (1.0 - COVERED) * left;
    for (pair, energy) in pairs {
        if left <= enough {
            (bias[pair], bias[pair + half]) = (0.0, 0.0);
        }
        left -= energy;
    }
}

/// The rows of any model of this shape.
pub fn rotated(config: &Config, bits: u8, exact: Exact) -> LatentSet {
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
        for kind in [LatentKind::PostRopeKeys, LatentKind::Values] {
            let spec = |first_head| LatentSpec { first_layer, layers: 1, kind, first_head, kv_heads: 1, format: format.clone() };
            specs.extend((0..config.num_key_value_heads).map(spec));
        }
    }
    LatentSet { coders: vec![coder; specs.len()], specs, exact }
}
