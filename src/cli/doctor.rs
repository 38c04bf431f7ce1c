//! `lowkey doctor`: what there is to run on, and what would be taken.

use super::console::Console;
use super::device::ignored;
use super::table::{bytes, table};
use super::tune::{chosen, short};
use lowkey::gpu::{AdapterReport, Origin, Tier, Tuned, Tuning, adapters};
use lowkey::{Engine, Result};
use serde::Serialize;

/// Show graphics adapters, their limits, and what would run.
#[derive(clap::Args)]
pub struct Args {}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    adapters: Vec<AdapterReport>,
    processor_threads: usize,
    /// What commands with these options run on; absent where they would fail.
    would_run: Option<Choice>,
    /// Why they would fail.
    problem: Option<String>,
    /// How its kernels divide their work; absent where nothing would run, and on the processor.
    tuning: Option<Kernels>,
}

/// Constants of kernels, and where they are from.
#[derive(Serialize)]
struct Kernels {
    /// `built-in`, `tuned`, or `ignored` where a file cannot be used.
    origin: &'static str,
    /// The constants in force.
    constants: Tuning,
    /// What was measured.
    tuned: Option<Tuned>,
    /// What is wrong with the file, and what to do.
    problem: Option<String>,
}

impl Kernels {
    fn of(engine: &Engine) -> Option<Kernels> {
        let device = engine.gpu()?;
        let (origin, tuned) = match device.tuning_origin() {
            Origin::BuiltIn => ("built-in", None),
            Origin::Tuned(tuned) => ("tuned", Some(tuned.clone())),
            Origin::Ignored { .. } => ("ignored", None),
        };
        Some(Kernels { origin, constants: device.tuning(), tuned, problem: ignored(engine) })
    }
}

#[derive(Serialize)]
struct Choice {
    device: String,
    driver: String,
    tier: &'static str,
    software: bool,
}

impl Args {
    pub fn run(self, console: &Console) -> Result<()> {
        let opened = console.device().open();
        let choose = |engine: &Engine| Choice { device: engine.name(), driver: engine.driver(), tier: engine.tier(), software: engine.is_software() };
        let report = Report {
            version: env!("CARGO_PKG_VERSION"),
            adapters: adapters(),
            processor_threads: std::thread::available_parallelism().map_or(1, |threads| threads.get()),
            would_run: opened.as_ref().ok().map(choose),
            problem: opened.as_ref().err().map(|error| error.to_string()),
            tuning: opened.as_ref().ok().and_then(Kernels::of),
        };
        console.result(&report, text)
    }
}

fn text(report: &Report) -> String {
    let rows: Vec<Vec<String>> = report
        .adapters
        .iter()
        .map(|adapter| {
            let [small, large] = adapter.subgroup_sizes;
            vec![
                adapter.name.clone(),
                adapter.backend.clone(),
                adapter.kind.clone(),
                adapter.driver.clone(),
                adapter.tier.map_or("unusable", Tier::name).into(),
                if small == large { small.to_string() } else { format!("{small} to {large}") },
                bytes(adapter.max_storage_binding),
                bytes(adapter.max_buffer),
                bytes(adapter.max_workgroup_storage.into()),
            ]
        })
        .collect();
    let head = ["adapter", "backend", "kind", "driver", "tier", "subgroup", "binding", "buffer", "workgroup"];
    let mut text = format!("lowkey {}\n\n", report.version);
    text += &if rows.is_empty() { "no graphics adapter\n".into() } else { table(&head, &rows) };
    for adapter in &report.adapters {
        if let Some(reason) = &adapter.unusable {
            text += &format!("{}: {reason}\n", adapter.name);
        }
    }
    text += &format!("\nprocessor: {} threads (--device cpu)\n", report.processor_threads);
    match (&report.would_run, &report.problem) {
        (Some(choice), _) => {
            let software = if choice.software { ", a software renderer" } else { "" };
            text += &format!("would run on {}{software}, tier {} ({})\n", choice.device, choice.tier, choice.driver);
        }
        (None, Some(problem)) => text += &format!("{problem}\n"),
        (None, None) => {}
    }
    text + &report.tuning.as_ref().map_or(String::new(), kernels)
}

/// The choices in force: those that were measured, with what they won, then all.
fn kernels(kernels: &Kernels) -> String {
    let mut text = match (&kernels.tuned, &kernels.problem) {
        (Some(tuned), _) => chosen(tuned),
        (None, Some(problem)) => format!("kernel choices: built in; {problem}\n"),
        (None, None) => "kernel choices: built in; `lowkey tune` measures whether others are faster here\n".into(),
    };
    if let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(kernels.constants) {
        let constants: Vec<String> = fields.iter().map(|(name, value)| format!("{name} {}", short(value))).collect();
        text += &format!("  in force: {}\n", constants.join(", "));
    }
    text
}
