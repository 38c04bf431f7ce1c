//! Factors a checkpoint's attention projections so that less has to be cached for a token. One file for each published method.
//!
//! [`run`] takes a dense checkpoint, [`Statistics`] of it, and a [`Plan`] (method and budget, resolved), and writes a factored checkpoint. Everything is solved in f64,
//! layer by layer, all cores at once. Nothing here knows a GPU.

mod basis;
pub mod eigen;
mod factored;
pub mod kqsvd;
pub mod ksvd;
mod low_rank;
pub mod palu;
mod plan;
mod ranks;
pub mod recalkv;

pub use basis::{Basis, Roots, about};
pub use factored::Float;
pub use plan::{Method, Plan};
pub use ranks::{Part, Ranks};

use crate::calibrate::{Statistics, source_digest};
use crate::checkpoint::{Checkpoint, Factored};
use crate::progress::{OnProgress, report};
use crate::{Error, Result};
use factored::MadeTensors;
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What [`run`] did.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Report {
    /// The directory written.
    pub output: PathBuf,
    /// The method's name.
    pub method: &'static str,
    /// The kept fraction asked for.
    pub keep: f64,
    /// The kept fraction achieved.
    pub achieved_keep: f64,
    /// Bytes that a token adds to a cache of f16 rows.
    pub kv_bytes_per_token: u64,
    /// The same for the dense model.
    pub kv_bytes_per_token_dense: u64,
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
    /// Writing the checkpoint.
    pub write: f64,
}

/// Factors `checkpoint` as `plan` says and writes it, with its weights as `float`, to the new directory `output`.
///
/// # Errors
/// [`Error::Exists`] where `output` is taken, [`Error::Argument`] where the statistics or the plan are another model's or the checkpoint is factored already,
/// [`Error::Numeric`] where the numbers do not allow it, [`Error::Interrupted`] where `on_progress` says so, and those of reading and writing. Nothing is left
/// behind then.
pub fn run(
    checkpoint: &Checkpoint,
    plan: &Plan,
    statistics: &Statistics,
    float: Float,
    output: &Path,
    on_progress: OnProgress<'_>,
) -> Result<Report> {
    let mut seconds = Seconds::default();
    let mut clock = Instant::now();
    let mut lap = || std::mem::replace(&mut clock, Instant::now()).elapsed().as_secs_f64();

    if output.symlink_metadata().is_ok() {
        return Err(Error::Exists { path: output.into() });
    }
    if checkpoint.factored().is_some() {
        let message = format!("{} is factored already; compress the checkpoint it was made from", checkpoint.path().display());
        return Err(Error::Argument { name: "model".into(), message });
    }
    let config = checkpoint.config();
    plan.check(config)?;
    // What is written stands alone: it needs a tokenizer that works.
    checkpoint.tokenizer()?;
    let source = source_digest(checkpoint)?;
    statistics.check(checkpoint, &source)?;
    seconds.check = lap();

    let mut made = MadeTensors::new();
    let layers: Vec<usize> = (0..plan.layers().len()).collect();
    report(on_progress, "factor", 0, layers.len())?;
    for some in layers.chunks(rayon::current_num_threads()) {
        let factored: Vec<_> = some
            .par_iter()
            .map(|&layer| match plan.method() {
                Method::ReCalKv => recalkv::factor(checkpoint, layer, &plan.layers()[layer], &statistics.attention_inputs[layer]),
            })
            .collect::<Result<_>>()?;
        for (layer, tensors) in some.iter().zip(factored) {
            made.extend(tensors.into_iter().map(|(part, shape, numbers)| (format!("model.layers.{layer}.self_attn.{part}"), (shape, numbers))));
        }
        report(on_progress, "factor", some[some.len() - 1] + 1, layers.len())?;
    }
    seconds.factor = lap();

    let factored = Factored {
        format: Factored::FORMAT,
        method: plan.method().name().into(),
        keep: plan.keep(),
        achieved_keep: plan.achieved_keep(config),
        kv_bytes_per_token: plan.kv_bytes_per_token(),
        calibration_digest: statistics.text.clone(),
        source_digest: source,
        layers: plan.layers().to_vec(),
    };
    factored::write(checkpoint, &factored, &made, float, output, on_progress)?;
    seconds.write = lap();

    Ok(Report {
        output: output.into(),
        method: plan.method().name(),
        keep: plan.keep(),
        achieved_keep: factored.achieved_keep,
        kv_bytes_per_token: factored.kv_bytes_per_token,
        kv_bytes_per_token_dense: config.dense_kv_bytes_per_token(),
        seconds,
        peak_rss_bytes: peak_rss_bytes(),
    })
}

/// The high-water mark of this process's resident memory, as Linux tells it.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.trim().strip_suffix(" kB")?;
    Some(kilobytes.trim().parse::<u64>().ok()? * 1024)
}
