//! What `compress` knows of the model's keys and values: gathered from text, or read from a file of
//! statistics.

use super::super::console::{Console, read_text};
use super::super::table::bytes;
use super::{Args, Sensitivity};
use lowkey::calibrate::{self, LayerStatistics, SensitivityKind, Statistics, source_digest, text_digest};
use lowkey::checkpoint::{Checkpoint, Config};
use lowkey::compress::Plan;
use lowkey::pull::Store;
use lowkey::task::Progress;
use lowkey::{Error, Result, WeightStorage, cpu};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// What calibrates where nothing else is given: a little of everything.
const TEXT: &str = include_str!("../../../assets/calibration.txt");

/// Tokens that a model writes to calibrate itself with.
const SAMPLED: usize = 16384;

impl Args {
    /// Reads statistics, which must have what is asked for.
    pub(super) fn reuse(&self, file: &Path, config: &Config, console: &Console) -> Result<Statistics> {
        let statistics = Statistics::load(file)?;
        let refuse = |message: &str| {
            let message = format!("{} {message}; leave that out, or name a new file", file.display());
            Err(Error::Argument { name: "statistics".into(), message })
        };
        if !self.calibration.is_empty() && self.text()?.digest() != statistics.text {
            return refuse("was gathered from another text than --calibration gives");
        }
        let (shortest, longest) = self.windows(config);
        // That many, in whole windows: of each length one may be begun, and together those are
        // shorter than twice the longest, and than all tokens where there are several.
        if self.calibration_tokens.is_some_and(|tokens| tokens.saturating_add(tokens.min(2 * longest).max(shortest)) <= statistics.tokens) {
            return refuse("was gathered from more tokens than --calibration-tokens allows");
        }
        if self.calibration_window.is_some() && statistics.longest > longest.max(shortest) {
            return refuse("was gathered in longer windows than --calibration-window allows");
        }
        if self.method.span.is_some_and(|span| span > statistics.span) {
            return refuse("was gathered over a shorter span than --span gives");
        }
        let has = |part: fn(&LayerStatistics) -> bool| statistics.layers.iter().all(part);
        match self.sensitivity {
            Some(Sensitivity::Scalar) if !has(|layer| layer.scalar.is_some()) => {
                return refuse("has no scalar sensitivity, as --sensitivity asks for");
            }
            Some(Sensitivity::Full) if !has(|layer| layer.sensitivity.is_some()) => {
                return refuse("has no full sensitivity, as --sensitivity asks for");
            }
            _ => {}
        }
        console.remark(&format!("using statistics from {}", file.display()));
        Ok(statistics)
    }

    /// Runs text through the model on the processor.
    pub(super) fn gather(&self, checkpoint: &Checkpoint, plan: &Plan, console: &Console) -> Result<(Statistics, calibrate::Seconds)> {
        let text = self.text()?;
        let (window, longest) = self.windows(checkpoint.config());
        let options = calibrate::Options {
            window,
            longest,
            tokens: self.calibration_tokens,
            span: self.method.span.unwrap_or(1),
            sensitivity: match self.sensitivity {
                Some(Sensitivity::None) => SensitivityKind::None,
                Some(Sensitivity::Scalar) => SensitivityKind::Scalar,
                Some(Sensitivity::Full) => SensitivityKind::Full,
                None if plan.method.weighs() => SensitivityKind::Full,
                None => SensitivityKind::None,
            },
            sinks: plan.exact.sinks,
            recent: plan.exact.recent,
            keep: keep(),
            ..calibrate::Options::default()
        };
        console.remark(&format!("calibrating on the processor with {}", text.name()));
        let mut bar = console.bar();
        bar.show("load", 0, None)?;
        let model = Arc::new(cpu::Model::load_as(checkpoint, WeightStorage::Stored, &mut |progress| bar.report(progress))?);
        let mut on_progress = |progress| bar.report(progress);
        let tokens = match &text {
            Text::BuiltIn => calibrate::encode(checkpoint, &[TEXT])?,
            Text::Files(texts) => calibrate::encode(checkpoint, texts)?,
            Text::Sampled { tokens } => {
                // In whole windows.
                let length = longest.min(tokens.next_multiple_of(window));
                calibrate::sample(checkpoint, &model, tokens.div_ceil(length), length, options.seed, &mut on_progress)?
            }
        };
        let need = calibrate::need(&model, &tokens, &options)?;
        self.afford(need)?;
        console.remark(&format!("calibration takes up to {} of memory, and {} on disk", bytes(need.memory), bytes(need.disk)));
        let mut timed = timed(console, checkpoint.config().num_hidden_layers, &mut on_progress);
        let gathered = calibrate::gather(&model, &tokens, source_digest(checkpoint)?, text.digest(), &options, &mut timed);
        let kept = |keep: &Path| keep.read_dir().is_ok_and(|mut entries| entries.next().is_some());
        if let (Err(Error::Interrupted | Error::Io { .. }), Some(keep)) = (&gathered, options.keep.as_deref().filter(|keep| kept(keep))) {
            console.remark(&format!("the layers that are done are kept in {}; the same command goes on with them", keep.display()));
        }
        gathered
    }

