//! `lowkey compress`: calibrate, factor, write.

mod calibration;

use super::console::Console;
use super::locate::locate;
use super::table::bytes;
use clap::ValueEnum;
use lowkey::calibrate;
use lowkey::checkpoint::{ADAPTER, Checkpoint, Config};
use lowkey::compress::{self, Budget, Method, Output, Plan, Ranks, Sensing};
use lowkey::rows::Exact;
use lowkey::{Error, Result};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Make a model's cache smaller.
///
/// Text runs through the model once, on the processor, to see what its keys and values need; then they are factored. What is written is an adapter file, to be given in the model's place: it has
/// what was made, and goes with the model as it is.
#[derive(clap::Args)]
pub struct Args {
    /// Directory, .gguf file, or fetched name of a dense model.
    model: String,
    /// The file to write, `.lowkey` being appended where its name does not end so; with --standalone, the directory. It must not exist.
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Write a directory with the whole model in it, tokenizer and all, which needs the original no more.
    #[arg(long)]
    standalone: bool,
    /// lowkey's own, a published system, or `dense`: keys and values themselves in 8 or 4 bits.
    #[arg(long, default_value = "lowkey", value_parser = Method::ALL.map(|(name, _)| name))]
    method: String,
    /// How many times smaller than in f16 the cache is to be [default: 8].
    #[arg(long, value_name = "F", group = "budget")]
    times: Option<f64>,
    /// The share of the f16 cache to keep, above 0 and up to 1.
    #[arg(long, value_name = "F", group = "budget")]
    keep: Option<f64>,
    /// Bytes that a token may take, over the whole model.
    #[arg(long, value_name = "N", group = "budget")]
    kv_bytes: Option<u64>,
    /// lowkey: which rows [default: small].
    #[arg(long)]
    layout: Option<Layout>,
    /// lowkey, small: consecutive layers that share a row, 1, 2 or 4 [default: 1]. With --statistics, for any method that calibrates: how many layers are
    /// correlated with each other there.
    #[arg(long, value_name = "N")]
    span: Option<usize>,
    /// lowkey, fast: the longest context that rows are made for; beyond it keys are coded worse [default: 8192, or the model's own where that is shorter].
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// palu, recalkv: key heads that share a row [default: 4, or all where there are fewer].
    #[arg(long, value_name = "N")]
    group_heads: Option<usize>,
    /// recalkv: by what heads are put into groups [default: cka].
    #[arg(long)]
    grouping: Option<Grouping>,
    /// Published methods: how ranks are dealt out [default: by the paper's rule].
    #[arg(long, value_parser = Ranks::ALL.map(|(name, _)| name))]
    ranks: Option<String>,
    /// Published methods and dense: bits of a number, 16, 8 or 4 [default: 16; dense: 4]; oscar, kivi: 8, 4 or 2 [default: 2]; kvarn: the same, of keys and values
    /// [default: keys 4, values 2].
    #[arg(long, value_name = "N")]
    bits: Option<u8>,
    /// Tokens at the start of a text that stay exact (OSCAR's paper: 64).
    #[arg(long, value_name = "N", default_value_t = Exact::default().sinks)]
    sinks: usize,
    /// Newest tokens that stay exact, at least (OSCAR's paper: 256).
    #[arg(long, value_name = "N", default_value_t = Exact::default().recent)]
    recent: usize,
    /// Text to calibrate with, in place of the built-in one; the more like what the model will read, the better. Any number of files, or `self` for text that
    /// the model writes itself.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    calibration: Vec<PathBuf>,
    /// Use no more than this many tokens of it, rounded up to whole windows; the model itself writes 16384 where nothing else is asked.
    #[arg(long, value_name = "N")]
    calibration_tokens: Option<usize>,
    /// Tokens of the longest windows that it is read in; others have 512 and what lies between. Long ones take more memory, and show what a long context needs [default: 4096].
    #[arg(long, value_name = "N")]
    calibration_window: Option<usize>,
    /// How it is found out what a disturbance of keys and values does to the output, where the method or its ranks ask for that; with --statistics for any method
    /// that calibrates [default: full where it is asked for, else none].
    #[arg(long)]
    sensitivity: Option<Sensitivity>,
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
enum Layout {
    /// Keys before RoPE and values in one row: the smallest; keys are rebuilt when they are read.
    Small,
    /// Keys after RoPE, and values: nothing is rebuilt.
    Fast,
}

#[derive(Clone, Copy, ValueEnum)]
enum Grouping {
    /// By similarity, as in the paper.
    Cka,
    /// By what the groups lose.
    Loss,
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
        if checkpoint.factored().is_some() {
            let message = format!("{} has been compressed already; give the checkpoint that it was made from", path.display());
            return Err(Error::Argument { name: "MODEL".into(), message });
        }
        let plan = self.plan(checkpoint.config())?;
        self.check_heeded(&plan)?;
        plan.check(checkpoint.config())?;
        let short = match self.sensitivity {
            Some(Sensitivity::None) if plan.weighs() => Some("weighs what it leaves out; choose full or scalar"),
            Some(Sensitivity::Scalar) if plan.rule() == Ranks::Fisher => {
                Some("deals out ranks by Fisher information, which only full has; choose that")
            }
            _ => None,
        };
        if let Some(short) = short {
            let message = format!("{} {short}, or other --ranks for a published method", self.method);
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
        let done = compress::run(&checkpoint, &plan, statistics.as_ref(), &output, &mut |progress| bar.report(progress))?;
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

    /// What the options ask for.
    fn plan(&self, config: &Config) -> Result<Plan> {
        let method = Method::named(&self.method)?;
        let budget = match (self.kv_bytes, self.keep) {
            (Some(bytes), _) => Budget::Bytes(bytes),
            (_, Some(keep)) => Budget::Keep(keep),
            _ => Budget::Times(self.times.unwrap_or(8.0)),
        };
        let defaults = Plan::new(method, budget);
        let spans = method == Method::LowKey && !matches!(self.layout, Some(Layout::Fast));
        Ok(Plan {
            layout: match self.layout {
                Some(Layout::Small) => compress::Layout::Small,
                Some(Layout::Fast) => compress::Layout::Fast,
                None => defaults.layout,
            },
            span: self.span.filter(|_| spans).unwrap_or(defaults.span),
            sensing: if self.sensitivity == Some(Sensitivity::Scalar) { Sensing::Scalar } else { defaults.sensing },
            group_heads: self.group_heads.unwrap_or(config.num_key_value_heads.min(defaults.group_heads)),
            grouping: match self.grouping {
                Some(Grouping::Cka) => compress::Grouping::Cka,
                Some(Grouping::Loss) => compress::Grouping::Loss,
                None => defaults.grouping,
            },
            ranks: self.ranks.as_deref().map(Ranks::named).transpose()?,
            bits: self.bits.unwrap_or(if method == Method::Dense { 4 } else { defaults.bits }),
            value_bits: defaults.value_bits.filter(|_| self.bits.is_none()),
            exact: Exact { sinks: self.sinks, recent: self.recent },
            context: self.context.unwrap_or(defaults.context.min(config.max_position_embeddings)),
            ..defaults
        })
    }

    /// Refuses, by its name, an option that is given and would change nothing.
    fn check_heeded(&self, plan: &Plan) -> Result<()> {
        let (fixed, own, calibrates) = (plan.method.fixed(), plan.method == Method::LowKey, plan.method.calibrates());
        let small = own && plan.layout == compress::Layout::Small;
        let groups = matches!(plan.method, Method::Palu | Method::ReCalKv);
        let weighs = plan.weighs() || self.sensitivity == Some(Sensitivity::None);
        // Statistics that are kept serve other methods as well: there may be more in them than this one asks for.
        let kept = self.statistics.is_some();
        const BUDGET: &str = "this method has no budget to spend: its size is that of its numbers; choose --bits";
        const SPAN: &str = "only `--method lowkey --layout small` has rows over several layers, and no --statistics are kept for that";
        const CALIBRATION: &str = "this method needs no calibration";
        let options = [
            // The name, whether it is given, whether it is heeded, and why not.
            ("times", self.times.is_some(), !fixed, BUDGET),
            ("keep", self.keep.is_some(), !fixed, BUDGET),
            ("kv-bytes", self.kv_bytes.is_some(), !fixed, BUDGET),
            ("layout", self.layout.is_some(), own, "only `--method lowkey` has a choice of rows"),
            ("context", self.context.is_some(), own && !small, "only `--method lowkey --layout fast` codes keys by their position"),
            ("span", self.span.is_some(), small || kept && calibrates, SPAN),
            ("group-heads", self.group_heads.is_some(), groups, "only palu and recalkv put heads into groups"),
            ("grouping", self.grouping.is_some(), plan.method == Method::ReCalKv, "only `--method recalkv` reorders heads"),
            ("ranks", self.ranks.is_some(), !fixed && !own, "only published low-rank methods have ranks to deal out"),
            ("bits", self.bits.is_some(), !own, "lowkey deals out bits itself, as its budget allows"),
            ("calibration", !self.calibration.is_empty(), calibrates, CALIBRATION),
            ("calibration-tokens", self.calibration_tokens.is_some(), calibrates, CALIBRATION),
            ("calibration-window", self.calibration_window.is_some(), calibrates, CALIBRATION),
            ("statistics", kept, calibrates, CALIBRATION),
            ("sensitivity", self.sensitivity.is_some(), calibrates && (weighs || kept), "by this method and these ranks nothing is weighed"),
        ];
        match options.into_iter().find(|(_, given, heeded, _)| *given && !heeded) {
            Some((name, .., why)) => {
                Err(Error::Argument { name: name.into(), message: format!("{why}; leave it out, or choose another --method than {}", self.method) })
            }
            None => Ok(()),
        }
    }
}

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
        "{}\n{} ({}): {} bytes of cache per token, {times:.2} times smaller than {}\n{:.1} s (calibrate {calibrate:.1}, factor {:.1}, write {:.1}){memory}\n",
        report.output.display(),
        report.method,
        report.options,
        report.kv_bytes_per_token,
        report.kv_bytes_per_token_dense,
        calibrate + compress.check + compress.factor + compress.write,
        compress.factor,
        compress.write,
    )
}
