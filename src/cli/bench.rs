//! `lowkey bench`: prefill and decode speed by depth, or every kernel's time, and the device's
//! measured roofline beside it.

mod llama;
mod text;

use self::text::{kernels_of, kernels_text, speed, speed_page, speed_text};
use super::cache::CacheArgs;
use super::console::Console;
use super::device::untrained;
use super::progress::Bar;
use super::several;
use super::table::{markdown, table};
use clap::ValueEnum;
use clap::builder::PossibleValuesParser;
use lowkey::bench::{
    self, Cost, Picture, RandomRows, Report, Roofline, Row, RowsMade, Shape, Subject, Task, Text, WeightBytes, kernels, parameters, step_cost,
};
use lowkey::checkpoint::Checkpoint;
use lowkey::decoder;
use lowkey::gpu::{Device, ShaderChecks, WeightType};
use lowkey::kv::{Budget, CacheMethod, Evicted, Reviver};
use lowkey::sequence::SequenceOptions;
use lowkey::{Engine, Error, Result, WeightStorage};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What shaders are checked for.
#[derive(Clone, Copy, ValueEnum)]
enum Checks {
    /// Nothing.
    None,
    /// Every index stays inside its buffer.
    Bounds,
    /// Also that every loop ends and no divisor is zero.
    All,
}

/// Measure prefill and decode speed at given depths.
///
/// Several models are measured in turns, so that a machine that warms up or is used by others
/// treats them alike; with options of the cache each is also measured without them.
#[derive(clap::Args)]
pub struct Args {
    /// Directory, .gguf file, fetched name, or .lowkey file; any number of them.
    #[arg(required_unless_present = "shape", value_name = "MODEL")]
    models: Vec<String>,
    /// Instead of models, shapes of models with random weights, and caches full of random rows:
    /// 15m, 135m, 1b, 3b, 8b.
    #[arg(long, value_delimiter = ',', value_name = "SHAPE,…", conflicts_with_all = ["models", "method", "select"])]
    shape: Vec<Shape>,
    /// Rows of random caches: f16, q4, fast, fast-pairs, fast-heads, small, select, xkv
    /// [default: all but fast-pairs and fast-heads].
    #[arg(long, value_delimiter = ',', value_name = "ROWS,…", requires = "shape")]
    rows: Vec<RandomRows>,
    /// What weights are on a GPU. Of models: stored, f16, q8, q4, as `generate` has it [default:
    /// stored]; of shapes: f16, q4, q4m, q5, q5m, q6, q8, those with an m with minima as Q4_K has
    /// them [default: f16].
    #[arg(long, value_delimiter = ',', value_name = "TYPE,…")]
    weights: Vec<String>,
    /// Time every kernel of a step and of a chunk by the device's own clock.
    #[arg(long, requires = "shape")]
    kernels: bool,
    /// With --kernels: also with other constants than this device gets, one at a time, of rows that
    /// nothing is rebuilt of [default: all].
    #[arg(long, requires = "kernels", value_delimiter = ',', num_args = 0.., require_equals = true, value_name = "WHAT,…", value_parser = PossibleValuesParser::new(kernels::sweeps()))]
    sweep: Option<Vec<String>>,
    /// Tokens in the cache when a measurement starts.
    #[arg(long, value_delimiter = ',', default_value = "0", value_name = "N,…")]
    depth: Vec<usize>,
    /// Tokens prefilled in one measurement.
    #[arg(long, default_value_t = Task::default().prefill, value_name = "N")]
    prefill: usize,
    /// Tokens decoded in one measurement.
    #[arg(long, default_value_t = Task::default().steps, value_name = "N")]
    steps: usize,
    /// Measurements of each model at each depth.
    #[arg(long, default_value_t = Task::default().rounds, value_name = "N")]
    rounds: usize,
    /// Seed of the pseudo-random tokens.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// What one model at one depth may take, about: where it is slow, a shorter prefill is
    /// measured, fewer steps, and fewer rounds. Rows say what was.
    #[arg(long, default_value_t = 20, value_name = "SECONDS")]
    row_time: u64,
    /// What a GPU's kernels are checked for while they run, to see what it costs.
    #[arg(long, value_enum, default_value_t = Checks::Bounds, value_name = "WHAT")]
    shader_checks: Checks,
    /// Begin no measurement later than so many seconds after the start.
    #[arg(long, value_name = "SECONDS")]
    time: Option<u64>,
    /// Write what has been measured so far, after each measurement, into this directory: as JSON,
    /// as a table with llama-bench's columns, and as a picture of speed by depth.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    #[command(flatten)]
    cache: CacheArgs,
}

