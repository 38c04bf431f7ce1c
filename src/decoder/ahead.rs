//! Steps that begin before the last one's token has come back: nothing else links two steps, and
//! the device has it.
//!
//! While the processor looks at a token the device is at the next one already, so that recording,
//! submitting and reading back cost a device no time. What has begun in vain is forgotten: the row
//! that it has written is one that the next call writes anew. So a step begins early only where it
//! does nothing else, codes no rows and counts no attention.

use crate::Result;
use crate::gpu::Device;
use crate::kv::Call;

/// A sequence's steps on the device.
pub(super) struct Ahead {
    /// The token that the latest step has found, u32, for the next one.
    ///
    /// The scratch is other sequences' too meanwhile.
    pub next: wgpu::Buffer,
    /// Where tokens are read back: of two steps at a time.
    backs: [wgpu::Buffer; 2],
    turn: usize,
    /// The token of the latest step whose token has come back.
    pub found: u32,
    /// The step that has begun early, with that one.
    begun: Option<Step>,
}

/// A step that the device has.
pub(super) struct Step {
    pub call: Call,
    pub index: wgpu::SubmissionIndex,
    /// Where its token is read back.
    pub back: wgpu::Buffer,
}

impl Ahead {
    /// # Errors
    /// [`OutOfMemory`](crate::Error::OutOfMemory).
    pub fn new(device: &Device) -> Result<Ahead> {
        let back = || device.readback("token", 4);
        Ok(Ahead { next: device.buffer("next token", 4)?, backs: [back()?, back()?], turn: 0, found: u32::MAX, begun: None })
    }

    /// Where the next step's token is to be read back.
    pub fn back(&mut self) -> wgpu::Buffer {
        self.turn = 1 - self.turn;
        self.backs[self.turn].clone()
    }

    /// `step` has begun with the token that the one before it is going to find.
    pub fn begin(&mut self, step: Step) {
        self.begun = Some(step);
    }

    /// The step that has begun early.
    pub fn take(&mut self) -> Option<Step> {
        self.begun.take()
    }
}
