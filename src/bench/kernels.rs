//! A decode step and a prefill chunk taken apart: every kernel with its time by the device's own
//! clock, what it moves and computes in that time, and the device's ceilings beside it.
//!
//! Kernels are timed where they work, in a step and a chunk of a whole model, not one by one on the
//! same buffers again and again: what a layer reads has left the caches since the step before.
//! Steps are as many as pass between one coding of rows and the next, so that whatever is done once
//! in a while is there too.

use super::constants::{Constant, constants};
use super::{RandomRows, Text, tokens};
use crate::Result;
use crate::gpu::{self, Device, ElementType, Shape, Tensor, Timed, Work};
use crate::kernels::gram::Gram;
use crate::kv::Exact;
use crate::linalg::Random;
use crate::sequence::Logits;
use crate::task::{OnProgress, report};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use crate::gpu::Roofline;

/// A sequence to be taken apart.
pub struct Subject {
    /// The model's name.
    pub model: String,
    /// How its rows are stored.
    pub rows: String,
    /// Tokens are drawn from this many.
    pub vocab: usize,
    /// The sequence, with room for [`Task::room`] tokens beyond the deepest depth.
    pub text: Text,
    /// The most tokens that it is to have in its cache.
    ///
    /// Where a text has to be read, less than the depths may be enough.
    pub deepest: usize,
}

/// What to time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Tokens in the cache.
    pub depths: Vec<usize>,
    /// Tokens that are prefilled.
    pub chunk: usize,
    /// Whether kernels are also timed with other constants than the device's own, and with which.
    ///
    /// [`sweeps`]. At the deepest depth, of sequences that are random.
    pub sweep: Vec<String>,
    /// No measurement begins later than this after the first.
    ///
    /// `None` for as long as all of them take.
    pub time: Option<Duration>,
}

/// How long a device is kept busy before anything is timed.
const WARM: Duration = Duration::from_millis(500);

/// Which phases are timed: a step, a chunk.
type Phases = [bool; 2];
const STEP: Phases = [true, false];
const CHUNK: Phases = [false, true];
const BOTH: Phases = [true, true];

impl Constant {
    fn phases(&self) -> Phases {
        if self.is_of_chunks() { CHUNK } else { STEP }
    }
}

/// Steps that are timed: in as many, rows are coded once.
const STEPS: usize = Exact::BLOCK + 1;

impl Task {
    /// Tokens for which there has to be room beyond a depth.
    pub fn room(&self) -> usize {
        self.chunk.max(STEPS + 1)
    }
}

/// One kernel in one phase of one model at one depth.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Row {
    /// The model.
    pub model: String,
    /// How its rows are stored.
    pub rows: String,
    /// Tokens in the cache.
    pub depth: usize,
    /// What is otherwise than the device's own [`Tuning`](gpu::Tuning); empty where nothing is.
    pub tuning: String,
    /// `step`, `chunk`, or `prompt` for what only a prompt that is compressed needs.
    pub phase: &'static str,
    /// The shader, its flags, and the shape of a matrix.
    pub kernel: String,
    /// Dispatches of it in a step, or a chunk.
    pub dispatches: f64,
    /// The median dispatch, microseconds.
    pub us: f64,
    /// All of them in a step, or a chunk, microseconds.
    pub total_us: f64,
    /// Bytes and operations of a dispatch, at the least.
    pub bytes: u64,
    /// See [`bytes`](Self::bytes).
    pub flops: u64,
    /// 10⁹ bytes a second.
    pub gbps: f64,
    /// 10⁹ operations a second.
    pub gflops: f64,
    /// The least time that the work can take on this device, divided by the time that it took.
    pub share_of_roofline: f64,
}

/// The median of `seconds`.
pub(super) fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_unstable_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().unwrap_or(0.0)
}

/// The time that a dispatch takes which does nothing, in microseconds: in every other's time, too.
///
/// # Errors
/// [`Gpu`](crate::Error::Gpu) where the device has no timestamps, and the driver's.
pub fn launch_us(device: &Device) -> Result<f64> {
    let (_, timed) = device.profile(|| gpu::empty_dispatches(device, 64))?;
    Ok(1e6 * median(timed.iter().map(|t| t.seconds).collect()))
}

