//! `lowkey chat`: one answer to what is piped in, and a conversation on a terminal.

use super::*;
use std::io::Write;

/// What a command prints that is given `text` on stdin.
fn piped(arguments: &[&str], text: &str) -> Output {
    let mut command = lowkey();
    command.args(arguments).args(["--device", "cpu"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn what_is_piped_in_is_answered_once() {
    let bench = Bench::new();
    let model = bench.path("model");
    let generate = |prompt: &str| done(&["generate", &model, "-n", "6", "-p", prompt]);
    let expected = generate("the ring\n/quit");

    let output = piped(&["chat", &model, "-n", "6"], "the ring\n/quit\n");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{}\n", expected["text"].as_str().unwrap()));
    assert!(stderr(&output).contains("per second") && !stderr(&output).contains(">>>"), "{}", stderr(&output));

    let said = json(&piped(&["chat", &model, "-n", "6", "--json"], "the ring\n/quit\n"));
    assert_eq!(keys(&said), keys(&expected));
    assert_eq!((&said["text"], &said["prompt_tokens"]), (&expected["text"], &expected["prompt_tokens"]));

    // An argument comes before it, and is enough.
    let said = json(&piped(&["chat", &model, "In short:", "-n", "6", "--json"], "the ring"));
    assert_eq!(said["prompt_tokens"], generate("In short:\n\nthe ring")["prompt_tokens"]);
    assert_eq!(done(&["chat", &model, "the ring", "-n", "6"])["text"], generate("the ring")["text"]);
    let told = done(&["chat", &model, "the ring", "-n", "6", "--system", "Be brief."]);
    assert!(number(&told["prompt_tokens"]) > number(&generate("the ring")["prompt_tokens"]));
    assert_eq!(stderr(&piped(&["chat", &model, "-n", "6", "--quiet"], "the ring")), "");
}

#[test]
fn what_cannot_be_asked_is_refused() {
    let bench = Bench::new();
    let model = bench.path("model");
    for (arguments, kind, code, words) in [
        (vec!["chat", &model], "argument", 2, "PROMPT: there is none"),
        (vec!["chat", "/nowhere/at/all", "the ring"], "io", 1, "lowkey pull"),
        (vec!["chat", &model, "the ring", "--top-p", "2"], "argument", 2, "top-p"),
        (vec!["chat", &model, "the ring", "--select", "64"], "argument", 2, "select"),
        (vec!["chat", &model, "the ring", "-n", "0"], "usage", 2, "--max-tokens"),
        (vec!["chat", &model, "the ring", "--context", "4"], "context", 1, "--context"),
    ] {
        let found = failed(&[&arguments[..], &["--device", "cpu"]].concat());
        assert_eq!((found.0.as_str(), found.2), (kind, code), "{arguments:?}: {}", found.1);
        assert!(found.1.contains(words), "{}", found.1);
    }
    // A model that was not trained for conversations goes on with a text, and has no place for
    // instructions.
    std::fs::write(Path::new(&model).join("tokenizer_config.json"), r#"{ "bos_token": null }"#).unwrap();
    let continued = piped(&["chat", &model, "-n", "4"], "the ring");
    assert!(continued.status.success() && stderr(&continued).contains("continuing the text as it is"), "{}", stderr(&continued));
    let (kind, message, code) = failed(&["chat", &model, "the ring", "--system", "Be brief.", "--device", "cpu"]);
    assert_eq!((kind.as_str(), code), ("argument", 2));
    assert!(message.starts_with("system: ") && message.contains(&model), "{message}");
}

#[cfg(unix)]
#[test]
fn a_conversation_has_turns_and_commands() {
    let bench = Bench::new();
    let (model, saved, kept) = (bench.path("model"), bench.path("saved"), bench.path("kept"));
    let start = || {
        Terminal::start(|command| {
            command
                .args(["chat", &model, "-n", "5", "--device", "cpu", "--system", "Be brief."])
                .env("HOME", bench.path(""))
                .env("XDG_DATA_HOME", bench.path("data"))
        })
    };
    let mut terminal = start();
    terminal.expect("/help");
    let (question, next) = (">>> ", "... ");
    for (prompt, keys, shown) in [
        (question, "the ring\r", &[" tokens at ", "of 512"][..]),
        (question, "\"\"\"two\r", &[]),
        (next, "/quit\"\"\"\r", &[" tokens at ", "cache "]),
        (question, "/stats\r", &["2 answers", "bytes of cache per token (dense 432)"]),
        (question, &format!("/write {saved}\r"), &["(written)"]),
        (question, &format!("/write {saved}\r"), &["(cannot write "]),
        (question, "/write\r", &["(/write FILE)"]),
        (question, "/save\r", &["(/save FILE)"]),
        (question, &format!("/save {saved}\r"), &["already exists"]),
        (question, &format!("/load {saved}\r"), &["is no session"]),
        (question, &format!("/save {kept}\r"), &["(saved: 4 messages, "]),
        (question, "/reset\r", &["(forgotten)"]),
        (question, &format!("/load {kept}\r"), &["(loaded: 4 messages; "]),
        (question, "and then\r", &[" tokens at ", " new of the prompt"]),
        (question, "/save\r", &["(saved: 6 messages, "]),
        (question, "\r", &[]),
        (question, "/nonsense now\r", &["(there is no /nonsense; /reset"]),
        (question, &format!("{}\r", "the ring ".repeat(200)), &["the context has room for 512"]),
        (question, "half a question\x03", &["Ctrl-D ends the chat"]),
        (question, "\"\"\"half\r", &[]),
        (next, "\x03", &["Ctrl-D ends the chat"]),
        (question, "/clear\r", &["(forgotten)"]),
        (question, "/help\r", &["/stats"]),
        (question, "\x04", &[]),
    ] {
        terminal.expect(prompt);
        terminal.press(keys);
        shown.iter().for_each(|text| terminal.expect(text));
    }
    assert_eq!(terminal.end(), Some(0));

    let said = std::fs::read_to_string(&saved).unwrap();
    assert!(said.starts_with("system:\nBe brief.\n\nuser:\nthe ring\n\nassistant:\n"), "{said}");
    assert!(said.contains("\n\nuser:\ntwo\n/quit\n\nassistant:\n"), "{said}");

    // The next conversation remembers what was typed in this one.
    let mut terminal = start();
    terminal.expect(">>> ");
    for line in ["/help", "/clear", "the ring the ring", "/nonsense now"] {
        terminal.press("\x1b[A");
        terminal.expect(line);
    }
    terminal.press("\x03");
    terminal.expect(">>> ");
    terminal.press("/bye\r");
    assert_eq!(terminal.end(), Some(0));
}

#[cfg(unix)]
#[test]
fn an_answer_is_stopped_and_the_conversation_goes_on() {
    let bench = Bench::new();
    let model = bench.path("model");
    // No token that it writes ends a text.
    for (file, from, to) in [
        ("config.json", r#""eos_token_id": 2"#, r#""eos_token_id": 500"#),
        ("tokenizer_config.json", "eos_token", "some_token"),
        ("tokenizer_config.json", "im_end", "im_some"),
        ("tokenizer.json", "im_end", "im_some"),
    ] {
        let path = Path::new(&model).join(file);
        let before = std::fs::read_to_string(&path).unwrap();
        assert!(before.contains(from), "no {from} in {before}");
        std::fs::write(&path, before.replace(from, to)).unwrap();
    }
    let arguments = ["chat", &*model, "--device", "cpu", "--context", "100000"];
    let mut terminal = Terminal::start(|command| command.args(arguments).env("HOME", bench.path("")).env("XDG_DATA_HOME", bench.path("data")));
    terminal.expect(">>> ");
    terminal.press("the ring\r");
    terminal.expect("read ");
    std::thread::sleep(std::time::Duration::from_millis(500));
    terminal.interrupt();
    terminal.expect("[stopped after ");
    terminal.expect(">>> ");
    terminal.press("/stats\r");
    terminal.expect("1 answers");
    terminal.expect(">>> ");
    terminal.press("/quit\r");
    assert_eq!(terminal.end(), Some(0));
}
