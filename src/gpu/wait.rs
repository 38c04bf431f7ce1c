//! Waiting for the device: what it has been given arrives as a future, and native code blocks on
//! that at the edge, never without a limit.

use super::Device;
use crate::{Error, Result};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// How long the driver is asked to wait at a time, before it is looked whether the caller still
/// wants it.
const SLICE: Duration = Duration::from_millis(100);
/// How long a call that its caller no longer wants is left to end by itself.
///
/// Most do, and then nothing of them is lost.
const GRACE: Duration = Duration::from_secs(1);
/// How long a GPU may take without one submission being done.
///
/// Submissions are sized for a fifth of a second, and drivers reset a card after 2 to 10 seconds:
/// one that says nothing for much longer never will.
const GPU_PATIENCE: Duration = Duration::from_secs(60);
/// The same of a software renderer: two layers of a large model take minutes on a busy machine.
const SOFTWARE_PATIENCE: Duration = Duration::from_secs(600);

/// What comes of a submission, and who is to be told.
#[derive(Default)]
struct Landing {
    result: Option<Result<(), wgpu::BufferAsyncError>>,
    waker: Option<Waker>,
}

/// Resolves when the device has done something, whoever drives it: a browser by itself, native code
/// by polling.
#[must_use]
pub(crate) struct Arrival(Arc<Mutex<Landing>>);

impl Arrival {
    /// One, and what is to be called when it is there.
    fn new() -> (Arrival, impl FnOnce(Result<(), wgpu::BufferAsyncError>) + Send + 'static) {
        let shared = Arc::<Mutex<Landing>>::default();
        let land = {
            let shared = shared.clone();
            move |result| {
                let mut landing = shared.lock().unwrap_or_else(PoisonError::into_inner);
                landing.result = Some(result);
                if let Some(waker) = landing.waker.take() {
                    waker.wake();
                }
            }
        };
        (Arrival(shared), land)
    }
}

