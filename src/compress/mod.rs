//! Makes the bases in which a checkpoint's keys and values are cached. One file for each method.
//!
//! [`factor`] takes a dense checkpoint, [`Statistics`] of it, and a [`Plan`] (method, budget,
//! options), and answers with the latents and their bases; [`run`] writes them, as an adapter file
//! or with the whole model. A method answers with [`Basis`]es, whose coordinates are sorted by what
//! they cost to leave out; the bits that they get are the plan's. Everything is solved in f64, all
//! cores at once. Nothing here knows a GPU.

mod adapter;
mod bands;
mod basis;
mod coder;
mod dense;
pub mod eigen;
pub mod kivi;
pub mod kqsvd;
pub mod ksvd;
pub mod kvarn;
pub mod lowkey;
mod method;
pub mod oscar;
pub mod palu;
mod plan;
mod positions;
mod ranks;
pub mod recalkv;
mod scales;
mod standalone;
mod tensors;
mod unit;
pub mod xkv;

pub use crate::kv::Budget;
pub use basis::{Basis, Roots, about};
pub use dense::rotated;
pub use method::{Grouping, Layout, LowKey, LowRank, Method, Palu, ReCalKv, Scales, Sensing};
pub use plan::Plan;
pub use ranks::{Part, Ranks};
pub use tensors::Float;
pub use xkv::Solver;

use crate::calibrate::{Statistics, source_digest};
use crate::checkpoint::{Checkpoint, Factored, Source};
use crate::kv::{Band, Exact, Format, LatentSet, Price, RUN, Scale};
use crate::machine::peak_memory;
use crate::task::{OnProgress, report};
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;
use tensors::MadeTensors;
use unit::{Context, Unit};

/// What [`run`] is to write, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The new file or directory.
    pub path: PathBuf,
    /// Which of them.
    pub form: Form,
    /// How its numbers are stored.
    pub float: Float,
}

/// The forms in which what was made is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Form {
    /// An adapter file, opened beside the model; by its name, which must end with `.lowkey` to be
    /// opened alone.
    #[default]
    Adapter,
    /// A directory that stands alone: the whole model, its tokenizer too.
    Standalone,
}

impl Output {
    /// An adapter file with numbers in f16.
    pub fn adapter(path: impl Into<PathBuf>) -> Output {
        Output { path: path.into(), form: Form::Adapter, float: Float::F16 }
    }

    /// A directory that stands alone, with numbers in f16.
    pub fn standalone(path: impl Into<PathBuf>) -> Output {
        Output { form: Form::Standalone, ..Output::adapter(path) }
    }
}

/// What [`run`] did.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Report {
    /// The adapter file or directory written.
    pub output: PathBuf,
    /// The method's name.
    pub method: &'static str,
    /// Its options in words.
    pub options: String,
    /// Bytes that a token adds to the cache.
    pub kv_bytes_per_token: u64,
    /// The same for the dense model's f16 cache.
    pub kv_bytes_per_token_dense: u64,
    /// Operations that reading a cached token costs a decode step, over all layers.
    ///
    /// A multiplication and an addition are two.
    pub flops_per_cached_token: u64,
    /// The same for the dense model.
    pub flops_per_cached_token_dense: u64,
    /// Time spent.
    pub seconds: Seconds,
    /// The most memory that this process has held, in bytes; `None` where the system does not tell.
    pub peak_rss_bytes: Option<u64>,
}

/// Wall-clock seconds by stage.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Seconds {
    /// Digest of the source, and checks.
    pub check: f64,
    /// Solving for the factors.
    pub factor: f64,
    /// Writing it.
    pub write: f64,
}

/// What [`factor`] makes.
pub struct Made {
    /// The latents and their bases.
    pub rows: LatentSet,
    /// Tensors that replace the checkpoint's, where the method reorders heads: shape and numbers by
    /// name.
    pub(crate) tensors: MadeTensors,
}

