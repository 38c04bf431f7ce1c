//! Special and added tokens, as transformers resolves them from all of a tokenizer's files:
//! `tokenizer_config.json`, and where that lists no added tokens also `special_tokens_map.json` and
//! `added_tokens.json`; what `tokenizer.json` lacks is added to it.

use super::read_json;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;
use tokenizers::{AddedToken, Tokenizer};

/// The names of tokens that every tokenizer may have.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The settings of the tokenizer in a directory, with what older files say of special tokens.
///
/// # Errors
/// Those of reading the files.
pub(super) fn settings(directory: &Path) -> Result<Value> {
    let mut settings = object(&directory.join("tokenizer_config.json"))?;
    if !settings.contains_key(DECODER) {
        settings.extend(object(&directory.join("special_tokens_map.json"))?);
    }
    if let Some(list) = settings.get("additional_special_tokens").filter(|_| !settings.contains_key(EXTRA)) {
        let list = list.clone();
        settings.insert(EXTRA.into(), list);
    }
    Ok(Value::Object(settings))
}

/// Added tokens by their ids.
const DECODER: &str = "added_tokens_decoder";
/// Special tokens that have no name of their own, or that the model's own have.
const EXTRA: &str = "extra_special_tokens";

/// A file's object; empty where there is no file.
fn object(path: &Path) -> Result<Map<String, Value>> {
    if !path.is_file() {
        return Ok(Map::new());
    }
    match read_json(path)? {
        Value::Object(map) => Ok(map),
        _ => Err(Error::Tokenizer { path: path.into(), message: "is not a JSON object".into() }),
    }
}

/// `bos_token` and its like: a string, or an object with one.
pub(super) fn special_token(settings: &Value, key: &str) -> Option<String> {
    content(settings.get(key)?)
}

fn content(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(String::from)
}

/// All tokens that have a name, as templates are given them.
pub(super) fn named_tokens(settings: &Value) -> Vec<(String, String)> {
    let own = settings.get(EXTRA).and_then(Value::as_object);
    let all = settings.as_object().into_iter().chain(own).flatten();
    all.filter(|(name, _)| name.ends_with("_token")).filter_map(|(name, value)| Some((name.clone(), content(value)?))).collect()
}

/// Adds to the tokenizer of a directory what its other files have of added and special tokens.
///
/// `own` are those of `tokenizer.json` itself, where they have been taken out.
///
/// # Errors
/// [`Error::Tokenizer`] for a token that another file gives an id that it would not have, and those
/// of reading the files.
pub(super) fn complete(tokenizer: &mut Tokenizer, directory: &Path, settings: &Value, own: &Value) -> Result<()> {
    let error = |message: String| Error::Tokenizer { path: directory.into(), message };
    let mut listed: Vec<(u32, AddedToken)> = Vec::new();
    let extra: Vec<&Value> = settings.get(EXTRA).and_then(Value::as_array).into_iter().flatten().collect();
    match settings.get(DECODER).and_then(Value::as_object) {
        Some(decoder) => {
            for (id, token) in decoder {
                let wrong = || error(format!("{DECODER}: {id}: {token} is no token with an id"));
                listed.push((id.parse().map_err(|_| wrong())?, added(token, false).ok_or_else(wrong)?));
            }
        }
        None => {
            let special: Vec<String> =
                NAMED.iter().filter_map(|key| special_token(settings, key)).chain(extra.iter().filter_map(|value| content(value))).collect();
            for (text, id) in object(&directory.join("added_tokens.json"))? {
                let id =
                    id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| error(format!("added_tokens.json: {text:?} has the id {id}")))?;
                let is_special = special.contains(&text);
                listed.push((id, AddedToken::from(text, is_special).normalized(!is_special)));
            }
            for token in own.as_array().into_iter().flatten() {
                let id = token["id"].as_u64().and_then(|id| u32::try_from(id).ok());
                let (Some(id), Some(token)) = (id, added(token, false)) else {
                    return Err(error(format!("tokenizer.json: {token} is no added token")));
                };
                listed.retain(|(other, _)| *other != id);
                listed.push((id, token));
            }
        }
    }
    listed.sort_by_key(|(id, _)| *id);

    let known = tokenizer.get_added_tokens_decoder();
    let mut new: Vec<AddedToken> =
        listed.iter().map(|(_, token)| token).filter(|token| !known.values().any(|known| same(known, token))).cloned().collect();
    let named = NAMED.iter().filter_map(|key| settings.get(key)).chain(named_values(settings)).chain(extra);
    for token in named.filter_map(|value| added(value, true)) {
        if !new.contains(&token) && !known.values().any(|known| known.content == token.content) {
            new.push(token);
        }
    }
    tokenizer.add_tokens(new).map_err(|e| error(format!("cannot add its tokens: {e}")))?;
    for (id, token) in listed {
        match tokenizer.token_to_id(&token.content) {
            Some(found) if found == id => {}
            found => {
                let found = found.map_or("none".into(), |id| id.to_string());
                return Err(error(format!(
                    "the added token {:?} has the id {id} in one file, and would have {found} after tokenizer.json's tokens; make the files agree",
                    token.content
                )));
            }
        }
    }
    Ok(())
}

/// The model's own named tokens.
fn named_values(settings: &Value) -> impl Iterator<Item = &Value> {
    let own = settings.get(EXTRA).and_then(Value::as_object).into_iter().flatten();
    let beside = settings.as_object().into_iter().flatten().filter(|(name, _)| name.ends_with("_token") && !NAMED.contains(&name.as_str()));
    beside.chain(own).map(|(_, value)| value)
}

/// A token from its text, or from an object with its flags; `named` ones are special.
fn added(value: &Value, named: bool) -> Option<AddedToken> {
    let flag = |name: &str, default: bool| value.get(name).and_then(Value::as_bool).unwrap_or(default);
    let special = named || flag("special", false);
    let token = AddedToken::from(content(value)?, special);
    let normalized = flag("normalized", !special);
    Some(token.single_word(flag("single_word", false)).lstrip(flag("lstrip", false)).rstrip(flag("rstrip", false)).normalized(normalized))
}

/// Whether two tokens are the same, flags and all.
fn same(a: &AddedToken, b: &AddedToken) -> bool {
    let flags = |token: &AddedToken| [token.single_word, token.lstrip, token.rstrip, token.normalized, token.special];
    a.content == b.content && flags(a) == flags(b)
}
