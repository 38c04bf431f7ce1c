//! `LlamaTokenizer`, a class of transformers that takes vocabulary and merges from `tokenizer.json`
//! and sets up the rest itself: a text's first piece begins with a space, and a piece after a
//! special token does not.

use serde_json::{Value, json};

/// Families for which transformers runs `tokenizer.json` as it is, whatever class settings name.
const AS_IT_IS: [&str; 14] = [
    "mistral",
    "ministral",
    "ministral3",
    "mixtral",
    "ernie4_5",
    "internlm3",
    "granite",
    "olmo2",
    "olmo3",
    "phi3",
    "glm",
    "glm4",
    "nemotron",
    "stablelm",
];

/// Whether transformers takes this class for a model of this type.
pub(super) fn is_class(settings: &Value, config: &Value) -> bool {
    let class = [settings, config].into_iter().find_map(|file| file["tokenizer_class"].as_str());
    let named = class.is_some_and(|class| class.strip_suffix("Fast").unwrap_or(class) == "LlamaTokenizer");
    named && !config["model_type"].as_str().is_some_and(|model_type| AS_IT_IS.contains(&model_type))
}

/// Makes of `tokenizer.json` what the class makes of it, and takes out its added tokens, which are
/// added again with those of other files.
///
/// One of another kind, in bytes as Llama 3 has it, stays as it is.
pub(super) fn rebuild(tokenizer: &mut Value, settings: &Value) -> Option<Value> {
    let byte_level = |part: &str| tokenizer[part].to_string().contains("\"ByteLevel\"");
    if tokenizer["model"]["type"] != "BPE" || byte_level("pre_tokenizer") || byte_level("decoder") {
        return None;
    }
    let flag = |name: &str, default: bool| settings[name].as_bool().unwrap_or(default);
    let space_first = flag("add_prefix_space", true);
    let scheme = match (space_first, flag("legacy", false)) {
        (false, _) => "never",
        (true, true) => "always",
        (true, false) => "first",
    };
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    decoders.extend(space_first.then(|| json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 })));
    tokenizer["normalizer"] = Value::Null;
    tokenizer["pre_tokenizer"] = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false });
    tokenizer["decoder"] = json!({ "type": "Sequence", "decoders": decoders });
    let model = &mut tokenizer["model"];
    for (name, value) in [("fuse_unk", true), ("byte_fallback", true), ("ignore_merges", false)] {
        model[name] = value.into();
    }
    model["unk_token"] = Value::Null;
    model["dropout"] = Value::Null;
    Some(std::mem::replace(&mut tokenizer["added_tokens"], json!([])))
}