/// Makes the rows of `checkpoint` that `plan` asks for.
///
/// `statistics` may be absent where the method needs none.
///
/// # Errors
/// [`Error::Argument`] where the plan or the statistics do not fit the model, [`Error::Numeric`]
/// where the numbers do not allow it, [`Error::Interrupted`] where `on_progress` says so, and those
/// of reading.
pub fn factor(checkpoint: &Checkpoint, plan: &Plan, statistics: Option<&Statistics>, on_progress: OnProgress<'_>) -> Result<Made> {
    let (config, exact) = (checkpoint.config(), plan.exact);
    plan.check(config)?;
    let as_it_is = |rows| Ok(Made { rows, tensors: MadeTensors::new() });
    let context = || {
        let message = || format!("{} needs statistics of the model; calibrate first", plan.method.name());
        let statistics = statistics.ok_or_else(|| Error::Argument { name: "statistics".into(), message: message() })?;
        Ok::<_, Error>(Context { checkpoint, statistics, heads: config.num_key_value_heads, head_dim: config.head_dim })
    };
    match &plan.method {
        Method::Dense { bits } => {
            let mut rows = rotated(config, *bits, exact);
            dense::about_biases(&mut rows, checkpoint)?;
            as_it_is(rows)
        }
        Method::Kivi { bits } => as_it_is(kivi::rows(config, *bits, exact)),
        Method::KVarN { key_bits, value_bits } => as_it_is(kvarn::rows(config, [*key_bits, *value_bits], exact)),
        Method::Oscar { bits } => as_it_is(oscar::rows(&context()?, *bits, exact)?),
        Method::LowKey(options) => {
            let context = context()?;
            let solver = lowkey::Solver::new(&context, *options);
            let span = if let Layout::Small { span } = options.layout { span } else { 1 };
            let solved = solved(config.num_hidden_layers, span, &|layers| Ok((solver.units(layers)?, MadeTensors::new())), on_progress)?;
            let formats = solver.formats(&solved.0)?;
            Ok(made(solved, formats, exact))
        }
        Method::Palu(Palu { group_heads, .. }) => {
            low_rank(plan, &context()?, &|context, layer| palu::units(context, *group_heads, layer).map(kept), on_progress)
        }
        Method::ReCalKv(options) => low_rank(plan, &context()?, &|context, layer| recalkv::units(context, options, layer), on_progress),
        Method::KqSvd(_) => low_rank(plan, &context()?, &|context, layer| kqsvd::units(context, layer).map(kept), on_progress),
        Method::KSvd(_) => low_rank(plan, &context()?, &|context, layer| ksvd::units(context, layer).map(kept), on_progress),
        Method::Eigen(_) => low_rank(plan, &context()?, &|context, layer| eigen::units(context, layer).map(kept), on_progress),
    }
}

/// Rows without formats, and tensors that replace the checkpoint's.
type Solved = (Vec<Unit>, MadeTensors);

/// What leaves the checkpoint's tensors as they are.
fn kept(units: Vec<Unit>) -> Solved {
    (units, MadeTensors::new())
}

/// Solves for the rows of all `layers`, `span` of them together, all cores at once.
fn solved(layers: usize, span: usize, units: &(dyn Fn(Range<usize>) -> Result<Solved> + Sync), on_progress: OnProgress<'_>) -> Result<Solved> {
    let spans: Vec<Range<usize>> = (0..layers).step_by(span).map(|first| first..(first + span).min(layers)).collect();
    let (mut all, mut tensors) = kept(Vec::new());
    report(on_progress, "factor", 0, layers)?;
    for some in spans.chunks(rayon::current_num_threads()) {
        let made: Vec<Solved> = some.par_iter().map(|span| units(span.clone())).collect::<Result<_>>()?;
        for (more, replaced) in made {
            all.extend(more);
            tensors.extend(replaced);
        }
        report(on_progress, "factor", some[some.len() - 1].end, layers)?;
    }
    Ok((all, tensors))
}

/// Rows packed as `formats`.
fn made((units, tensors): Solved, formats: Vec<Format>, exact: Exact) -> Made {
    let coders = units.par_iter().zip(&formats).map(|(unit, format)| coder::coder(&unit.basis, format)).collect();
    let specs = units.iter().zip(formats).map(|(unit, format)| unit.spec(format)).collect();
    Made { rows: LatentSet { specs, coders, exact }, tensors }
}

