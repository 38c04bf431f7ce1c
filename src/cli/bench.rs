//! `lowkey bench`: prefill and decode speed by depth, and the device's measured roofline beside it.

use super::cache::CacheArgs;
use super::console::Console;
use super::device::untrained;
use super::locate::locate;
use super::table::{bytes, number, table};
use lowkey::bench::{Roofline, Row, Subject, Task, run};
use lowkey::sequence::SequenceOptions;
use lowkey::{Error, Result};
use serde::Serialize;

/// Measure prefill and decode speed at given depths.
///
/// Several models are measured in turns, so that a machine that warms up or is used by others treats them alike; with options of the cache each is also measured without them.
#[derive(clap::Args)]
pub struct Args {
    /// Directory, .gguf file, or fetched name; any number of them.
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<String>,
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
    #[command(flatten)]
    cache: CacheArgs,
}

#[derive(Serialize)]
struct Report {
    device: String,
    driver: String,
    tier: &'static str,
    roofline: Roofline,
    rows: Vec<Row>,
}

impl Args {
    pub fn run(self, console: &Console) -> Result<()> {
        let task = Task { depths: self.depth, prefill: self.prefill, steps: self.steps, rounds: self.rounds, seed: self.seed };
        let options = self.cache.apply(SequenceOptions::default())?;
        let too_deep = || Error::Argument { name: "depth".into(), message: "more tokens than can be counted".into() };
        let capacity = task.capacity().ok_or_else(too_deep)?;
        let paths = self.models.iter().map(|model| locate(model)).collect::<Result<Vec<_>>>()?;
        let engine = console.engine()?;
        let mut bar = console.bar();
        let mut subjects = Vec::new();
        for (model, path) in self.models.iter().zip(&paths) {
            bar.show("load", 0, None)?;
            let loaded = engine.load(path)?;
            if let Some(remark) = untrained(model, loaded.checkpoint().config(), capacity) {
                console.remark(&format!("{remark}, though the speed is true"));
            }
            let mut settings = vec![SequenceOptions::default(), SequenceOptions { select: None, ..options }, options];
            settings.dedup();
            for options in settings {
                subjects.push(Subject {
                    model: model.clone(),
                    method: options.method().unwrap_or(loaded.method()).into(),
                    layout: options.layout(&loaded.layout()),
                    weights: loaded.weight_type().into(),
                    vocab: loaded.checkpoint().config().vocab_size,
                    cost: Box::new(loaded.cost(options)),
                    sequence: loaded.sequence(SequenceOptions { capacity, ..options }).map_err(name_depth)?,
                });
            }
        }
        bar.show("roofline", 0, None)?;
        let roofline = engine.roofline()?;
        let rows = run(&task, &mut subjects, &roofline, &mut |progress| bar.report(progress))?;
        drop(bar);
        subjects.iter().filter_map(|subject| subject.sequence.remark()).for_each(|remark| console.remark(&remark));
        let report = Report { device: engine.name(), driver: engine.driver(), tier: engine.tier(), roofline, rows };
        console.result(&report, text)
    }
}

/// A context that cannot be is here one that a depth asked for.
fn name_depth(error: Error) -> Error {
    match error {
        Error::Argument { name, message } if name == "context" => Error::Argument { name: "depth".into(), message },
        error => error,
    }
}

fn text(report: &Report) -> String {
    let Roofline { copy_gbps, f32_gflops, f16_gflops } = report.roofline;
    let head = [
        "model",
        "method",
        "rows",
        "weights",
        "depth",
        "prefill t/s",
        "decode t/s",
        "ms p10",
        "p50",
        "p90",
        "kv B/token",
        "moved/step",
        "of roofline",
        "dispatches",
    ];
    let rows: Vec<Vec<String>> = report
        .rows
        .iter()
        .map(|row| {
            vec![
                row.model.clone(),
                row.method.clone(),
                row.layout.clone(),
                row.weights.clone(),
                row.depth.to_string(),
                number(Some(row.prefill_tps)),
                number(Some(row.decode_tps)),
                number(Some(row.decode_ms_p10)),
                number(Some(row.decode_ms_p50)),
                number(Some(row.decode_ms_p90)),
                row.kv_bytes_per_token.to_string(),
                bytes(row.bytes_per_step),
                format!("{:.0} %", 100.0 * row.share_of_roofline),
                row.dispatches_per_step.to_string(),
            ]
        })
        .collect();
    format!(
        "{} ({}; tier {})\ncopies {} GB/s, multiplies and adds {} GFLOPS in f32, {} in f16\n\n{}",
        report.device,
        report.driver,
        report.tier,
        number(Some(copy_gbps)),
        number(Some(f32_gflops)),
        number(f16_gflops),
        table(&head, &rows)
    )
}