/// Takes all `subjects` apart, by depth. `on_rows` hears of all rows so far after each measurement.
///
/// # Errors
/// [`Gpu`](crate::Error::Gpu) where the device has no timestamps,
/// [`Interrupted`](crate::Error::Interrupted) where `on_progress` says so; the sequences' own, and
/// those of `on_rows`.
pub fn run(
    task: &Task,
    device: &Device,
    subjects: &mut [Subject],
    roofline: &Roofline,
    on_rows: &mut dyn FnMut(&[Row]) -> Result<()>,
    on_progress: OnProgress<'_>,
) -> Result<Vec<Row>> {
    let (mut run, mut rows, mut done) = (Run { task, device, roofline, started: Instant::now(), random: Random::new(0) }, Vec::new(), 0);
    // A card that was idle raises its clocks first.
    if let Some(first) = subjects.first_mut() {
        while run.started.elapsed() < WARM {
            first.text.go_to(0, first.vocab, &mut Random::new(0), &mut || Ok(()))?;
            first.text.sequence_mut().step(0)?;
        }
        first.text.go_to(0, first.vocab, &mut Random::new(0), &mut || Ok(()))?;
    }
    let total = task.depths.len() * subjects.len();
    for &depth in &task.depths {
        for subject in subjects.iter_mut() {
            report(on_progress, "kernels", done, total)?;
            if run.is_over() {
                return Ok(rows);
            }
            done += 1;
            let depth = depth.min(subject.deepest);
            if rows.iter().any(|row: &Row| (&row.model, &row.rows, row.depth) == (&subject.model, &subject.rows, depth)) {
                continue;
            }
            let mut pause = || report(on_progress, "kernels", done - 1, total);
            for (phase, timed, times) in run.apart(subject, depth, BOTH, &mut pause)? {
                rows.extend(table(&timed, times, roofline).map(|row| Row {
                    model: subject.model.clone(),
                    rows: subject.rows.clone(),
                    depth,
                    phase,
                    ..row
                }));
            }
            on_rows(&rows)?;
        }
    }
    let Some(&depth) = task.depths.iter().max().filter(|_| !task.sweep.is_empty()) else { return Ok(rows) };
    let own = device.tuning();
    // Whatever happens, what is planned next is planned as the device wants it.
    let swept = run.sweep(subjects, depth, &mut rows, on_rows, on_progress);
    device.set_tuning(own);
    for subject in subjects.iter_mut() {
        subject.text.replan()?;
    }
    swept.map(|()| rows)
}

/// What a sweep can vary.
pub fn sweeps() -> Vec<&'static str> {
    constants().iter().map(|constant| constant.name).collect()
}

/// What is measured with.
struct Run<'a> {
    task: &'a Task,
    device: &'a Device,
    roofline: &'a Roofline,
    started: Instant,
    random: Random,
}

