//! How long each dispatch takes, by the device's own clock.
//!
//! While [`Device::profile`] runs something, every dispatch is recorded into a compute pass of its
//! own between two timestamps, whatever records it. That keeps dispatches from overlapping, and
//! adds what it takes to launch one: an empty dispatch has a time too, which is to be shown beside
//! the others.

use super::{Device, Work};
use crate::{Error, Result};
use std::sync::Arc;

/// One dispatch, timed.
#[derive(Debug, Clone, PartialEq)]
pub struct Timed {
    /// The kernel: its shader, its flags, and what distinguishes it from others of that shader.
    pub kernel: Arc<str>,
    /// What it had to do at the least.
    pub work: Work,
    /// From its beginning to its end.
    pub seconds: f64,
}

/// Dispatches of one query set: two timestamps each, and WebGPU has 4,096 at the most.
const DISPATCHES: u32 = 2048;

/// What has been recorded so far.
#[derive(Default)]
pub(super) struct Profile {
    sets: Vec<wgpu::QuerySet>,
    entries: Vec<(Arc<str>, Work)>,
}

impl Profile {
    /// Where the next dispatch writes its timestamps.
    pub fn next(&mut self, device: &wgpu::Device, kernel: &Arc<str>, work: Work) -> wgpu::ComputePassTimestampWrites<'_> {
        let index = self.entries.len() as u32 % DISPATCHES;
        if index == 0 {
            let descriptor = wgpu::QuerySetDescriptor { label: Some("profile"), ty: wgpu::QueryType::Timestamp, count: 2 * DISPATCHES };
            self.sets.push(device.create_query_set(&descriptor));
        }
        self.entries.push((kernel.clone(), work));
        wgpu::ComputePassTimestampWrites {
            query_set: &self.sets[self.sets.len() - 1],
            beginning_of_pass_write_index: Some(2 * index),
            end_of_pass_write_index: Some(2 * index + 1),
        }
    }
}

impl Device {
    /// Whether [`profile`](Self::profile) can be had.
    pub fn has_timestamps(&self) -> bool {
        self.device.features().contains(wgpu::Features::TIMESTAMP_QUERY)
    }

    /// What `run` returns, and every dispatch that was submitted meanwhile, in order.
    ///
    /// # Errors
    /// [`Error::Gpu`] where the adapter has no timestamps; those of `run`, and of reading back.
    pub fn profile<T>(&self, run: impl FnOnce() -> Result<T>) -> Result<(T, Vec<Timed>)> {
        if !self.has_timestamps() {
            return Err(Error::Gpu { what: "timing kernels".into(), message: "this adapter has no timestamp queries".into() });
        }
        *self.profile.lock().unwrap_or_else(|e| e.into_inner()) = Some(Profile::default());
        let result = run();
        let profile = self.profile.lock().unwrap_or_else(|e| e.into_inner()).take().unwrap_or_default();
        let result = result?;
        let period = f64::from(self.queue.get_timestamp_period()) * 1e-9;
        let mut timed = Vec::with_capacity(profile.entries.len());
        for (set, entries) in profile.sets.iter().zip(profile.entries.chunks(DISPATCHES as usize)) {
            let bytes = 16 * entries.len() as u64;
            let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
            let (resolved, back) = (self.make("timestamps", bytes, usage)?, self.readback("timestamps", bytes)?);
            let mut stamps = vec![[0u64; 2]; entries.len()];
            let copy = |encoder: &mut wgpu::CommandEncoder| {
                encoder.resolve_query_set(set, 0..2 * entries.len() as u32, &resolved, 0);
                encoder.copy_buffer_to_buffer(&resolved, 0, &back, 0, bytes);
            };
            self.submit_and_read(self.encode("timestamps", |_| (), copy)?.0, &back, &mut stamps)?;
            let seconds = |[begin, end]: [u64; 2]| end.wrapping_sub(begin) as f64 * period;
            timed.extend(entries.iter().zip(stamps).map(|((kernel, work), stamps)| Timed {
                kernel: kernel.clone(),
                work: *work,
                seconds: seconds(stamps),
            }));
        }
        Ok((result, timed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Options, roofline_spec};

    #[test]
    fn every_dispatch_has_a_time_and_only_while_asked_for() {
        let device = Device::open(&Options::default()).unwrap();
        let copy = roofline_spec(&["COPY"]);
        let (bytes, most) = (64 << 20, DISPATCHES as usize + 3);
        let (from, to) = (device.buffer("from", bytes).unwrap(), device.buffer("to", bytes).unwrap());
        let kernel = device.kernel(copy, &[&from, &to]).unwrap().called("all of it");
        let run = |count: u32, times: usize| {
            let work = Work { bytes: 32 * u64::from(count), flops: 0 };
            let record = |pass: &mut crate::gpu::Pass| (0..times).for_each(|_| kernel.record(pass, &[0u32, count], [64, 1, 1], work));
            let (commands, dispatches) = device.encode("copy", record, |_| ())?;
            device.submit(commands)?;
            device.wait()?;
            Ok(dispatches)
        };
        // More than one query set holds.
        let (dispatches, timed) = device.profile(|| Ok(run(1, most)? + run(bytes as u32 / 16, 1)?)).unwrap();
        assert_eq!((dispatches as usize, timed.len()), (most + 1, most + 1));
        assert!(timed.iter().all(|t| &*t.kernel == "roofline COPY all of it" && t.seconds >= 0.0 && t.seconds < 1.0), "{:?}", timed[0]);
        let large = timed[most].clone();
        assert_eq!(large.work.bytes, 2 * bytes);
        let mut small: Vec<f64> = timed[..most].iter().map(|t| t.seconds).collect();
        small.sort_unstable_by(f64::total_cmp);
        assert!(large.seconds > 2.0 * small[most / 2], "{} {}", large.seconds, small[most / 2]);
        run(1, 1).unwrap();
        assert_eq!(device.profile(|| Ok(())).unwrap().1, []);
    }
}
