//! What the command line promises: its JSON keys, its exit codes, its words when something is wrong, and nothing half-written.

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
mod methods;
mod models;
#[cfg(unix)]
mod terminal;
mod usage;

use common::SyntheticModel;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;
#[cfg(unix)]
use terminal::Terminal;

fn lowkey() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lowkey"));
    command.stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    lowkey().args(arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text:?}; stderr: {}", stderr(output)))
}

/// The object that a command prints, which must have succeeded.
fn done(arguments: &[&str]) -> Value {
    let output = run(&[arguments, &["--json", "--device", "cpu"]].concat());
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
    json(&output)
}

/// The kind and message of the error that a command prints as JSON, and its exit code.
fn failed(arguments: &[&str]) -> (String, String, i32) {
    let output = run(&[arguments, &["--json"]].concat());
    let error = &json(&output)["error"];
    let word = |key: &str| error[key].as_str().unwrap_or_else(|| panic!("no {key} in {error}")).to_string();
    (word("kind"), word("message"), output.status.code().unwrap())
}

fn keys(object: &Value) -> Vec<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// A small model and a text to run through it.
struct Bench {
    directory: TempDir,
}

impl Bench {
    fn new() -> Bench {
        let directory = tempfile::tempdir().unwrap();
        SyntheticModel::default().write(&directory.path().join("model"));
        let text: String = (0..400).map(|i| format!("the {} and {} in a ring. ", i * 7 % 31, (i * i) % 17)).collect();
        std::fs::write(directory.path().join("text"), text).unwrap();
        Bench { directory }
    }

    /// A compressed model, beside the others.
    fn small(&self) -> String {
        let small = self.path("small");
        done(&["compress", &self.path("model"), "-o", &small, "--keep", "0.5", "--calibration", &self.path("text")]);
        small
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().into()
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}
