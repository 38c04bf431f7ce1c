//! Which constants of kernels a device is fastest with, measured.
//!
//! One constant after the other: all its values are timed in turns, so that a machine that warms up
//! or is used by others treats them alike, and those that are far behind are left out of the next
//! turn. The fastest by the median then runs against what is there once more, and stays only where
//! it is ahead by [`MARGIN`] both times. At the end all that was chosen runs against what is built
//! in, in whole steps, and is dropped where these are no faster.
//!
//! The model has the shape and the random weights of a real one, and four layers: kernels do
//! the same in every layer, and what a layer reads is more than caches hold.

use super::constants::{Constant, FEW_BITS, constants};
use super::kernels::median;
use super::{RandomRows, Shape, tokens};
use crate::decoder::{GpuSequence, Model};
use crate::gpu::{Choice, Device, Quantised, Timed, Tuned, Tuning, WeightType};
use crate::kv::CacheMethod;
use crate::linalg::Random;
use crate::sequence::{Logits, Sequence, SequenceOptions};
use crate::task::{OnProgress, Progress};
use crate::{Error, Result};
use serde_json::Value;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How many times as fast a choice has to make its kernels.
pub const MARGIN: f64 = 1.03;
const LAYERS: usize = 4;
/// Measurements of each value.
const TURNS: usize = 5;
/// Steps in one, and tokens of a chunk.
const STEPS: usize = 3;
const CHUNK: usize = 128;
/// What is this many times as slow as the first is left out of the next turn.
const BEHIND: f64 = 1.1;

/// What to measure, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Task {
    /// The shape of the model; `None` for what fits the device.
    pub shape: Option<Shape>,
    /// No measurement begins later than this after the start.
    ///
    /// What is under way is finished; where shaders are compiled for the first time that can take
    /// a while.
    pub time: Duration,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Found {
    /// What there is to be kept.
    pub tuned: Tuned,
    /// How many times as fast a whole step is with it, by the kind of rows; nothing where nothing
    /// was chosen.
    pub steps: Vec<(String, f64)>,
}

/// A kind of rows, and a cache full of them.
struct Cache {
    rows: &'static str,
    sequence: GpuSequence,
}

struct Run<'a> {
    device: &'a Device,
    caches: Vec<Cache>,
    vocab: usize,
    depth: usize,
    random: Random,
    started: Instant,
    time: Duration,
    on_progress: OnProgress<'a>,
}

/// Measures `device`, whose tuning is afterwards what it was.
///
/// `on_progress` hears of milliseconds.
///
/// # Errors
/// [`Error::Argument`] where there was no time to measure anything, [`Error::Interrupted`] where
/// `on_progress` says so, [`Error::OutOfMemory`], and the driver's.
pub fn run(task: &Task, device: &Arc<Device>, on_progress: OnProgress<'_>) -> Result<Found> {
    let before = device.tuning();
    let own = Tuning::of(device.is_software());
    device.set_tuning(own);
    let found = found(task, device, &own, on_progress);
    device.set_tuning(before);
    found
}

fn found(task: &Task, device: &Arc<Device>, own: &Tuning, on_progress: OnProgress<'_>) -> Result<Found> {
    let started = Instant::now();
    // Deep enough that splitting tells.
    let depth = if device.is_software() { 1024 } else { 16_384 };
    let (shape, caches, vocab) = caches(task.shape, device, depth)?;
    let mut run = Run { device, caches, vocab, depth, random: Random::new(1), started, time: task.time, on_progress };
    let (mut tuning, mut choices, mut unmeasured, mut measured) = (*own, Vec::new(), Vec::new(), 0);
    for constant in constants() {
        match run.choose(&constant, &tuning)? {
            Verdict::NoTime => unmeasured.push(constant.name.to_string()),
            Verdict::Stays => measured += 1,
            Verdict::Better { value, tuning: better, times } => {
                measured += 1;
                choices.push(Choice { name: constant.field(), value, times });
                tuning = better;
            }
        }
    }
    if measured == 0 {
        let message = format!("nothing could be measured in {} seconds; give it more, shaders are compiled only once", task.time.as_secs());
        return Err(Error::Argument { name: "time".into(), message });
    }
    let mut steps = if choices.is_empty() { Vec::new() } else { run.steps(own, &tuning)? };
    if steps.iter().map(|(_, times)| times.ln()).sum::<f64>() < 0.0 {
        choices.clear();
        steps.clear();
    }
    let measured = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let lowkey = env!("CARGO_PKG_VERSION").into();
    let tuned = Tuned { format: Tuned::FORMAT, adapter: device.adapter(), lowkey, measured, shape: shape.name().into(), choices, unmeasured };
    Ok(Found { tuned, steps })
}