impl Args {
    pub fn run(self, console: &Console) -> Result<()> {
        let started = Instant::now();
        // Clap does not ask for what is excluded by something else that was given.
        let of_shapes = [("kernels", self.kernels), ("sweep", self.sweep.is_some()), ("rows", !self.rows.is_empty())];
        if let Some((name, _)) = of_shapes.into_iter().find(|(_, given)| *given && self.shape.is_empty()) {
            return Err(Error::Argument { name: name.into(), message: "this is for random models; give --shape in place of a model".into() });
        }
        let report = self.report.as_ref().map(|path| Report::reserve(path, if self.kernels { "kernels" } else { "speed" })).transpose()?;
        let method = self.cache.method()?;
        let row_time = Some(Duration::from_secs(self.row_time));
        let task = Task { depths: self.depth, prefill: self.prefill, steps: self.steps, rounds: self.rounds, seed: self.seed, time: None, row_time };
        let capacity = task.capacity().ok_or_else(too_deep)?;
        let weights = Weights::parse(&self.weights, self.shape.is_empty())?;
        let mut checkpoints = Some(several::open(&self.models)?);
        let engine = console.engine_with(match self.shader_checks {
            Checks::None => ShaderChecks::None,
            Checks::Bounds => ShaderChecks::Bounds,
            Checks::All => ShaderChecks::All,
        })?;
        let run = Run { console, engine: &engine, report, bar: console.bar(), started, time: self.time.map(Duration::from_secs), roofline: None };
        let sweep =
            self.sweep.map_or(Vec::new(), |what| if what.is_empty() { kernels::sweeps().into_iter().map(String::from).collect() } else { what });
        let rows = if self.rows.is_empty() { RandomRows::usual() } else { self.rows };
        let each = |kinds: Vec<WeightType>| self.shape.iter().flat_map(|shape| kinds.iter().map(|kind| (*shape, *kind))).collect::<Vec<_>>();
        match weights {
            Weights::OfModels(storages) => {
                // Each is read once for every type.
                let mut models = Vec::new();
                for (index, storage) in storages.into_iter().enumerate() {
                    let opened = if index == 0 { checkpoints.take() } else { None };
                    let opened = opened.map_or_else(|| several::open(&self.models), Ok)?;
                    models.extend(self.models.iter().cloned().zip(opened).map(|(model, checkpoint)| (model, checkpoint, storage)));
                }
                run.models(&task, models, method, capacity)
            }
            Weights::OfShapes(kinds) if self.kernels => run.kernels(&task, &each(kinds), &rows, sweep),
            Weights::OfShapes(kinds) => run.shapes(&task, &each(kinds), &rows, capacity),
        }
    }
}

/// What weights are to be.
enum Weights {
    OfModels(Vec<WeightStorage>),
    OfShapes(Vec<WeightType>),
}

impl Weights {
    fn parse(names: &[String], models: bool) -> Result<Weights> {
        Ok(match (models, names.is_empty()) {
            (true, true) => Weights::OfModels(vec![WeightStorage::Stored]),
            (true, false) => Weights::OfModels(names.iter().map(|name| name.parse()).collect::<Result<_>>()?),
            (false, true) => Weights::OfShapes(vec![WeightType::F16]),
            (false, false) => Weights::OfShapes(names.iter().map(|name| name.parse()).collect::<Result<_>>()?),
        })
    }
}

/// One call of the command.
struct Run<'a> {
    console: &'a Console,
    engine: &'a Engine,
    report: Option<Report>,
    bar: Bar,
    started: Instant,
    time: Option<Duration>,
    roofline: Option<Roofline>,
}

/// A kind of rows, how many frequency pairs rotate in each, and a sequence of them.
type Filled = (RandomRows, Vec<usize>, Text);

