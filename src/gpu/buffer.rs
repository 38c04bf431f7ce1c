//! Making buffers, filling them, and reading them back.

use super::Device;
use crate::{Error, Result};
use std::sync::mpsc;

impl Device {
    /// A zeroed storage buffer of `bytes` (rounded up to 16).
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with the label, also where one binding may not be as large.
    pub(crate) fn buffer(&self, label: &str, bytes: u64) -> Result<wgpu::Buffer> {
        self.make(label, bytes, wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC)
    }

    /// A storage buffer holding `data`.
    ///
    /// # Errors
    /// As [`buffer`](Self::buffer).
    pub(crate) fn upload<T: bytemuck::NoUninit>(&self, label: &str, data: &[T]) -> Result<wgpu::Buffer> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let buffer = self.buffer(label, bytes.len() as u64)?;
        // `write_buffer` takes multiples of four.
        let whole = bytes.len() / 4 * 4;
        self.queue.write_buffer(&buffer, 0, &bytes[..whole]);
        if whole < bytes.len() {
            let mut tail = [0u8; 4];
            tail[..bytes.len() - whole].copy_from_slice(&bytes[whole..]);
            self.queue.write_buffer(&buffer, whole as u64, &tail);
        }
        // Hands the staging memory to the driver now, so that loading a model never holds all of it twice.
        self.queue.submit([]);
        Ok(buffer)
    }

    pub(super) fn make(&self, label: &str, bytes: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        self.check()?;
        let out_of_memory = || Error::OutOfMemory { what: label.to_owned(), bytes };
        let size = bytes.max(4).checked_next_multiple_of(16).ok_or_else(out_of_memory)?;
        if size > self.max_binding().max(16) {
            return Err(out_of_memory());
        }
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false });
        let validation = pollster::block_on(validation.pop());
        if pollster::block_on(memory.pop()).is_some() {
            return Err(out_of_memory());
        }
        match validation {
            Some(e) => Err(Error::Gpu { what: format!("making the buffer {label}"), message: e.to_string() }),
            None => Ok(buffer),
        }
    }

    /// A buffer that results are copied to and read from.
    pub(crate) fn readback(&self, label: &str, bytes: u64) -> Result<wgpu::Buffer> {
        self.make(label, bytes, wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST)
    }

    /// Submits, waits, and returns the first `out.len()` elements of `from`, a buffer made by [`readback`](Self::readback).
    ///
    /// # Errors
    /// [`Error::DeviceLost`], or [`Error::Gpu`] where the driver fails.
    pub(crate) fn submit_and_read<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        commands: wgpu::CommandBuffer,
        from: &wgpu::Buffer,
        out: &mut [T],
    ) -> Result<()> {
        let index = self.queue.submit([commands]);
        let bytes = std::mem::size_of_val(out) as u64;
        let (send, receive) = mpsc::channel();
        from.map_async(wgpu::MapMode::Read, 0..bytes, move |mapped| {
            let _ = send.send(mapped);
        });
        let waited = self.wait(Some(index));
        if let Ok(Err(e)) = receive.try_recv() {
            return waited.and(Err(self.failed("reading back", e)));
        }
        let read = || {
            waited?;
            let view = from.get_mapped_range(0..bytes).map_err(|e| self.failed("reading back", e))?;
            bytemuck::cast_slice_mut::<T, u8>(out).copy_from_slice(&view);
            Ok(())
        };
        let done = read();
        // Also after a failure: a buffer that stays mapped cannot be copied to again.
        from.unmap();
        done
    }

    /// Waits until a submission, or everything submitted, is done.
    ///
    /// # Errors
    /// As [`submit_and_read`](Self::submit_and_read).
    pub(crate) fn wait(&self, submission_index: Option<wgpu::SubmissionIndex>) -> Result<()> {
        let polled = self.device.poll(wgpu::PollType::Wait { submission_index, timeout: None });
        self.check()?;
        polled.map(|_| ()).map_err(|e| self.failed("waiting", e))
    }

    fn failed(&self, what: &str, e: impl std::fmt::Display) -> Error {
        match self.check() {
            Err(lost) => lost,
            Ok(()) => Error::Gpu { what: what.to_owned(), message: e.to_string() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Options, Work, roofline_variants};

    #[test]
    fn a_refused_submission_is_an_error_and_the_next_one_works() {
        let device = Device::open(&Options::default()).unwrap();
        let numbers: Vec<f32> = (0..64).map(|n| n as f32).collect();
        let from = device.upload("from", &numbers).unwrap();
        let (to, back) = (device.buffer("to", 256).unwrap(), device.readback("back", 256).unwrap());
        let copy = roofline_variants().into_iter().find(|v| v.flags == ["COPY"]).unwrap();
        let kernel = device.kernel(copy, &[&from, &to]).unwrap();
        let run = |workgroups: u32| {
            let mut out = vec![0f32; 64];
            let copy = |encoder: &mut wgpu::CommandEncoder| encoder.copy_buffer_to_buffer(&to, 0, &back, 0, 256);
            let (commands, _) = device.encode("copy", |pass| kernel.record(pass, &[0u32, 16], [workgroups, 1, 1], Work::default()), copy);
            device.submit_and_read(commands, &back, &mut out).map(|()| out)
        };
        let refused = run(u32::MAX).unwrap_err();
        assert!(matches!(&refused, Error::Gpu { message, .. } if message.contains("4294967295")), "{refused}");
        assert_eq!(run(1).unwrap(), numbers);
    }

    #[test]
    fn a_buffer_larger_than_a_binding_is_refused_by_name() {
        let device = Device::open(&Options { max_binding: Some(1 << 10), ..Default::default() }).unwrap();
        for bytes in [(1 << 10) + 1, u64::MAX] {
            let refused = device.buffer("a large one", bytes).unwrap_err();
            assert!(matches!(&refused, Error::OutOfMemory { what, bytes: b } if what == "a large one" && *b == bytes), "{refused}");
        }
        assert_eq!(device.buffer("one that fits", 1 << 10).unwrap().size(), 1 << 10);
    }
}