/// What a published low-rank method makes, layer by layer.
fn low_rank(plan: &Plan, context: &Context, units: &(dyn Fn(&Context, usize) -> Result<Solved> + Sync), on_progress: OnProgress<'_>) -> Result<Made> {
    let solved = solved(context.checkpoint.config().num_hidden_layers, 1, &|layers| units(context, layers.start), on_progress)?;
    let formats = dealt(&plan.method, context, &solved.0)?;
    Ok(made(solved, formats, plan.exact))
}

/// Rows of one band: a rank for each by the method's rule, so that together they keep the budget's
/// share of all numbers, and as many bits for every coordinate.
fn dealt(method: &Method, context: &Context, units: &[Unit]) -> Result<Vec<Format>> {
    let (LowRank { budget, bits, .. }, rule) = (method.low_rank().unwrap_or_default(), method.ranks().unwrap_or_default());
    let parts: Vec<Part> = units.iter().map(|unit| unit.part(context, rule)).collect::<Result<_>>()?;
    let (keep, numbers) = (context.keep(budget)?, parts.iter().map(|part| part.width).sum::<usize>());
    // All is all, also where the last run of a row is not full.
    let ranks = rule.deal(&parts, if keep >= 1.0 { usize::MAX } else { (keep * numbers as f64).round() as usize })?;
    let scale = if bits < 16 { Scale::Affine } else { Scale::Fixed };
    Ok(ranks.into_iter().map(|rank| Format { bands: vec![Band { bits, runs: rank / RUN }], scale }).collect())
}

/// Makes the rows of `checkpoint` as `plan` says and writes them.
///
/// # Errors
/// [`Error::Exists`] where `output.path` is taken, [`Error::Argument`] where the statistics or the
/// plan are another model's or the checkpoint is factored already, and those of [`factor`], of
/// reading and of writing. Nothing is left behind then.
pub fn run(checkpoint: &Checkpoint, plan: &Plan, statistics: Option<&Statistics>, output: &Output, on_progress: OnProgress<'_>) -> Result<Report> {
    let mut seconds = Seconds::default();
    let mut clock = Instant::now();
    let mut lap = || std::mem::replace(&mut clock, Instant::now()).elapsed().as_secs_f64();

    if output.path.symlink_metadata().is_ok() {
        return Err(Error::Exists { path: output.path.clone() });
    }
    if checkpoint.factored().is_some() {
        let message = format!("{} is factored already; compress the checkpoint it was made from", checkpoint.path().display());
        return Err(Error::Argument { name: "model".into(), message });
    }
    if output.form == Form::Standalone {
        // It needs a tokenizer that works.
        checkpoint.tokenizer()?;
    }
    let source = source_digest(checkpoint)?;
    if let Some(statistics) = statistics {
        statistics.check(checkpoint, &source)?;
    }
    seconds.check = lap();

    let made = factor(checkpoint, plan, statistics, on_progress)?;
    seconds.factor = lap();

    let factored = Factored {
        format: Factored::FORMAT,
        method: plan.method.name().into(),
        options: plan.method.options(),
        kv_bytes_per_token: LatentSet::bytes_per_token(&made.rows.specs),
        calibration_digest: statistics.map_or(String::new(), |statistics| statistics.text.clone()),
        source_digest: source,
        exact: plan.exact,
        context: plan.context(),
        rows: made.rows.specs.clone(),
        source: Some(Source::of(checkpoint)),
    };
    match output.form {
        Form::Adapter => adapter::write(&factored, &made, checkpoint.config().head_dim, output, on_progress)?,
        Form::Standalone => standalone::write(checkpoint, &factored, &made, output, on_progress)?,
    }
    seconds.write = lap();

    let geometry = checkpoint.config().geometry();

    Ok(Report {
        output: output.path.clone(),
        method: plan.method.name(),
        options: factored.options,
        kv_bytes_per_token: factored.kv_bytes_per_token,
        kv_bytes_per_token_dense: checkpoint.config().dense_kv_bytes_per_token(),
        flops_per_cached_token: Price::of(&made.rows.specs, &made.rows.mean_pairs(geometry.head_dim), &geometry).flops_per_cached_token,
        flops_per_cached_token_dense: Price::of(&[], &[], &geometry).flops_per_cached_token,
        seconds,
        peak_rss_bytes: peak_memory(),
    })
}
