//! What the command line promises of adapter files: one stands for the model that it was made for,
//! in every command, and what is wrong is said by name.

mod common;

use common::SyntheticModel;
use common::cli::{Bench, done, failed, json, keys, lowkey, number, run, stderr};
use std::path::Path;

/// A model and an adapter file for it, at this path.
fn compressed(bench: &Bench, small: &str) -> String {
    done(&["compress", &bench.path("model"), "-o", small, "--method", "dense", "--bits", "4"]);
    small.into()
}

#[test]
fn a_name_gets_its_ending_and_a_directory_is_written_where_that_is_asked_for() {
    let bench = Bench::new();
    let model = bench.path("model");
    for (asked, written) in [("small", "small.lowkey"), ("small-8.5", "small-8.5.lowkey"), ("other.lowkey", "other.lowkey")] {
        let made = done(&["compress", &model, "-o", &bench.path(asked), "--method", "kivi"]);
        assert_eq!(made["output"], bench.path(written));
        assert!(Path::new(&bench.path(written)).is_file());
    }
    let whole = bench.path("whole");
    assert_eq!(done(&["compress", &model, "-o", &whole, "--method", "kivi", "--standalone"])["output"], whole);
    assert_eq!(bench.names(), ["model", "other.lowkey", "small-8.5.lowkey", "small.lowkey", "text", "whole"]);
    // It needs the model no more.
    std::fs::remove_dir_all(&model).unwrap();
    let found = done(&["inspect", &whole]);
    assert_eq!((&found["method"], found.get("adapter")), (&"kivi".into(), None));
    assert_eq!(failed(&["inspect", &bench.path("small.lowkey")]).2, 1);
}

#[test]
fn every_command_takes_it_alone_or_beside_its_model() {
    let bench = Bench::new();
    let (model, text) = (bench.path("model"), bench.path("text"));
    let small = compressed(&bench, &bench.path("small.lowkey"));
    let found = done(&["inspect", &small]);
    assert_eq!(keys(&found["adapter"]), ["path", "bytes", "model"]);
    assert_eq!((&found["adapter"]["model"], &found["model"], &found["method"]), (&model.as_str().into(), &small.as_str().into(), &"dense".into()));
    assert_eq!(found["adapter"]["bytes"], std::fs::metadata(&small).unwrap().len());
    assert_eq!(found["factored"]["source"]["name"], "model");
    assert_eq!(found["kv_bytes_per_token"], found["factored"]["kv_bytes_per_token"]);
    let shown = run(&["inspect", &small]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains(&format!("for {model}")), "{}", stderr(&shown));

    // Where the file does not find it, the model is named with it, and compress says so.
    let elsewhere = tempfile::tempdir().unwrap();
    let far = elsewhere.path().join("far.lowkey").to_str().unwrap().to_string();
    let made = run(&["compress", &model, "-o", &far, "--method", "dense", "--bits", "4"]);
    assert!(stderr(&made).contains(&format!("{model} --adapter {far}")), "{}", stderr(&made));
    assert!(std::fs::read(&far).unwrap() == std::fs::read(&small).unwrap());
    let generate = |names: &[&str]| done(&[&["generate"], names, &["-p", "the ring", "--raw", "-n", "12"]].concat());
    let dense = generate(&[&model]);
    let [alone, beside] = [generate(&[&small]), generate(&[&model, "--adapter", &far])];
    assert_eq!(alone["text"], beside["text"]);
    assert_eq!(alone["kv_bytes"], beside["kv_bytes"]);
    assert_ne!(alone["kv_bytes"], dense["kv_bytes"]);
    assert_eq!(done(&["inspect", &model, "--adapter", &far])["kv_bytes_per_token"], found["kv_bytes_per_token"]);

    // Commands that take several models find it among them.
    let bench_rows = done(&["bench", &far, &model, "--prefill", "4", "--steps", "2", "--rounds", "1"]);
    let layouts: Vec<_> = bench_rows["rows"].as_array().unwrap().iter().map(|row| row["layout"].as_str().unwrap()).collect();
    assert_eq!(layouts, ["q4", "f16"]);
    let eval = |names: &[&str]| done(&[&["eval"], names, &["--text", &text, "--window", "100", "--tokens", "300"]].concat());
    let with = eval(&[&far, "--against", &model]);
    assert_eq!(with["rows"].as_array().unwrap().len(), 2);
    // Compared with its own model where no other is named.
    let alone = eval(&[&small]);
    assert_eq!((&alone["rows"][0]["method"], &alone["rows"][0]["model"]), (&"dense".into(), &model.as_str().into()));
    assert_eq!(alone["rows"][1]["kl_mean"], with["rows"][1]["kl_mean"]);
    assert!(number(&alone["rows"][1]["kl_mean"]) > 0.0);
    assert_eq!(eval(&[&far, &model])["rows"].as_array().unwrap().len(), 3);
    assert_eq!(eval(&[&model, &far])["rows"][1]["kl_mean"], with["rows"][1]["kl_mean"]);
}

