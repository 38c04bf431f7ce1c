//! Verifying a draft: a few tokens through the model together, by the kernels of a step, which read
//! weights once for all of them.

use super::Model;
use super::attention::AttentionPlan;
use super::coding::Coding;
use super::decode::DecodePlan;
use super::scratch::Scratch;
use crate::Result;
use crate::gpu::{ElementType, Shape, Tensor};
use crate::kv::Call;

/// The most tokens of a draft, and the one that it begins with.
pub(super) const VERIFIED: usize = 8;

/// Planned the first time that a draft is verified.
pub(super) struct VerifyPlan {
    plan: DecodePlan,
    logits: Tensor,
    found: Tensor,
    back: wgpu::Buffer,
}

impl VerifyPlan {
    /// # Errors
    /// [`OutOfMemory`](crate::Error::OutOfMemory), and [`Gpu`](crate::Error::Gpu) where the driver
    /// refuses a kernel.
    pub fn plan(model: &Model, s: &Scratch) -> Result<VerifyPlan> {
        let device = &*model.device;
        let logits = Tensor::zeroed(device, "logits of a draft", ElementType::F32, Shape::dense(VERIFIED, model.config.vocab_size))?;
        let found = Tensor::zeroed(device, "tokens of a draft", ElementType::U32, Shape::dense(VERIFIED, 1))?;
        let back = device.readback("tokens of a draft", 4 * VERIFIED as u64)?;
        Ok(VerifyPlan { plan: DecodePlan::plan(model, s, [&logits, &found], VERIFIED as u32)?, logits, found, back })
    }

    /// Runs the tokens of `call`, and returns what comes after each, as
    /// [`Argmax`](crate::kernels::argmax::Argmax) has it, with the number of dispatches.
    ///
    /// # Errors
    /// The device's, and [`Interrupted`](crate::Error::Interrupted) where `stop` says so.
    pub fn run(
        &self,
        model: &Model,
        (attention, coding): (&AttentionPlan, &Coding),
        call: &Call,
        stop: &dyn Fn() -> bool,
    ) -> Result<(Vec<u32>, u32)> {
        let mut found = vec![0; call.tokens.len()];
        let bytes = 4 * found.len() as u64;
        let record = |pass: &mut crate::gpu::Pass| self.plan.record(pass, attention, coding, call);
        let copy = |encoder: &mut wgpu::CommandEncoder| encoder.copy_buffer_to_buffer(&self.found, 0, &self.back, 0, bytes);
        let (commands, dispatches) = model.device.encode("draft", record, copy)?;
        model.device.submit_and_read_unless(commands, &self.back, &mut found, stop)?;
        Ok((found, dispatches))
    }

    /// Bytes of its buffers.
    pub fn bytes(&self) -> u64 {
        self.logits.size() + self.found.size() + self.back.size()
    }
}
