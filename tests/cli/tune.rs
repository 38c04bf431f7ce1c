//! `lowkey tune`, and what other commands make of what it has kept.

use super::*;
use lowkey::gpu::{Choice, Device, Options, Origin, Tuned};
use std::path::PathBuf;

/// A command with a cache directory of its own.
fn in_cache(cache: &Path, arguments: &[&str]) -> Output {
    lowkey().env("LOWKEY_CACHE", cache).args(arguments).args(["--device", "gpu"]).output().unwrap()
}

fn opened(directory: PathBuf) -> std::sync::Arc<Device> {
    Device::open(&Options { tunings: Some(directory), ..Options::default() }).unwrap()
}

#[test]
fn what_was_measured_is_in_force_and_what_is_damaged_is_not() {
    let cache = tempfile::tempdir().unwrap();
    let directory = cache.path().join("tuning");
    let plain = opened(directory.clone());
    assert_eq!(plain.tuning_origin(), &Origin::BuiltIn);
    let own = plain.tuning();
    let choices = vec![Choice { name: "keys".into(), value: 256.into(), times: 1.25 }];
    let (adapter, lowkey, shape) = (plain.adapter(), "0.0.9".into(), "15m".into());
    let tuned = Tuned { format: Tuned::FORMAT, adapter, lowkey, measured: 1_700_000_000, shape, choices, unmeasured: vec!["logits".into()] };
    let path = tuned.write(&directory).unwrap();

    let device = opened(directory.clone());
    assert_eq!(device.tuning_origin(), &Origin::Tuned(tuned));
    assert_eq!(device.tuning(), own.with("keys", &256.into()).unwrap());
    // Nobody who has not asked for it is told.
    assert_eq!(Device::open(&Options::default()).unwrap().tuning(), own);
    let doctor = json(&in_cache(cache.path(), &["doctor", "--json"]));
    assert_eq!((&doctor["tuning"]["origin"], &doctor["tuning"]["constants"]["keys"]), (&"tuned".into(), &256.into()));
    let text = String::from_utf8(in_cache(cache.path(), &["doctor"]).stdout).unwrap();
    for words in ["tuned", "years ago by lowkey 0.0.9", "keys 256: 1.25 times", "no time was left for: logits", "in force: splits"] {
        assert!(text.contains(words), "no {words:?} in {text}");
    }
    // The same text, whatever is in force.
    let bench = Bench::new();
    let generate = ["generate", &bench.path("model"), "-p", "the ring", "--raw", "-n", "16", "--json"];
    let with = json(&in_cache(cache.path(), &generate));
    assert_eq!(with["text"], json(&in_cache(bench.directory.path(), &generate))["text"]);

    for damaged in ["{", "{\"format\": 99}"] {
        std::fs::write(&path, damaged).unwrap();
        let output = in_cache(cache.path(), &generate);
        assert_eq!((output.status.code(), &json(&output)["text"]), (Some(0), &with["text"]));
        let remark = stderr(&output);
        assert!(remark.contains(path.to_str().unwrap()) && remark.contains("lowkey tune --reset"), "{remark}");
        let doctor = json(&in_cache(cache.path(), &["doctor", "--json"]));
        assert_eq!((&doctor["tuning"]["origin"], &doctor["tuning"]["constants"]["keys"]), (&"ignored".into(), &own.keys.into()));
    }
    let reset = || json(&in_cache(cache.path(), &["tune", "--reset", "--json"]))["removed"].clone();
    assert_eq!((reset(), reset(), path.exists()), (true.into(), false.into(), false));
}

#[test]
fn tune_measures_keeps_and_tells() {
    let cache = tempfile::tempdir().unwrap();
    let output = in_cache(cache.path(), &["tune", "--shape", "15m", "--time", "20", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let found = json(&output);
    assert_eq!(keys(&found), ["device", "path", "tuned", "steps"]);
    let path = Path::new(found["path"].as_str().unwrap());
    assert_eq!(serde_json::from_str::<Value>(&std::fs::read_to_string(path).unwrap()).unwrap(), found["tuned"]);
    for choice in found["tuned"]["choices"].as_array().unwrap() {
        assert!(number(&choice["times"]) >= lowkey::bench::tune::MARGIN, "{choice}");
    }
    assert!(stderr(&output).contains("about 20 seconds"), "{}", stderr(&output));
    let doctor = json(&in_cache(cache.path(), &["doctor", "--json"]));
    assert_eq!((&doctor["tuning"]["origin"], &doctor["tuning"]["tuned"]), (&"tuned".into(), &found["tuned"]));

    // Without time nothing is written; on the processor there is nothing to choose.
    let empty = tempfile::tempdir().unwrap();
    let output = in_cache(empty.path(), &["tune", "--shape", "15m", "--time", "0", "--json"]);
    assert_eq!((output.status.code(), json(&output)["error"]["kind"].as_str()), (Some(2), Some("argument")));
    assert_eq!(in_cache(empty.path(), &["tune", "--device", "cpu"]).status.code(), Some(2));
    assert_eq!(empty.path().read_dir().unwrap().count(), 0);
}
