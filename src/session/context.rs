//! A sequence together with the tokens in its cache, so that what two prompts have in common is read once.
//!
//! A conversation is rendered anew for each turn, and all but its end is what the cache already holds. The longest common prefix of the new prompt and
//! the cached tokens stays, everything after it is forgotten, and only the rest runs through the model.

use super::Cancel;
use crate::sequence::{Logits, Sequence};
use crate::{Error, Result};

/// What [`Context::read`] did.
pub struct Read {
    /// Tokens at the prompt's beginning that were in the cache already.
    pub reused: usize,
    /// Logits after the prompt's last token, `[vocab]`.
    pub logits: Vec<f32>,
}

/// A sequence and the tokens in its cache.
pub struct Context {
    sequence: Box<dyn Sequence>,
    tokens: Vec<u32>,
}

impl Context {
    /// Takes a sequence over, and empties it.
    pub fn new(mut sequence: Box<dyn Sequence>) -> Context {
        sequence.truncate(0);
        Context { sequence, tokens: Vec::new() }
    }

    /// The tokens in the cache.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The sequence itself, to look at.
    pub fn sequence(&self) -> &dyn Sequence {
        self.sequence.as_ref()
    }

    /// Whether no further token fits.
    pub fn is_full(&self) -> bool {
        self.sequence.position() >= self.sequence.capacity()
    }

    /// Has long calls of the sequence stop where `cancel` is set.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.sequence.set_cancel(cancel);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.sequence.truncate(0);
        self.tokens.clear();
    }

    /// Makes the cache hold exactly `prompt`, running as few tokens through the model as possible. At least the last one does: its logits are needed.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty prompt and [`Error::Context`] for one that does not fit, both before anything is done; [`Error::Interrupted`]
    /// between two chunks when `cancel` is set; the sequence's own. What had been cached until then stays cached.
    pub fn read(&mut self, prompt: &[u32], cancel: &Cancel) -> Result<Read> {
        let Some(last) = prompt.len().checked_sub(1) else {
            return Err(Error::Argument { name: "prompt".into(), message: "it has no tokens".into() });
        };
        if prompt.len() > self.sequence.capacity() {
            return Err(Error::Context { needed: prompt.len(), capacity: self.sequence.capacity() });
        }
        let common = prompt.iter().zip(&self.tokens).take_while(|(a, b)| a == b).count();
        let reused = common.min(last);
        self.sequence.truncate(reused);
        self.tokens.truncate(reused);

        let chunk = self.sequence.chunk().max(1);
        let mut logits = Vec::new();
        while self.tokens.len() < prompt.len() {
            if cancel.is_set() {
                return Err(Error::Interrupted);
            }
            let end = (self.tokens.len() + chunk).min(prompt.len());
            let wanted = if end == prompt.len() { Logits::Last } else { Logits::None };
            logits = self.append(&prompt[self.tokens.len()..end], |sequence, tokens| sequence.forward(tokens, wanted))?;
        }
        Ok(Read { reused, logits })
    }

    /// Appends `token` and returns the logits after it, `[vocab]`.
    ///
    /// # Errors
    /// The sequence's.
    pub fn push(&mut self, token: u32) -> Result<Vec<f32>> {
        self.append(&[token], |sequence, tokens| sequence.forward(tokens, Logits::Last))
    }

    /// Appends `token` and returns the likeliest next one, which the device chooses.
    ///
    /// # Errors
    /// The sequence's.
    pub fn step(&mut self, token: u32) -> Result<u32> {
        self.append(&[token], |sequence, tokens| sequence.step(tokens[0]))
    }

    /// Runs `tokens` and remembers them; where that fails half-way, the cache is set back to what was there before.
    fn append<T>(&mut self, tokens: &[u32], run: impl FnOnce(&mut dyn Sequence, &[u32]) -> Result<T>) -> Result<T> {
        let result = run(self.sequence.as_mut(), tokens);
        match result {
            Ok(_) => self.tokens.extend_from_slice(tokens),
            Err(_) => {
                self.sequence.truncate(self.tokens.len());
                self.tokens.truncate(self.sequence.position());
            }
        }
        result
    }
}
