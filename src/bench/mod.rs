//! How fast: prefill and decode at given depths, with what the device could do at best beside it.
//!
//! Machines drift: they warm up, and others use them. So settings are interleaved, one round of
//! each model after the other, never all rounds of one model first; and the roofline is measured in
//! the same run. A depth is reached by prefilling pseudo-random tokens, since the speed does not
//! depend on which; where a model is random itself ([`Shape`]) its cache is full of random rows
//! from the start, and a depth is reached by saying so. [`kernels`] takes a step apart.

#[cfg(feature = "report")]
mod chart;
mod constants;
mod cost;
pub mod kernels;
mod report;
mod roofline;
mod row;
mod shape;
pub mod tune;

pub use crate::gpu::Roofline;
#[cfg(feature = "report")]
pub use chart::chart;
pub use cost::{Cost, EvictionCost, RowsMade, WeightBytes, parameters, step_cost};
pub use report::{Picture, Report};
pub use roofline::processor_roofline;
use row::Round;
pub use row::Row;
pub use shape::{RandomRows, Shape};

use crate::decoder::GpuSequence;
use crate::linalg::Random;
use crate::sequence::{Logits, Sequence, StepCounters};
use crate::task::{OnProgress, report};
use crate::{Error, Result};
use std::time::{Duration, Instant};

/// Tokens of a prefill that are measured however slow it is, and steps.
const PROBE: usize = 8;
const FEWEST: usize = 2;

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
    /// How many weights it has.
    pub parameters: u64,
    /// Bytes that they take in memory.
    pub weight_bytes: u64,
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
    /// What one model at one depth may take, about.
    ///
    /// Where it is slow, a shorter prefill is measured, fewer steps, and fewer rounds; 8 tokens and
    /// two steps in any case. What was measured is in its [`Row`]. `None` for as long as all of
    /// them take.
    pub row_time: Option<Duration>,
}

impl Default for Task {
    fn default() -> Self {
        Task { depths: vec![0], prefill: 128, steps: 16, rounds: 3, seed: 0, time: None, row_time: None }
    }
}

impl Task {
    /// The context that the deepest measurement needs, or `None` where that cannot be counted.
    pub fn capacity(&self) -> Option<usize> {
        self.depths.iter().copied().max().unwrap_or(0).checked_add(self.prefill.max(self.steps))
    }

    /// Whether another round like the last of `rounds` is within a row's time.
    fn has_time_after(&self, rounds: &[Round]) -> bool {
        let taken: f64 = rounds.iter().chain(rounds.last()).map(Round::seconds).sum();
        self.row_time.is_none_or(|time| taken <= time.as_secs_f64())
    }

    fn check(&self) -> Result<()> {
        let settings = [("depth", self.depths.len()), ("prefill", self.prefill), ("steps", self.steps), ("rounds", self.rounds)];
        match settings.into_iter().find(|setting| setting.1 == 0) {
            Some((name, _)) => Err(Error::Argument { name: name.into(), message: "at least one is needed to measure anything".into() }),
            None => Ok(()),
        }
    }
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
        let mut measured: Vec<Vec<Round>> = subjects.iter().map(|_| Vec::new()).collect();
        let (before, mut lengths) = (rows.len(), vec![task.prefill; subjects.len()]);
        for _ in 0..task.rounds {
            for index in 0..subjects.len() {
                report(on_progress, "measure", done, total)?;
                if late() {
                    return Ok(rows);
                }
                done += 1;
                let (subject, rounds) = (&mut subjects[index], &mut measured[index]);
                let (mut known, mut until, mut steps) = (None, None, task.steps);
                match rounds.first() {
                    None => {
                        subject.text.go_to(depth, subject.vocab, &mut random, &mut || report(on_progress, "measure", done - 1, total))?;
                        // Whatever is made on first use is made here; a token alone is a step.
                        prefill(subject, task.prefill.min(2), &mut random)?;
                        decode(subject, 1, None, &mut random)?;
                        until = task.row_time.map(|time| Instant::now() + time);
                        (lengths[index], known) = prompt_length(task, subject, &mut random)?;
                    }
                    Some(_) if !task.has_time_after(rounds) => continue,
                    // Rounds are of as many steps each.
                    Some(first) => steps = first.steps.len(),
                }
                let tokens = lengths[index];
                let seconds = known.map_or_else(|| prefill(subject, tokens, &mut random), Ok)?;
                let (steps, counters) = decode(subject, steps, until, &mut random)?;
                rounds.push(Round { tokens, prefill: seconds, steps, counters });
                rows.truncate(before);
                let there = subjects.iter().zip(&measured).filter(|(_, rounds)| !rounds.is_empty());
                rows.extend(there.map(|(subject, rounds)| Row::of(subject, depth, rounds, roofline)));
                on_rows(&rows)?;
            }
        }
    }
    report(on_progress, "measure", done, total)?;
    Ok(rows)
}

fn tokens(random: &mut Random, vocab: usize, count: usize) -> Vec<u32> {
    (0..count).map(|_| random.below(vocab) as u32).collect()
}

/// Tokens that are prefilled in half of a row's time: all, or as many lots of [`PROBE`]; and what
/// they took where that is known by now.
fn prompt_length(task: &Task, subject: &mut Subject, random: &mut Random) -> Result<(usize, Option<f64>)> {
    let Some(time) = task.row_time.filter(|_| task.prefill > PROBE) else { return Ok((task.prefill, None)) };
    let seconds = prefill(subject, PROBE, random)?;
    let lots = (time.as_secs_f64() / 2.0 / seconds.max(1e-9)) as usize;
    Ok(if lots < 2 { (PROBE, Some(seconds)) } else { (lots.saturating_mul(PROBE).min(task.prefill), None) })
}

/// Goes back to `depth`, where no clock runs.
fn back(subject: &mut Subject, depth: usize) -> Result<()> {
    subject.text.go_to(depth, subject.vocab, &mut Random::new(0), &mut || Ok(()))
}

/// Seconds that a prefill of so many tokens takes from the present depth, to which it returns.
fn prefill(subject: &mut Subject, count: usize, random: &mut Random) -> Result<f64> {
    let (depth, prompt) = (subject.text.sequence().position(), tokens(random, subject.vocab, count));
    let start = Instant::now();
    // Logits are asked for so that the call ends when the work does, not when it has been handed to
    // the device.
    subject.text.sequence_mut().forward(&prompt, Logits::Last)?;
    let seconds = start.elapsed().as_secs_f64();
    back(subject, depth)?;
    Ok(seconds)
}

/// Seconds of each of some steps from the present depth, to which it returns: of as many as `until`
/// leaves time for, and of [`FEWEST`] in any case. And what a step cost.
fn decode(subject: &mut Subject, steps: usize, until: Option<Instant>, random: &mut Random) -> Result<(Vec<f64>, StepCounters)> {
    let depth = subject.text.sequence().position();
    let mut token = random.below(subject.vocab) as u32;
    let (mut seconds, mut counters, mut last) = (Vec::with_capacity(steps), StepCounters::default(), false);
    while !last {
        let start = Instant::now();
        let count = seconds.len() + 1;
        last = count >= steps || count >= FEWEST && until.is_some_and(|until| start >= until);
        // As text is generated.
        let sequence = subject.text.sequence_mut();
        token = if last { sequence.step(token)? } else { sequence.step_ahead(token)? };
        seconds.push(start.elapsed().as_secs_f64());
        counters += sequence.counters();
    }
    let counters = counters / seconds.len() as u32;
    back(subject, depth)?;
    Ok((seconds, counters))
}
