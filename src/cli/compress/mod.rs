//! `lowkey compress`: calibrate, factor, write.

mod calibration;
mod method;

use super::console::Console;
use super::locate::locate;
use super::size::Size;
use super::table::{bytes, multiply_adds};
use clap::ValueEnum;
use lowkey::calibrate;
use lowkey::checkpoint::{ADAPTER, Checkpoint, Config};
use lowkey::compress::{self, LowKey, Method, Output, Plan, Ranks, Sensing};
use lowkey::kv::Exact;
use lowkey::{Error, Result};
use method::{MethodArgs, flag};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Make a model's cache smaller.
///
/// Text runs through the model once, on the processor, to see what its keys and values need; then
/// they are factored. What is written is an adapter file, to be given in the model's place: it has
/// what was made, and goes with the model as it is.
#[derive(clap::Args)]
pub struct Args {
    /// Directory, .gguf file, or fetched name of a dense model.
    model: String,
    /// The file to write, `.lowkey` being appended where its name does not end so; with
    /// --standalone, the directory. It must not exist.
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Write a directory with the whole model in it, tokenizer and all, which needs the original no
    /// more.
    #[arg(long)]
    standalone: bool,
    #[command(flatten)]
    method: MethodArgs,
    /// Tokens at the start of a text that stay exact (OSCAR's paper: 64).
    #[arg(long, value_name = "N", default_value_t = Exact::default().sinks)]
    sinks: usize,
    /// Newest tokens that stay exact, at least (OSCAR's paper: 256).
    #[arg(long, value_name = "N", default_value_t = Exact::default().recent)]
    recent: usize,
    /// Text to calibrate with, in place of the built-in one; the more like what the model will
    /// read, the better. Any number of files, or `self` for text that the model writes itself.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    calibration: Vec<PathBuf>,
    /// Use no more than this many tokens of it, rounded up to whole windows; the model itself
    /// writes 16384 where nothing else is asked.
    #[arg(long, value_name = "N")]
    calibration_tokens: Option<usize>,
    /// Tokens of the longest windows that it is read in; others have 512 and what lies between.
    /// Long ones take more memory, and show what a long context needs [default: 4096].
    #[arg(long, value_name = "N")]
    calibration_window: Option<usize>,
    /// How it is found out what a disturbance of keys and values does to the output, where the
    /// method or its ranks ask for that; with --statistics for any method that calibrates [default:
    /// full where it is asked for, else none].
    #[arg(long)]
    sensitivity: Option<Sensitivity>,
    /// Refuse a calibration that needs more memory than this: `6G`, `512M`.
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// Where calibration's result is kept: read where the file exists, written where it does not.
    #[arg(long, value_name = "FILE")]
    statistics: Option<PathBuf>,
    /// How numbers are written.
    #[arg(long, default_value = "f16")]
    weights: Float,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Sensitivity {
    /// Not at all.
    None,
    /// As one number for each layer's keys and values, from passes with noise added to them.
    Scalar,
    /// In every direction, from the gradient of the loss.
    Full,
}

#[derive(Clone, Copy, ValueEnum)]
enum Float {
    F16,
    F32,
}

/// The report of [`compress::run`], with the time that came before it.
#[derive(Serialize)]
struct Report {
    output: PathBuf,
    method: &'static str,
    options: String,
    kv_bytes_per_token: u64,
    kv_bytes_per_token_dense: u64,
    flops_per_cached_token: u64,
    flops_per_cached_token_dense: u64,
    #[serde(skip)]
    layers: usize,
    seconds: Seconds,
    peak_rss_bytes: Option<u64>,
}

#[derive(Serialize)]
struct Seconds {
    /// Loading the model and running text through it, or reading its statistics.
    calibrate: f64,
    #[serde(flatten)]
    stages: Option<calibrate::Seconds>,
    #[serde(flatten)]
    compress: compress::Seconds,
}

impl Args {
    pub fn run(self, console: &Console) -> Result<()> {
        let path = locate(&self.model)?;
        // Before calibration rather than after.
        let output = self.output();
        if output.path.symlink_metadata().is_ok() {
            return Err(Error::Exists { path: output.path });
        }
        parent_exists(&output.path)?;
        let known = self.statistics.as_ref().is_some_and(|file| file.exists());
        if let Some(file) = self.statistics.as_ref().filter(|_| !known) {
            parent_exists(file)?;
        }
        if self.calibration_tokens == Some(0) {
            return Err(Error::Argument { name: "calibration-tokens".into(), message: "none is too few; ask for at least one".into() });
        }
        let checkpoint = Checkpoint::open(&path)?;
        checkpoint.remarks().iter().for_each(|remark| console.remark(remark));
        if checkpoint.factored().is_some() {
            let message = format!("{} has been compressed already; give the checkpoint that it was made from", path.display());
            return Err(Error::Argument { name: "MODEL".into(), message });
        }
        let plan = self.plan(checkpoint.config())?;
        plan.check(checkpoint.config()).map_err(flag)?;
        let short = match self.sensitivity {
            Some(Sensitivity::None) if plan.method.weighs() => Some("weighs what it leaves out; choose full or scalar"),
            Some(Sensitivity::Scalar) if plan.method.ranks() == Some(Ranks::Fisher) => {
                Some("deals out ranks by Fisher information, which only full has; choose that")
            }
            _ => None,
        };
        if let Some(short) = short {
            let message = format!("{} {short}, or other --ranks for a published method", plan.method.name());
            return Err(Error::Argument { name: "sensitivity".into(), message });
        }

        let start = Instant::now();
        let (statistics, stages) = match &self.statistics {
            _ if !plan.method.calibrates() => (None, None),
            Some(file) if known => (Some(self.reuse(file, checkpoint.config(), console)?), None),
            file => {
                let (statistics, seconds) = self.gather(&checkpoint, &plan, console)?;
                if let Some(file) = file {
                    statistics.save(file)?;
                }
                (Some(statistics), Some(seconds))
            }
        };
        let calibrate = start.elapsed().as_secs_f64();
        let mut bar = console.bar();
        let done = compress::run(&checkpoint, &plan, statistics.as_ref(), &output, &mut |progress| bar.report(progress)).map_err(flag)?;
        drop(bar);
        if !self.standalone && Checkpoint::open(&output.path).is_err() {
            let (file, model) = (output.path.display(), &self.model);
            console.remark(&format!("{file} does not find its model, which is neither beside it nor fetched: name both, `{model} --adapter {file}`"));
        }
        let report = Report {
            output: done.output,
            method: done.method,
            options: done.options,
            kv_bytes_per_token: done.kv_bytes_per_token,
            kv_bytes_per_token_dense: done.kv_bytes_per_token_dense,
            flops_per_cached_token: done.flops_per_cached_token,
            flops_per_cached_token_dense: done.flops_per_cached_token_dense,
            layers: checkpoint.config().num_hidden_layers,
            seconds: Seconds { calibrate, stages, compress: done.seconds },
            peak_rss_bytes: done.peak_rss_bytes,
        };
        console.result(&report, text)
    }

