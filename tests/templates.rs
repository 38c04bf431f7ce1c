//! Chat templates render byte for byte as transformers renders them, and what it refuses is
//! refused.

mod common;

use common::SyntheticModel;
use lowkey::checkpoint::{Checkpoint, Message};
use serde_json::{Value, json};

/// Templates, conversations, and what transformers makes of them: tests/tools/templates.py writes
/// it. `LOWKEY_TEMPLATES` names another such file.
fn cases() -> Vec<Value> {
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/templates.json");
    let path = std::env::var("LOWKEY_TEMPLATES").unwrap_or(fixture.into());
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn templates_render_as_in_transformers() {
    let directory = SyntheticModel::default().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let settings = json!({ "bos_token": "<s>", "eos_token": { "content": "</s>" }, "image_token": "<image>", "unk_token": null });
    std::fs::write(directory.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    let (cases, mut wrong) = (cases(), Vec::new());
    for case in &cases {
        std::fs::write(directory.path().join("chat_template.jinja"), case["template"].as_str().unwrap()).unwrap();
        let turn = |turn: &Value| Message::new(turn["role"].as_str().unwrap(), turn["content"].as_str().unwrap());
        let messages: Vec<Message> = case["messages"].as_array().unwrap().iter().map(turn).collect();
        let found = checkpoint.chat_template().and_then(|template| template.render(&messages, case["prompt"].as_bool().unwrap()));
        match (found, case["text"].as_str()) {
            (Ok(found), Some(expected)) if found == expected => {}
            (Err(_), None) => {}
            (found, expected) => {
                let found = found.map_err(|error| error.to_string().lines().next().unwrap_or_default().to_string());
                wrong.push(format!("{}: {found:?}, and transformers: {expected:?} {}", case["name"], case["error"]));
            }
        }
    }
    assert!(cases.len() > 200, "{} cases", cases.len());
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}
