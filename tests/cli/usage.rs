//! Exit codes, and words for what is wrong.

use super::*;

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
        (vec!["generate", &model, "-p", "x", "--weights", "f32", "--device", "gpu"], "weights"),
        (vec!["bench", &model, "--weights", "q5"], "weights"),
        (vec!["bench", "--shape", "15m", "--weights", "stored", "--device", "gpu"], "weights"),
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
        (vec!["generate", &model, "-p", "x", "--context", "1000000000000000", "--device", "gpu"], "context"),
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
        (vec!["generate", &model, "-p", "x", "--method", "kvreviver", "--evicted", "rows", "--device", "cpu"], "evicted"),
        (vec!["generate", &model, "-p", "x", "--method", "kvreviver", "--select", "8", "--device", "cpu"], "select"),
        (vec!["generate", &model, "-p", "x", "--method", "xkv", "--evicted", "mean", "--device", "cpu"], "evicted"),
        (vec!["eval", &model, "--text", &bench.path("text"), "--method", "kvreviver", "--kv-bytes", "8", "--device", "cpu"], "kv-bytes"),
    ] {
        let (kind, message, code) = failed(&arguments);
        assert_eq!((kind.as_str(), code), ("argument", 2), "{arguments:?}: {message}");
        assert!(message.contains(name), "{message}");
    }
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
        let small = bench.path("small.lowkey");
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
