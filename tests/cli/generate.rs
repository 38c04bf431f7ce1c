//! `lowkey generate`.

use super::*;

#[test]
fn an_answer_is_one_object() {
    let bench = Bench::new();
    let small = small(&bench);
    let said = done(&["generate", &small, "-p", "the ring", "-n", "5", "--temperature", "0.7", "--seed", "3"]);
    let counts = ["text", "thinking", "prompt_tokens", "reused_tokens", "tokens", "drafted_tokens", "accepted_tokens"];
    let others = ["prefill_tps", "decode_tps", "kv_bytes", "finish", "remarks", "load_seconds", "peak_rss_bytes"];
    assert_eq!(keys(&said), [&counts[..], &others].concat());
    assert!((1..=5).contains(&said["tokens"].as_u64().unwrap()));
    assert_eq!(said["text"], done(&["generate", &small, "-p", "the ring", "-n", "5", "--temperature", "0.7", "--seed", "3"])["text"]);
}

/// What repeats itself takes fewer steps with drafts, and says the same.
#[test]
fn drafts_change_no_word() {
    let bench = Bench::new();
    let small = small(&bench);
    let said = |draft: &str| done(&["generate", &small, "-p", "a b c d a b c d a b c d a b", "-n", "40", "--raw", "--draft", draft]);
    let (plain, drafted) = (said("0"), said("7"));
    assert_eq!((&plain["text"], &plain["finish"], &plain["tokens"]), (&drafted["text"], &drafted["finish"], &drafted["tokens"]));
    assert_eq!(plain["drafted_tokens"], 0);
    assert!(drafted["drafted_tokens"].as_u64() > Some(0) && drafted["accepted_tokens"].as_u64() <= drafted["drafted_tokens"].as_u64());
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
fn a_closed_pipe_ends_it_quietly() {
    let bench = Bench::new();
    let arguments = ["generate", &*bench.path("model"), "-p", "the", "--raw", "--context", "512", "--device", "cpu", "--quiet"];
    let mut child = lowkey().args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}
