//! Text to tokens and back. `tokenizer.json` is the one form that is run; what a GGUF file holds
//! instead is brought into it by [`super::gguf_tokenizer`].

use super::special::{self, special_token};
use super::{Checkpoint, foreign, gguf_tokenizer, llama_tokenizer, read_json};
use crate::{Error, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// What chat models end a turn with. Their configs often name only the token that ends a text.
const END_OF_TURN: [&str; 7] = ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", "</s>"];

/// Files beside the weights that make text of tokens and tokens of text.
const FILES: [&str; 6] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template.jinja"];

/// A checkpoint's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    bos: Option<u32>,
    eos: Vec<u32>,
    /// Rows of the model's embedding table.
    rows: usize,
}

impl Checkpoint {
    /// The tokenizer that comes with the checkpoint.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where there is none, or none that lowkey can run.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let settings = self.tokenizer_config()?;
        let mut own = Value::Null;
        let (path, inner) = match &self.gguf {
            Some(metadata) => {
                let json = gguf_tokenizer::tokenizer_json(&self.path, metadata)?;
                (self.path.clone(), serde_json::from_value(json).map_err(|e| e.to_string()))
            }
            None => {
                let path = self.path.join("tokenizer.json");
                if !path.is_file() {
                    let message = "there is no tokenizer.json (a tokenizer.model alone is not read; save it as a fast tokenizer first)".into();
                    return Err(Error::Tokenizer { path: self.path.clone(), message });
                }
                let inner = if llama_tokenizer::is_class(&settings, &self.config_json) {
                    let mut json = read_json(&path)?;
                    own = llama_tokenizer::rebuild(&mut json, &settings).unwrap_or_default();
                    serde_json::from_value(json).map_err(|e| e.to_string())
                } else {
                    let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
                    foreign::refuse_pointer(&path, &bytes)?;
                    tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| e.to_string())
                };
                (path, inner)
            }
        };
        let mut inner = inner.map_err(|message| Error::Tokenizer { path: path.clone(), message: format!("cannot be used: {message}") })?;
        // Some files carry the limits of the batches they were trained with.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::Tokenizer { path: path.clone(), message: e.to_string() })?;

        if self.gguf.is_none() {
            special::complete(&mut inner, &self.path, &settings, &own)?;
        }
        let named = |key: &str| special_token(&settings, key).and_then(|token| inner.token_to_id(&token));
        let bos = self.config.bos_token_id.or_else(|| named("bos_token"));
        let mut eos = self.config.eos_token_ids.clone();
        let special = inner.get_added_tokens_decoder();
        let ends = END_OF_TURN.iter().filter_map(|token| inner.token_to_id(token)).filter(|id| special.get(id).is_some_and(|token| token.special));
        for id in named("eos_token").into_iter().chain(ends) {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        Ok(Tokenizer { inner, path, bos, eos, rows: self.config.vocab_size })
    }

    /// The tokenizer's settings, or what they would be for GGUF.
    pub(super) fn tokenizer_config(&self) -> Result<Value> {
        match &self.gguf {
            Some(metadata) => gguf_tokenizer::tokenizer_config(&self.path, metadata),
            None => special::settings(&self.path),
        }
    }

    /// Writes the tokenizer and chat template into another directory.
    ///
    /// All that [`tokenizer`](Self::tokenizer) and [`chat_template`](Self::chat_template) read: a
    /// factored checkpoint stands alone.
    ///
    /// # Errors
    /// [`Error::Io`], and for GGUF those of [`tokenizer`](Self::tokenizer).
    pub fn write_tokenizer(&self, directory: &Path) -> Result<()> {
        let Some(metadata) = &self.gguf else {
            for file in FILES {
                let (from, to) = (self.path.join(file), directory.join(file));
                if from.is_file() {
                    // Not `copy`, which takes a file's permissions along.
                    let contents = std::fs::read(&from).map_err(Error::io("read", &from))?;
                    std::fs::write(&to, contents).map_err(Error::io("write", &to))?;
                }
            }
            return Ok(());
        };
        let tokenizer = gguf_tokenizer::tokenizer_json(&self.path, metadata)?;
        let settings = gguf_tokenizer::tokenizer_config(&self.path, metadata)?;
        for (file, value) in [("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)] {
            let to = directory.join(file);
            std::fs::write(&to, value.to_string()).map_err(Error::io("write", &to))?;
        }
        Ok(())
    }
}

