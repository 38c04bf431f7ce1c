//! What commands run on.

use super::*;

#[test]
fn without_an_adapter_it_is_the_processor_or_an_error_that_names_the_ways_out() {
    let bench = Bench::new();
    let hidden = |arguments: &[&str]| {
        let nowhere = "/nonexistent/driver.json";
        lowkey().env("VK_DRIVER_FILES", nowhere).env("VK_ICD_FILENAMES", nowhere).env("WGPU_BACKEND", "vulkan").args(arguments).output().unwrap()
    };
    let model = bench.path("model");
    let output = hidden(&["generate", &model, "-p", "x", "--json", "--device", "gpu"]);
    assert_eq!(output.status.code(), Some(1));
    let error = &json(&output)["error"];
    assert_eq!(error["kind"], "no_adapter");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("driver") && message.contains("--device cpu"), "{message}");
    // Whoever names no device is told which it is.
    let output = hidden(&["generate", &model, "-p", "x", "-n", "1"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("no GPU was found: running on the processor"), "{}", stderr(&output));
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
    let found = [done(&eval), json(&run(&[&eval[..], &["--json", "--device", "gpu"]].concat()))].map(|found| {
        let rows = found["rows"].as_array().unwrap().clone();
        rows.iter().map(|row| (row["recent"].as_u64(), number(&row["kl_mean"]))).collect::<Vec<_>>()
    });
    assert_eq!(found.each_ref().map(Vec::len), [4, 4]);
    for (&(recent, processor), &(_, gpu)) in found[0].iter().zip(&found[1]).skip(1) {
        assert!((processor - gpu).abs() < 0.05 * processor, "{recent:?}: {found:?}");
    }

    let output = run(&["bench", &model, "--prefill", "4", "--steps", "3", "--rounds", "1", "--json", "--device", "gpu"]);
    let row = &json(&output)["rows"][0];
    assert_eq!((row["submits_per_step"].as_u64(), row["readback_bytes_per_step"].as_u64()), (Some(1), Some(4)));
    let dispatches = row["dispatches_per_step"].as_u64().unwrap();
    // Three layers of at most eight, and embedding, final norm, head and argmax.
    assert!((1..=3 * 8 + 6).contains(&dispatches), "{dispatches} dispatches");
    assert_eq!((row["weights"].as_str(), row["kv_bytes_per_token"].as_u64()), (Some("f16"), Some(432)));

    let doctor = json(&run(&["doctor", "--json"]));
    assert_eq!(keys(&doctor), ["version", "adapters", "processor_threads", "would_run", "problem", "tuning"]);
    assert!(doctor["would_run"]["tier"].is_string() && doctor["problem"].is_null(), "{doctor}");
}