/// Exact rows and coded ones of a model that the device has room for, and its vocabulary.
fn caches(shape: Option<Shape>, device: &Arc<Device>, depth: usize) -> Result<(Shape, Vec<Cache>, usize)> {
    let shapes = match shape {
        Some(shape) => vec![shape],
        None if device.is_software() => vec![Shape::M135],
        None => vec![Shape::B3, Shape::B1, Shape::M135],
    };
    let mut refused = None;
    for shape in shapes {
        let mut config = shape.config();
        config.num_hidden_layers = config.num_hidden_layers.min(LAYERS);
        let make = || {
            let model = Arc::new(Model::random(&config, WeightType::F16, device.clone(), 1)?);
            let options = SequenceOptions { capacity: depth + CHUNK, method: CacheMethod::default(), ..SequenceOptions::default() };
            let cache = |rows: RandomRows| Ok(Cache { rows: rows.name(), sequence: model.random_sequence(rows.rows(&config).as_ref(), options, 2)? });
            let mut all = [RandomRows::Dense, RandomRows::Fast].into_iter().map(cache).collect::<Result<Vec<_>>>()?;
            let few = Arc::new(Model::random(&config, WeightType::Quantised(Quantised::Q4), device.clone(), 1)?);
            all.push(Cache { rows: FEW_BITS, sequence: few.random_sequence(RandomRows::Dense.rows(&config).as_ref(), options, 2)? });
            Ok(all)
        };
        match make() {
            Ok(caches) => return Ok((shape, caches, config.vocab_size)),
            Err(error @ Error::OutOfMemory { .. }) => refused = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(refused.unwrap_or_else(|| Error::Argument { name: "shape".into(), message: "there is none to measure".into() }))
}

/// What is timed: kernels by their shaders, or all; in a chunk, or in a step.
#[derive(Clone, Copy)]
struct What<'a> {
    kernels: &'a [&'a str],
    chunk: bool,
    rows: &'a [&'a str],
    /// Tokens in the cache.
    depth: usize,
}

/// What was found of a constant.
enum Verdict {
    /// The time was up.
    NoTime,
    /// No other value is clearly faster.
    Stays,
    /// Its kernels are so many times as fast with another value.
    Better { value: Value, tuning: Tuning, times: f64 },
}

