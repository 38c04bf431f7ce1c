//! `norm.wgsl`: RMSNorm of many tokens.

use super::{WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, pad};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    width: u32,
    count: u32,
    epsilon: f32,
}

/// Normalises rows.
pub struct Norm {
    kernel: Kernel,
    step: Step,
}

fn variant() -> Spec {
    spec("norm.wgsl", &[], &[("WORKGROUP", WORKGROUP)], &[(0, Access::Read), (1, Access::Read), (2, Access::Write)])
}

pub(super) fn variants() -> Vec<Spec> {
    vec![variant()]
}

impl Norm {
    /// `x`, `out`: `[n][pad(width)]` f32, padding zero; `gain`: `[pad(width)]`.
    pub(crate) fn plan(device: &Device, x: &wgpu::Buffer, gain: &wgpu::Buffer, out: &wgpu::Buffer, width: usize, epsilon: f32) -> Result<Norm> {
        let step = Step { width: (pad(width) / 4) as u32, count: width as u32, epsilon };
        Ok(Norm { kernel: device.kernel(variant(), &[x, gain, out])?, step })
    }

    /// One workgroup per token.
    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        self.kernel.record(pass, &self.step, [tokens, 1, 1]);
    }
}
