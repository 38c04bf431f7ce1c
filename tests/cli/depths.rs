//! `lowkey eval` at depths, with and without exact tokens, and of what models write themselves.

use super::*;

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
