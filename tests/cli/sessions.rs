//! What is kept of a conversation or a prompt between two runs.

use super::*;

/// Tokens of the prompt that were read.
fn read(said: &serde_json::Value) -> u64 {
    said["prompt_tokens"].as_u64().unwrap() - said["reused_tokens"].as_u64().unwrap()
}

/// A conversation goes on in the next run, and only what is new is read.
#[test]
fn a_conversation_is_resumed() {
    let bench = Bench::new();
    let (model, file) = (bench.path("model"), bench.path("talk.session"));
    let say = |text: &str| done(&["chat", &model, text, "-n", "4", "--resume", &file]);
    let first = say("the ring and the ring and the ring");
    assert_eq!(first["reused_tokens"], 0);
    let second = say("and then");
    assert!(number(&second["prompt_tokens"]) > number(&first["prompt_tokens"]));
    assert!(second["reused_tokens"].as_u64() >= first["prompt_tokens"].as_u64() && read(&second) < 40, "{second}");
    let remarks = second["remarks"].to_string();
    assert!(remarks.contains("(loaded: 2 messages; "), "{remarks}");
    assert!(say("more")["remarks"].to_string().contains("(loaded: 4 messages; "));
    // Another model's, another method's, and what is no session at all.
    let refused = |more: &[&str], word: &str| {
        let (kind, message, code) = failed(&[&["chat", &*model, "a", "--device", "cpu"][..], more].concat());
        assert_eq!((kind.as_str(), code), ("session", 1), "{message}");
        assert!(message.contains(word), "{message}");
    };
    refused(&["--resume", &file, "--method", "kvreviver", "--keep", "0.5", "--context", "512"], "open it with the same --method");
    refused(&["--resume", &bench.path("text")], "is no session that lowkey has saved");
}

/// What a prompt begins with is read once, by whatever process; a directory keeps its size.
#[test]
fn prefixes_are_read_once() {
    let bench = Bench::new();
    let (model, directory) = (bench.path("model"), bench.path("prefixes"));
    let document = std::fs::read_to_string(bench.path("text")).unwrap()[..300].to_string();
    let ask = |question: &str, more: &[&str]| {
        done(&[&["generate", &*model, "-p", question, "-n", "4", "--context", "512", "--prefix-cache", &*directory][..], more].concat())
    };
    let files = || std::fs::read_dir(&directory).unwrap().count();
    let first = ask("what now?", &["--system", &document]);
    assert_eq!((&first["reused_tokens"], files()), (&0.into(), 1));
    let second = ask("and why?", &["--system", &document]);
    assert!(read(&second) < 30 && number(&second["reused_tokens"]) > 100.0, "{second}");
    assert_eq!(files(), 1);
    let alone = done(&["generate", &model, "-p", "and why?", "-n", "4", "--context", "512", "--system", &document]);
    assert_eq!((&second["text"], &second["prompt_tokens"]), (&alone["text"], &alone["prompt_tokens"]));
    // Without a system prompt all of it, whose last token alone is read again.
    assert_eq!(ask(&document, &["--raw"])["reused_tokens"], 0);
    assert_eq!((read(&ask(&document, &["--raw"])), files()), (1, 2));
    // As far as they have anything in common.
    let common = ask(&format!("{} something else", &document[..200]), &["--raw"]);
    assert!(number(&common["reused_tokens"]) > 100.0, "{common}");
    // What was used longest ago goes first; others' files stay.
    std::fs::write(std::path::Path::new(&directory).join("note.txt"), "mine").unwrap();
    let size = |path: std::path::PathBuf| path.metadata().unwrap().len();
    let most: u64 = std::fs::read_dir(&directory).unwrap().map(|entry| size(entry.unwrap().path())).max().unwrap();
    ask("a b c d e f g", &["--raw", "--prefix-cache-bytes", &(most + most / 2).to_string()]);
    assert!(files() <= 3, "one prefix or two, and the note");
    assert!(std::path::Path::new(&directory).join("note.txt").exists());
    assert_eq!(read(&ask("a b c d e f g", &["--raw"])), 1, "what has just been saved is the last to go");
    let (kind, ..) = failed(&["generate", &model, "-p", "a", "--prefix-cache-bytes", "5"]);
    assert_eq!(kind, "usage");
}
