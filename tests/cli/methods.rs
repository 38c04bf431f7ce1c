//! Which methods `lowkey compress` has, and which options each of them takes.

use super::*;

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
    assert_eq!(done(&["compress", &model, "-o", &bench.path("small.lowkey"), "--method", "dense", "--bits", "8"])["options"], "q8");
}

/// Those whose size is that of their numbers, by every command; the bytes are those of the cache
/// that was read.
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