impl Tokenizer {
    /// The tokens of `text`.
    ///
    /// With `add_special` those are added that the model expects around a text (a `<s>` before it,
    /// if any); a rendered chat template has them already.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for text that the vocabulary cannot express, or that has a token which
    /// the model has not.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(|e| self.error(format!("cannot encode the text: {e}")))?;
        let tokens = encoding.get_ids();
        match tokens.iter().find(|token| **token as usize >= self.rows) {
            None => Ok(tokens.to_vec()),
            Some(token) => {
                let name = self.token(*token).unwrap_or_default();
                Err(self.error(format!(
                    "{name:?} is token {token}, and the model's embedding table has {} rows; its files do not belong together",
                    self.rows
                )))
            }
        }
    }

    /// The text of `tokens`, without special tokens. Bytes that are no UTF-8 become `U+FFFD`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where the decoder fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.inner.decode(tokens, true).map_err(|e| self.error(format!("cannot decode {} tokens: {e}", tokens.len())))
    }

    /// Decodes token by token what follows `context`, the tokens that came before.
    ///
    /// Only the last few matter: whether a word begins with a space depends on them.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn stream(&self, context: &[u32]) -> Result<TextStream<'_>> {
        let mut start = context.len().saturating_sub(CONTEXT);
        let mut shown = self.decode(&context[start..])?;
        // Not from the middle of a character.
        while shown.starts_with(char::REPLACEMENT_CHARACTER) && start > 0 && context.len() - start < CONTEXT + LONGEST_CHARACTER {
            start -= 1;
            shown = self.decode(&context[start..])?;
        }
        let window = context[start..].to_vec();
        Ok(TextStream { tokenizer: self, latest: window.len(), window, shown, pending: 0 })
    }

    /// The token that starts a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The tokens that end an answer: those of the config, and the vocabulary's ends of turn.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// A token as it stands in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    fn error(&self, message: String) -> Error {
        Error::Tokenizer { path: self.path.clone(), message }
    }
}

/// Tokens before the stream that are decoded with it.
const CONTEXT: usize = 8;
/// A UTF-8 character has at most four bytes: after as many tokens it is complete, or will never be.
const LONGEST_CHARACTER: usize = 4;

/// Text that arrives token by token.
///
/// Only whole characters, and joined they are what [`Tokenizer::decode`] gives for all tokens.
///
/// Tokens cannot be decoded one by one: bytes of a character may be spread over several, and a
/// leading space is dropped at the start of a text but not within. So a short window of tokens is
/// decoded again each time, and what is new is the difference.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    window: Vec<u32>,
    /// The window's text as far as it has been handed out.
    shown: String,
    /// Where in the window the tokens begin that the last text came from, and those after it.
    latest: usize,
    /// Tokens since the window's text last ended with a whole character.
    pending: usize,
}

impl TextStream<'_> {
    /// The text that `token` completes; often empty.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.window.push(token);
        self.pending += 1;
        let text = self.tokenizer.decode(&self.window)?;
        let whole = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        if whole.len() < text.len() && self.pending < LONGEST_CHARACTER {
            return Ok(if whole.len() > self.shown.len() { self.show(whole) } else { String::new() });
        }
        let new = self.show(&text);
        self.pending = 0;
        // The latest tokens are window enough, unless they have no text: then the next token would
        // look like the start of one.
        let latest = self.tokenizer.decode(&self.window[self.latest..])?;
        if !latest.is_empty() {
            self.window.drain(..self.latest);
            self.shown = latest;
            self.latest = self.window.len();
        }
        Ok(new)
    }

    /// What was held back as the beginning of a character that never came.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(mut self) -> Result<String> {
        let text = self.tokenizer.decode(&self.window)?;
        Ok(self.show(&text))
    }

    /// What `text`, the window's, has beyond what was shown.
    fn show(&mut self, text: &str) -> String {
        let same: usize = self.shown.chars().zip(text.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        self.shown = text.into();
        text[same..].into()
    }
}
