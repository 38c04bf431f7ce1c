//! Known words behind buffers, which nothing is to write: a shader's bounds checks turn a write
//! beyond a buffer into one that goes unseen.

use super::Device;
use crate::Result;
use std::sync::{Mutex, PoisonError};

/// Bytes behind a buffer.
const BYTES: u64 = 64;
/// No number in f32 nor, either half of it, in f16: what reads it shows that.
const WORD: u32 = 0x7fc1_7e01;

/// A guarded buffer, what it is called, and where its own bytes end.
struct Guarded {
    label: String,
    buffer: wgpu::Buffer,
    end: u64,
}

/// The buffers of a device that have such words; they live as long as it does.
#[derive(Default)]
pub(super) struct Canaries(Mutex<Vec<Guarded>>);

impl Device {
    /// Bytes to be had behind a buffer: none, but in tests.
    pub(super) fn guard_bytes(&self) -> u64 {
        if self.canaries.is_some() { BYTES } else { 0 }
    }

    /// A buffer's own bytes.
    pub(crate) fn bytes_of(&self, buffer: &wgpu::Buffer) -> u64 {
        buffer.size() - self.guard_bytes()
    }

    /// Writes the words behind the first `end` bytes of a new buffer, where there are to be some.
    pub(super) fn guard(&self, label: &str, buffer: &wgpu::Buffer, end: u64) -> Result<()> {
        let Some(canaries) = &self.canaries else { return Ok(()) };
        self.write(buffer, end, &[WORD; BYTES as usize / 4])?;
        canaries.0.lock().unwrap_or_else(PoisonError::into_inner).push(Guarded { label: label.to_owned(), buffer: buffer.clone(), end });
        Ok(())
    }

    /// The first buffer behind which something was written; `None` where nothing was.
    ///
    /// Only known of a device that was opened with [`Options::canaries`](super::Options::canaries).
    ///
    /// # Errors
    /// The device's.
    pub fn overrun(&self) -> Result<Option<String>> {
        let Some(canaries) = &self.canaries else { return Ok(None) };
        let guarded = canaries.0.lock().unwrap_or_else(PoisonError::into_inner);
        if guarded.is_empty() {
            return Ok(None);
        }
        let back = self.readback("words behind buffers", BYTES * guarded.len() as u64)?;
        let copy = |encoder: &mut wgpu::CommandEncoder| {
            guarded.iter().zip(0..).for_each(|(g, i)| encoder.copy_buffer_to_buffer(&g.buffer, g.end, &back, BYTES * i, BYTES));
        };
        let mut words = vec![[0u32; BYTES as usize / 4]; guarded.len()];
        self.submit_and_read(self.encode("words behind buffers", |_| (), copy)?.0, &back, &mut words)?;
        Ok(guarded.iter().zip(words).find(|(_, words)| words.iter().any(|word| *word != WORD)).map(|(g, _)| g.label.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Options, Work, roofline_spec};

    #[test]
    fn a_kernel_that_writes_beyond_a_buffer_is_found_out() {
        let device = Device::open(&Options { canaries: true, ..Default::default() }).unwrap();
        let [from, to] = ["from", "to"].map(|label| device.buffer(label, 256).unwrap());
        assert_eq!((to.size(), device.bytes_of(&to)), (256 + BYTES, 256));
        let kernel = device.kernel(roofline_spec(&["COPY"]), &[&from, &to]).unwrap();
        let copy = |vectors: u32| {
            let record = |pass: &mut crate::gpu::Pass| kernel.record(pass, &[0u32, vectors], [1, 1, 1], Work::default());
            device.submit(device.encode("copy", record, |_| ()).unwrap().0).unwrap();
            device.overrun().unwrap()
        };
        assert_eq!(copy(16), None);
        device.write(&from, 256, &[0u32; 4]).unwrap();
        assert_eq!(device.overrun().unwrap().as_deref(), Some("from"));
        device.write(&from, 256, &[WORD; 4]).unwrap();
        device.queue.submit([]);
        let other = device.upload("other", &[1f32; 128]).unwrap();
        let kernel = device.kernel(roofline_spec(&["COPY"]), &[&other, &to]).unwrap();
        let record = |pass: &mut crate::gpu::Pass| kernel.record(pass, &[0u32, 17], [1, 1, 1], Work::default());
        device.submit(device.encode("copy", record, |_| ()).unwrap().0).unwrap();
        assert_eq!(device.overrun().unwrap().as_deref(), Some("to"));
    }

    #[test]
    fn nothing_stands_behind_buffers_unasked() {
        let device = Device::open(&Options::default()).unwrap();
        assert_eq!((device.buffer("a small one", 16).unwrap().size(), device.overrun().unwrap()), (16, None));
    }
}
