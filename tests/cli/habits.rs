//! What people do with a command line: texts that begin with dashes or with marks, templates of all
//! kinds, contexts that are too short.

use super::*;
use serde_json::json;

/// Gives a model another chat template.
fn set_template(model: &str, template: &str) {
    let settings = json!({ "bos_token": null, "eos_token": "<|im_end|>", "chat_template": template });
    std::fs::write(Path::new(model).join("tokenizer_config.json"), settings.to_string()).unwrap();
}

#[test]
fn texts_may_begin_with_a_dash() {
    let bench = Bench::new();
    let model = bench.path("model");
    let tokens = |arguments: &[&str]| done(&[arguments, &["-n", "3"]].concat())["prompt_tokens"].clone();
    let file = bench.path("prompt");
    for text in ["- buy milk", "--- a\n--- b", "-5 + 3 is", "-p", "--json", "-"] {
        std::fs::write(&file, text).unwrap();
        let expected = tokens(&["generate", &model, "--prompt-file", &file]);
        assert_eq!(tokens(&["generate", &model, "-p", text]), expected, "{text}");
        if text.contains(' ') || text == "-" {
            assert_eq!(tokens(&["chat", &model, text]), expected, "{text}");
        }
        done(&["generate", &model, "-p", "the", "--stop", text, "-n", "2"]);
        done(&["chat", &model, "the", "--system", text, "--stop", text, "-n", "2"]);
    }
    // Nobody's mistyped option becomes a question.
    for typo in ["--sytem", "-x", "--context=7o"] {
        let (kind, message, code) = failed(&["chat", &model, typo]);
        assert_eq!((kind.as_str(), code), ("usage", 2), "{message}");
        assert!(message.contains(typo.split('=').next().unwrap()), "{message}");
    }
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_text() {
    let bench = Bench::new();
    let model = bench.path("model");
    let text = std::fs::read_to_string(bench.path("text")).unwrap();
    let units = |order: fn(u16) -> [u8; 2]| format!("\u{feff}{text}").encode_utf16().flat_map(order).collect::<Vec<u8>>();
    let forms = [format!("\u{feff}{text}").into_bytes(), units(u16::to_le_bytes), units(u16::to_be_bytes)];
    let prompt = |file: &str| done(&["generate", &model, "--prompt-file", file, "-n", "1", "--raw", "--context", "20000"])["prompt_tokens"].clone();
    let eval = |file: &str| done(&["eval", &model, "--text", file, "--tokens", "300", "--window", "64"])["rows"][0]["perplexity"].clone();
    let adapter = |file: &str| {
        let small = bench.path("one.lowkey");
        done(&["compress", &model, "-o", &small, "--keep", "0.5", "--calibration", file, "--calibration-tokens", "512"]);
        let bytes = std::fs::read(&small).unwrap();
        std::fs::remove_file(&small).unwrap();
        bytes
    };
    let plain = bench.path("text");
    let expected = (prompt(&plain), eval(&plain), adapter(&plain));
    assert!(expected.0.is_u64() && expected.1.is_f64(), "{:?}", (&expected.0, &expected.1));
    for bytes in forms {
        let file = bench.path("marked");
        std::fs::write(&file, bytes).unwrap();
        assert!((prompt(&file), eval(&file), adapter(&file)) == expected);
    }
    let [marked, unmarked] = ["\u{feff}the ring", "the ring"].map(|text| done(&["generate", &model, "-p", text, "-n", "1"])["prompt_tokens"].clone());
    assert_eq!(marked, unmarked);
    std::fs::write(bench.path("latin"), b"caf\xe9").unwrap();
    let (kind, message, code) = failed(&["generate", &model, "--prompt-file", &bench.path("latin")]);
    assert!(kind == "io" && code == 1 && message.contains("not UTF-8"), "{message}");
}

/// A template is never replaced by the text as it is.
#[test]
fn a_template_that_does_not_work_is_an_error_that_names_raw() {
    let bench = Bench::new();
    let model = bench.path("model");
    set_template(&model, "{% for m in messages %}{{ m.content }}");
    for command in [&["generate", &*model, "-p", "the"][..], &["chat", &model, "the"]] {
        let (kind, message, code) = failed(&[command, &["--device", "cpu"]].concat());
        assert_eq!((kind.as_str(), code), ("tokenizer", 1), "{message}");
        assert!(message.contains("not valid") && message.contains("--raw"), "{message}");
        done(&[command, &["-n", "2", "--raw"]].concat());
    }
    // The pair means nothing when a model is asked.
    let tokens = |template: &str| {
        set_template(&model, template);
        done(&["generate", &model, "-p", "the", "-n", "1"])["prompt_tokens"].clone()
    };
    let (with, without) = ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "{{ messages[0].content }}");
    assert_eq!(tokens(with), tokens(without));
    assert_eq!(tokens("{% for m in messages %}\r\n{{ m.content }}\r\n{% endfor %}\r\n"), tokens("{{ messages[0].content }}\n\n"));
}

/// `strftime_now` is the local time.
#[test]
fn the_date_is_the_users() {
    let bench = Bench::new();
    let model = bench.path("model");
    set_template(&model, "{{ raise_exception('today is ' + strftime_now('%Y-%m-%d')) }}");
    // Never the same date.
    let dates = ["AAA-14", "BBB+11"].map(|zone| {
        let output = lowkey().args(["generate", &model, "-p", "the", "--device", "cpu"]).env("TZ", zone).output().unwrap();
        let message = stderr(&output);
        message.split("today is ").nth(1).unwrap_or_else(|| panic!("{message}"))[..10].to_string()
    });
    assert!(dates[0] > dates[1], "{dates:?}");
}

