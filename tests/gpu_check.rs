//! `assets/gpu-check.sh`, which `make gpu-check` runs, cut to about a minute: it writes every kind
//! of row that it writes on a GPU, and what it has written is whole whenever it is stopped.
#![cfg(unix)]

use serde_json::Value;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The script, on its way to `results`. The unit tests of kernels that it would run first are run
/// beside this one.
fn check(directory: &Path, time: u32, more: &[(&str, &str)]) -> (Child, PathBuf) {
    let (binaries, results) = (directory.join("binaries"), directory.join("results"));
    std::fs::create_dir(&binaries).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_lowkey"), binaries.join("lowkey")).unwrap();
    let mut command = Command::new("sh");
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/gpu-check.sh")).args([&binaries, &results]);
    command
        .envs([("SHAPES", "15m"), ("DEPTHS", "128"), ("CHUNK", "8"), ("STEPS", "2"), ("ROUNDS", "1"), ("SWEEP", "merge lanes")])
        .env("TIME", time.to_string());
    command.envs(more.iter().copied()).stdin(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    (command.spawn().unwrap(), results)
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn rows(value: &Value) -> &[Value] {
    value["rows"].as_array().unwrap()
}

#[test]
fn every_kind_of_row_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let (child, results) = check(directory.path(), 600, &[]);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (speed, kernels) = (json(&results.join("speed.json")), json(&results.join("kernels.json")));
    let layouts = ["f16", "q4", "fast", "small", "select", "xkv"];
    assert_eq!(rows(&speed).iter().map(|row| row["layout"].as_str().unwrap()).collect::<Vec<_>>(), layouts);
    for row in rows(&speed) {
        assert_eq!((row["model"].as_str(), row["depth"].as_u64()), (Some("15m"), Some(128)));
        assert!(["prefill_tps", "decode_tps", "share_of_roofline"].iter().all(|key| row[*key].as_f64().unwrap() > 0.0), "{row}");
    }
    // Every kernel there is, but those that are no part of a model, those of blocks of tokens,
    // which no random model is coded in, and those of other selectors, of sketches and of experts.
    // Integers are tried out of quantised weights.
    for (shader, _) in lowkey::gpu::SOURCES {
        let kernel = shader.trim_end_matches(".wgsl");
        if !shader.starts_with("lib/")
            && !["roofline", "repeat", "blocks", "stripe", "chunkkv", "sketch", "matvec_int8", "experts", "route"].contains(&kernel)
        {
            let is = |row: &&Value| row["kernel"].as_str().unwrap().split(' ').next() == Some(kernel);
            let row = rows(&kernels).iter().find(is).unwrap_or_else(|| panic!("no row of {kernel}"));
            assert!(row["us"].as_f64().unwrap() > 0.0 && row["dispatches"].as_f64().unwrap() > 0.0, "{row}");
        }
    }
    for phase in ["step", "chunk"] {
        for layout in layouts.into_iter().chain(["kvreviver"]) {
            assert!(rows(&kernels).iter().any(|row| row["phase"] == phase && row["rows"] == layout), "{phase} {layout}");
        }
    }
    assert!(kernels["launch_us"].as_f64().unwrap() > 0.0 && kernels["roofline"]["copy_gbps"].as_f64().unwrap() > 0.0);
    let weights = json(&results.join("weights/kernels.json"));
    let kernel = |row: &Value, kernel: &str| row["kernel"].as_str().unwrap().split(' ').next() == Some(kernel);
    for (name, tuning) in [("matvec", ""), ("matvec_int8", "int8 true")] {
        assert!(rows(&weights).iter().any(|row| row["tuning"] == tuning && kernel(row, name)), "{name}");
    }
    let sweep = json(&results.join("sweep/kernels.json"));
    assert!(rows(&sweep).iter().any(|row| row["tuning"] == "merge lanes 128" && row["kernel"] == "merge"));
    let summary = std::fs::read_to_string(results.join("summary.md")).unwrap();
    assert!(
        ["## tests", "## kernels", "## speed", "## sweep", "matvec NORM GATED", "of roofline"].iter().all(|text| summary.contains(text)),
        "{summary}"
    );
}

#[test]
fn a_stop_in_the_middle_leaves_whole_files() {
    let directory = tempfile::tempdir().unwrap();
    let (mut child, results) = check(directory.path(), 600, &[("ROWS", "f16,q4,fast")]);
    let started = Instant::now();
    while !results.join("kernels.json").exists() {
        assert!(started.elapsed() < Duration::from_secs(300) && child.try_wait().unwrap().is_none(), "nothing was written");
        std::thread::sleep(Duration::from_millis(20));
    }
    // As Ctrl-C does: to all of them.
    assert!(Command::new("kill").args(["-INT", "--", &format!("-{}", child.id())]).status().unwrap().success());
    child.wait().unwrap();
    let kernels = json(&results.join("kernels.json"));
    assert!(rows(&kernels).iter().any(|row| row["rows"] == "f16") && !rows(&kernels).iter().any(|row| row["rows"] == "kvreviver"), "in the middle");
    assert!(results.join("summary.md").exists() && !results.join("speed.json").exists());
    let temporary = |name: &str| name.starts_with(".lowkey-");
    assert!(!results.read_dir().unwrap().any(|entry| temporary(&entry.unwrap().file_name().to_string_lossy())));
}
