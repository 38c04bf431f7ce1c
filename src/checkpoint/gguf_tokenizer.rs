//! GGUF's tokenizers as a `tokenizer.json`.
//!
//! `gpt2` is byte-level BPE with explicit merges; `tokenizer.ggml.pre` names the rule by which text
//! is cut before merging (the file holds a name where Hugging Face has the regular expressions).
//! `llama` is SentencePiece's BPE: pieces with scores, merged best score first, unknown characters
//! as bytes; merges are listed from the scores here.

use super::gguf::{Metadata, Value as Meta};
use super::gguf_model::Fields;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::path::Path;

/// What `tokenizer.ggml.token_type` tells apart.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// SentencePiece's space.
const SPACE: &str = "▁";

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How text is cut and what else goes with a name in `tokenizer.ggml.pre`.
struct Rule {
    /// Applied one after the other: matches and what is between them become pieces.
    cuts: &'static [&'static str],
    /// Whether a piece that is a token is taken whole, without merging.
    ignore_merges: bool,
    /// Whether a text begins with the start token where metadata does not say.
    add_bos: bool,
    /// Whether text is brought into Unicode's composed form first.
    compose: bool,
}

fn rule(name: &str) -> Option<Rule> {
    let plain = |cuts| Rule { cuts, ignore_merges: false, add_bos: false, compose: false };
    Some(match name {
        "gpt-2" => plain(&[GPT2]),
        "smollm" => plain(&[r"\p{N}", GPT2]),
        "default" => plain(&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"]),
        "llama-bpe" | "llama3" | "llama-v3" => Rule { ignore_merges: true, add_bos: true, ..plain(&[LLAMA3]) },
        "qwen2" | "deepseek-r1-qwen" => Rule { compose: true, ..plain(&[QWEN2]) },
        "tekken" => Rule { ignore_merges: true, add_bos: true, ..plain(&[TEKKEN]) },
        _ => return None,
    })
}

/// The file's vocabulary as `tokenizer.json`.
pub(super) fn tokenizer_json(path: &Path, metadata: &Metadata) -> Result<Value> {
    let fields = Fields { path, metadata };
    let error = |message: String| Error::Tokenizer { path: path.into(), message };
    if !metadata.contains_key("tokenizer.ggml.model") {
        return Err(error("the file holds no tokenizer (metadata tokenizer.ggml.model is missing)".into()));
    }
    let vocabulary = Vocabulary::read(&fields)?;
    match fields.string("tokenizer.ggml.model")? {
        "gpt2" => {
            let name = if metadata.contains_key("tokenizer.ggml.pre") { fields.string("tokenizer.ggml.pre")? } else { "default" };
            let rule = rule(name).ok_or_else(|| {
                error(format!(
                    "the pre-tokenizer {name} is not supported (supported: gpt-2, smollm, llama-bpe, qwen2, deepseek-r1-qwen, tekken, default)"
                ))
            })?;
            byte_level(&fields, &vocabulary, &rule)
        }
        "llama" => sentence_piece(&fields, &vocabulary),
        other => Err(error(format!("the tokenizer {other} is not supported (supported in GGUF: gpt2, llama)"))),
    }
}

/// What to say of a vocabulary whose rule for cutting text is not named.
pub(super) fn remark(metadata: &Metadata) -> Option<String> {
    let is_bpe = metadata.get("tokenizer.ggml.model") == Some(&Meta::String("gpt2".into()));
    let remark = "the file does not say how its model cuts text into words (metadata tokenizer.ggml.pre is missing, as in files of before May 2024); \
                  a default rule is used, and answers may be worse for it. A newer file of the same model says it";
    (is_bpe && !metadata.contains_key("tokenizer.ggml.pre")).then(|| remark.into())
}

/// What `tokenizer_config.json` would say.
pub(super) fn tokenizer_config(path: &Path, metadata: &Metadata) -> Result<Value> {
    let fields = Fields { path, metadata };
    let mut settings = Map::new();
    if metadata.contains_key("tokenizer.ggml.tokens") {
        let tokens = fields.array("tokenizer.ggml.tokens")?;
        for (key, id) in [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")] {
            let id = &format!("tokenizer.ggml.{id}_token_id");
            if let Some(id) = fields.token(id)?
                && let Some(Meta::String(token)) = tokens.get(id as usize)
            {
                settings.insert(key.into(), json!(token));
            }
        }
    }
    if metadata.contains_key("tokenizer.chat_template") {
        settings.insert("chat_template".into(), json!(fields.string("tokenizer.chat_template")?));
    }
    settings.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    settings.insert("clean_up_tokenization_spaces".into(), json!(false));
    Ok(Value::Object(settings))
}

struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<i64>,
}