/// A model among those that have been fetched is known by the name that it was fetched by.
#[test]
fn a_fetched_model_is_found_wherever_the_file_goes() {
    let bench = Bench::new();
    let cache = bench.directory.path().join("cache");
    std::fs::create_dir(&cache).unwrap();
    std::fs::rename(bench.path("model"), cache.join("some--model")).unwrap();
    let cached = |arguments: &[&str]| {
        let output = lowkey().env("LOWKEY_CACHE", &cache).args(arguments).args(["--json", "--device", "cpu"]).output().unwrap();
        (json(&output), output.status.code())
    };
    let elsewhere = tempfile::tempdir().unwrap();
    let small = elsewhere.path().join("small.lowkey").to_str().unwrap().to_string();
    let (made, code) = cached(&["compress", "some/model", "-o", &small, "--method", "dense"]);
    assert_eq!(code, Some(0), "{made}");
    let (found, _) = cached(&["inspect", &small]);
    assert_eq!(found["adapter"]["model"], cache.join("some--model").to_str().unwrap());
    assert_eq!(found["factored"]["source"]["pull"], "some/model");
    // By its fingerprint, where it was fetched as another's.
    std::fs::rename(cache.join("some--model"), cache.join("other--name")).unwrap();
    assert_eq!(cached(&["inspect", &small]).0["adapter"]["model"], cache.join("other--name").to_str().unwrap());
    std::fs::remove_dir_all(cache.join("other--name")).unwrap();
    let (error, code) = cached(&["generate", &small, "-p", "x"]);
    let message = error["error"]["message"].as_str().unwrap();
    assert_eq!(code, Some(1));
    for part in ["was made for some--model (llama", "fingerprint", "--adapter", "`lowkey pull some/model`"] {
        assert!(message.contains(part), "no {part:?} in {message}");
    }
}

#[test]
fn what_does_not_go_together_is_refused_by_name() {
    let bench = Bench::new();
    let [model, other, broken, whole] = ["model", "other", "broken.lowkey", "whole"].map(|name| bench.path(name));
    let small = compressed(&bench, &bench.path("small.lowkey"));
    SyntheticModel { seed: 9, ..SyntheticModel::default() }.write(Path::new(&other));
    done(&["compress", &model, "-o", &whole, "--method", "dense", "--standalone"]);
    let bytes = std::fs::read(&small).unwrap();
    std::fs::write(&broken, &bytes[..bytes.len() / 2]).unwrap();
    let missing = bench.path("missing.lowkey");
    for (model, adapter, kind, parts) in [
        (&other, &small, "checkpoint", [&*small, "made for model (", "other is another model: other ("]),
        (&whole, &small, "checkpoint", [&*small, "whole has been compressed already", "give the dense model"]),
        (&small, &small, "checkpoint", [&*small, "is an adapter file itself", "name that"]),
        (&model, &broken, "tensor", [&*broken, "truncated", "rows."]),
        (&model, &bench.path("text"), "checkpoint", ["text", "not a safetensors file", "header"]),
        (&model, &missing, "io", ["cannot read", &*missing, "No such file"]),
    ] {
        for command in [&["generate", "-p", "x", "--device", "cpu"][..], &["inspect"]] {
            let (found, message, code) = failed(&[command, &[model, "--adapter", adapter]].concat());
            assert_eq!((found.as_str(), code), (kind, 1), "{message}");
            assert!(parts.iter().all(|part| message.contains(part)), "{parts:?} in {message}");
        }
    }
    // Nothing is made of what was made.
    for made in [&small, &whole] {
        let (_, message, code) = failed(&["compress", made, "-o", &bench.path("again"), "--method", "dense"]);
        assert!(code == 2 && message.contains("compressed already"), "{message}");
    }
    let (_, message, _) = failed(&["eval", &model, "--against", &small, "--text", &bench.path("text"), "--device", "cpu"]);
    assert!(message.contains("against") && message.contains("small.lowkey has been compressed itself"), "{message}");
}