impl Run<'_> {
    /// Tells where the work stands.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    fn pause(&mut self) -> Result<()> {
        let [done, total] = [self.started.elapsed().min(self.time), self.time].map(|time| time.as_millis() as u64);
        match (self.on_progress)(Progress { stage: "tune", done, total }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Interrupted),
        }
    }

    /// Whether the time is up, less a part of it that is kept for what is done at the end.
    fn is_late(&self, share: f64) -> bool {
        self.started.elapsed() > self.time.mul_f64(share)
    }

    /// What `own` is to be exchanged for, of the values of `constant`.
    fn choose(&mut self, constant: &Constant, own: &Tuning) -> Result<Verdict> {
        let depth = if constant.is_of_attention() { self.depth } else { 0 };
        let what = What { kernels: constant.kernels, chunk: constant.is_of_chunks(), rows: constant.rows, depth };
        let others = constant.others(own);
        let tunings: Vec<Tuning> = [*own].into_iter().chain(others.iter().map(|(.., tuning)| *tuning)).collect();
        let Some(times) = self.race(what, &tunings)? else { return Ok(Verdict::NoTime) };
        let fastest = times.iter().enumerate().skip(1).max_by(|a, b| a.1.total_cmp(b.1));
        let Some((index, _)) = fastest.filter(|(_, times)| **times >= MARGIN) else { return Ok(Verdict::Stays) };
        // The best of several is lucky, too.
        let Some(again) = self.race(what, &[*own, tunings[index]])? else { return Ok(Verdict::NoTime) };
        let (_, value, tuning) = &others[index - 1];
        let better = Verdict::Better { value: value.clone(), tuning: *tuning, times: again[1].min(times[index]) };
        Ok(if again[1] >= MARGIN { better } else { Verdict::Stays })
    }

    /// How many times as fast as the first of `tunings` each is, over the rows it is about: the
    /// geometric mean of the medians' ratios. 0 for what is left out, is clearly slower of one kind
    /// of rows, or cannot be made. `None` where the time was up.
    fn race(&mut self, what: What, tunings: &[Tuning]) -> Result<Option<Vec<f64>>> {
        let concerned: Vec<usize> = (0..self.caches.len()).filter(|cache| what.rows.contains(&self.caches[*cache].rows)).collect();
        // By tuning and rows: seconds of every turn.
        let mut seconds: Vec<Vec<Vec<f64>>> = tunings.iter().map(|_| vec![Vec::new(); self.caches.len()]).collect();
        let mut times = vec![1.0; tunings.len()];
        for _ in 0..TURNS {
            for (index, tuning) in tunings.iter().enumerate().filter(|(index, _)| times[*index] > 0.0).collect::<Vec<_>>() {
                for &cache in &concerned {
                    self.pause()?;
                    if self.is_late(0.9) {
                        return Ok(None);
                    }
                    match self.measure(what, tuning, cache) {
                        Ok(measured) => seconds[index][cache].push(measured),
                        Err(Error::Gpu { .. } | Error::OutOfMemory { .. }) if index > 0 => times[index] = 0.0,
                        Err(error) => return Err(error),
                    }
                }
            }
            let first: Vec<f64> = seconds[0].iter().map(|turns| median(turns.clone())).collect();
            for index in 1..tunings.len() {
                if times[index] > 0.0 {
                    times[index] = faster(&first, &seconds[index]);
                }
            }
        }
        Ok(Some(times))
    }

    /// Seconds that the kernels take with `tuning`; where the device has no clock of its own, those
    /// of the whole step or chunk.
    fn measure(&mut self, what: What, tuning: &Tuning, cache: usize) -> Result<f64> {
        let (device, vocab) = (self.device, self.vocab);
        let prompt = tokens(&mut self.random, vocab, if what.chunk { CHUNK } else { STEPS });
        let sequence = &mut self.caches[cache].sequence;
        device.set_tuning(*tuning);
        sequence.replan()?;
        let once = |sequence: &mut GpuSequence, tokens: &[u32]| {
            sequence.go_to(what.depth);
            match what.chunk {
                true => sequence.forward(tokens, Logits::None).map(|_| ()),
                false => tokens.iter().try_for_each(|token| sequence.step(*token).map(|_| ())),
            }
        };
        // Once untimed: whatever is made on first use is made here.
        once(sequence, &prompt[..if what.chunk { CHUNK } else { 1 }])?;
        let count = if what.chunk { 1.0 } else { STEPS as f64 };
        if what.kernels.is_empty() || !device.has_timestamps() {
            let start = Instant::now();
            once(sequence, &prompt)?;
            device.wait()?;
            return Ok(start.elapsed().as_secs_f64() / count);
        }
        let (_, timed) = device.profile(|| once(sequence, &prompt))?;
        let concerned = |timed: &&Timed| what.kernels.contains(&timed.kernel.split(' ').next().unwrap_or_default());
        Ok(timed.iter().filter(concerned).map(|timed| timed.seconds).sum::<f64>() / count)
    }

    /// How many times as fast whole steps are with `tuning` as with `own`, by the kind of rows.
    fn steps(&mut self, own: &Tuning, tuning: &Tuning) -> Result<Vec<(String, f64)>> {
        let what = What { kernels: &[], chunk: false, rows: &[], depth: self.depth };
        let mut found = Vec::new();
        for cache in 0..self.caches.len() {
            let mut seconds = [Vec::new(), Vec::new()];
            for turn in 0..TURNS {
                // Once in any case.
                if turn > 0 && self.is_late(1.0) {
                    break;
                }
                for (tuning, seconds) in [own, tuning].into_iter().zip(&mut seconds) {
                    self.pause()?;
                    seconds.push(self.measure(what, tuning, cache)?);
                }
            }
            let [before, after] = seconds.map(|seconds| median(seconds).max(1e-12));
            found.push((self.caches[cache].rows.to_string(), before / after));
        }
        Ok(found)
    }
}

/// How many times as fast `seconds`, by rows, are as `first`'s medians; 0 where they are
/// [`BEHIND`], or clearly slower of one kind of rows.
fn faster(first: &[f64], seconds: &[Vec<f64>]) -> f64 {
    let pairs = first.iter().zip(seconds).filter(|(_, turns)| !turns.is_empty());
    let times: Vec<f64> = pairs.map(|(first, turns)| first.max(1e-12) / median(turns.clone()).max(1e-12)).collect();
    let mean = (times.iter().map(|times| times.ln()).sum::<f64>() / times.len().max(1) as f64).exp();
    let slower = times.iter().any(|times| *times < 1.0 / BEHIND);
    if slower || times.is_empty() { 0.0 } else { mean }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_faster_of_all_rows_is_faster() {
        let turns = |seconds: f64| vec![9.0 * seconds, seconds, seconds];
        // Medians, whatever one turn was.
        assert!((faster(&[1.0, 2.0], &[turns(0.5), turns(1.0)]) - 2.0).abs() < 1e-12);
        // Rows that it is not about do not count.
        assert!((faster(&[0.0, 2.0], &[vec![], turns(1.0)]) - 2.0).abs() < 1e-12);
        // Far ahead of one kind and behind of another.
        assert_eq!(faster(&[1.0, 1.0], &[turns(0.1), turns(1.2)]), 0.0);
        assert_eq!(faster(&[1.0], &[turns(1.2)]), 0.0);
        assert_eq!(faster(&[1.0], &[vec![]]), 0.0);
    }
}
