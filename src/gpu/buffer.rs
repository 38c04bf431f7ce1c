//! Making buffers, filling them, and reading them back.

use super::Device;
use crate::{Error, Result};
use std::sync::atomic::Ordering;

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
        // What is written is a multiple of four bytes.
        let whole = bytes.len() / 4 * 4;
        self.write(&buffer, 0, &bytes[..whole])?;
        if whole < bytes.len() {
            let mut tail = [0u8; 4];
            tail[..bytes.len() - whole].copy_from_slice(&bytes[whole..]);
            self.write(&buffer, whole as u64, &tail)?;
        }
        // Hands the staging memory to the driver now, so that loading a model never holds all of it
        // twice.
        self.owning("uploading", || self.queue.submit([]))?;
        Ok(buffer)
    }

    pub(super) fn make(&self, label: &str, bytes: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        self.check()?;
        let out_of_memory = || Error::OutOfMemory { what: label.to_owned(), bytes };
        let size = bytes.max(4).checked_next_multiple_of(16).ok_or_else(out_of_memory)?;
        if size > self.max_binding().max(16) {
            return Err(out_of_memory());
        }
        let guard = if usage.contains(wgpu::BufferUsages::STORAGE) { self.guard_bytes() } else { 0 };
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size: size + guard, usage, mapped_at_creation: false };
        self.made.fetch_add(1, Ordering::Relaxed);
        match self.catching(|| self.device.create_buffer(&descriptor)) {
            (buffer, None) if guard > 0 => self.guard(label, &buffer, size).map(|()| buffer),
            (buffer, None) => Ok(buffer),
            (_, Some(wgpu::Error::OutOfMemory { .. })) => Err(out_of_memory()),
            (_, Some(e)) => Err(self.failed(&format!("making the buffer {label}"), e)),
        }
    }

    /// A buffer that results are copied to and read from.
    pub(crate) fn readback(&self, label: &str, bytes: u64) -> Result<wgpu::Buffer> {
        self.make(label, bytes, wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST)
    }

    /// Writes `data`, a multiple of four bytes, `offset` bytes into a buffer, before what is
    /// submitted next.
    ///
    /// # Errors
    /// [`Error::DeviceLost`], or [`Error::Gpu`] where it does not fit.
    pub(crate) fn write<T: bytemuck::NoUninit>(&self, buffer: &wgpu::Buffer, offset: u64, data: &[T]) -> Result<()> {
        self.owning("writing to a buffer", || self.queue.write_buffer(buffer, offset, bytemuck::cast_slice(data)))
    }

    /// Submits, waits, and returns the first `out.len()` elements of `from`, a buffer made by
    /// [`readback`](Self::readback).
    ///
    /// # Errors
    /// Those of [`submit`](Self::submit) and of [`wait`](Self::wait).
    pub(crate) fn submit_and_read<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        commands: wgpu::CommandBuffer,
        from: &wgpu::Buffer,
        out: &mut [T],
    ) -> Result<()> {
        self.submit_and_read_unless(commands, from, out, &|| false)
    }

    /// The same, unless `stop` says that the caller no longer wants it.
    ///
    /// # Errors
    /// Those of [`submit`](Self::submit) and of [`wait_unless`](Self::wait_unless).
    pub(crate) fn submit_and_read_unless<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        commands: wgpu::CommandBuffer,
        from: &wgpu::Buffer,
        out: &mut [T],
        stop: &dyn Fn() -> bool,
    ) -> Result<()> {
        let index = self.submit(commands)?;
        self.read_unless(index, from, out, stop)
    }

    /// What stands in these parts of buffers, in bytes, one after the other: each begins and ends
    /// at a multiple of four.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with the label, and those of
    /// [`submit_and_read`](Self::submit_and_read).
    pub(crate) fn download<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        label: &str,
        parts: &[(&wgpu::Buffer, std::ops::Range<u64>)],
    ) -> Result<Vec<T>> {
        let bytes: u64 = parts.iter().map(|(_, range)| range.end - range.start).sum();
        let mut found = vec![T::zeroed(); bytes as usize / size_of::<T>()];
        if bytes == 0 {
            return Ok(found);
        }
        let back = self.readback(label, bytes)?;
        let copy = |encoder: &mut wgpu::CommandEncoder| {
            let mut at = 0;
            for (buffer, range) in parts.iter().filter(|(_, range)| !range.is_empty()) {
                encoder.copy_buffer_to_buffer(buffer, range.start, &back, at, range.end - range.start);
                at += range.end - range.start;
            }
        };
        let (commands, _) = self.encode(label, |_| (), copy)?;
        self.submit_and_read(commands, &back, &mut found)?;
        Ok(found)
    }

    /// Waits for the submission `index`, which copies to `from`, and reads that as
    /// [`submit_and_read`](Self::submit_and_read) does.
    ///
    /// # Errors
    /// Those of [`wait_unless`](Self::wait_unless).
    pub(crate) fn read_unless<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(
        &self,
        index: wgpu::SubmissionIndex,
        from: &wgpu::Buffer,
        out: &mut [T],
        stop: &dyn Fn() -> bool,
    ) -> Result<()> {
        let bytes = std::mem::size_of_val(out) as u64;
        let arrival = self.owning("reading back", || self.mapped(from, bytes))?;
        let read = |()| {
            let view = from.get_mapped_range(0..bytes).map_err(|e| self.failed("reading back", e))?;
            bytemuck::cast_slice_mut::<T, u8>(out).copy_from_slice(&view);
            Ok(())
        };
        let done = self.block_on(arrival, Some(index), stop).and_then(read);
        // Also after a failure: a buffer that stays mapped cannot be copied to again.
        from.unmap();
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Options;

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
