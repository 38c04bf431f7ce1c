//! `embed.wgsl`: token ids to rows of the embedding table.

use super::{WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Matrix, Pass, Spec};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    first: u32,
    rows: u32,
    width: u32,
}

/// Looks tokens up in every part of the table.
pub struct Embed {
    parts: Vec<(Kernel, Step)>,
}

fn variant() -> Spec {
    spec("embed.wgsl", &[], &[("WORKGROUP", WORKGROUP)], &[(0, Access::Read), (1, Access::Read), (2, Access::Write)])
}

pub(super) fn variants() -> Vec<Spec> {
    vec![variant()]
}

impl Embed {
    /// `tokens`: `[n]` u32, each below the table's rows; `out`: `[n][stride]` f32.
    pub(crate) fn plan(device: &Device, table: &Matrix, tokens: &wgpu::Buffer, out: &wgpu::Buffer) -> Result<Embed> {
        let part = |p: &crate::gpu::Part| {
            let step = Step { first: p.first, rows: p.rows, width: table.stride / 4 };
            Ok((device.kernel(variant(), &[&p.buffer, tokens, out])?, step))
        };
        Ok(Embed { parts: table.parts.iter().map(part).collect::<Result<_>>()? })
    }

    /// One dispatch per part of the table.
    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        for (kernel, step) in &self.parts {
            kernel.record(pass, step, [tokens, 1, 1]);
        }
    }
}
