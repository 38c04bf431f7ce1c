//! `lowkey eval`: distances from the dense model, questions about texts, and reports.

use super::*;

#[test]
fn models_are_compared_on_texts() {
    let bench = Bench::new();
    let (small, [model, text]) = (small(&bench), ["model", "text"].map(|name| bench.path(name)));

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
    assert_eq!(rows[1]["kv_bytes_per_token"], done(&["inspect", &small])["kv_bytes_per_token"]);
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

    // What is compressed itself is no reference.
    let (kind, message, code) = failed(&["eval", &model, "--against", &small, "--text", &text, "--device", "cpu"]);
    assert_eq!((kind.as_str(), code), ("argument", 2), "{message}");
    assert!(message.contains("against") && message.contains(&small), "{message}");
}

#[test]
fn questions_are_asked_and_reported() {
    let bench = Bench::new();
    let (small, [model, text]) = (small(&bench), ["model", "text"].map(|name| bench.path(name)));

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

/// What few bits cost is measured against the model as it is stored.
#[test]
fn weights_of_few_bits_are_compared_with_the_stored() {
    let bench = Bench::new();
    let [model, text] = ["wide", "text"].map(|name| bench.path(name));
    // Rows that are whole blocks.
    let wide = SyntheticModel { hidden: 64, heads: 4, kv_heads: 2, head_dim: 16, ffn: 96, ..SyntheticModel::default() };
    wide.write(Path::new(&model));
    let found = done(&["eval", &model, "--against", &model, "--weights", "q8", "--text", &text, "--window", "64"]);
    let rows = found["rows"].as_array().unwrap();
    let divergence = |row: &Value| number(&row["kl_mean"]);
    assert_eq!(rows.len(), 2);
    assert!(divergence(&rows[0]) == 0.0 && divergence(&rows[1]) > 1e-8 && divergence(&rows[1]) < 1e-2, "{rows:?}");
}
