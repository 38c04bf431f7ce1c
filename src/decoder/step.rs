//! A token through a sequence, or the few of a draft: what is recorded, submitted and read back.

use super::ahead::Step;
use super::executor::Shared;
use super::sequence::{GpuSequence, not_a_number};
use crate::Result;
use crate::kv::Reach;

impl GpuSequence {
    /// One token through the step's plan, and the logits after it.
    pub(super) fn run_last(&mut self, token: u32, reach: Option<Reach>) -> Result<Vec<f32>> {
        let (device, vocab) = (self.model.device.clone(), self.model.config.vocab_size);
        device.write(&self.buffers.tokens, 0, &[token])?;
        // Behind them, whether something was too large.
        let (mut out, bytes, back) = (vec![0f32; vocab + 1], 4 * vocab as u64, &self.buffers.logits_back);
        let call = self.cursor.call_within(1, reach);
        let (commands, dispatches) = device.encode(
            "step",
            |pass| self.plans.decode.record(pass, &self.attention[0], &self.coding, &call),
            |encoder| {
                encoder.copy_buffer_to_buffer(&self.buffers.logits, 0, back, 0, bytes);
                self.buffers.copy_reach(encoder, back, bytes);
            },
        )?;
        device.submit_and_read_unless(commands, back, &mut out, &|| self.cancel.is_set())?;
        self.count(dispatches, bytes + 4);
        if out.pop().is_some_and(|reach| reach.to_bits() != 0) {
            return Err(self.buffers.too_large(&self.model)?);
        }
        self.cursor.advance(&call);
        Ok(out)
    }

    /// Begins the step of `token`, or of the one that the step before it finds.
    fn begin(&mut self, token: Option<u32>) -> Result<Step> {
        let (device, back) = (self.model.device.clone(), self.ahead.back());
        if let Some(token) = token {
            device.write(&self.buffers.tokens, 0, &[token])?;
        }
        let (call, next) = (self.cursor.call(1), &self.ahead.next);
        let (commands, dispatches) = device.encode_between(
            "step",
            |encoder| {
                if token.is_none() {
                    encoder.copy_buffer_to_buffer(next, 0, &self.buffers.tokens, 0, 4);
                }
            },
            |pass| self.plans.decode.record(pass, &self.attention[0], &self.coding, &call),
            |encoder| [next, &back].into_iter().for_each(|to| encoder.copy_buffer_to_buffer(&self.buffers.token, 0, to, 0, 4)),
        )?;
        let index = device.submit(commands)?;
        self.count(dispatches, 0);
        Ok(Step { call, index, back })
    }

    /// The step of `token`, which may have begun, and begins the one after it if `on` and if
    /// nothing is lost where that was in vain.
    fn run_step(&mut self, token: u32, begun: Option<Step>, on: bool) -> Result<u32> {
        let step = match begun {
            Some(step) => step,
            None => self.begin(Some(token))?,
        };
        self.cursor.advance(&step.call);
        if on && self.policy.max > 1 && self.cursor.takes_back(1) > 0 {
            let next = self.begin(None)?;
            self.ahead.begin(next);
        }
        let mut found = [0u32];
        self.model.device.read_unless(step.index, &step.back, &mut found, &|| self.cancel.is_set())?;
        self.counters.readback_bytes += 4;
        self.ahead.found = found[0];
        self.told(found[0])
    }

    /// A token as argmax has left it, or what it says instead.
    fn told(&self, found: u32) -> Result<u32> {
        match (found as usize).checked_sub(self.model.config.vocab_size) {
            None => Ok(found),
            Some(0) => Err(not_a_number()),
            Some(_) => Err(self.buffers.too_large(&self.model)?),
        }
    }

    /// A few tokens through the step's kernels, and what comes after each.
    pub(super) fn run_draft(&mut self, tokens: &[u32], shared: &mut Shared) -> Result<Vec<u32>> {
        let plan = shared.verify(&self.model, &self.buffers)?;
        self.model.device.write(&self.buffers.tokens, 0, tokens)?;
        let call = self.cursor.call(tokens.len());
        let (found, dispatches) = plan.run(&self.model, (&self.attention[1], &self.coding), &call, &|| self.cancel.is_set())?;
        self.count(dispatches, 4 * tokens.len() as u64);
        let found = found.into_iter().map(|token| self.told(token)).collect::<Result<_>>()?;
        self.cursor.advance(&call);
        Ok(found)
    }

    /// A step of `token`: what has begun of it, or all.
    pub(super) fn step_and(&mut self, token: u32, on: bool) -> Result<u32> {
        self.cursor.check(&[token], self.model.config.vocab_size)?;
        let begun = if token == self.ahead.found { self.ahead.take() } else { None };
        self.whole(|sequence, _| sequence.run_step(token, begun, on))
    }

    /// Forgets the step that has begun, if one has.
    pub(super) fn forget(&mut self) {
        if self.ahead.take().is_some() {
            self.cursor.overwritten(1);
            // What it met was no call's. A device that is lost says so at the next one.
            let _ = self.buffers.clear_record(&self.model);
        }
    }
}