/// No token that the model writes ends a text.
fn never_ends(model: &str) {
    for (file, from, to) in [
        ("config.json", r#""eos_token_id": 2"#, r#""eos_token_id": 500"#),
        ("tokenizer_config.json", "eos_token", "some_value"),
        ("tokenizer_config.json", "im_end", "im_some"),
        ("tokenizer.json", "im_end", "im_some"),
    ] {
        let path = Path::new(model).join(file);
        let before = std::fs::read_to_string(&path).unwrap();
        assert!(before.contains(from), "no {from} in {before}");
        std::fs::write(&path, before.replace(from, to)).unwrap();
    }
}

#[test]
fn a_full_context_is_said() {
    let bench = Bench::new();
    let model = bench.path("model");
    never_ends(&model);
    let arguments = ["generate", &*model, "-p", "the ring", "--raw", "--context", "20", "-t", "0"];
    let said = done(&arguments);
    assert_eq!(said["finish"], "context", "{said}");
    let full =
        |remarks: &Value| remarks.as_array().unwrap().iter().any(|remark| remark.as_str().unwrap().contains("the context of 20 tokens is full"));
    assert!(full(&said["remarks"]), "{said}");
    assert!(stderr(&run(&[&arguments[..], &["--device", "cpu"]].concat())).contains("the context of 20 tokens is full; --context makes it larger"));
    let short = done(&[&arguments[..], &["-n", "3"]].concat());
    assert!(short["finish"] == "length" && !full(&short["remarks"]), "{short}");
}

#[test]
fn thinking_is_apart_from_the_answer() {
    let bench = Bench::new();
    let model = bench.path("model");
    set_template(&model, common::TEMPLATE);
    let arguments = ["generate", &*model, "-p", "the ring", "-n", "40", "-t", "1.5", "--seed", "5", "--device", "cpu"];
    let plain = json(&run(&[&arguments[..], &["--json"]].concat()));
    assert_eq!(plain["thinking"], Value::Null);
    // A template that begins it: all of this answer is thought.
    set_template(&model, &format!("{}{{{{ '<think>\\n' }}}}", common::TEMPLATE));
    let thought = json(&run(&[&arguments[..], &["--json"]].concat()));
    assert_eq!((thought["text"].as_str(), thought["thinking"].is_string()), (Some(""), true), "{thought}");
    let output = run(&arguments);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "\n");
    assert!(stderr(&output).contains(thought["thinking"].as_str().unwrap()), "{}", stderr(&output));
    assert_eq!(stderr(&run(&[&arguments[..], &["--quiet"]].concat())), "");
}

/// The oldest turns go where the user says so.
#[cfg(unix)]
#[test]
fn a_conversation_goes_on_without_its_oldest_turns() {
    let bench = Bench::new();
    let model = bench.path("model");
    let start = |more: &[&str]| {
        let arguments = [&["chat", &*model, "--device", "cpu", "--context", "120", "-n", "6", "--system", "Be brief."], more].concat();
        Terminal::start(|command| command.args(arguments).env("HOME", bench.path("")).env("XDG_DATA_HOME", bench.path("data")))
    };
    let question = "a b c d e f g h i j k l m n o p\r";
    let mut terminal = start(&["--on-full", "shift"]);
    for _ in 0..2 {
        terminal.expect(">>> ");
        terminal.press(question);
    }
    terminal.expect("the context of 120 tokens is full");
    terminal.expect("messages are left out");
    for _ in 0..2 {
        terminal.expect(">>> ");
        terminal.press(question);
        terminal.expect(" tokens at ");
    }
    let saved = bench.path("saved");
    terminal.expect(">>> ");
    terminal.press(&format!("/write {saved}\r"));
    terminal.expect("(written)");
    terminal.press("\x04");
    assert_eq!(terminal.end(), Some(0));
    // Nothing of it is lost.
    assert_eq!(std::fs::read_to_string(&saved).unwrap().matches("a b c d").count(), 4);

    let mut terminal = start(&[]);
    for _ in 0..3 {
        terminal.expect(">>> ");
        terminal.press(question);
    }
    terminal.expect("the context has room for 120");
    terminal.press("\x04");
    assert_eq!(terminal.end(), Some(0));
}

/// An answer that fills the context goes on without the oldest turns.
#[cfg(unix)]
#[test]
fn an_answer_goes_on_where_the_context_is_full() {
    let bench = Bench::new();
    let model = bench.path("model");
    never_ends(&model);
    let (question, answer) = ("a b c", 60);
    let prompt = number(&done(&["generate", &model, "-p", question, "-n", "1"])["prompt_tokens"]) as usize;
    // Both questions fit, and a part of the second answer. Of the first, which is read again as
    // text, fewer tokens are left than it had.
    let context = (2 * prompt + answer + 20).to_string();
    let start = |on_full: &str| {
        let length = answer.to_string();
        let arguments = ["chat", &model, "--device", "cpu", "--context", &context, "-n", &length, "--on-full", on_full];
        let mut terminal = Terminal::start(|command| command.args(arguments).env("HOME", bench.path("")).env("XDG_DATA_HOME", bench.path("data")));
        terminal.expect(">>> ");
        terminal.press(&format!("{question}\r"));
        terminal.expect("[60 tokens at ");
        terminal.expect(">>> ");
        terminal.press(&format!("{question}\r"));
        terminal
    };
    let mut terminal = start("shift");
    terminal.expect("the oldest 2 messages are left out");
    terminal.expect("[60 tokens at ");
    terminal.press("\x04");
    assert_eq!(terminal.end(), Some(0));
    let mut terminal = start("stop");
    terminal.expect("(the context is full: ");
    terminal.press("\x04");
    assert_eq!(terminal.end(), Some(0));
}