impl Run<'_> {
    /// The device's ceilings: measured once.
    fn roofline(&mut self) -> Result<Roofline> {
        if let Some(roofline) = self.roofline {
            return Ok(roofline);
        }
        self.bar.show("roofline", 0, None)?;
        Ok(*self.roofline.insert(self.engine.roofline()?))
    }

    /// What is left of the time there is.
    fn left(&self) -> Option<Duration> {
        self.time.map(|time| time.saturating_sub(self.started.elapsed()))
    }

    fn models(mut self, task: &Task, models: Vec<(String, Checkpoint, WeightStorage)>, method: CacheMethod, capacity: usize) -> Result<()> {
        let mut subjects = Vec::new();
        for (model, checkpoint, storage) in models {
            self.bar.show("load", 0, None)?;
            let loaded = self.engine.clone().with_weights(storage)?.load_telling(checkpoint, &mut |progress| self.bar.report(progress))?;
            if let Some(remark) = untrained(&model, loaded.checkpoint(), capacity) {
                self.console.remark(&format!("{remark}, though the speed is true"));
            }
            let mut methods = vec![CacheMethod::default(), method.reading_all(), method];
            methods.dedup();
            for method in methods {
                let options = SequenceOptions { capacity, method, ..SequenceOptions::default() };
                let made = RowsMade::of(loaded.checkpoint())?;
                subjects.push(Subject {
                    model: model.clone(),
                    method: method.name().unwrap_or(loaded.method()).into(),
                    layout: method.layout(&loaded.layout()),
                    weights: loaded.weight_type(),
                    parameters: parameters(loaded.checkpoint().config()),
                    weight_bytes: loaded.weight_bytes().all(loaded.checkpoint().config()),
                    vocab: loaded.checkpoint().config().vocab_size,
                    cost: Box::new(step_cost(loaded.checkpoint().config(), options, made, loaded.weight_bytes())),
                    text: Text::Read(Box::new(loaded.sequence(options).map_err(name_depth)?)),
                });
            }
        }
        let rows = self.measure(task, &mut subjects, &[])?;
        self.bar.hide();
        subjects.iter().filter_map(|subject| subject.text.sequence().remark()).for_each(|remark| self.console.remark(&remark));
        self.speed(&rows)
    }

    /// The rows of `subjects` behind those of `before`.
    fn measure(&mut self, task: &Task, subjects: &mut [Subject], before: &[Row]) -> Result<Vec<Row>> {
        let (roofline, time) = (self.roofline()?, self.left());
        let all = |rows: &[Row]| [before, rows].concat();
        let written = |rows: &[Row]| match &self.report {
            Some(report) => {
                let rows = all(rows);
                let speed = speed(self.engine, roofline, &rows);
                report.write(&speed, &speed_page(&speed), picture(&rows)?.as_ref())
            }
            None => Ok(()),
        };
        let task = Task { time, ..task.clone() };
        let bar = &mut self.bar;
        bench::run(&task, subjects, &roofline, &mut |rows| written(rows), &mut |progress| bar.report(progress)).map(|rows| all(&rows))
    }

    fn speed(mut self, rows: &[Row]) -> Result<()> {
        let roofline = self.roofline()?;
        let Run { console, engine, bar, .. } = self;
        drop(bar);
        console.result(&speed(engine, roofline, rows), |speed| speed_text(speed, table))
    }

    fn gpu(&self) -> Result<Arc<Device>> {
        let message = "random models are made on a GPU; give --device gpu for any graphics driver, or name a model".to_owned();
        self.engine.gpu().cloned().ok_or_else(|| Error::Argument { name: "shape".into(), message })
    }

    /// A random model of every shape that fits, for `each`.
    fn random(&mut self, shapes: &[(Shape, WeightType)], mut each: impl FnMut(&mut Self, Shape, Arc<decoder::Model>) -> Result<()>) -> Result<()> {
        let device = self.gpu()?;
        self.roofline()?;
        for &(shape, weights) in shapes {
            if self.left().is_some_and(|left| left.is_zero()) {
                self.console.remark(&format!("{}: there was no time left", shape.name()));
                continue;
            }
            self.bar.show("fill", 0, None)?;
            match decoder::Model::random(&shape.config(), weights, device.clone(), 1) {
                Ok(model) => each(self, shape, Arc::new(model))?,
                Err(error @ Error::OutOfMemory { .. }) => self.unfit(shape, "weights", &error),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn unfit(&self, shape: Shape, what: &str, error: &Error) {
        self.console.remark(&format!("{}, {what}: left out: {error}", shape.name()));
    }

    /// A sequence of every kind of `rows` that fits, with the frequency pairs in which the means of
    /// its rows rotate.
    fn sequences(&mut self, shape: Shape, model: &Arc<decoder::Model>, rows: &[RandomRows], capacity: usize) -> Result<Vec<Filled>> {
        let mut sequences = Vec::new();
        for &rows in rows {
            self.bar.show("fill", 0, None)?;
            let options = SequenceOptions { capacity, method: CacheMethod::Calibrated(rows.read()), ..SequenceOptions::default() };
            let set = rows.rows(model.config());
            let mean_pairs = set.as_ref().map_or(Vec::new(), |set| set.mean_pairs(model.config().head_dim));
            match model.random_sequence(set.as_ref(), options, 2) {
                Ok(sequence) => sequences.push((rows, mean_pairs, Text::Random(Box::new(sequence)))),
                Err(error @ Error::OutOfMemory { .. }) => self.unfit(shape, rows.name(), &error),
                Err(error) => return Err(name_depth(error)),
            }
        }
        Ok(sequences)
    }

    fn shapes(mut self, task: &Task, shapes: &[(Shape, WeightType)], rows: &[RandomRows], capacity: usize) -> Result<()> {
        let mut all: Vec<Row> = Vec::new();
        self.random(shapes, |run, shape, model| {
            let subject = |(rows, mean_pairs, text): Filled| {
                let config = model.config().clone();
                let bytes = WeightBytes { matrices: model.matrix_bytes(), embedding: model.embedding_bytes(), number: 2 };
                Subject {
                    model: shape.name().into(),
                    method: rows.method().into(),
                    layout: rows.name().into(),
                    weights: model.weight_type(),
                    parameters: parameters(&config),
                    weight_bytes: bytes.all(&config),
                    vocab: config.vocab_size,
                    cost: Box::new(move |sequence| Cost::of(&config, (sequence.rows(), &mean_pairs), rows.read(), bytes)),
                    text,
                }
            };
            let mut subjects: Vec<Subject> = run.sequences(shape, &model, rows, capacity)?.into_iter().map(subject).collect();
            all = run.measure(task, &mut subjects, &all)?;
            Ok(())
        })?;
        self.speed(&all)
    }

    fn kernels(mut self, task: &Task, shapes: &[(Shape, WeightType)], rows: &[RandomRows], sweep: Vec<String>) -> Result<()> {
        const EVICTING: usize = 256;
        let mut task = kernels::Task { depths: task.depths.clone(), chunk: task.prefill, sweep, time: None };
        let deepest = task.depths.iter().copied().max().unwrap_or(0);
        let capacity = deepest.checked_add(task.room()).ok_or_else(too_deep)?;
        let device = self.gpu()?;
        let launch_us = kernels::launch_us(&device)?;
        let mut all: Vec<kernels::Row> = Vec::new();
        self.random(shapes, |run, shape, model| {
            let (roofline, config) = (run.roofline()?, model.config());
            let name = match model.weight_type().as_str() {
                "f16" => shape.name().to_string(),
                weights => format!("{} {weights}", shape.name()),
            };
            let subject = |rows: &str, text: Text, deepest: usize| kernels::Subject {
                model: name.clone(),
                rows: rows.into(),
                vocab: config.vocab_size,
                text,
                deepest,
            };
            let mut subjects: Vec<_> =
                run.sequences(shape, &model, rows, capacity)?.into_iter().map(|(rows, _, text)| subject(rows.name(), text, deepest)).collect();
            // What a sequence that evicts has beside its rows has to be read: few tokens will do.
            let method = CacheMethod::Evict(Reviver::new(Budget::Keep(0.25), Some(Evicted::None)));
            let read = deepest.min(EVICTING);
            let capacity = (read + task.room()).max(EVICTING);
            let evicting = model.sequence(SequenceOptions { capacity, method, ..SequenceOptions::default() })?;
            subjects.push(subject("kvreviver", Text::Read(Box::new(evicting)), read));
            let mut before = all.clone();
            if rows.contains(&RandomRows::Xkv) {
                let width = 4.min(config.num_hidden_layers) * config.num_key_value_heads * config.head_dim;
                before.extend(kernels::moments(&device, &name, width, task.chunk, &roofline)?);
            }
            let written = |rows: &[kernels::Row]| match &run.report {
                Some(report) => {
                    let rows = [&before, rows].concat();
                    let kernels = kernels_of(run.engine, roofline, launch_us, &rows);
                    report.write(&kernels, &kernels_text(&kernels, markdown), None)
                }
                None => Ok(()),
            };
            task.time = run.left();
            let bar = &mut run.bar;
            let rows = kernels::run(&task, &device, &mut subjects, &roofline, &mut |rows| written(rows), &mut |progress| bar.report(progress))?;
            all = [before, rows].concat();
            Ok(())
        })?;
        let roofline = self.roofline()?;
        let Run { console, engine, bar, .. } = self;
        drop(bar);
        console.result(&kernels_of(engine, roofline, launch_us, &all), |kernels| kernels_text(kernels, table))
    }
}

fn picture(rows: &[Row]) -> Result<Option<Picture>> {
    let caption = "Tokens decoded per second by tokens in the cache".to_owned();
    Ok(bench::chart(rows)?.map(|svg| Picture { svg, caption }))
}

fn too_deep() -> Error {
    Error::Argument { name: "depth".into(), message: "more tokens than can be counted".into() }
}

/// A context that cannot be is here one that a depth asked for.
fn name_depth(error: Error) -> Error {
    match error {
        Error::Argument { name, message } if name == "context" => Error::Argument { name: "depth".into(), message },
        error => error,
    }
}
