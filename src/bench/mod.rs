//! How fast: prefill and decode at given depths, with what the device could do at best beside it.
//!
//! Machines drift: they warm up, and others use them. So settings are interleaved, one round of
//! each model after the other, never all rounds of one model first; and the roofline is measured in
//! the same run. A depth is reached by prefilling pseudo-random tokens, since the speed does not
//! depend on which; where a model is random itself ([`Shape`]) its cache is full of random rows
//! from the start, and a depth is reached by saying so. [`kernels`] takes a step apart.

mod cost;
pub mod kernels;
mod report;
mod roofline;
mod shape;

pub use crate::gpu::Roofline;
pub use cost::{Cost, EvictionCost, RowsMade, WeightBytes, step_cost};
pub use report::Report;
pub use roofline::processor_roofline;
pub use shape::{RandomRows, Shape};

use crate::decoder::GpuSequence;
use crate::linalg::Random;
use crate::sequence::{Logits, Sequence, StepCounters};
use crate::task::{OnProgress, report};
use crate::{Error, Result};
use std::time::{Duration, Instant};

/// What a step of a sequence costs at the least.
pub type CostOf = dyn Fn(&dyn Sequence) -> Cost;

/// A model to be measured.
pub struct Subject {
    /// What to call it in the table.
    pub model: String,
    /// Its method.
    pub method: String,
    /// How its rows are stored.
    pub layout: String,
    /// The types its weights have in memory: `f16`, `f32`, `q4 q6`.
    pub weights: String,
    /// Tokens are drawn from this many.
    pub vocab: usize,
    /// What a step costs at the least, once the sequence has read something.
    pub cost: Box<CostOf>,
    /// A sequence with room for [`Task::capacity`] tokens.
    pub text: Text,
}

/// What is decoded.
pub enum Text {
    /// A sequence that has to read what it is to have in its cache.
    Read(Box<dyn Sequence>),
    /// One whose cache is full of random rows.
    Random(Box<GpuSequence>),
}

impl Text {
    /// The sequence.
    pub fn sequence(&self) -> &dyn Sequence {
        match self {
            Text::Read(sequence) => sequence.as_ref(),
            Text::Random(sequence) => sequence.as_ref(),
        }
    }

    /// The sequence.
    pub fn sequence_mut(&mut self) -> &mut dyn Sequence {
        match self {
            Text::Read(sequence) => sequence.as_mut(),
            Text::Random(sequence) => sequence.as_mut(),
        }
    }

    /// Has a random sequence plan its kernels anew.
    ///
    /// # Errors
    /// The device's.
    pub(crate) fn replan(&mut self) -> Result<()> {
        match self {
            Text::Random(sequence) => sequence.replan(),
            Text::Read(_) => Ok(()),
        }
    }

    /// Appends tokens below `vocab` up to `depth`, keeping those that are there, or cuts what is
    /// beyond. Asks `pause` before every chunk whether to go on.
    ///
    /// # Errors
    /// The sequence's, and those of `pause`.
    pub(crate) fn go_to(&mut self, depth: usize, vocab: usize, random: &mut Random, pause: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let sequence = match self {
            Text::Random(sequence) => {
                sequence.go_to(depth);
                return Ok(());
            }
            Text::Read(sequence) => sequence,
        };
        let chunk = sequence.chunk().max(1);
        while sequence.position() < depth {
            pause()?;
            let count = chunk.min(depth - sequence.position());
            sequence.forward(&tokens(random, vocab, count), Logits::None)?;
        }
        // A sequence that has to read its text anew where it is cut does so here, where no clock
        // runs.
        sequence.truncate(depth);
        sequence.forward(&[], Logits::None).map(|_| ())
    }
}

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Tokens in the cache when a measurement starts.
    pub depths: Vec<usize>,
    /// Tokens prefilled in one measurement.
    pub prefill: usize,
    /// Tokens decoded in one measurement.
    pub steps: usize,
    /// Measurements of each model at each depth.
    pub rounds: usize,
    /// The seed of the tokens.
    pub seed: u64,
    /// No measurement begins later than this after the first.
    ///
    /// `None` for as long as all of them take.
    pub time: Option<Duration>,
}

impl Default for Task {
    fn default() -> Self {
        Task { depths: vec![0], prefill: 128, steps: 16, rounds: 3, seed: 0, time: None }
    }
}

