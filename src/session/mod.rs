//! One conversation, or one text, being decoded: prompt in, tokens out, until something ends it.
//!
//! A [`Session`] owns a sequence and remembers the tokens in its cache, so that a prompt that
//! begins as the one before is not read again from the start: for a conversation, render all of it
//! anew for each turn, and only the last message costs anything. [`Session::generate`] gives an
//! iterator that does one step of the model for each item; whoever stops iterating stops the model.

mod container;
mod draft;
mod generation;
mod packing;
mod prefixes;
mod saved;
mod stop;
mod stores;

pub use crate::logits::Sampling;
pub use crate::task::Cancel;
pub use generation::{Finish, Generation, Summary, Token};
pub use prefixes::{Begun, PrefixCache};
pub use saved::Restored;
pub use stop::{Released, StopStrings};

use crate::Result;
use crate::checkpoint::{Origin, Tokenizer};
use crate::kv::{CacheMethod, KvMemory};
use crate::logits::Sampler;
use crate::sequence::{Context, Sequence};
use std::sync::Arc;

/// What a session is made for.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SessionOptions {
    /// Room for this many tokens, prompts and answers together.
    ///
    /// `None` for what the model was trained for, but no more than 4096.
    pub context: Option<usize>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Text that ends an answer, besides the model's own end tokens. It is not part of the answer.
    pub stop: Vec<String>,
    /// The longest answer; `None` for what the context has room for.
    pub max_tokens: Option<usize>,
    /// Whether the model's end tokens are taken as any other.
    pub ignore_eos: bool,
    /// How many tokens are drafted from what the text has said before, to be verified together; 0
    /// for none. The text is the same, of greedy sampling; other sampling drafts nothing.
    pub draft: usize,
    /// How keys and values are kept.
    pub method: CacheMethod,
}

/// What to continue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prompt<'a> {
    /// Text. What the model expects around one (often a token that starts it) is added.
    Text(&'a str),
    /// Text in which the special tokens are written out, as a chat template renders it. Nothing is
    /// added.
    Rendered(&'a str),
    /// Tokens.
    Tokens(&'a [u32]),
}

impl<'a> From<&'a str> for Prompt<'a> {
    fn from(text: &'a str) -> Prompt<'a> {
        Prompt::Text(text)
    }
}

impl<'a> From<&'a String> for Prompt<'a> {
    fn from(text: &'a String) -> Prompt<'a> {
        Prompt::Text(text)
    }
}

/// A sequence, its tokenizer and its sampler.
pub struct Session {
    context: Context,
    tokenizer: Arc<Tokenizer>,
    sampler: Sampler,
    stop: StopStrings,
    max_tokens: usize,
    /// Tokens that end an answer, sorted.
    ends: Vec<u32>,
    draft: usize,
    cancel: Cancel,
    /// What its cache is computed with, where that is known.
    origin: Option<Arc<Origin>>,
    method: CacheMethod,
}

impl Session {
    /// A session on any sequence.
    ///
    /// `options.context` and `method` are of no effect here: the sequence has its own.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] for an option out of its range.
    pub fn new(mut context: Context, tokenizer: Arc<Tokenizer>, options: SessionOptions) -> Result<Session> {
        let mut ends = if options.ignore_eos { Vec::new() } else { tokenizer.eos_ids().to_vec() };
        ends.sort_unstable();
        let cancel = Cancel::default();
        context.set_cancel(cancel.clone());
        Ok(Session {
            context,
            sampler: Sampler::new(options.sampling)?,
            stop: StopStrings::new(options.stop)?,
            max_tokens: options.max_tokens.unwrap_or(usize::MAX),
            ends,
            draft: options.draft,
            method: options.method,
            tokenizer,
            cancel,
            origin: None,
        })
    }

    /// Continues `prompt`, which is everything the model is to see.
    ///
    /// What it has in common with the cache is not read again.
    ///
    /// # Errors
    /// [`crate::Error::Tokenizer`] for text that cannot be encoded, [`crate::Error::Argument`] for
    /// a prompt without tokens, [`crate::Error::Context`] for one that does not fit. What goes
    /// wrong later is an item of the iterator, its last.
    pub fn generate<'a>(&mut self, prompt: impl Into<Prompt<'a>>) -> Result<Generation<'_>> {
        let tokens = self.encode(prompt)?;
        Generation::new(self, tokens)
    }

    /// The tokens of `prompt`.
    ///
    /// # Errors
    /// [`crate::Error::Tokenizer`] for text that cannot be encoded.
    pub fn encode<'a>(&self, prompt: impl Into<Prompt<'a>>) -> Result<Vec<u32>> {
        match prompt.into() {
            Prompt::Text(text) => self.tokenizer.encode(text, true),
            Prompt::Rendered(text) => self.tokenizer.encode(text, false),
            Prompt::Tokens(tokens) => Ok(tokens.to_vec()),
        }
    }

    /// A handle to stop an answer with, from another thread. It stays set until it is cleared.
    pub fn cancel(&self) -> Cancel {
        self.cancel.clone()
    }

    /// Has `cancel` stop answers from now on.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.context.set_cancel(cancel.clone());
        self.cancel = cancel;
    }

    /// Forgets everything that was said.
    pub fn reset(&mut self) {
        self.context.truncate(0);
    }

    /// The tokens in the cache.
    pub fn tokens(&self) -> &[u32] {
        self.context.tokens()
    }

    /// Tokens in the cache.
    pub fn position(&self) -> usize {
        self.context.tokens().len()
    }

    /// Tokens that the cache has room for.
    pub fn capacity(&self) -> usize {
        self.context.capacity()
    }

    /// What the user should know of how the text is kept: [`Sequence::remark`].
    pub fn remark(&self) -> Option<String> {
        self.context.remark()
    }

    /// What the cache costs.
    pub fn memory(&self) -> KvMemory {
        self.context.memory()
    }
}