impl Run<'_> {
    fn is_over(&self) -> bool {
        self.task.time.is_some_and(|time| self.started.elapsed() > time)
    }

    /// Rows of kernels with other constants.
    fn sweep(
        &mut self,
        subjects: &mut [Subject],
        depth: usize,
        rows: &mut Vec<Row>,
        on_rows: &mut dyn FnMut(&[Row]) -> Result<()>,
        on_progress: OnProgress<'_>,
    ) -> Result<()> {
        let (task, device, roofline) = (self.task, self.device, self.roofline);
        self.random = Random::new(1);
        let own = device.tuning();
        let asked = constants().into_iter().filter(|constant| task.sweep.iter().any(|asked| asked == constant.name));
        let others: Vec<_> =
            asked.flat_map(|constant| constant.others(&own).into_iter().map(move |other| (constant.phases(), constant.kernels, other))).collect();
        // Exact rows, and coded ones that nothing is rebuilt of: what the constants are about.
        let rebuilt = |subject: &Subject| [RandomRows::Small, RandomRows::Select, RandomRows::Xkv].iter().any(|rows| rows.name() == subject.rows);
        let concerned = |subject: &Subject| matches!(subject.text, Text::Random(_)) && !rebuilt(subject);
        for (done, (phases, kernels, (name, _, tuning))) in others.iter().enumerate() {
            for subject in subjects.iter_mut().filter(|subject| concerned(subject)) {
                report(on_progress, "sweep", done, others.len())?;
                if self.is_over() {
                    return Ok(());
                }
                device.set_tuning(*tuning);
                subject.text.replan()?;
                for (phase, timed, times) in self.apart(subject, depth, *phases, &mut || Ok(()))? {
                    let of = table(&timed, times, roofline).filter(|row| kernels.contains(&row.kernel.split(' ').next().unwrap_or_default()));
                    let row = |row| Row { model: subject.model.clone(), rows: subject.rows.clone(), depth, tuning: name.clone(), phase, ..row };
                    rows.extend(of.map(row));
                }
            }
            on_rows(rows)?;
        }
        Ok(())
    }

    /// What was timed of one sequence at one depth: by phase, and how many of it.
    fn apart(
        &mut self,
        subject: &mut Subject,
        depth: usize,
        [step, chunk]: Phases,
        pause: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<(&'static str, Vec<Timed>, usize)>> {
        let Run { task, device, random, .. } = self;
        let Subject { text, vocab, .. } = subject;
        let mut found = Vec::new();
        if step {
            let steps = tokens(random, *vocab, STEPS);
            text.go_to(depth, *vocab, random, pause)?;
            // Once untimed: whatever is made on first use is made here.
            text.sequence_mut().step(steps[0])?;
            text.go_to(depth, *vocab, random, pause)?;
            let (_, timed) = device.profile(|| steps.iter().try_for_each(|token| text.sequence_mut().step(*token).map(|_| ())))?;
            found.push(("step", timed, STEPS));
        }
        if chunk {
            let prompt = tokens(random, *vocab, task.chunk);
            pause()?;
            text.go_to(depth, *vocab, random, pause)?;
            let (_, timed) = device.profile(|| text.sequence_mut().forward(&prompt, Logits::None))?;
            found.push(("chunk", timed, 1));
        }
        Ok(found)
    }
}

/// Rows by kernel, in the order of the first dispatch of each, of what happened so many `times`.
fn table(timed: &[Timed], times: usize, roofline: &Roofline) -> impl Iterator<Item = Row> {
    let mut kernels: Vec<(Arc<str>, Vec<&Timed>)> = Vec::new();
    for dispatch in timed {
        match kernels.iter_mut().find(|(name, _)| *name == dispatch.kernel) {
            Some((_, all)) => all.push(dispatch),
            None => kernels.push((dispatch.kernel.clone(), vec![dispatch])),
        }
    }
    kernels.into_iter().map(move |(kernel, all)| {
        let (count, seconds) = (all.len() as u64, all.iter().map(|t| t.seconds).sum::<f64>().max(1e-12));
        let work = all.iter().fold(Work::default(), |sum, t| Work { bytes: sum.bytes + t.work.bytes, flops: sum.flops + t.work.flops });
        Row {
            model: String::new(),
            rows: String::new(),
            depth: 0,
            tuning: String::new(),
            phase: "",
            kernel: kernel.to_string(),
            dispatches: count as f64 / times as f64,
            us: 1e6 * median(all.iter().map(|t| t.seconds).collect()),
            total_us: 1e6 * seconds / times as f64,
            bytes: work.bytes / count,
            flops: work.flops / count,
            gbps: 1e-9 * work.bytes as f64 / seconds,
            gflops: 1e-9 * work.flops as f64 / seconds,
            share_of_roofline: roofline.least_seconds(work.bytes, work.flops) / seconds,
        }
    })
}

/// What only a prompt needs that is compressed in bases of its own.
///
/// Second moments of so many tokens of a group's keys, for a sequence of xKV.
///
/// # Errors
/// [`OutOfMemory`](crate::Error::OutOfMemory), and [`Gpu`](crate::Error::Gpu).
pub fn moments(device: &Device, model: &str, width: usize, tokens: usize, roofline: &Roofline) -> Result<Vec<Row>> {
    let x = Tensor::upload(device, "random rows", &vec![0.5f32; tokens * width], Shape::padded(tokens, width))?;
    let sums = Tensor::zeroed(device, "moments", ElementType::F32, Shape::dense(width + 1, width))?;
    let gram = Gram::plan(device, &x, &sums)?;
    let run = || {
        device.submit(device.encode("moments", |pass| gram.record(pass, tokens as u32), |_| ())?.0)?;
        device.wait()
    };
    run()?;
    let (_, timed) = device.profile(run)?;
    Ok(table(&timed, 1, roofline).map(|row| Row { model: model.into(), rows: "xkv".into(), depth: tokens, phase: "prompt", ..row }).collect())
}