impl Task {
    /// The context that the deepest measurement needs, or `None` where that cannot be counted.
    pub fn capacity(&self) -> Option<usize> {
        self.depths.iter().copied().max().unwrap_or(0).checked_add(self.prefill.max(self.steps))
    }

    fn check(&self) -> Result<()> {
        let settings = [("depth", self.depths.len()), ("prefill", self.prefill), ("steps", self.steps), ("rounds", self.rounds)];
        match settings.into_iter().find(|setting| setting.1 == 0) {
            Some((name, _)) => Err(Error::Argument { name: name.into(), message: "at least one is needed to measure anything".into() }),
            None => Ok(()),
        }
    }
}

/// One model at one depth: a line of the table, and an object of `"rows"` in JSON.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Row {
    /// The model.
    pub model: String,
    /// Its method.
    pub method: String,
    /// How its rows are stored.
    pub layout: String,
    /// The type its weights have in memory.
    pub weights: String,
    /// Tokens in the cache at the start.
    pub depth: usize,
    /// Tokens prefilled per second, over all rounds.
    pub prefill_tps: f64,
    /// Tokens decoded per second, over all rounds.
    pub decode_tps: f64,
    /// Milliseconds that the fastest tenth of steps did not exceed.
    pub decode_ms_p10: f64,
    /// The median step, in milliseconds.
    pub decode_ms_p50: f64,
    /// Milliseconds that nine tenths of steps did not exceed.
    pub decode_ms_p90: f64,
    /// Bytes the cache grows by per token.
    pub kv_bytes_per_token: u64,
    /// Bytes that a step has to move at the mean depth of those measured.
    pub bytes_per_step: u64,
    /// Operations that it has to make there.
    pub flops_per_step: u64,
    /// The least time that this can take on this device, divided by the time that it took.
    pub share_of_roofline: f64,
    /// Compute dispatches recorded per step.
    pub dispatches_per_step: u32,
    /// Command buffers submitted per step.
    pub submits_per_step: u32,
    /// Bytes read back per step.
    pub readback_bytes_per_step: u64,
}

/// Measures all `subjects`, by depth.
///
/// `on_progress` hears of measurements, `on_rows` of all rows so far after each of them.
///
/// # Errors
/// [`Error::Argument`] for a task that measures nothing, [`Error::Context`] for a sequence too
/// small for it, [`Error::Interrupted`] where `on_progress` says so; the sequences' own, and those
/// of `on_rows`.
pub fn run(
    task: &Task,
    subjects: &mut [Subject],
    roofline: &Roofline,
    on_rows: &mut dyn FnMut(&[Row]) -> Result<()>,
    on_progress: OnProgress<'_>,
) -> Result<Vec<Row>> {
    task.check()?;
    let needed = task.capacity().unwrap_or(usize::MAX);
    if let Some(capacity) = subjects.iter().map(|s| s.text.sequence().capacity()).min().filter(|&capacity| capacity < needed) {
        return Err(Error::Context { needed, capacity });
    }
    let mut depths = task.depths.clone();
    depths.sort_unstable();
    depths.dedup();
    let total = depths.len().saturating_mul(task.rounds).saturating_mul(subjects.len());
    let (started, mut done) = (Instant::now(), 0);
    let late = || task.time.is_some_and(|time| started.elapsed() > time);
    let mut random = Random::new(task.seed);
    let mut rows = Vec::new();
    for depth in depths {
        let mut measured: Vec<Measured> = subjects.iter().map(|_| Measured::default()).collect();
        let before = rows.len();
        for round in 0..task.rounds {
            for index in 0..subjects.len() {
                report(on_progress, "measure", done, total)?;
                if late() {
                    return Ok(rows);
                }
                let subject = &mut subjects[index];
                if round == 0 {
                    subject.text.go_to(depth, subject.vocab, &mut random, &mut || report(on_progress, "measure", done, total))?;
                    // Whatever is made on first use is made here.
                    measure(subject, 1, 1, &mut random)?;
                }
                measured[index].add(measure(subject, task.prefill, task.steps, &mut random)?);
                done += 1;
                rows.truncate(before);
                let there = subjects.iter().zip(&measured).filter(|(_, measured)| !measured.step_seconds.is_empty());
                rows.extend(there.map(|(subject, measured)| row(task, subject, depth, measured, roofline)));
                on_rows(&rows)?;
            }
        }
    }
    report(on_progress, "measure", done, total)?;
    Ok(rows)
}