    /// Whether what calibration needs is no more than it may take.
    fn afford(&self, need: calibrate::Need) -> Result<()> {
        let Some(memory) = self.memory.filter(|memory| memory.0 < need.memory) else { return Ok(()) };
        let message = format!(
            "calibration needs {} at most, more than {}: shorter windows need less (--calibration-window)",
            bytes(need.memory),
            bytes(memory.0)
        );
        Err(Error::Argument { name: "memory".into(), message })
    }

    /// What to calibrate with.
    fn text(&self) -> Result<Text> {
        let itself = |path: &PathBuf| path.as_os_str() == "self";
        Ok(match &self.calibration[..] {
            [] => Text::BuiltIn,
            [path] if itself(path) => Text::Sampled { tokens: self.calibration_tokens.unwrap_or(SAMPLED) },
            files if files.iter().any(itself) => {
                let message = "`self` goes alone; give a file of that name as ./self".into();
                return Err(Error::Argument { name: "calibration".into(), message });
            }
            files => Text::Files(files.iter().map(|file| read_text(file)).collect::<Result<_>>()?),
        })
    }

    /// Tokens that are run together: the fewest and the most.
    fn windows(&self, config: &Config) -> (usize, usize) {
        let (defaults, most) = (calibrate::Options::default(), config.max_position_embeddings);
        let longest = self.calibration_window.unwrap_or(defaults.longest).min(most);
        (defaults.window.min(longest), longest)
    }
}

/// What a model is calibrated with.
enum Text {
    BuiltIn,
    Files(Vec<String>),
    /// The model's own.
    Sampled {
        tokens: usize,
    },
}

impl Text {
    fn name(&self) -> &'static str {
        match self {
            Text::BuiltIn => "the built-in text",
            Text::Files(_) => "the given text",
            Text::Sampled { .. } => "text of its own",
        }
    }

    /// What is recorded. A model's own text follows from the model, which has a digest of its own,
    /// and how much of it there is.
    fn digest(&self) -> String {
        match self {
            Text::BuiltIn => text_digest(&[TEXT]),
            Text::Files(texts) => text_digest(texts),
            Text::Sampled { tokens } => text_digest(&[format!("self {tokens}")]),
        }
    }
}

/// Where calibration keeps what is done until all of it is.
fn keep() -> Option<PathBuf> {
    Some(Store::standard().ok()?.directory().join(".calibration"))
}

/// Says, when a layer has gone through, how long the rest will take.
fn timed<'a>(
    console: &'a Console,
    layers: usize,
    inner: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> impl FnMut(Progress) -> ControlFlow<()> + 'a {
    let (mut begun, mut said) = (None, false);
    move |progress| {
        let (start, first) = *begun.get_or_insert((Instant::now(), progress.done));
        // A layer is no more than its share, for there is the loss and mostly a way back.
        let (done, layer) = (progress.done - first, progress.total / (3 * layers as u64).max(1));
        if !said && done > layer && progress.stage == "calibrate" {
            said = true;
            let seconds = start.elapsed().as_secs_f64() / done as f64 * (progress.total - progress.done) as f64;
            console.remark(&format!("about {} to go", duration(seconds)));
        }
        inner(progress)
    }
}

/// In words.
fn duration(seconds: f64) -> String {
    match seconds {
        ..90.0 => format!("{seconds:.0} s"),
        ..5400.0 => format!("{:.0} minutes", seconds / 60.0),
        _ => format!("{:.1} hours", seconds / 3600.0),
    }
}
