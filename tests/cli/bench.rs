//! `lowkey bench`.

use super::*;

#[test]
fn speed_is_measured_by_depth() {
    let bench = Bench::new();
    let (small, model) = (small(&bench), bench.path("model"));
    let bytes = &done(&["inspect", &small])["kv_bytes_per_token"];

    let measured = done(&["bench", &model, &small, "--depth", "0,40", "--prefill", "8", "--steps", "3", "--rounds", "2"]);
    assert_eq!(keys(&measured), ["device", "driver", "backend", "tier", "roofline", "rows"]);
    assert_eq!(keys(&measured["roofline"]), ["copy_gbps", "f32_gflops", "f16_gflops"]);
    let rows = measured["rows"].as_array().unwrap();
    assert_eq!(
        keys(&rows[0]),
        [
            "model",
            "method",
            "layout",
            "weights",
            "parameters",
            "weight_bytes",
            "depth",
            "rounds",
            "prefill",
            "steps",
            "prefill_tps",
            "prefill_tps_deviation",
            "decode_tps",
            "decode_tps_deviation",
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
    assert!(rows.iter().all(|row| row["kv_bytes_per_token"] == if row["method"] == "dense" { 432.into() } else { bytes.clone() }));
}

#[test]
fn weights_are_measured_in_every_type() {
    let measured = |arguments: &[&str]| {
        let brief = ["--depth", "0", "--prefill", "4", "--steps", "2", "--rounds", "1", "--json", "--device", "gpu"];
        let output = run(&[&["bench"], arguments, &brief].concat());
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
        let rows = json(&output)["rows"].as_array().unwrap().clone();
        rows.iter().map(|row| (row["weights"].as_str().unwrap().to_string(), number(&row["bytes_per_step"]))).collect::<Vec<_>>()
    };
    let shapes = measured(&["--shape", "15m", "--rows", "f16", "--weights", "q4,f16"]);
    assert_eq!([&*shapes[0].0, &*shapes[1].0], ["q4", "f16"]);
    assert!(shapes[0].1 < 0.4 * shapes[1].1, "{shapes:?}");

    let bench = Bench::new();
    let models = measured(&[&bench.path("model"), "--weights", "stored,f16"]);
    assert_eq!([&*models[0].0, &*models[1].0], ["f16"; 2]);
    assert_eq!(models[0].1, models[1].1);
}

#[test]
fn a_report_has_the_columns_of_llama_bench_and_a_picture() {
    let bench = Bench::new();
    let (small, model, report) = (small(&bench), bench.path("model"), bench.path("report"));
    let depths = ["--depth", "0,12,96", "--prefill", "8", "--steps", "3", "--rounds", "2", "--report", &report];
    let rows = done(&[&["bench", &model, &small], &depths[..]].concat())["rows"].as_array().unwrap().clone();
    let read = |name: &str| std::fs::read_to_string(Path::new(&report).join(name)).unwrap();
    let page = read("speed.md");
    let lines: Vec<Vec<&str>> = page.lines().filter(|line| line.starts_with("| ")).map(|line| line.split('|').map(str::trim).collect()).collect();
    assert_eq!(lines[0][1..8], ["model", "size", "params", "backend", "threads", "test", "t/s"]);
    let tests: Vec<&str> = lines[2..].iter().map(|line| line[6]).collect();
    let both = |depth: &str| [format!("pp8{depth}"), format!("tg3{depth}")];
    assert_eq!(tests, ["", "", " @ d12", " @ d12", " @ d96", " @ d96"].map(both).concat());
    assert_eq!(lines[3][7], format!("{:.2} ± {:.2}", number(&rows[0]["decode_tps"]), number(&rows[0]["decode_tps_deviation"])));
    assert!(lines[2][2].ends_with(" MiB") && lines[2][3].ends_with(" M") && lines[2][4] == "CPU", "{:?}", lines[2]);
    assert!(page.starts_with("![") && page.contains("](speed.svg)"), "{page}");

    let svg = read("speed.svg");
    let picture = roxmltree::Document::parse(&svg).unwrap();
    let texts: Vec<&str> = picture.descendants().filter(|node| node.has_tag_name("text")).filter_map(|node| node.text()).map(str::trim).collect();
    // A name for each line, and depths by doublings.
    for text in ["model", "small.lowkey", "tokens in the cache", "0", "12", "96"] {
        assert!(texts.iter().any(|found| found.starts_with(text)), "no {text} in {texts:?}");
    }
    assert!(svg.contains("prefers-color-scheme: dark"));
}
