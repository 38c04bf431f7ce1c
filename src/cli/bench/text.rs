//! What `lowkey bench` prints: as JSON, and as a table for people.

use super::super::table::{bytes, number};
use super::llama;
use lowkey::Engine;
use lowkey::bench::{Roofline, Row, kernels};
use serde::Serialize;

#[derive(Serialize)]
pub(super) struct Speed<'a> {
    device: String,
    driver: String,
    backend: String,
    tier: &'static str,
    roofline: Roofline,
    rows: &'a [Row],
}

#[derive(Serialize)]
pub(super) struct Kernels<'a> {
    device: String,
    driver: String,
    tier: &'static str,
    roofline: Roofline,
    launch_us: f64,
    rows: &'a [kernels::Row],
}

pub(super) fn speed<'a>(engine: &Engine, roofline: Roofline, rows: &'a [Row]) -> Speed<'a> {
    Speed { device: engine.name(), driver: engine.driver(), backend: engine.backend(), tier: engine.tier(), roofline, rows }
}

pub(super) fn kernels_of<'a>(engine: &Engine, roofline: Roofline, launch_us: f64, rows: &'a [kernels::Row]) -> Kernels<'a> {
    Kernels { device: engine.name(), driver: engine.driver(), tier: engine.tier(), roofline, launch_us, rows }
}

/// Makes a table of names and rows.
pub(super) type MakeTable = fn(&[&str], &[Vec<String>]) -> String;

fn head(device: &str, driver: &str, tier: &str, roofline: Roofline) -> String {
    let Roofline { copy_gbps, f32_gflops, f16_gflops } = roofline;
    format!(
        "{device} ({driver}; tier {tier})\ncopies {} GB/s, multiplies and adds {} GFLOPS in f32, {} in f16\n",
        number(Some(copy_gbps)),
        number(Some(f32_gflops)),
        number(f16_gflops),
    )
}

pub(super) fn speed_text(speed: &Speed, table: MakeTable) -> String {
    let names = [
        "model",
        "method",
        "rows",
        "weights",
        "depth",
        "prefill t/s",
        "decode t/s",
        "steps",
        "ms p10",
        "p50",
        "p90",
        "kv B/token",
        "moved/step",
        "of roofline",
        "dispatches",
    ];
    let row = |row: &Row| {
        vec![
            row.model.clone(),
            row.method.clone(),
            row.layout.clone(),
            row.weights.clone(),
            row.depth.to_string(),
            number(Some(row.prefill_tps)),
            number(Some(row.decode_tps)),
            format!("{}×{}", row.rounds, row.steps),
            number(Some(row.decode_ms_p10)),
            number(Some(row.decode_ms_p50)),
            number(Some(row.decode_ms_p90)),
            row.kv_bytes_per_token.to_string(),
            bytes(row.bytes_per_step),
            format!("{:.0} %", 100.0 * row.share_of_roofline),
            row.dispatches_per_step.to_string(),
        ]
    };
    let rows: Vec<Vec<String>> = speed.rows.iter().map(row).collect();
    head(&speed.device, &speed.driver, speed.tier, speed.roofline) + "\n" + &table(&names, &rows)
}

/// The page of a report.
pub(super) fn speed_page(speed: &Speed) -> String {
    let head = head(&speed.device, &speed.driver, speed.tier, speed.roofline);
    let build = concat!("\nbuild: lowkey ", env!("CARGO_PKG_VERSION"), "\n");
    head + "\n" + &llama::table(&speed.backend, speed.rows) + build
}

pub(super) fn kernels_text(kernels: &Kernels, table: MakeTable) -> String {
    let names = ["model", "rows", "depth", "tuning", "phase", "kernel", "dispatches", "µs", "µs in all", "GB/s", "GFLOP/s", "of roofline"];
    let row = |row: &kernels::Row| {
        vec![
            row.model.clone(),
            row.rows.clone(),
            row.depth.to_string(),
            row.tuning.clone(),
            row.phase.into(),
            row.kernel.clone(),
            number(Some(row.dispatches)),
            number(Some(row.us)),
            number(Some(row.total_us)),
            number(Some(row.gbps)),
            number(Some(row.gflops)),
            format!("{:.1} %", 100.0 * row.share_of_roofline),
        ]
    };
    let rows: Vec<Vec<String>> = kernels.rows.iter().map(row).collect();
    let head = head(&kernels.device, &kernels.driver, kernels.tier, kernels.roofline);
    format!("{head}a dispatch that does nothing {} µs\n\n{}", number(Some(kernels.launch_us)), table(&names, &rows))
}