    /// What to write, and where.
    fn output(&self) -> Output {
        let float = match self.weights {
            Float::F16 => compress::Float::F16,
            Float::F32 => compress::Float::F32,
        };
        if self.standalone {
            return Output { float, ..Output::standalone(&self.output) };
        }
        let mut path = self.output.clone().into_os_string();
        if self.output.extension().is_none_or(|extension| extension != ADAPTER) {
            path.push(format!(".{ADAPTER}"));
        }
        Output { float, ..Output::adapter(path) }
    }

    /// What the options ask for. Refuses, by its name, an option that is given and would change
    /// nothing.
    fn plan(&self, config: &Config) -> Result<Plan> {
        let (mut method, mut left) = self.method.method(config)?;
        if let (Method::LowKey(LowKey { sensing, .. }), Some(Sensitivity::Scalar)) = (&mut method, self.sensitivity) {
            *sensing = Sensing::Scalar;
        }
        // Statistics that are kept serve other methods as well: there may be more in them than this
        // one asks for.
        let kept = self.statistics.is_some() && method.calibrates();
        left.span = left.span.filter(|_| !kept);
        let weighs = method.weighs() || self.sensitivity == Some(Sensitivity::None) && method.calibrates();
        let unweighed = (self.sensitivity.is_some() && !weighs && !kept).then_some(UNWEIGHED);
        match left.left_over().or(self.vain_calibration(&method)).or(unweighed) {
            Some((option, why)) => {
                let message = format!("{why}; leave it out, or choose another --method than {}", method.name());
                Err(Error::Argument { name: option.into(), message })
            }
            None => Ok(Plan { method, exact: Exact { sinks: self.sinks, recent: self.recent } }),
        }
    }

    /// An option of calibration that is given, where the method needs none.
    fn vain_calibration(&self, method: &Method) -> Option<(&'static str, &'static str)> {
        let options = [
            ("calibration", !self.calibration.is_empty()),
            ("calibration-tokens", self.calibration_tokens.is_some()),
            ("calibration-window", self.calibration_window.is_some()),
            ("statistics", self.statistics.is_some()),
            ("memory", self.memory.is_some()),
        ];
        let (name, _) = options.into_iter().find(|(_, given)| *given && !method.calibrates())?;
        Some((name, "this method needs no calibration"))
    }
}

/// Why --sensitivity is refused.
const UNWEIGHED: (&str, &str) = ("sensitivity", "by this method and these ranks nothing is weighed");

/// Refuses a file that could not be made for want of its directory.
fn parent_exists(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) if parent != Path::new("") && !parent.is_dir() => {
            let source = std::io::Error::new(std::io::ErrorKind::NotFound, format!("there is no directory {}", parent.display()));
            Err(Error::Io { action: "create", path: path.into(), source })
        }
        _ => Ok(()),
    }
}

fn text(report: &Report) -> String {
    let times = report.kv_bytes_per_token_dense as f64 / report.kv_bytes_per_token.max(1) as f64;
    let Seconds { calibrate, compress, .. } = &report.seconds;
    let memory = report.peak_rss_bytes.map_or(String::new(), |peak| format!(", {} of memory", bytes(peak)));
    format!(
        "{}\n{} ({}): {} bytes of cache per token, {times:.2} times smaller than {}\n{}\n{:.1} s (calibrate {calibrate:.1}, factor {:.1}, write {:.1}){memory}\n",
        report.output.display(),
        report.method,
        report.options,
        report.kv_bytes_per_token,
        report.kv_bytes_per_token_dense,
        multiply_adds(report.layers, report.flops_per_cached_token, report.flops_per_cached_token_dense),
        calibrate + compress.check + compress.factor + compress.write,
        compress.factor,
        compress.write,
    )
}
