//! `lowkey compress` and `inspect`.

use super::*;
use std::path::PathBuf;

#[test]
fn a_model_is_inspected_compressed_and_its_statistics_used_again() {
    let bench = Bench::new();
    let [model, small, text, statistics] = ["model", "small.lowkey", "text", "statistics"].map(|name| bench.path(name));

    let found = done(&["inspect", &model, "--context", "100"]);
    // Two sides, three layers, three heads of 12, two bytes.
    assert_eq!(found["kv_bytes_per_token"], 2 * 3 * 3 * 12 * 2);
    let memory = found["memory"].as_array().unwrap();
    assert!(memory.len() > 1 && memory[0]["device"] == "processor", "{memory:?}");
    for device in memory {
        assert_eq!((&device["context"], &device["exact_rows"]), (&100.into(), &(100 * 2 * 3 * 3 * 12 * 2).into()));
        assert_eq!((device["fits"].as_bool(), device["coded_rows"].as_u64()), (Some(true), Some(0)));
    }
    assert_eq!((found["method"].as_str(), found["config"]["architecture"].as_str()), (Some("dense"), Some("llama")));

    let compress = ["compress", &*model, "-o", &*small, "--keep", "0.5", "--calibration", &*text, "--statistics", &*statistics];
    let made = done(&compress);
    let prices = ["kv_bytes_per_token", "kv_bytes_per_token_dense", "flops_per_cached_token", "flops_per_cached_token_dense"];
    assert_eq!(keys(&made), [&["output", "method", "options"][..], &prices, &["seconds", "peak_rss_bytes"]].concat());
    assert_eq!(made["output"], small.as_str());
    assert_eq!(keys(&made["seconds"]), ["calibrate", "forward", "backward", "disturb", "moments", "check", "factor", "write"]);
    let kept = number(&made["kv_bytes_per_token"]) / number(&made["kv_bytes_per_token_dense"]);
    assert!(kept <= 0.5 && kept > 0.45, "{kept}");
    assert!(Path::new(&statistics).is_file());
    let found = done(&["inspect", &small]);
    assert_eq!(found["method"], "lowkey");
    prices.iter().for_each(|price| assert_eq!(found[price], made[price]));
    // Two operations for scores and for values, three layers, six query heads of 12; keys are
    // rebuilt.
    assert_eq!(found["flops_per_cached_token_dense"], 2 * 2 * 3 * 6 * 12);
    assert!(number(&found["flops_per_cached_token"]) > number(&found["flops_per_cached_token_dense"]));
    let words = String::from_utf8(run(&["inspect", &small]).stdout).unwrap();
    assert!(words.contains("multiply-adds per cached token") && words.contains("(dense "), "{words}");

    // Statistics are read where they exist: no text is needed, and the result is the same.
    let again = bench.path("again.lowkey");
    done(&["compress", &model, "-o", &again, "--keep", "0.5", "--statistics", &statistics]);
    assert!(std::fs::read(&small).unwrap() == std::fs::read(&again).unwrap());

    // But never in place of another text that is given.
    let other = bench.path("other");
    std::fs::write(&other, "another text").unwrap();
    let compress = ["compress", &*model, "-o", &bench.path("never"), "--statistics", &*statistics, "--calibration"];
    let (kind, message, code) = failed(&[&compress[..], &[&other]].concat());
    assert_eq!((kind.as_str(), code), ("argument", 2), "{message}");
    assert!(message.contains("statistics") && message.contains("--calibration"), "{message}");
    let output = run(&[&compress[..], &[&text]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains(&format!("using statistics from {statistics}")), "{}", stderr(&output));
}

#[test]
fn a_model_calibrates_itself_and_statistics_serve_no_more_than_they_hold() {
    let bench = Bench::new();
    let [model, text, statistics] = ["model", "text", "statistics"].map(|name| bench.path(name));
    let own = ["--calibration", "self", "--calibration-tokens", "700"];
    let compress = |output: &str, more: &[&[&str]]| -> Vec<String> {
        ["compress", &model, "-o", &bench.path(output)].iter().chain(more.concat().iter()).map(|word| word.to_string()).collect()
    };
    let words = |arguments: Vec<String>| -> Value { done(&arguments.iter().map(String::as_str).collect::<Vec<_>>()) };
    let made = words(compress("small", &[&own, &["--statistics", &statistics, "--sensitivity", "scalar", "--span", "2", "--method", "ksvd"]]));
    assert!(number(&made["seconds"]["disturb"]) > 0.0 && number(&made["seconds"]["backward"]) == 0.0, "{made}");
    words(compress("again", &[&own, &["--sensitivity", "none", "--method", "ksvd"]]));
    let weights = |name: &str| std::fs::read(bench.path(&format!("{name}.lowkey"))).unwrap();
    assert!(weights("small") == weights("again"), "the same seed wrote another text");
    words(compress("third", &[&own, &["--statistics", &statistics, "--span", "1", "--method", "ksvd"]]));
    assert!(weights("small") == weights("third"));

    for (more, expected) in [
        (vec!["--sensitivity", "full"], "--sensitivity"),
        (vec!["--span", "4"], "--span"),
        (vec!["--calibration", "self", "--calibration-tokens", "200"], "--calibration"),
        (vec!["--calibration", &text], "--calibration"),
        (vec!["--calibration", "self", &text], "goes alone"),
        (vec!["--calibration-tokens", "200"], "--calibration-tokens"),
        (vec!["--calibration-window", "200"], "--calibration-window"),
    ] {
        let arguments = compress("never", &[&more, &["--statistics", &statistics]]);
        let (kind, message, code) = failed(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!((kind.as_str(), code), ("argument", 2), "{message}");
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn the_calibration_text_that_ships_is_used_where_none_is_given() {
    let bench = Bench::new();
    let made = done(&[
        "compress",
        &bench.path("model"),
        "-o",
        &bench.path("small.lowkey"),
        "--kv-bytes",
        "2000",
        "--calibration-tokens",
        "1000",
        "--weights",
        "f32",
    ]);
    assert!(number(&made["kv_bytes_per_token"]) <= 2000.0);
    // At full rank nothing is lost but rounding.
    let evaluated = done(&[
        "eval",
        &bench.path("small.lowkey"),
        "--against",
        &bench.path("model"),
        "--text",
        &bench.path("text"),
        "--window",
        "100",
        "--tokens",
        "300",
    ]);
    assert!(number(&evaluated["rows"][1]["kl_mean"]) < 1e-4, "{evaluated}");
}

#[cfg(unix)]
#[test]
fn an_interrupted_compression_leaves_nothing() {
    use std::io::{BufRead, BufReader};
    let bench = Bench::new();
    let long: PathBuf = bench.directory.path().join("long");
    std::fs::write(&long, std::fs::read_to_string(bench.path("text")).unwrap().repeat(200)).unwrap();
    let arguments = ["compress", &bench.path("model"), "-o", &bench.path("small.lowkey"), "--calibration", long.to_str().unwrap()];
    let mut child = lowkey().args(arguments).args(["--statistics", &bench.path("statistics")]).stderr(Stdio::piped()).spawn().unwrap();
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    errors.read_line(&mut line).unwrap();
    assert!(line.contains("calibrating"), "{line}");
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let rest: String = errors.lines().map(|line| line.unwrap()).collect();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(rest.contains("interrupted"), "{rest}");
    assert_eq!(bench.names(), ["long", "model", "text"]);
}
