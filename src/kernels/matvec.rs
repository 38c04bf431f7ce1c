//! `matvec.wgsl`: one token through a weight matrix.

use super::{WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Matrix, Pass, Spec};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    first: u32,
    rows: u32,
    width: u32,
    count: u32,
    epsilon: f32,
}

/// What a projection does beside the product, before or after it.
#[derive(Clone, Copy, Default)]
pub(crate) struct Around<'a> {
    /// RMSNorm of the input: its gain and epsilon, and the width under the mean (matvec only; many tokens are normalised by [`super::norm`]).
    pub norm: Option<(&'a wgpu::Buffer, f32, usize)>,
    /// The matrix's rows are pairs of gate and up: `silu(gate) · up` is written.
    pub gated: bool,
    /// Added to what is there.
    pub residual: bool,
    /// A bias `[rows]`.
    pub bias: Option<&'a wgpu::Buffer>,
}

impl Around<'_> {
    /// The flags that both projection shaders know.
    pub(super) fn flags(&self) -> Vec<&'static str> {
        let pairs = [(self.gated, "GATED"), (self.residual, "RESIDUAL"), (self.bias.is_some(), "BIAS")];
        pairs.into_iter().filter_map(|(on, flag)| on.then_some(flag)).collect()
    }
}

/// Rows that a team of lanes takes at once.
const UNROLL: u32 = 4;
/// Lanes of a team where there are no subgroups.
const TEAM: u32 = 16;

/// `out[row] = Σ_k weights[row][k] · x[k]`, and what is around it.
pub struct Matvec {
    parts: Vec<(Kernel, Step, [u32; 3])>,
}

fn variant(flags: &[&'static str], rows: u32) -> Spec {
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Write)];
    if flags.contains(&"NORM") || flags.contains(&"BIAS") {
        bindings.push((3, Access::Read));
    }
    spec("matvec.wgsl", flags, &[("WORKGROUP", WORKGROUP), ("UNROLL", UNROLL), ("TEAM", TEAM), ("ROWS", rows)], &bindings)
}

pub(super) fn variants() -> Vec<Spec> {
    [&[][..], &["NORM"], &["NORM", "GATED"], &["RESIDUAL"], &["RESIDUAL", "BIAS"]].iter().map(|flags| variant(flags, 32)).collect()
}

impl Matvec {
    /// `x`: `[stride]` f32, padding zero; `out`: `[rows]`, or `[rows / 2]` where gated.
    pub(crate) fn plan(device: &Device, weights: &Matrix, x: &wgpu::Buffer, out: &wgpu::Buffer, around: Around) -> Result<Matvec> {
        let team = if device.tier() == crate::gpu::Tier::F16Subgroups { device.min_subgroup() } else { TEAM };
        // As many rows as the workgroup's teams take in one go.
        let block = (WORKGROUP / team).max(1) * UNROLL;
        let mut flags = around.flags();
        let mut count = 0;
        let mut epsilon = 0.0;
        let mut last = around.bias;
        if let Some((gain, e, width)) = around.norm {
            flags.insert(0, "NORM");
            (last, epsilon, count) = (Some(gain), e, width as u32);
        }
        let parts = weights.parts.iter().map(|part| {
            let mut buffers = vec![&part.buffer, x, out];
            buffers.extend(last);
            let kernel = device.kernel(variant(&flags, block), &buffers)?;
            let blocks = part.rows.div_ceil(block);
            let across = blocks.min(32768);
            Ok((kernel, Step { first: part.first, rows: part.rows, width: weights.stride / 4, count, epsilon }, [across, blocks.div_ceil(across), 1]))
        });
        Ok(Matvec { parts: parts.collect::<Result<_>>()? })
    }

    /// One dispatch per part of the matrix.
    pub fn record(&self, pass: &mut Pass) {
        for (kernel, step, grid) in &self.parts {
            kernel.record(pass, step, *grid);
        }
    }
}
