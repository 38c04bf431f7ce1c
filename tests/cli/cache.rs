//! Options of the cache, in every command that reads text.

use super::*;

/// Options of the cache in every command that reads text, beside the model without them; a prompt
/// too short for them is said to be.
#[test]
fn what_depends_on_the_prompt_is_an_option_of_the_cache() {
    let bench = Bench::new();
    let (model, text) = (bench.path("model"), bench.path("text"));
    let xkv = ["--method", "xkv", "--group-layers", "2", "--times", "1.5", "--bits", "16"];
    let with = |command: &[&str], more: &[&str]| done(&[command, &xkv, more].concat());
    let prompt = "the ring and the other ring ".repeat(30);

    let generate = ["generate", &*model, "-p", &prompt, "--raw", "-n", "8", "--context", "700"];
    let (dense, small) = (done(&generate), with(&generate, &["--select", "64"]));
    assert_eq!(dense["prompt_tokens"], small["prompt_tokens"]);
    assert_ne!(dense["kv_bytes"], small["kv_bytes"]);

    let eval = with(&["eval", &model, "--against", &model, "--text", &text, "--prefill", "200", "--window", "260", "--tokens", "520"], &[]);
    let rows = eval["rows"].as_array().unwrap();
    assert_eq!((rows[0]["method"].as_str(), rows[1]["method"].as_str()), (Some("dense"), Some("xkv")));
    assert_eq!(rows[1]["layout"], "groups of 2, 16 bits");
    assert!(number(&rows[1]["kl_mean"]) > number(&rows[0]["kl_mean"]));
    assert!(number(&rows[1]["kv_bytes_per_token"]) * 1.5 <= number(&rows[0]["kv_bytes_per_token"]));

    let bench_rows = with(&["bench", &model, "--depth", "300", "--prefill", "4", "--steps", "2", "--rounds", "1"], &["--select", "64"]);
    let rows: Vec<&str> = bench_rows["rows"].as_array().unwrap().iter().map(|row| row["layout"].as_str().unwrap()).collect();
    assert_eq!(rows, ["f16", "groups of 2, 16 bits", "groups of 2, 16 bits, 64 selected"]);

    let short = run(&[&["generate", &model, "-p", "the", "--raw", "-n", "2", "--device", "cpu"], &xkv[..]].concat());
    assert!(stderr(&short).contains("xkv keeps the cache exact: its bases pay from"), "{}", stderr(&short));

    for (arguments, option) in [
        (vec!["--select", "64"], "select"),
        (vec!["--select", "63", "--method", "xkv"], "select"),
        (vec!["--select", "18446744073709551608", "--method", "xkv"], "select"),
        (vec!["--method", "xkv", "--bits", "5"], "bits"),
        (vec!["--method", "xkv", "--keep", "2"], "keep"),
        (vec!["--method", "xkv", "--group-layers", "0"], "group-layers"),
    ] {
        let (_, message, code) = failed(&[&["generate", &model, "-p", "x", "--device", "cpu"], &arguments[..]].concat());
        assert!(code == 2 && message.starts_with(&format!("{option}: ")), "{arguments:?}: {message}");
    }
    assert_eq!(failed(&["generate", &model, "-p", "x", "--times", "4"]).2, 2);
}

/// A cache that evicts is had in every command that reads text, and is named.
#[test]
fn a_cache_that_evicts_is_measured_and_talked_with() {
    let bench = Bench::new();
    let [model, text] = ["model", "text"].map(|name| bench.path(name));
    let eviction = ["--method", "kvreviver", "--keep", "0.5"];
    let rows =
        &done(&[&["eval", &model, "--against", &model, "--text", &text, "--window", "200", "--tokens", "400"], &eviction[..]].concat())["rows"];
    assert_eq!((rows[0]["method"].as_str(), rows[1]["method"].as_str()), (Some("dense"), Some("kvreviver")));
    assert_eq!(rows[1]["layout"], "candidates, nothing of the evicted, f16");
    let bytes = |row: usize| number(&rows[row]["kv_bytes_per_token"]);
    assert!(bytes(1) <= 0.5 * bytes(0) && number(&rows[1]["kl_mean"]) > 0.0);
    let mean = [&eviction[..], &["--evicted", "mean"]].concat();
    let answer = done(&[&["generate", &model, "-p", "the 3 and 4", "--context", "200", "-n", "100"], &mean[..]].concat());
    assert!(number(&answer["tokens"]) > 0.0);
    let measured = &done(&[&["bench", &model, "--depth", "100", "--prefill", "32", "--steps", "2", "--rounds", "1"], &mean[..]].concat())["rows"][1];
    assert_eq!(measured["method"], "kvreviver");
}
