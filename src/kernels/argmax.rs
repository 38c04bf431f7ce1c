//! `argmax.wgsl`: the most likely token.

use super::spec;
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    count: u32,
}

/// Finds the largest of `vocab` logits.
pub struct Argmax {
    kernel: Kernel,
    vocab: u32,
}

fn variant() -> Spec {
    spec("argmax.wgsl", &[], &[("WORKGROUP", 256)], &[(0, Access::Read), (1, Access::Write)])
}

pub(super) fn variants() -> Vec<Spec> {
    vec![variant()]
}

impl Argmax {
    /// `logits`: `[vocab]` f32; `token`: `[1]` u32.
    pub(crate) fn plan(device: &Device, logits: &wgpu::Buffer, token: &wgpu::Buffer, vocab: u32) -> Result<Argmax> {
        Ok(Argmax { kernel: device.kernel(variant(), &[logits, token])?, vocab })
    }

    /// One workgroup.
    pub fn record(&self, pass: &mut Pass) {
        self.kernel.record(pass, &Step { count: self.vocab }, [1, 1, 1]);
    }
}