impl<'a> Vocabulary<'a> {
    fn read(fields: &Fields<'a>) -> Result<Vocabulary<'a>> {
        let key = "tokenizer.ggml.tokens";
        let tokens = strings(fields, key)?;
        let kinds = match fields.metadata.contains_key("tokenizer.ggml.token_type") {
            false => vec![1; tokens.len()],
            true => fields.array("tokenizer.ggml.token_type")?.iter().map(|kind| if let Meta::Integer(kind) = kind { *kind } else { 1 }).collect(),
        };
        if kinds.len() != tokens.len() {
            return Err(fields.error("tokenizer.ggml.token_type", &format!("has {} entries for {} tokens", kinds.len(), tokens.len())));
        }
        let mut ids = HashMap::new();
        for (id, token) in tokens.iter().enumerate() {
            if let Some(before) = ids.insert(*token, id) {
                return Err(fields.error(key, &format!("holds {token:?} twice, as {before} and {id}")));
            }
        }
        Ok(Vocabulary { tokens, kinds })
    }

    fn ids(&self) -> Value {
        self.tokens.iter().enumerate().map(|(id, token)| (token.to_string(), json!(id))).collect::<Map<_, _>>().into()
    }

    /// Tokens that are found in text as a whole. Control tokens are no text and vanish in decoding;
    /// user-defined ones stay.
    fn added(&self) -> Value {
        let special = |kind: &i64| matches!(*kind, UNKNOWN | CONTROL);
        self.tokens
            .iter()
            .zip(&self.kinds)
            .enumerate()
            .filter(|(_, (token, kind))| (special(kind) || **kind == USER_DEFINED) && !token.is_empty())
            .map(|(id, (token, kind))| {
                json!({ "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special(kind) })
            })
            .collect()
    }
}

fn strings<'a>(fields: &Fields<'a>, key: &str) -> Result<Vec<&'a str>> {
    let text = |value: &'a Meta| if let Meta::String(text) = value { Some(text.as_str()) } else { None };
    fields.array(key)?.iter().map(|value| text(value).ok_or_else(|| fields.error(key, "holds something that is not a text"))).collect()
}

fn byte_level(fields: &Fields, vocabulary: &Vocabulary, rule: &Rule) -> Result<Value> {
    let key = "tokenizer.ggml.merges";
    let merges = strings(fields, key)?
        .into_iter()
        // The first character may itself be a space.
        .map(|merge| merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| json!([&merge[..at], &merge[at + 1..]])).ok_or(merge))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|merge| fields.error(key, &format!("holds {merge:?}, which is no pair of tokens")))?;
    let mut steps: Vec<Value> =
        rule.cuts.iter().map(|cut| json!({ "type": "Split", "pattern": { "Regex": cut }, "behavior": "Isolated", "invert": false })).collect();
    steps.push(json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false }));
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added(),
        "normalizer": if rule.compose { json!({ "type": "NFC" }) } else { Value::Null },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": steps },
        "post_processor": around(fields, vocabulary, rule.add_bos)?,
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": rule.ignore_merges, "vocab": vocabulary.ids(), "merges": merges,
        },
    }))
}

fn sentence_piece(fields: &Fields, vocabulary: &Vocabulary) -> Result<Value> {
    let key = "tokenizer.ggml.scores";
    let scores = fields
        .array(key)?
        .iter()
        .map(|score| if let Meta::Float(score) = score { Ok(*score) } else { Err(fields.error(key, "holds something that is not a number")) });
    let scores = scores.collect::<Result<Vec<f64>>>()?;
    if scores.len() != vocabulary.tokens.len() {
        return Err(fields.error(key, &format!("has {} entries for {} tokens", scores.len(), vocabulary.tokens.len())));
    }
    let space_first = fields.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers = vec![json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE })];
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if space_first {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": SPACE }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    let unknown = vocabulary.kinds.iter().position(|kind| *kind == UNKNOWN).map(|id| vocabulary.tokens[id]);
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added(),
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "post_processor": around(fields, vocabulary, true)?,
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "ignore_merges": false, "vocab": vocabulary.ids(), "merges": merges_by_score(vocabulary, &scores),
        },
    }))
}

/// Every way to put a piece together from two others, the best pieces first: merging pairs in this
/// order is what SentencePiece does with scores.
fn merges_by_score(vocabulary: &Vocabulary, scores: &[f64]) -> Vec<Value> {
    let mergeable = |id: usize| !matches!(vocabulary.kinds[id], UNKNOWN | CONTROL);
    let ids: HashMap<&str, usize> = vocabulary.tokens.iter().enumerate().filter(|(id, _)| mergeable(*id)).map(|(id, token)| (*token, id)).collect();
    let mut merges = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate().filter(|(id, _)| mergeable(*id)) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                merges.push((scores[id], *l, *r));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    merges.into_iter().map(|(_, l, r)| json!([vocabulary.tokens[l], vocabulary.tokens[r]])).collect()
}

/// The special tokens around every text, where metadata or the kind of vocabulary asks for them.
fn around(fields: &Fields, vocabulary: &Vocabulary, add_bos: bool) -> Result<Value> {
    let token = |wanted: bool, key: &str| -> Result<Option<(&str, u32)>> {
        match fields.token(key)? {
            Some(id) if wanted => {
                let token = vocabulary.tokens.get(id as usize).ok_or_else(|| fields.error(key, &format!("is {id}, outside the vocabulary")))?;
                Ok(Some((*token, id)))
            }
            _ => Ok(None),
        }
    };
    let first = token(fields.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos), "tokenizer.ggml.bos_token_id")?;
    let last = token(fields.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false), "tokenizer.ggml.eos_token_id")?;
    if first.is_none() && last.is_none() {
        return Ok(Value::Null);
    }
    let piece = |token: &Option<(&str, u32)>, kind: u32| token.map(|(token, _)| json!({ "SpecialToken": { "id": token, "type_id": kind } }));
    let sequence = |name: &str, kind: u32| Some(json!({ "Sequence": { "id": name, "type_id": kind } }));
    let single: Vec<Value> = [piece(&first, 0), sequence("A", 0), piece(&last, 0)].into_iter().flatten().collect();
    let pair: Vec<Value> = single.iter().cloned().chain([piece(&first, 1), sequence("B", 1), piece(&last, 1)].into_iter().flatten()).collect();
    let special: Map<_, _> =
        [first, last].into_iter().flatten().map(|(token, id)| (token.to_string(), json!({ "id": token, "ids": [id], "tokens": [token] }))).collect();
    Ok(json!({ "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special }))
}
