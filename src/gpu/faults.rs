//! Whose fault it was: an error belongs to the call that caused it, and a lost device is
//! everybody's.
//!
//! wgpu reports errors to the innermost scope of the thread that caused them, so a call that puts
//! scopes around what it does gets its own errors and no one else's.

use super::Device;
use crate::{Error, Result};
use std::sync::{Arc, Mutex, PoisonError};

/// What the driver has said that is no call's own.
#[derive(Default)]
pub(super) struct Faults {
    /// Why the device is gone.
    lost: Mutex<Option<String>>,
    /// The first error that no scope caught.
    unowned: Mutex<Option<String>>,
}

fn keep(into: &Mutex<Option<String>>, message: String) {
    into.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(message);
}

fn kept(from: &Mutex<Option<String>>) -> Option<String> {
    from.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

impl Faults {
    /// Those of `device`, from now on.
    pub fn of(device: &wgpu::Device) -> Arc<Faults> {
        let faults = Arc::<Faults>::default();
        let note = faults.clone();
        device.set_device_lost_callback(move |reason, message| {
            let given = if message.is_empty() { format!("the driver says no more than {reason:?}") } else { message };
            keep(&note.lost, given);
        });
        // Without this wgpu panics.
        let note = faults.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            log::error!("GPU, of no call: {error}");
            keep(&note.unowned, error.to_string());
        }));
        faults
    }

    /// Notes that the device is gone, where the driver has not said why itself.
    pub fn lose(&self, message: &str) {
        keep(&self.lost, message.to_owned());
    }
}

impl Device {
    /// What `call` returns, and the first error that it caused: out of memory before any other.
    pub(super) fn catching<T>(&self, call: impl FnOnce() -> T) -> (T, Option<wgpu::Error>) {
        let filters = [wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::OutOfMemory];
        let scopes = filters.map(|filter| self.device.push_error_scope(filter));
        let value = call();
        let error = scopes.into_iter().rev().fold(None, |first, scope| {
            let error = pollster::block_on(scope.pop());
            first.or(error)
        });
        (value, error)
    }

    /// What `call` returns, or the error that it caused by doing `what`.
    ///
    /// # Errors
    /// [`Error::DeviceLost`], or [`Error::Gpu`] with the driver's words.
    pub(super) fn owning<T>(&self, what: &str, call: impl FnOnce() -> T) -> Result<T> {
        self.check()?;
        let (value, error) = self.catching(call);
        match error {
            Some(e) => Err(self.failed(what, e)),
            None => Ok(value),
        }
    }

    /// [`Error::DeviceLost`] once the driver has said so.
    pub(crate) fn check(&self) -> Result<()> {
        match kept(&self.faults.lost) {
            Some(message) => Err(Error::DeviceLost { message }),
            None => Ok(()),
        }
    }

    /// The error of a call whose `what` failed: the loss of the device, where that is why.
    pub(super) fn failed(&self, what: &str, e: impl std::fmt::Display) -> Error {
        match self.check() {
            Err(lost) => lost,
            Ok(()) => Error::Gpu { what: what.to_owned(), message: e.to_string() },
        }
    }

    /// The first error of the driver's that no call here caused, if there ever was one.
    ///
    /// It fails no call, since it belongs to none, and is logged as it comes.
    pub fn unowned_error(&self) -> Option<String> {
        kept(&self.faults.unowned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Options, Work, roofline_spec};

    /// Copies 64 numbers in a kernel with so many workgroups.
    fn copying(device: &Device, workgroups: u32) -> Result<Vec<f32>> {
        let numbers: Vec<f32> = (0..64).map(|n| n as f32).collect();
        let from = device.upload("from", &numbers)?;
        let (to, back) = (device.buffer("to", 256)?, device.readback("back", 256)?);
        let kernel = device.kernel(roofline_spec(&["COPY"]), &[&from, &to])?;
        let copy = |encoder: &mut wgpu::CommandEncoder| encoder.copy_buffer_to_buffer(&to, 0, &back, 0, 256);
        let (commands, _) = device.encode("copy", |pass| kernel.record(pass, &[0u32, 16], [workgroups, 1, 1], Work::default()), copy)?;
        let mut out = vec![0f32; 64];
        device.submit_and_read(commands, &back, &mut out)?;
        assert_eq!(out, numbers);
        Ok(out)
    }

    #[test]
    fn a_refused_submission_fails_the_call_that_made_it_and_no_other() {
        let device = Device::open(&Options::default()).unwrap();
        // Either thread begins a round when the other does, and ends it before the other begins the
        // next.
        let barrier = std::sync::Barrier::new(2);
        let rounds = 20;
        std::thread::scope(|scope| {
            let faulty = scope.spawn(|| {
                for _ in 0..rounds {
                    barrier.wait();
                    let refused = copying(&device, u32::MAX).unwrap_err();
                    assert!(matches!(&refused, Error::Gpu { message, .. } if message.contains("4294967295")), "{refused}");
                }
            });
            for _ in 0..rounds {
                barrier.wait();
                copying(&device, 1).unwrap();
            }
            faulty.join().unwrap();
        });
        copying(&device, 1).unwrap();
        assert_eq!(device.unowned_error(), None);
    }

    #[test]
    fn a_write_beyond_a_buffer_is_the_writers_error() {
        let device = Device::open(&Options::default()).unwrap();
        let buffer = device.buffer("a small one", 16).unwrap();
        let refused = device.write(&buffer, 8, &[0u32; 4]).unwrap_err();
        assert!(matches!(&refused, Error::Gpu { what, .. } if what == "writing to a buffer"), "{refused}");
        copying(&device, 1).unwrap();
    }

    #[test]
    fn what_no_call_caused_fails_none() {
        let device = Device::open(&Options::default()).unwrap();
        let buffer = device.buffer("a small one", 16).unwrap();
        device.queue.write_buffer(&buffer, 8, &[0; 16]);
        copying(&device, 1).unwrap();
        assert!(device.unowned_error().is_some());
    }

    #[test]
    fn a_lost_device_fails_everybody_with_its_reason() {
        let device = Device::open(&Options::default()).unwrap();
        copying(&device, 1).unwrap();
        device.device.destroy();
        let _ = device.device.poll(wgpu::PollType::Poll);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..2 {
                        let lost = copying(&device, 1).unwrap_err();
                        assert!(matches!(&lost, Error::DeviceLost { message } if message.contains("Destroyed")), "{lost:?}");
                    }
                });
            }
        });
    }
}
