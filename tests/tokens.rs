//! Special and added tokens are those that transformers resolves from all of a tokenizer's files.

mod common;

use common::SyntheticModel;
use lowkey::checkpoint::{Architecture, Checkpoint, Message, Tokenizer};
use serde_json::{Value, json};

/// tests/tools/tokens.py writes it.
fn fixture() -> Value {
    serde_json::from_slice(&std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokens.json")).unwrap()).unwrap()
}

/// A model with the files of a case.
fn model(fixture: &Value, case: &Value) -> tempfile::TempDir {
    let architecture = match case["model_type"].as_str().unwrap() {
        "mistral" => Architecture::Mistral,
        "qwen3" => Architecture::Qwen3,
        _ => Architecture::Llama,
    };
    let model = SyntheticModel { architecture, ..SyntheticModel::default() };
    let directory = model.write_temporary();
    let mut config = model.config();
    let write = |file: &str, value: &Value| std::fs::write(directory.path().join(file), value.to_string()).unwrap();
    for (file, content) in case["files"].as_object().unwrap() {
        match file.as_str() {
            "config.json" => content.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone()),
            file => write(file, content),
        }
    }
    write("config.json", &config);
    write("tokenizer.json", &fixture["bases"][case["base"].as_str().unwrap()]);
    directory
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn of(directory: &tempfile::TempDir) -> lowkey::Result<Tokenizer> {
    Checkpoint::open(directory.path()).unwrap().tokenizer()
}

#[test]
fn tokens_are_those_of_transformers() {
    let (fixture, mut wrong) = (fixture(), Vec::new());
    let cases = fixture["cases"].as_array().unwrap();
    for case in cases {
        let directory = model(&fixture, case);
        if case["agrees"] == false {
            let error = of(&directory).err().unwrap_or_else(|| panic!("{} is read", case["name"])).to_string();
            assert!(error.contains("<|im_") && error.contains("make the files agree"), "{error}");
            continue;
        }
        let tokenizer = of(&directory).unwrap();
        for (row, decoded) in case["texts"].as_array().unwrap().iter().zip(case["decoded"].as_array().unwrap()) {
            let text = row[0].as_str().unwrap();
            for (special, expected) in [(true, &row[1]), (false, &row[2])] {
                let found = tokenizer.encode(text, special).unwrap();
                if found != ids(expected) {
                    wrong.push(format!("{}: {text:?} {special}: {found:?}, and transformers {expected}", case["name"]));
                }
            }
            let found = tokenizer.decode(&ids(&row[1])).unwrap();
            if found != decoded.as_str().unwrap() {
                wrong.push(format!("{}: {text:?} back: {found:?}, and transformers {decoded}", case["name"]));
            }
        }
        if !tokenizer.eos_ids().contains(&(case["eos"].as_u64().unwrap() as u32)) {
            wrong.push(format!("{}: ends are {:?}, and transformers {}", case["name"], tokenizer.eos_ids(), case["eos"]));
        }
        // Templates are given the same names.
        std::fs::write(directory.path().join("chat_template.jinja"), NAMES).unwrap();
        let names = Checkpoint::open(directory.path()).unwrap().chat_template().unwrap().render(&[Message::new("user", "")], true).unwrap();
        let token = |name: &str| case["named"][name].as_str().unwrap_or("-");
        let expected = ["bos_token", "eos_token", "pad_token", "image_token", "extra_token"].map(token).join(" ");
        if names != expected {
            wrong.push(format!("{}: named {names}, and transformers {expected}", case["name"]));
        }
    }
    assert!(cases.len() >= 20 && wrong.is_empty(), "{}", wrong.join("\n"));
}

const NAMES: &str = "{{ bos_token or '-' }} {{ eos_token or '-' }} {{ pad_token or '-' }} {{ image_token or '-' }} {{ extra_token or '-' }}";

/// What `generation_config.json` ends answers with takes the place of the config's ends.
#[test]
fn ends_are_those_of_generation() {
    let directory = SyntheticModel::default().write_temporary();
    let write = |file: &str, value: Value| std::fs::write(directory.path().join(file), value.to_string()).unwrap();
    write("tokenizer_config.json", json!({ "bos_token": null }));
    let ends = || of(&directory).unwrap().eos_ids().to_vec();
    // The vocabulary's own: `<|im_end|>` and `<|endoftext|>`.
    assert_eq!(ends(), [2, 0]);
    write("generation_config.json", json!({ "eos_token_id": [7, 300] }));
    assert_eq!(ends(), [7, 300, 2, 0]);
    write("generation_config.json", json!({ "temperature": 0.6 }));
    assert_eq!(ends(), [2, 0]);
}

/// A token that the model has no row for is an error that names it.
#[test]
fn tokens_that_the_model_has_not_are_named() {
    let directory = SyntheticModel::default().write_temporary();
    let rows = SyntheticModel::default().vocab;
    let (held, _) = common::vocabulary();
    // As many as fit, and one more.
    let more: serde_json::Map<_, _> = (held.len()..=rows).map(|id| (format!("<extra_{id}>"), json!(id))).collect();
    std::fs::write(directory.path().join("added_tokens.json"), Value::Object(more).to_string()).unwrap();
    let tokenizer = of(&directory).unwrap();
    assert_eq!(tokenizer.encode(&format!("<extra_{}>", rows - 1), false).unwrap(), [rows as u32 - 1]);
    let error = tokenizer.encode(&format!("a <extra_{rows}> b"), false).unwrap_err().to_string();
    assert!(error.contains("<extra_515>") && error.contains("token 515") && error.contains("515 rows"), "{error}");
}