impl Future for Arrival {
    type Output = Result<(), wgpu::BufferAsyncError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut landing = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match landing.result.take() {
            Some(result) => Poll::Ready(result),
            None => {
                landing.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// How long is waited, and what says meanwhile that the device is alive.
pub(super) struct Patience {
    limit: Duration,
    /// Submissions of everybody's that are done.
    done: Arc<AtomicU64>,
}

impl Patience {
    pub fn new(limit: Option<Duration>, software: bool) -> Patience {
        Patience { limit: limit.unwrap_or(if software { SOFTWARE_PATIENCE } else { GPU_PATIENCE }), done: Arc::default() }
    }
}

impl Device {
    /// Hands commands to the device.
    ///
    /// # Errors
    /// [`Error::DeviceLost`], or [`Error::Gpu`] where the driver refuses them: those of this call
    /// alone.
    pub(crate) fn submit(&self, commands: wgpu::CommandBuffer) -> Result<wgpu::SubmissionIndex> {
        let index = self.owning("running commands", || self.queue.submit([commands]))?;
        let done = self.patience.done.clone();
        self.queue.on_submitted_work_done(move || {
            done.fetch_add(1, Ordering::Relaxed);
        });
        Ok(index)
    }

    /// When all that was submitted is done.
    fn done(&self) -> Arrival {
        let (arrival, land) = Arrival::new();
        self.queue.on_submitted_work_done(move || land(Ok(())));
        arrival
    }

    /// When the first `bytes` of a readback buffer can be read.
    pub(super) fn mapped(&self, buffer: &wgpu::Buffer, bytes: u64) -> Arrival {
        let (arrival, land) = Arrival::new();
        buffer.map_async(wgpu::MapMode::Read, 0..bytes, land);
        arrival
    }

    /// Waits until everything that was submitted is done.
    ///
    /// # Errors
    /// As [`wait_unless`](Self::wait_unless).
    pub(crate) fn wait(&self) -> Result<()> {
        self.wait_unless(&|| false)
    }

    /// The same, unless `stop` says that the caller no longer wants it.
    ///
    /// # Errors
    /// [`Error::DeviceLost`]; [`Error::Gpu`] where the device does not answer;
    /// [`Error::Interrupted`] where it was stopped: then the device goes on with what it has.
    pub(crate) fn wait_unless(&self, stop: &dyn Fn() -> bool) -> Result<()> {
        self.check()?;
        self.block_on(self.done(), None, stop)
    }

    /// Blocks until `arrival`, which the submission `index` brings, or else the last one.
    ///
    /// # Errors
    /// As [`wait_unless`](Self::wait_unless).
    pub(super) fn block_on(&self, mut arrival: Arrival, index: Option<wgpu::SubmissionIndex>, stop: &dyn Fn() -> bool) -> Result<()> {
        let limit = self.patience.limit;
        let begun = Instant::now();
        let (mut alive, mut done) = (begun, self.patience.done.load(Ordering::Relaxed));
        loop {
            if let Poll::Ready(result) = Pin::new(&mut arrival).poll(&mut Context::from_waker(Waker::noop())) {
                self.check()?;
                return result.map_err(|e| self.failed("reading back", e));
            }
            self.check()?;
            if begun.elapsed() >= GRACE.min(limit) && stop() {
                return Err(Error::Interrupted);
            }
            let now = self.patience.done.load(Ordering::Relaxed);
            if now != done {
                (alive, done) = (Instant::now(), now);
            }
            if alive.elapsed() >= limit {
                return Err(self.silent(limit));
            }
            self.poll(index.clone(), SLICE.min(limit))?;
        }
    }

    fn silent(&self, limit: Duration) -> Error {
        let message = format!(
            "it has not answered for {} seconds: the driver or the device hangs. End the program and start it again; where it happens again, update the driver, \
             or choose another device",
            limit.as_secs_f64()
        );
        Error::Gpu { what: format!("waiting for {}", self.name()), message }
    }

    /// Has the driver call back whoever waits for what is done within `timeout`.
    fn poll(&self, submission_index: Option<wgpu::SubmissionIndex>, timeout: Duration) -> Result<()> {
        let wait = wgpu::PollType::Wait { submission_index, timeout: Some(timeout) };
        // wgpu panics where the device is lost while it is being polled.
        match catch_unwind(AssertUnwindSafe(|| self.device.poll(wait))) {
            Ok(Ok(_) | Err(wgpu::PollError::Timeout)) => Ok(()),
            Ok(Err(e)) => Err(self.failed("waiting", e)),
            Err(_) => {
                self.faults.lose("the driver stopped answering");
                self.check()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Kernel, Options, Work, roofline_spec};
    use std::cell::Cell;

    /// A device that is given `limit`, something that keeps it busy for long, and where its numbers
    /// are.
    fn busy(limit: Option<Duration>) -> (Arc<Device>, Kernel, wgpu::Buffer) {
        let device = Device::open(&Options { patience: limit, ..Default::default() }).unwrap();
        let [source, sink] = ["source", "sink"].map(|label| device.buffer(label, 1 << 22).unwrap());
        let kernel = device.kernel(roofline_spec(&[]), &[&source, &sink]).unwrap();
        (device, kernel, sink)
    }

    /// So many rounds of arithmetic, in one submission.
    fn work(device: &Device, kernel: &Kernel, rounds: u32) {
        let (commands, _) = device.encode("rounds", |pass| kernel.record(pass, &[rounds, 0u32], [1024, 1, 1], Work::default()), |_| ()).unwrap();
        device.submit(commands).unwrap();
    }

    /// Rounds that take this device longer than `seconds`.
    fn rounds(device: &Device, kernel: &Kernel, seconds: f64) -> u32 {
        let mut rounds = 1;
        loop {
            let start = Instant::now();
            work(device, kernel, rounds);
            while device.wait().is_err() {}
            let taken = start.elapsed().as_secs_f64();
            if taken > 0.2 {
                return (f64::from(rounds) * (seconds / taken).max(1.0)).ceil() as u32;
            }
            rounds *= 4;
        }
    }

    #[test]
    fn a_device_that_does_not_answer_is_an_error_and_works_when_it_does() {
        let (device, kernel, sink) = busy(Some(Duration::from_millis(20)));
        let rounds = rounds(&device, &kernel, 1.0);
        let back = device.readback("back", 16).unwrap();
        let mut out = [0u32; 4];
        // In one submission: Mesa's software renderer takes no second before the first is done.
        let read = |rounds: u32, out: &mut [u32]| {
            let record = |pass: &mut crate::gpu::Pass| kernel.record(pass, &[rounds, 0u32], [1024, 1, 1], Work::default());
            let copy = |encoder: &mut wgpu::CommandEncoder| encoder.copy_buffer_to_buffer(&sink, 0, &back, 0, 16);
            let (commands, _) = device.encode("rounds and a copy", record, copy).unwrap();
            device.submit_and_read(commands, &back, out)
        };
        let start = Instant::now();
        let silent = read(rounds, &mut out).unwrap_err();
        assert!(matches!(&silent, Error::Gpu { what, message } if what.contains(device.name()) && message.contains("0.02 seconds")), "{silent}");
        assert!(start.elapsed() < Duration::from_millis(700), "{:?}", start.elapsed());
        while device.wait().is_err() {}
        while read(1, &mut out).is_err() {}
    }

    #[test]
    fn whoever_no_longer_wants_it_need_not_wait() {
        let (device, kernel, _) = busy(None);
        let mut rounds = rounds(&device, &kernel, 4.0);
        // A GPU that others use meanwhile, or whose clock was low, may be done sooner than it
        // seemed.
        let (asked, start, stopped) = loop {
            let (asked, start) = (Cell::new(0), Instant::now());
            work(&device, &kernel, rounds);
            match device.wait_unless(&|| asked.replace(asked.get() + 1) >= 2) {
                Ok(()) => rounds *= 2,
                Err(stopped) => break (asked, start, stopped),
            }
        };
        assert!(matches!(stopped, Error::Interrupted), "{stopped}");
        assert!(start.elapsed() >= GRACE && asked.get() == 3, "{:?}, {}", start.elapsed(), asked.get());
        device.wait().unwrap();
    }

    #[test]
    fn an_arrival_is_a_future() {
        let (device, kernel, _) = busy(None);
        work(&device, &kernel, 1);
        let arrival = device.done();
        // Somebody else drives the device meanwhile.
        std::thread::scope(|scope| {
            scope.spawn(|| device.wait().unwrap());
            pollster::block_on(arrival).unwrap();
        });
    }
}
