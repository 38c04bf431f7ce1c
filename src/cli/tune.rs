//! `lowkey tune`: measures which constants of kernels this device is fastest with, and keeps them.

use super::console::Console;
use super::device::tunings;
use super::table::ago;
use lowkey::bench::Shape;
use lowkey::bench::tune::{Found, Task, run};
use lowkey::gpu::{Device, Tuned};
use lowkey::{Error, Result};
use serde::Serialize;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Measure which kernel choices this GPU and driver are fastest with, and keep them.
///
/// They are kept in the cache directory for this adapter and this version of its driver, and every
/// command takes them from there; `lowkey doctor` shows which are in force. A choice is kept only
/// where it is at least 3 % faster, twice. Results do not change beyond rounding. Ctrl-C leaves
/// everything as it was.
#[derive(clap::Args)]
pub struct Args {
    /// Begin no measurement later than so many seconds after the start.
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    time: u64,
    /// The shape of the model that is measured: 15m, 135m, 1b, 3b, 8b, four layers of it [default:
    /// 3b, or less where that does not fit; on a software renderer 135m].
    #[arg(long, value_name = "SHAPE")]
    shape: Option<Shape>,
    /// Go back to the built-in choices: remove what was measured of this adapter and driver.
    #[arg(long, conflicts_with_all = ["time", "shape"])]
    reset: bool,
}

#[derive(Serialize)]
struct Report {
    device: String,
    /// Where it is kept.
    path: PathBuf,
    #[serde(flatten)]
    found: Found,
}

#[derive(Serialize)]
struct Reset {
    device: String,
    path: PathBuf,
    /// Whether there was anything.
    removed: bool,
}

impl Args {
    pub fn run(self, console: &Console) -> Result<()> {
        let directory = tunings()?;
        let engine = if self.reset { console.device().open()? } else { console.engine()? };
        let device = engine.gpu().ok_or_else(|| {
            let message = "kernel choices are a GPU's, and the processor has none; give --device gpu for any graphics driver".into();
            Error::Argument { name: "device".into(), message }
        })?;
        if self.reset {
            return reset(console, device, &directory);
        }
        console.remark(&format!("measuring on {}: about {} seconds at the most", device.name(), self.time));
        let mut bar = console.bar();
        let task = Task { shape: self.shape, time: Duration::from_secs(self.time) };
        let found = run(&task, device, &mut |progress| bar.report(progress))?;
        drop(bar);
        let path = found.tuned.write(&directory)?;
        console.result(&Report { device: engine.name(), path, found }, text)
    }
}

fn reset(console: &Console, device: &Arc<Device>, directory: &Path) -> Result<()> {
    let path = device.adapter().file(directory);
    let removed = match std::fs::remove_file(&path) {
        Ok(()) => true,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(source) => return Err(Error::Io { action: "remove", path, source }),
    };
    console.result(&Reset { device: device.name().into(), path, removed }, |reset| match reset.removed {
        true => format!("{} removed: {} has its built-in kernel choices again\n", reset.path.display(), reset.device),
        false => format!("nothing was measured on {}: it has its built-in kernel choices\n", reset.device),
    })
}

fn text(report: &Report) -> String {
    let Report { path, found, .. } = report;
    let mut text = chosen(&found.tuned);
    if !found.steps.is_empty() {
        let steps: Vec<String> = found.steps.iter().map(|(rows, times)| format!("{rows} rows {times:.2}")).collect();
        text += &format!("a whole step is so many times as fast: {}\n", steps.join(", "));
    }
    text + &format!("kept in {}; `lowkey tune --reset` goes back\n", path.display())
}

/// What was chosen, and when.
pub fn chosen(tuned: &Tuned) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let mut text =
        format!("kernel choices: tuned {} by lowkey {} on the shape {}\n", ago(now.saturating_sub(tuned.measured)), tuned.lowkey, tuned.shape);
    for choice in &tuned.choices {
        text += &format!("  {} {}: {:.2} times as fast as built in\n", choice.name, short(&choice.value), choice.times);
    }
    if tuned.choices.is_empty() {
        text += "  what is built in is the fastest, or as fast\n";
    }
    if !tuned.unmeasured.is_empty() {
        text += &format!("  no time was left for: {} (--time)\n", tuned.unmeasured.join(", "));
    }
    text
}

/// A constant's value in one word: the numbers of a tile with crosses between them.
pub fn short(value: &Value) -> String {
    match value {
        Value::Object(fields) => fields.values().map(Value::to_string).collect::<Vec<_>>().join("×"),
        value => value.to_string(),
    }
}
