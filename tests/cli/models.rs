//! `lowkey list`, `rm`, and the names by which every command takes what is in the cache directory.

use super::*;
use std::fs;

/// A cache directory with one model of every kind.
struct Cache {
    directory: TempDir,
}

impl Cache {
    fn new() -> Cache {
        let cache = Cache { directory: tempfile::tempdir().unwrap() };
        let model = SyntheticModel::default();
        model.write(&cache.path("models/owner--dense"));
        fs::create_dir_all(cache.path("models/owner--other--q.gguf/")).unwrap();
        model.gguf().write(&cache.path("models/owner--other--q.gguf/q.gguf"));
        let compress = |small: &str, form: &[&str]| {
            let (dense, small) = (cache.text("models/owner--dense"), cache.text(small));
            done(&[&["compress", &*dense, "-o", &small, "--method", "dense", "--bits", "4"], form].concat())
        };
        compress("models/owner--dense-small", &["--standalone"]);
        compress("models/owner--other--q.gguf/q-small", &[]);
        fs::create_dir_all(cache.path("models/.owner--third.partial")).unwrap();
        fs::write(cache.path("models/.owner--third.partial/part"), [0; 1000]).unwrap();
        fs::write(cache.path("models/.owner--dense.lock"), "").unwrap();
        fs::create_dir(cache.path("models/broken")).unwrap();
        fs::write(cache.path("models/broken/config.json"), "{").unwrap();
        fs::write(cache.path("models/broken/model.safetensors"), "none").unwrap();
        cache
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().into()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = lowkey();
        command.env("LOWKEY_CACHE", self.path("models")).args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// What a command says that must have succeeded.
    fn done(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[arguments, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}{}", stderr(&output), String::from_utf8_lossy(&output.stdout));
        json(&output)
    }

    /// The message of a command that must have failed, with this kind of error and exit code.
    fn failed(&self, arguments: &[&str], expected: (&str, i32)) -> String {
        let output = self.run(&[arguments, &["--json"]].concat());
        let error = &json(&output)["error"];
        let message = error["message"].as_str().unwrap().to_string();
        assert_eq!((error["kind"].as_str().unwrap(), output.status.code().unwrap()), expected, "{message}");
        message
    }

    fn names(&self) -> Vec<String> {
        let models = self.done(&["list"])["models"].as_array().unwrap().clone();
        models.iter().map(|model| model["name"].as_str().unwrap().into()).collect()
    }
}

/// Bytes of all files below a directory.
fn bytes(path: &Path) -> u64 {
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| if entry.file_type().unwrap().is_dir() { bytes(&entry.path()) } else { entry.metadata().unwrap().len() }).sum()
}

#[test]
fn models_are_listed_by_names_that_every_command_takes() {
    let cache = Cache::new();
    let listed = cache.done(&["list"]);
    assert_eq!(keys(&listed), ["directory", "bytes", "models"]);
    assert_eq!((listed["directory"].as_str().unwrap(), listed["bytes"].as_u64().unwrap()), (&*cache.text("models"), bytes(&cache.path("models"))));
    let models = listed["models"].as_array().unwrap();
    let found: Vec<_> = models.iter().map(|model| (model["name"].as_str().unwrap(), model["kind"].as_str().unwrap())).collect();
    let expected = [
        ("broken", "unreadable"),
        ("owner--other--q.gguf/q-small.lowkey", "compressed"),
        ("owner/dense", "safetensors"),
        ("owner/dense-small", "compressed"),
        ("owner/other:q.gguf", "gguf"),
        ("owner/third", "unfinished"),
    ];
    assert_eq!(found, expected);
    assert_eq!((&models[1]["method"], models[5]["bytes"].as_u64()), (&"dense".into(), Some(1000)));
    let inspected = cache.done(&["show", "owner--other--q.gguf/q-small.lowkey"]);
    let times = number(&inspected["kv_bytes_per_token_dense"]) / number(&inspected["kv_bytes_per_token"]);
    assert_eq!((number(&models[1]["times"]), &inspected["method"]), (times, &models[1]["method"]));
    // What lies in a model's directory is not counted twice.
    let file = fs::metadata(cache.path("models/owner--other--q.gguf/q.gguf")).unwrap().len();
    assert_eq!(models[4]["bytes"].as_u64(), Some(file));
    assert!(models.iter().all(|model| model["modified"].as_u64() > Some(1_600_000_000)));

    for name in ["owner/dense", "owner/dense-small", "owner/other:q.gguf"] {
        cache.done(&["inspect", name]);
        assert!(cache.done(&["chat", name, "the ring", "-n", "2", "--device", "cpu"])["tokens"].as_u64() > Some(0));
    }
    let shown = cache.run(&["ls"]);
    let text = String::from_utf8_lossy(&shown.stdout);
    for words in ["owner/other:q.gguf", "GGUF", "dense, 2.0 ", "times smaller", "unfinished download", "just now", &cache.text("models")] {
        assert!(text.contains(words), "no {words:?} in {text}");
    }
    assert!(stderr(&shown).contains("broken does not open: "), "{}", stderr(&shown));

    let nothing = lowkey().env("LOWKEY_CACHE", cache.path("nowhere")).arg("list").output().unwrap();
    assert!(nothing.status.success() && String::from_utf8_lossy(&nothing.stdout).contains("lowkey pull NAME"));
}

