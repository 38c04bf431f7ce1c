//! What the command line promises: its JSON keys, its exit codes, its words when something is
//! wrong, and nothing half-written.

mod bench;
mod cache;
mod chat;
#[path = "../common/mod.rs"]
mod common;
mod completions;
mod compress;
mod depths;
mod device;
mod eval;
mod generate;
mod habits;
mod methods;
mod models;
mod sessions;
#[cfg(unix)]
mod terminal;
mod tune;
mod usage;

use common::SyntheticModel;
use common::cli::{Bench, done, failed, json, keys, lowkey, number, run, stderr};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;
#[cfg(unix)]
use terminal::Terminal;

/// A compressed model, beside the others.
fn small(bench: &Bench) -> String {
    let small = bench.path("small.lowkey");
    done(&["compress", &bench.path("model"), "-o", &small, "--keep", "0.5", "--calibration", &bench.path("text")]);
    small
}
