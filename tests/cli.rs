//! What the command line promises: its JSON keys, its exit codes, its words when something is wrong, and nothing half-written.

mod common;

use common::SyntheticModel;
use common::cli::{Bench, done, failed, json, keys, lowkey, number, run, stderr};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

#[test]
fn inspect_compress_eval_bench_and_generate_work_together() {
    let bench = Bench::new();
    let [model, small, text, statistics] = ["model", "small.lowkey", "text", "statistics"].map(|name| bench.path(name));

    let found = done(&["inspect", &model, "--context", "100"]);
    // Two sides, three layers, three heads of 12, two bytes.
    assert_eq!(found["kv_bytes_per_token"], 2 * 3 * 3 * 12 * 2);
    assert_eq!(found["memory"]["kv_bytes"], 100 * 2 * 3 * 3 * 12 * 2);
    assert_eq!((found["method"].as_str(), found["config"]["architecture"].as_str()), (Some("dense"), Some("llama")));

    let compress = ["compress", &*model, "-o", &*small, "--keep", "0.5", "--calibration", &*text, "--statistics", &*statistics];
    let made = done(&compress);
    assert_eq!(keys(&made), ["output", "method", "options", "kv_bytes_per_token", "kv_bytes_per_token_dense", "seconds", "peak_rss_bytes"]);
    assert_eq!(made["output"], small.as_str());
    assert_eq!(keys(&made["seconds"]), ["calibrate", "forward", "backward", "disturb", "moments", "check", "factor", "write"]);
    let kept = number(&made["kv_bytes_per_token"]) / number(&made["kv_bytes_per_token_dense"]);
    assert!(kept <= 0.5 && kept > 0.45, "{kept}");
    assert!(Path::new(&statistics).is_file());
    let found = done(&["inspect", &small]);
    assert_eq!((found["method"].as_str(), &found["kv_bytes_per_token"]), (Some("lowkey"), &made["kv_bytes_per_token"]));

    let evaluated = done(&["eval", &small, "--against", &model, "--text", &text, "--window", "64", "--tokens", "640"]);
    let rows = evaluated["rows"].as_array().unwrap();
    assert_eq!(
        keys(&rows[0]),
        [
            "model",
            "method",
            "layout",
            "sinks",
            "recent",
            "reference",
            "text",
            "window",
            "windows",
            "first_position",
            "last_position",
            "tokens",
            "perplexity",
            "kl_mean",
            "kl_stderr",
            "kl_p99",
            "kl_p999",
            "kl_max",
            "top1_agreement",
            "kv_bytes_per_token",
            "kv_fixed_bytes"
        ]
    );
    assert_eq!((&rows[0]["method"], number(&rows[0]["kl_mean"]), number(&rows[0]["top1_agreement"])), (&"dense".into(), 0.0, 1.0));
    assert_eq!((&rows[1]["method"], &rows[1]["tokens"]), (&"lowkey".into(), &630.into()));
    assert!(number(&rows[1]["kl_mean"]) > 0.0 && number(&rows[1]["kl_p99"]) > number(&rows[1]["kl_mean"]));
    assert!(rows.iter().all(|row| number(&row["perplexity"]).is_finite()));
    assert_eq!(rows[1]["kv_bytes_per_token"], made["kv_bytes_per_token"]);
    assert!((0.0..number(&rows[1]["kl_mean"])).contains(&number(&rows[1]["kl_stderr"])));

    // Two texts, with a prompt before each window's scored part.
    let second = bench.path("second");
    std::fs::write(&second, "and the other ring in an order. ".repeat(60)).unwrap();
    let prefilled = ["eval", &*model, &*small, "--text", &*text, "--text", &*second, "--prefill", "40", "--chunk", "7", "--tokens", "200"];
    let evaluated = done(&[&prefilled[..], &["--window", "100"]].concat());
    let rows = evaluated["rows"].as_array().unwrap();
    let labels: Vec<_> = rows.iter().map(|row| (row["text"].as_str().unwrap(), row["model"].as_str().unwrap())).collect();
    assert_eq!(labels, [(&*text, &*model), (&*text, &*small), (&*second, &*model), (&*second, &*small)]);
    // Of 100 tokens 40 are prompt, and the last predicts nothing.
    assert!(rows.iter().all(|row| row["tokens"] == 2 * 59));
    let shown = run(&[&prefilled[..], &["--window", "100", "--device", "cpu"]].concat());
    assert!(String::from_utf8_lossy(&shown.stdout).contains(&*second), "{}", stderr(&shown));

    // Untrained models find nothing, at any depth.
    let asked = ["eval", &*model, &*small, "--text", &*text, "--tokens", "100", "--needle", "--needle-lengths", "300,400", "--needle-trials", "2"];
    let evaluated = done(&asked);
    let found = evaluated["needle"].as_array().unwrap();
    assert_eq!(
        keys(&found[0]),
        ["model", "method", "layout", "sinks", "recent", "kind", "length", "depth_percent", "trials", "accuracy", "log_probability"]
    );
    assert_eq!(found.len(), 2 * 2 * 5);
    assert!(found.iter().all(|row| row["kind"] == "single"));
    assert_eq!(found[..5].iter().map(|row| row["depth_percent"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 25, 50, 75, 100]);
    assert!(found.iter().all(|row| row["accuracy"] == 0.0 && row["trials"] == 2 && number(&row["log_probability"]) < -1.0));
    assert!(found[..10].iter().all(|row| row["model"] == *model) && found[10..].iter().all(|row| row["model"] == *small));
    let kinds =
        ["eval", &*model, "--text", &*text, "--tokens", "100", "--needle=tracking,multi-turn", "--needle-lengths", "900", "--needle-trials", "1"];
    let names: Vec<_> = done(&kinds)["needle"].as_array().unwrap().iter().map(|row| row["kind"].clone()).collect();
    assert_eq!(names, [["tracking"; 5], ["multi-turn"; 5]].concat());
    let shown = run(&[&kinds[..], &["--device", "cpu"]].concat());
    let shown = String::from_utf8_lossy(&shown.stdout);
    assert!(shown.lines().any(|line| line.contains("  tracking  ")) && shown.contains("  multi-turn  "), "{shown}");
    // The same model twice has two lines, with the same columns.
    let twice = ["eval", &*model, &*model, "--text", &*text, "--tokens", "100", "--needle", "--needle-lengths", "400", "--needle-trials", "1"];
    let shown = run(&[&twice[..], &["--device", "cpu"]].concat());
    let shown = String::from_utf8_lossy(&shown.stdout);
    assert_eq!((shown.matches("at 75 %").count(), shown.matches("  single  ").count()), (1, 2), "{shown}");
    let report = bench.path("report");
    let shown = run(&[&asked[..], &["--device", "cpu", "--report", &report]].concat());
    assert!(String::from_utf8_lossy(&shown.stdout).contains("at 75 %"), "{}", stderr(&shown));
    assert!(stderr(&shown).contains("index.html"), "{}", stderr(&shown));

    // The report says the same, once.
    let written = |name: &str| std::fs::read_to_string(Path::new(&report).join(name)).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&written("report.json")).unwrap(), evaluated);
    assert_eq!((written("rows.csv").lines().count(), written("needle.csv").lines().count()), (1 + 2, 1 + 20));
    assert_eq!(written("index.html").matches("<svg").count(), 3);
    let (kind, message, code) = failed(&[&asked[..], &["--device", "cpu", "--report", &report]].concat());
    assert_eq!((kind.as_str(), code), ("exists", 1));
    assert!(message.contains(&report), "{message}");

    let measured = done(&["bench", &model, &small, "--depth", "0,40", "--prefill", "8", "--steps", "3", "--rounds", "2"]);
    assert_eq!(keys(&measured), ["device", "driver", "tier", "roofline", "rows"]);
    assert_eq!(keys(&measured["roofline"]), ["copy_gbps", "f32_gflops", "f16_gflops"]);
    let rows = measured["rows"].as_array().unwrap();
    assert_eq!(
        keys(&rows[0]),
        [
            "model",
            "method",
            "layout",
            "weights",
            "depth",
            "prefill_tps",
            "decode_tps",
            "decode_ms_p10",
            "decode_ms_p50",
            "decode_ms_p90",
            "kv_bytes_per_token",
            "bytes_per_step",
            "flops_per_step",
            "share_of_roofline",
            "dispatches_per_step",
            "submits_per_step",
            "readback_bytes_per_step"
        ]
    );
    assert_eq!(rows.iter().map(|row| row["depth"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 0, 40, 40]);
    assert!(rows.iter().all(|row| number(&row["decode_tps"]) > 0.0 && number(&row["share_of_roofline"]) > 0.0));
    assert!(
        rows.iter().all(|row| row["kv_bytes_per_token"] == if row["method"] == "dense" { 432.into() } else { made["kv_bytes_per_token"].clone() })
    );

    let said = done(&["generate", &small, "-p", "the ring", "-n", "5", "--temperature", "0.7", "--seed", "3"]);
    assert_eq!(keys(&said), ["text", "prompt_tokens", "tokens", "prefill_tps", "decode_tps", "kv_bytes", "finish"]);
    assert!((1..=5).contains(&said["tokens"].as_u64().unwrap()));
    assert_eq!(said["text"], done(&["generate", &small, "-p", "the ring", "-n", "5", "--temperature", "0.7", "--seed", "3"])["text"]);

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

    // What is compressed itself is no reference.
    let (kind, message, code) = failed(&["eval", &again, "--against", &small, "--text", &text, "--device", "cpu"]);
    assert_eq!((kind.as_str(), code), ("argument", 2), "{message}");
    assert!(message.contains("against") && message.contains(&small), "{message}");
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
fn options_that_a_method_does_not_take_are_refused() {
    let bench = Bench::new();
    let [model, statistics] = ["model", "statistics"].map(|name| bench.path(name));
    let calibration = ["--calibration-tokens", "700", "--keep", "0.5"];
    let published = ["palu", "recalkv", "kqsvd", "ksvd", "eigen"];
    let all = || published.into_iter().chain(["lowkey", "dense", "oscar", "kivi", "kvarn"]);
    // The option, a value for it, and who takes it.
    let table: [(&str, &str, &[&str]); 14] = [
        ("times", "4", &["palu", "recalkv", "kqsvd", "ksvd", "eigen", "lowkey"]),
        ("keep", "0.5", &["palu", "recalkv", "kqsvd", "ksvd", "eigen", "lowkey"]),
        ("kv-bytes", "200", &["palu", "recalkv", "kqsvd", "ksvd", "eigen", "lowkey"]),
        ("layout", "small", &["lowkey"]),
        ("span", "2", &["lowkey"]),
        ("group-heads", "2", &["palu", "recalkv"]),
        ("grouping", "cka", &["recalkv"]),
        ("ranks", "uniform", &published),
        ("bits", "8", &["palu", "recalkv", "kqsvd", "ksvd", "eigen", "dense", "oscar", "kivi", "kvarn"]),
        ("calibration", "self", &["oscar", "palu", "recalkv", "kqsvd", "ksvd", "eigen", "lowkey"]),
        ("calibration-tokens", "700", &["oscar", "palu", "recalkv", "kqsvd", "ksvd", "eigen", "lowkey"]),
        ("calibration-window", "600", &["oscar", "palu", "recalkv", "kqsvd", "ksvd", "eigen", "lowkey"]),
        ("statistics", &statistics, &["oscar", "palu", "recalkv", "kqsvd", "ksvd", "eigen", "lowkey"]),
        // By their own rules for ranks the others weigh nothing.
        ("sensitivity", "full", &["palu", "recalkv", "lowkey"]),
    ];
    for (option, value, takers) in table {
        for method in all().filter(|method| !takers.contains(method)) {
            let given = format!("--{option}");
            let (kind, message, code) = failed(&["compress", &model, "-o", &bench.path("never"), "--method", method, &given, value]);
            assert_eq!((kind.as_str(), code), ("argument", 2), "{method}: {message}");
            assert!(message.starts_with(&format!("{option}: ")) && message.contains("leave it out"), "{method}: {message}");
        }
    }
    for (arguments, option) in [
        (&["--layout", "fast", "--span", "2", "--statistics", &statistics, "--method", "dense"][..], "layout"),
        (&["--layout", "fast", "--span", "2"], "span"),
        (&["--method", "palu", "--ranks", "uniform", "--sensitivity", "full"], "sensitivity"),
        (&["--method", "palu", "--sensitivity", "scalar"], "sensitivity"),
    ] {
        let (kind, message, _) = failed(&[&["compress", &*model, "-o", &bench.path("never")], arguments].concat());
        assert!(kind == "argument" && message.starts_with(&format!("{option}: ")), "{message}");
    }
    assert_eq!(bench.names(), ["model", "text"]);

    // And those that it takes are heeded.
    for (arguments, options) in [
        (
            &["--method", "palu", "--group-heads", "2", "--ranks", "spectrum", "--bits", "8", "--sensitivity", "scalar"][..],
            "groups of 2, ranks by spectrum, 8 bits",
        ),
        (&["--method", "recalkv", "--group-heads", "3", "--grouping", "loss"], "groups of 3, grouped by loss"),
        (&["--layout", "small", "--span", "2", "--sensitivity", "scalar"], "small, span 2, scalar sensitivity"),
        (&["--layout", "fast", "--span", "4", "--statistics", &statistics], "fast"),
        // What the one before has kept.
        (&["--span", "4", "--statistics", &statistics], "small, span 4"),
    ] {
        let small = bench.path("small.lowkey");
        let made = done(&[&["compress", &*model, "-o", &small], &calibration[..], arguments].concat());
        assert_eq!(made["options"], options);
        std::fs::remove_file(&small).unwrap();
    }
    assert_eq!(done(&["compress", &model, "-o", &bench.path("small"), "--method", "dense", "--bits", "8"])["options"], "q8");
}

/// Those whose size is that of their numbers, by every command; the bytes are those of the cache that was read.
#[test]
fn quantised_baselines_are_made_inspected_and_evaluated() {
    let bench = Bench::new();
    let [model, text] = ["model", "text"].map(|name| bench.path(name));
    for (index, (arguments, options)) in [
        (&["--method", "oscar", "--calibration-tokens", "700"][..], "2 bits"),
        (&["--method", "kivi", "--bits", "4"], "4 bits"),
        (&["--method", "kvarn"], "4 bits, values 2"),
        (&["--method", "kvarn", "--bits", "2", "--sinks", "0", "--recent", "0"], "2 bits"),
    ]
    .into_iter()
    .enumerate()
    {
        let small = bench.path(&format!("small{index}.lowkey"));
        let made = done(&[&["compress", &*model, "-o", &small], arguments].concat());
        assert_eq!((&made["method"], &made["options"]), (&arguments[1].into(), &options.into()));
        let found = done(&["inspect", &small]);
        assert_eq!((&found["method"], &found["kv_bytes_per_token"]), (&made["method"], &made["kv_bytes_per_token"]));
        let evaluated = done(&["eval", &small, "--against", &model, "--text", &text, "--window", "200", "--tokens", "600"]);
        let row = &evaluated["rows"][1];
        assert_eq!((&row["method"], &row["kv_bytes_per_token"]), (&made["method"], &made["kv_bytes_per_token"]));
        assert!(number(&row["kl_mean"]) > 0.0 && number(&row["kl_mean"]).is_finite());
    }
    let (kind, message, _) = failed(&["compress", &model, "-o", &bench.path("never"), "--method", "kivi", "--bits", "16"]);
    assert!(kind == "argument" && message.contains("choose 2, 4 or 8"), "{message}");
}

/// Options of the cache in every command that reads text, beside the model without them; a prompt too short for them is said to be.
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

#[test]
fn models_with_different_tokens_are_not_compared() {
    let bench = Bench::new();
    let [model, larger, odd, text] = ["model", "larger", "odd", "text"].map(|name| bench.path(name));
    let dense = SyntheticModel::default();
    SyntheticModel { vocab: dense.vocab + 3, ..SyntheticModel::default() }.write(Path::new(&larger));
    dense.write(Path::new(&odd));
    let tokenizer = Path::new(&odd).join("tokenizer.json");
    let mut rules: Value = serde_json::from_slice(&std::fs::read(&tokenizer).unwrap()).unwrap();
    rules["model"]["merges"] = Value::Array(Vec::new());
    std::fs::write(&tokenizer, rules.to_string()).unwrap();
    for (other, reason) in [(&larger, "vocabulary"), (&odd, "other tokens")] {
        let (kind, message, code) = failed(&["eval", other, "--against", &model, "--text", &text, "--device", "cpu"]);
        assert_eq!((kind.as_str(), code), ("argument", 2), "{message}");
        assert!(message.contains(reason) && message.contains(other.as_str()), "{message}");
    }
}

#[test]
fn a_context_beyond_the_trained_one_is_remarked_on() {
    let bench = Bench::new();
    let context = (SyntheticModel::default().context + 1).to_string();
    let generate = ["generate", &*bench.path("model"), "-p", "the", "-n", "1", "--device", "cpu", "--context"];
    assert!(stderr(&run(&[&generate[..], &[&context]].concat())).contains(&format!("{context} tokens are beyond")));
    assert!(!stderr(&run(&[&generate[..], &["64"]].concat())).contains("beyond"));
    let [model, small] = ["model", "small.lowkey"].map(|name| bench.path(name));
    let own = ["--calibration", "self", "--calibration-tokens", "512"];
    done(&[&["compress", &*model, "-o", &*small][..], &own, &["--layout", "fast", "--times", "2", "--context", "40"]].concat());
    let beyond = stderr(&run(&["generate", &small, "--prompt", "a", "--max-tokens", "1", "--device", "cpu", "--context", "64"]));
    assert!(beyond.contains("64 tokens are beyond the 40 that its rows were made for"), "{beyond}");
}

#[test]
fn text_goes_to_stdout_and_remarks_to_stderr() {
    let bench = Bench::new();
    let model = bench.path("model");
    let generate = ["generate", &*model, "-p", "the", "-n", "4", "--device", "cpu", "--raw"];
    let output = run(&generate);
    let text = done(&["generate", &model, "-p", "the", "-n", "4", "--raw"])["text"].as_str().unwrap().to_string();
    assert_eq!(String::from_utf8_lossy(&output.stdout), text + "\n");
    assert!(stderr(&output).contains("per second"), "{}", stderr(&output));
    assert_eq!(stderr(&run(&[&generate[..], &["--quiet"]].concat())), "");
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

#[test]
fn wrong_usage_exits_with_2() {
    let bench = Bench::new();
    let model = bench.path("model");
    assert_eq!(run(&["generate", &model]).status.code(), Some(2));
    assert_eq!(run(&["nonsense"]).status.code(), Some(2));
    assert_eq!(run(&[]).status.code(), Some(2));
    assert_eq!(run(&["--help"]).status.code(), Some(0));
    assert_eq!(run(&["bench", "--version"]).status.code(), Some(2));
    let (kind, message, code) = failed(&["generate", &model, "-p", "x", "--seed", "many"]);
    assert_eq!((kind.as_str(), code), ("usage", 2));
    assert!(message.contains("--seed") && !message.starts_with("error"), "{message}");
    for (arguments, option) in [
        (vec!["eval", &model, "--text", "text", "--needle=single,several"], "--needle"),
        (vec!["eval", &model, "--text", "text", "--depths", "100", "--window", "50"], "--window"),
        (vec!["eval", &model, "--text", "text", "--generate-prompt", "50"], "--generate"),
        (vec!["eval", &model, "--text", "text", "--exact", "0"], "SINKS+RECENT"),
        (vec!["inspect", &model, "--context", "0"], "--context"),
        (vec!["inspect", &model, "--context", "99999999999"], "--context"),
        (vec!["generate", &model, "-p", "x", "-n", "0"], "--max-tokens"),
        (vec!["doctor", "--tier", "fast"], "f16-subgroups"),
        (vec!["compress", &model, "-o", "/tmp/never", "--keep", "0.5", "--times", "4"], "--times"),
    ] {
        let (kind, message, code) = failed(&arguments);
        assert_eq!((kind.as_str(), code), ("usage", 2), "{arguments:?}: {message}");
        assert!(message.contains(option), "{message}");
    }
    for (arguments, name) in [
        (vec!["generate", &model, "-p", "x", "--tier", "f16", "--device", "cpu"], "tier"),
        (vec!["compress", &model, "-o", "/tmp/never", "--calibration-tokens", "0"], "calibration-tokens"),
        (vec!["eval", &model, "--text", &bench.path("text"), "--tokens", "0", "--device", "cpu"], "tokens:"),
        (vec!["bench", &model, "--depth", "1000000000000", "--device", "cpu"], "depth:"),
        (vec!["bench", &model, "--kernels"], "kernels"),
        (vec!["bench", &model, "--rows", "fast", "--device", "cpu"], "rows"),
        (vec!["bench", "--shape", "15m", "--device", "cpu"], "shape"),
        (vec!["compress", &model, "-o", "/tmp/never", "--layout", "small", "--context", "4096"], "context"),
        (vec!["compress", &model, "-o", "/tmp/never", "--layout", "fast", "--context", "0"], "context"),
        (vec!["generate", &model, "-p", "x", "--temperature=-1", "--device", "cpu"], "temperature"),
        (vec!["generate", &model, "-p", "x", "--context", "0", "--device", "cpu"], "context"),
        (vec!["generate", &model, "-p", "x", "--context", "1000000000000000", "--device", "cpu"], "context"),
        (vec!["generate", &model, "-p", "x", "--context", "1000000000000000"], "context"),
        (vec!["compress", &model, "-o", "/tmp/never", "--keep", "1.5"], "keep"),
        (vec!["compress", &model, "-o", "/tmp/never", "--times", "0.5"], "times"),
        (vec!["compress", &model, "-o", "/tmp/never", "--sensitivity", "none"], "sensitivity"),
        (vec!["compress", &model, "-o", "/tmp/never", "--recent", "18446744073709551615"], "window"),
        (vec!["compress", &model, "-o", "/tmp/never", "--kv-bytes", "0"], "kv-bytes"),
        (vec!["compress", &model, "-o", "/tmp/never", "--method", "dense", "--times", "4"], "--bits"),
        (vec!["compress", &model, "-o", "/tmp/never", "--layout", "fast", "--span", "2"], "span"),
        (vec!["compress", &model, "-o", "/tmp/never", "--method", "dense", "--bits", "5"], "bits"),
        (vec!["compress", &model, "-o", "/tmp/never", "--method", "lowkey", "--ranks", "fisher"], "ranks"),
        (vec!["compress", &model, "-o", "/tmp/never", "--group-heads", "0"], "group-heads"),
        (vec!["eval", &model, "--text", &bench.path("text"), "--window", "1", "--device", "cpu"], "window"),
        (vec!["eval", &model, "--text", &bench.path("text"), "--prefill", "18446744073709551615", "--device", "cpu"], "prefill"),
        (vec!["eval", &model, "--text", &bench.path("text"), "--chunk", "0", "--device", "cpu"], "chunk"),
        (vec!["eval", &model, "--text", &bench.path("text"), "--needle", "--needle-lengths", "20", "--device", "cpu"], "needle-lengths"),
        (vec!["bench", &model, "--steps", "0", "--device", "cpu"], "steps"),
        (vec!["bench", &model, "--depth", "18446744073709551615", "--device", "cpu"], "depth"),
        (vec!["generate", &model, "-p", "x", "--method", "kvreviver", "--group-layers", "2", "--device", "cpu"], "group-layers"),
        (vec!["generate", &model, "-p", "x", "--method", "kvreviver", "--vague", "rows", "--device", "cpu"], "vague"),
        (vec!["generate", &model, "-p", "x", "--method", "kvreviver", "--select", "8", "--device", "cpu"], "select"),
        (vec!["generate", &model, "-p", "x", "--method", "xkv", "--vague", "mean", "--device", "cpu"], "vague"),
        (vec!["eval", &model, "--text", &bench.path("text"), "--method", "kvreviver", "--kv-bytes", "8", "--device", "cpu"], "kv-bytes"),
    ] {
        let (kind, message, code) = failed(&arguments);
        assert_eq!((kind.as_str(), code), ("argument", 2), "{arguments:?}: {message}");
        assert!(message.contains(name), "{message}");
    }
}

#[test]
fn evaluation_goes_to_depths_with_and_without_exact_tokens() {
    let bench = Bench::new();
    let [model, small, bare, text, report] = ["model", "small.lowkey", "bare.lowkey", "text", "report"].map(|name| bench.path(name));
    let compress = ["compress", &*model, "--method", "dense", "--bits", "4", "-o"];
    done(&[&compress[..], &[&small]].concat());
    done(&[&compress[..], &[&bare, "--sinks", "0", "--recent", "0"]].concat());

    let asked = ["eval", &*small, "--against", &*model, "--text", &*text, "--depths", "300,450", "--tokens", "1000", "--exact", "0+0"];
    let more = ["--generate", "60", "--generate-prompt", "40", "--needle", "--needle-trials", "1", "--report", &*report];
    let evaluated = done(&[&asked[..], &more].concat());
    let rows = evaluated["rows"].as_array().unwrap();
    let labels: Vec<_> = rows
        .iter()
        .map(|row| (row["window"].as_u64().unwrap(), row["model"].as_str().unwrap(), row["sinks"].as_u64(), row["recent"].as_u64()))
        .collect();
    let lines = |depth| [(depth, &*model, None, None), (depth, &*small, Some(4), Some(32)), (depth, &*small, Some(0), Some(0))];
    assert_eq!(labels, [lines(300), lines(450)].concat());
    for row in &rows[..3] {
        assert_eq!([&row["windows"], &row["tokens"], &row["first_position"], &row["last_position"]].map(|n| n.as_u64()), [2, 598, 0, 298].map(Some));
        assert_eq!((&row["reference"], &row["kl_p999"]), (&model.as_str().into(), &Value::Null));
    }
    let kl: Vec<f64> = rows.iter().map(|row| number(&row["kl_mean"])).collect();
    assert!(kl[0] == 0.0 && kl[1] > 0.0 && kl[2] > kl[1] && kl[5] > kl[4], "{kl:?}");
    // It is what a model is that was made without them.
    let made = &done(&["eval", &bare, "--against", &model, "--text", &text, "--depths", "450", "--tokens", "1000"])["rows"][1];
    for key in ["kl_mean", "kl_p99", "kl_max", "perplexity", "sinks", "recent", "kv_bytes_per_token", "kv_fixed_bytes", "top1_agreement"] {
        assert_eq!(made[key], rows[5][key], "{key}");
    }

    let written = evaluated["continuations"].as_array().unwrap();
    let labels: Vec<_> = written.iter().map(|row| (row["model"].as_str().unwrap(), row["sinks"].as_u64())).collect();
    assert_eq!(labels, [(&*model, None), (&*small, Some(4)), (&*small, Some(0))]);
    for row in written {
        assert_eq!([&row["prompt_tokens"], &row["tokens"]].map(Value::as_u64), [40, 60].map(Some));
        assert!(number(&row["perplexity"]) >= 1.0 && (0.0..=1.0).contains(&number(&row["distinct_4grams"])), "{row}");
    }
    assert_eq!((&written[0]["agreed_tokens"], &written[1]["reference"]), (&60.into(), &model.as_str().into()));

    let found = evaluated["needle"].as_array().unwrap();
    assert_eq!(found.len(), 3 * 2 * 5);
    let lengths: Vec<_> = found.iter().step_by(5).map(|row| (row["length"].as_u64().unwrap(), row["sinks"].as_u64())).collect();
    assert_eq!(lengths, [None, Some(4), Some(0)].map(|sinks| [300, 450].map(|length| (length, sinks))).concat());
    assert!(Path::new(&report).join("continuations.csv").is_file());

    let shown = run(&[&asked[..], &["--device", "cpu"]].concat());
    let shown = String::from_utf8_lossy(&shown.stdout);
    for word in ["  all  ", "  4 + 32  ", "  0 + 0  ", "depth 450: 898 predictions, at positions 0 to 448 of 2 windows\n", "below 1000 predictions"] {
        assert!(shown.contains(word), "no {word:?} in {shown}");
    }
    // More than a thousand predictions, and nothing that was not asked for.
    let shown = run(&["eval", &model, &small, "--text", &text, "--window", "300", "--tokens", "1200", "--device", "cpu"]);
    let shown = String::from_utf8_lossy(&shown.stdout);
    assert!(shown.contains("KL p99.9") && ["depth", "exact", "below"].iter().all(|word| !shown.contains(word)), "{shown}");

    std::fs::write(bench.path("short"), "the 7 and 4 in a ring. ").unwrap();
    for (arguments, words) in [
        (vec!["--text", &*text, "--depths", "513"], vec!["depths: ", "trained for 512 positions"]),
        (vec!["--text", &*text, "--depths", "100,1"], vec!["depths: 1 "]),
        (vec!["--text", &bench.path("short"), "--depths", "100"], vec!["text: ", "short has ", "depths up to"]),
        (vec!["--text", &*text, "--tokens", "100", "--generate", "0"], vec!["generate: 0 "]),
        (vec!["--text", &*text, "--tokens", "100", "--generate", "100", "--generate-prompt", "413"], vec!["generate: ", "trained for 512 positions"]),
        (vec!["--text", &*text, "--tokens", "100", "--generate", "18446744073709551615"], vec!["generate: ", "trained for 512 positions"]),
        (vec!["--text", &bench.path("short"), "--generate", "100", "--generate-prompt", "413"], vec!["text: ", "the prompt takes 413"]),
    ] {
        let (kind, message, code) = failed(&[&["eval", &small, "--against", &model, "--device", "cpu"], &arguments[..]].concat());
        assert_eq!((kind.as_str(), code), ("argument", 2), "{arguments:?}: {message}");
        assert!(words.iter().all(|word| message.contains(word)), "{words:?} in {message}");
    }
    // What is made for a model is compared with it unless it stands alone.
    let whole = bench.path("whole");
    done(&["compress", &model, "--method", "dense", "--standalone", "-o", &whole]);
    let (_, message, _) = failed(&["eval", &whole, "--text", &text, "--generate", "10", "--device", "cpu"]);
    assert!(message.contains("--against"), "{message}");
}

/// A cache that forgets is had in every command that reads text, and is named.
#[test]
fn a_cache_that_forgets_is_measured_and_talked_with() {
    let bench = Bench::new();
    let [model, text] = ["model", "text"].map(|name| bench.path(name));
    let forgetting = ["--method", "kvreviver", "--keep", "0.5"];
    let rows =
        &done(&[&["eval", &model, "--against", &model, "--text", &text, "--window", "200", "--tokens", "400"], &forgetting[..]].concat())["rows"];
    assert_eq!((rows[0]["method"].as_str(), rows[1]["method"].as_str()), (Some("dense"), Some("kvreviver")));
    assert_eq!(rows[1]["layout"], "candidates, nothing of the evicted, f16");
    let bytes = |row: usize| number(&rows[row]["kv_bytes_per_token"]);
    assert!(bytes(1) <= 0.5 * bytes(0) && number(&rows[1]["kl_mean"]) > 0.0);
    let mean = [&forgetting[..], &["--vague", "mean"]].concat();
    let answer = done(&[&["generate", &model, "-p", "the 3 and 4", "--context", "200", "-n", "100"], &mean[..]].concat());
    assert!(number(&answer["tokens"]) > 0.0);
    let measured = &done(&[&["bench", &model, "--depth", "100", "--prefill", "32", "--steps", "2", "--rounds", "1"], &mean[..]].concat())["rows"][1];
    assert_eq!(measured["method"], "kvreviver");
}

#[test]
fn what_fails_says_on_what_and_exits_with_1() {
    let bench = Bench::new();
    let [model, text] = ["model", "text"].map(|name| bench.path(name));

    let (kind, message, code) = failed(&["inspect", "/nowhere/at/all"]);
    assert_eq!((kind.as_str(), code), ("io", 1));
    assert!(message.contains("/nowhere/at/all") && message.contains("lowkey pull"), "{message}");
    let empty = tempfile::tempdir().unwrap();
    let unfetched = lowkey().env("LOWKEY_CACHE", empty.path()).args(["inspect", "stories15M", "--json"]).output().unwrap();
    assert!(json(&unfetched)["error"]["message"].as_str().unwrap().contains("`lowkey pull stories15M`"));

    for (name, form) in [("taken.lowkey", &[][..]), ("text", &["--standalone"])] {
        std::fs::copy(&text, bench.path("taken.lowkey")).unwrap();
        let output = bench.path(name);
        let (kind, message, code) = failed(&[&["compress", &*model, "-o", output.strip_suffix(".lowkey").unwrap_or(&output)], form].concat());
        assert_eq!((kind.as_str(), code), ("exists", 1));
        assert!(message.contains(&output), "{message}");
        assert!(std::fs::read_to_string(&output).unwrap().starts_with("the 0"));
    }
    std::fs::remove_file(bench.path("taken.lowkey")).unwrap();

    // Before an hour's work rather than after it.
    let nowhere = bench.path("nowhere/file");
    for option in ["-o", "--statistics"] {
        let mut compress = vec!["compress", &*model, option, &nowhere];
        let small = bench.path("small");
        if option != "-o" {
            compress.extend(["-o", &small]);
        }
        let output = run(&compress);
        assert_eq!(output.status.code(), Some(1));
        let path = if option == "-o" { format!("{nowhere}.lowkey") } else { nowhere.clone() };
        assert!(stderr(&output).starts_with(&format!("error: cannot create {path}:")), "{}", stderr(&output));
    }

    let (kind, message, code) = failed(&["eval", &model, "--text", &bench.path("missing"), "--device", "cpu"]);
    assert_eq!((kind.as_str(), code), ("io", 1));
    assert!(message.contains("missing"), "{message}");

    let (kind, message, code) = failed(&["generate", &model, "--prompt-file", &text, "--context", "64", "--raw", "--device", "cpu"]);
    assert_eq!((kind.as_str(), code), ("context", 1), "{message}");
    assert!(message.contains("64") && message.contains("--context"), "{message}");

    std::fs::remove_file(Path::new(&model).join("tokenizer.json")).unwrap();
    let (kind, message, code) = failed(&["generate", &model, "-p", "x", "--device", "cpu"]);
    assert_eq!((kind.as_str(), code), ("tokenizer", 1));
    assert!(message.contains("tokenizer.json"), "{message}");
    let output = run(&["generate", &model, "-p", "x", "--device", "cpu"]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
    assert!(stderr(&output).starts_with("error: "), "{}", stderr(&output));
    assert_eq!(bench.names(), ["model", "text"]);
}

#[test]
fn without_an_adapter_both_ways_out_are_named() {
    let bench = Bench::new();
    let hidden = |arguments: &[&str]| {
        let nowhere = "/nonexistent/driver.json";
        lowkey().env("VK_DRIVER_FILES", nowhere).env("VK_ICD_FILENAMES", nowhere).env("WGPU_BACKEND", "vulkan").args(arguments).output().unwrap()
    };
    let model = bench.path("model");
    let output = hidden(&["generate", &model, "-p", "x", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let error = &json(&output)["error"];
    assert_eq!(error["kind"], "no_adapter");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("driver") && message.contains("--device cpu"), "{message}");
    // The other way out is one.
    assert_eq!(hidden(&["generate", &model, "-p", "x", "-n", "1", "--device", "cpu"]).status.code(), Some(0));
}

#[test]
fn an_answer_ends_at_a_stop_string() {
    let bench = Bench::new();
    let model = bench.path("model");
    let generate =
        |more: &[&str]| done(&[&["generate", &*model, "-p", "ring ", "--raw", "-n", "40", "--temperature", "1.5", "--seed", "5"], more].concat());
    let free = generate(&[]);
    let text = free["text"].as_str().unwrap();
    let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[middle..].chars().take(2).collect();
    let stopped = generate(&["--stop", &stop]);
    assert_eq!((stopped["text"].as_str(), stopped["finish"].as_str()), (text.split(&stop).next(), Some("stop")));
}

#[test]
fn the_gpu_says_what_the_processor_says_in_every_tier() {
    let bench = Bench::new();
    let model = bench.path("model");
    let generate = ["generate", &*model, "-p", "the ring", "--raw", "-n", "24"];
    let expected = done(&generate)["text"].clone();
    for tier in ["f16-subgroups", "f16", "baseline"] {
        let output = run(&[&generate[..], &["--tier", tier, "--json"]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_eq!(json(&output)["text"], expected, "tier {tier}");
    }
    let (kind, message, code) = failed(&["generate", &model, "-p", "x", "--device", "no such adapter"]);
    assert_eq!((kind.as_str(), code), ("no_adapter", 1));
    assert!(message.contains("no such adapter"), "{message}");

    // With no token exact, where a query reads its own row from its code.
    let (small, text) = (bench.path("small.lowkey"), bench.path("text"));
    done(&["compress", &model, "-o", &small, "--method", "dense", "--bits", "4"]);
    let eval = ["eval", &*small, "--against", &*model, "--text", &*text, "--window", "150", "--tokens", "300", "--exact", "4+0,0+0"];
    let found = [done(&eval), json(&run(&[&eval[..], &["--json"]].concat()))].map(|found| {
        let rows = found["rows"].as_array().unwrap().clone();
        rows.iter().map(|row| (row["recent"].as_u64(), number(&row["kl_mean"]))).collect::<Vec<_>>()
    });
    assert_eq!(found.each_ref().map(Vec::len), [4, 4]);
    for (&(recent, processor), &(_, gpu)) in found[0].iter().zip(&found[1]).skip(1) {
        assert!((processor - gpu).abs() < 0.05 * processor, "{recent:?}: {found:?}");
    }

    let output = run(&["bench", &model, "--prefill", "4", "--steps", "3", "--rounds", "1", "--json"]);
    let row = &json(&output)["rows"][0];
    assert_eq!((row["submits_per_step"].as_u64(), row["readback_bytes_per_step"].as_u64()), (Some(1), Some(4)));
    let dispatches = row["dispatches_per_step"].as_u64().unwrap();
    // Three layers of at most eight, and embedding, final norm, head and argmax.
    assert!((1..=3 * 8 + 6).contains(&dispatches), "{dispatches} dispatches");
    assert_eq!((row["weights"].as_str(), row["kv_bytes_per_token"].as_u64()), (Some("f16"), Some(432)));

    let doctor = json(&run(&["doctor", "--json"]));
    assert_eq!(keys(&doctor), ["version", "adapters", "processor_threads", "would_run", "problem"]);
    assert!(doctor["would_run"]["tier"].is_string() && doctor["problem"].is_null(), "{doctor}");
}

#[test]
fn a_closed_pipe_ends_it_quietly() {
    let bench = Bench::new();
    let arguments = ["generate", &*bench.path("model"), "-p", "the", "--raw", "--context", "512", "--device", "cpu", "--quiet"];
    let mut child = lowkey().args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}

#[cfg(unix)]
#[test]
fn an_interrupted_compression_leaves_nothing() {
    use std::io::{BufRead, BufReader};
    let bench = Bench::new();
    let long: PathBuf = bench.directory.path().join("long");
    std::fs::write(&long, std::fs::read_to_string(bench.path("text")).unwrap().repeat(200)).unwrap();
    let arguments = ["compress", &bench.path("model"), "-o", &bench.path("small"), "--calibration", long.to_str().unwrap()];
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