#[test]
fn models_are_removed_with_what_lies_in_their_directories() {
    let cache = Cache::new();
    let before = bytes(&cache.path("models"));
    let removed = cache.done(&["rm", "owner/other:q.gguf", "owner/third", "broken", "--yes"]);
    assert_eq!(removed["removed"], serde_json::json!(["broken", "owner--other--q.gguf/q-small.lowkey", "owner/other:q.gguf", "owner/third"]));
    assert_eq!(removed["bytes"].as_u64().unwrap(), before - bytes(&cache.path("models")));
    assert_eq!(cache.names(), ["owner/dense", "owner/dense-small"]);
    // By its path, as `pull` prints it; the words say how much.
    let output = cache.run(&["rm", "-y", &cache.text("models/owner--dense")]);
    assert!(String::from_utf8_lossy(&output.stdout).ends_with(" KiB freed\n"), "{}", stderr(&output));
    assert_eq!(cache.names(), ["owner/dense-small"]);
    let left: Vec<_> = fs::read_dir(cache.path("models")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn nothing_is_removed_that_was_not_meant() {
    let cache = Cache::new();
    let (all, before) = (cache.names(), bytes(&cache.path("models")));
    SyntheticModel::default().write(&cache.path("mine"));
    assert!(cache.failed(&["rm", "owner/dense"], ("argument", 2)).starts_with("yes: "));
    assert!(cache.failed(&["rm", "--yes"], ("usage", 2)).contains("NAME"));
    let unknown = cache.failed(&["rm", "--yes", "owner/dense", "owner/missing"], ("io", 1));
    assert!(unknown.contains("owner/missing") && unknown.contains("lowkey list"), "{unknown}");
    let outside = cache.text("models/../mine");
    for path in [&cache.text("mine"), &cache.text("models"), &outside, "/", "..", "."] {
        let message = cache.failed(&["rm", "--yes", path], ("argument", 2));
        assert!(message.contains(&cache.text("models")), "{message}");
    }
    cache.failed(&["rm", "--yes", "../mine"], ("io", 1));
    assert_eq!((cache.names(), bytes(&cache.path("models"))), (all, before));
    assert!(cache.path("mine/config.json").is_file());

    // What is being fetched holds a lock.
    let lock = fs::File::open(cache.path("models/.owner--dense.lock")).unwrap();
    lock.lock().unwrap();
    assert!(cache.failed(&["rm", "--yes", "owner/dense"], ("io", 1)).contains("being fetched"));
    drop(lock);
    cache.done(&["rm", "--yes", "owner/dense"]);
}

#[cfg(unix)]
#[test]
fn links_are_removed_as_links() {
    let cache = Cache::new();
    let (mine, before) = (cache.path("mine"), cache.names());
    SyntheticModel::default().write(&mine.join("model"));
    let size = bytes(&mine);
    std::os::unix::fs::symlink(mine.join("model"), cache.path("models/linked")).unwrap();
    std::os::unix::fs::symlink(&mine, cache.path("models/folder")).unwrap();
    std::os::unix::fs::symlink(&mine, cache.path("models/owner--dense/folder")).unwrap();
    assert_eq!(cache.names(), [&before[..1], &["linked".to_string()], &before[1..]].concat());
    // It loads by that name too, and what is behind a folder's link is not the cache directory's.
    cache.done(&["inspect", "linked"]);
    cache.failed(&["rm", "--yes", "folder/model"], ("io", 1));
    let removed = cache.done(&["rm", "--yes", "linked", "owner/dense"]);
    assert_eq!(removed["removed"], serde_json::json!(["linked", "owner/dense"]));
    assert_eq!(bytes(&mine), size);
    assert!(!cache.path("models/linked").is_symlink());
}

#[cfg(unix)]
#[test]
fn a_terminal_is_asked_and_an_interrupted_removal_is_finished() {
    let cache = Cache::new();
    let start = || Terminal::start(|command| command.env("LOWKEY_CACHE", cache.path("models")).args(["rm", "owner/other:q.gguf"]));
    for (keys, code) in [("\r", 0), ("no\r", 0), ("\x04", 0)] {
        let mut terminal = start();
        terminal.expect("q-small");
        terminal.expect("Remove them, ");
        terminal.expect("[y/N] ");
        terminal.press(keys);
        terminal.expect("0 B freed");
        assert_eq!(terminal.end(), Some(code));
    }
    let mut terminal = start();
    terminal.expect("[y/N] ");
    terminal.interrupt();
    assert_eq!(terminal.end(), Some(1));
    assert_eq!(cache.names().len(), 6);

    // As a process leaves it that was killed while it deleted.
    fs::create_dir(cache.path("models/.removed-abc")).unwrap();
    fs::rename(cache.path("models/broken"), cache.path("models/.removed-abc/model")).unwrap();
    assert_eq!(cache.names().len(), 5);
    let mut terminal = start();
    terminal.expect("[y/N] ");
    terminal.press("y\r");
    terminal.expect(" freed");
    assert_eq!(terminal.end(), Some(0));
    assert!(!cache.path("models/.removed-abc").exists());
    assert_eq!(cache.names(), ["owner/dense", "owner/dense-small", "owner/third"]);
}