/// Timings of one model at one depth.
#[derive(Default)]
struct Measured {
    prefill_seconds: Vec<f64>,
    step_seconds: Vec<f64>,
    counters: StepCounters,
}

impl Measured {
    fn add(&mut self, other: Measured) {
        self.prefill_seconds.extend(other.prefill_seconds);
        self.step_seconds.extend(other.step_seconds);
        self.counters = other.counters;
    }
}

fn tokens(random: &mut Random, vocab: usize, count: usize) -> Vec<u32> {
    (0..count).map(|_| random.below(vocab) as u32).collect()
}

/// Times one prefill and some steps from the present depth, and returns to it.
fn measure(subject: &mut Subject, prefill: usize, steps: usize, random: &mut Random) -> Result<Measured> {
    let Subject { text, vocab, .. } = subject;
    let depth = text.sequence().position();
    let back = |text: &mut Text| text.go_to(depth, *vocab, &mut Random::new(0), &mut || Ok(()));
    let prompt = tokens(random, *vocab, prefill);
    let start = Instant::now();
    // Logits are asked for so that the call ends when the work does, not when it has been handed to
    // the device.
    text.sequence_mut().forward(&prompt, Logits::Last)?;
    let prefill_seconds = vec![start.elapsed().as_secs_f64()];
    back(text)?;

    let mut token = random.below(*vocab) as u32;
    let mut step_seconds = Vec::with_capacity(steps);
    let mut counters = StepCounters::default();
    for step in 1..=steps {
        let start = Instant::now();
        // As text is generated.
        token = if step < steps { text.sequence_mut().step_ahead(token)? } else { text.sequence_mut().step(token)? };
        step_seconds.push(start.elapsed().as_secs_f64());
        counters += text.sequence().counters();
    }
    let counters = counters / steps.max(1) as u32;
    back(text)?;
    Ok(Measured { prefill_seconds, step_seconds, counters })
}

fn row(task: &Task, subject: &Subject, depth: usize, measured: &Measured, roofline: &Roofline) -> Row {
    // A clock too coarse to see a step must not make its speed infinite.
    let seconds = |times: &[f64]| times.iter().sum::<f64>().max(1e-9);
    let step_seconds = seconds(&measured.step_seconds) / measured.step_seconds.len() as f64;
    let prefill_tps = (task.prefill * measured.prefill_seconds.len()) as f64 / seconds(&measured.prefill_seconds);
    let mut sorted = measured.step_seconds.clone();
    sorted.sort_unstable_by(f64::total_cmp);
    let milliseconds = |percent| percentile(&sorted, percent) * 1e3;

    // Step s of a measurement reads depth + s cached rows and its own.
    let mean_depth = depth + task.steps.div_ceil(2);
    let kv_bytes_per_token = subject.text.sequence().memory().kv_bytes_per_token;
    let cost = (subject.cost)(subject.text.sequence());
    let bytes_per_step = cost.bytes(mean_depth, kv_bytes_per_token);
    let flops_per_step = cost.flops(mean_depth);
    Row {
        model: subject.model.clone(),
        method: subject.method.clone(),
        layout: subject.layout.clone(),
        weights: subject.weights.clone(),
        depth,
        prefill_tps,
        decode_tps: 1.0 / step_seconds,
        decode_ms_p10: milliseconds(10),
        decode_ms_p50: milliseconds(50),
        decode_ms_p90: milliseconds(90),
        kv_bytes_per_token,
        bytes_per_step,
        flops_per_step,
        share_of_roofline: roofline.least_seconds(bytes_per_step, flops_per_step) / step_seconds,
        dispatches_per_step: measured.counters.dispatches,
        submits_per_step: measured.counters.submits,
        readback_bytes_per_step: measured.counters.readback_bytes,
    }
}

/// The value that `percent` % of `sorted` do not exceed (nearest rank); 0 where there are none.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::percentile;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let sorted: Vec<f64> = (1..=20).map(f64::from).collect();
        assert_eq!([10, 50, 90, 100].map(|p| percentile(&sorted, p)), [2.0, 10.0, 18.0, 20.0]);
        assert_eq!([10, 50, 90].map(|p| percentile(&[7.0], p)), [7.0; 3]);
        assert_eq!(percentile(&[], 50), 0.0);
    }
}
