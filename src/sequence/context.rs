//! A sequence together with its tokens: what two prompts have in common is read once, and what a
//! cache has lost is read again.
//!
//! A conversation is rendered anew for each turn, and all but its end is what the cache already
//! holds. The longest common prefix of the new prompt and the cached tokens stays, everything after
//! it is forgotten, and only the rest runs through the model ([`Context::read`]).
//!
//! Not every cache can be cut anywhere: what is evicted is gone, a block of latents cannot be coded
//! anew in part, and bases that were made of a prompt are that prompt's. Such a sequence goes back
//! further, or to nothing ([`Sequence::kept_from`]); with the next call it reads again what is
//! missing.

use super::{Logits, Sequence, StepCounters};
use crate::kv::{KvMemory, LatentSpec, Saved};
use crate::logits::argmax;
use crate::task::Cancel;
use crate::{Error, Result};

/// What [`Context::read`] did.
pub struct Read {
    /// Tokens at the prompt's beginning that were in the cache already.
    pub reused: usize,
    /// Logits after the prompt's last token, `[vocab]`.
    pub logits: Vec<f32>,
}

/// A sequence and its tokens.
pub struct Context {
    sequence: Box<dyn Sequence>,
    /// The cache holds the first of them, as many as the sequence has.
    tokens: Vec<u32>,
    cancel: Cancel,
}

impl Context {
    /// Takes a sequence over, and empties it.
    pub fn new(mut sequence: Box<dyn Sequence>) -> Context {
        sequence.truncate(0);
        Context { sequence, tokens: Vec::new(), cancel: Cancel::default() }
    }

    /// Its tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Whether no further token fits.
    pub fn is_full(&self) -> bool {
        self.tokens.len() >= self.sequence.capacity()
    }

    /// Makes the tokens be exactly `prompt`, running as few of them through the model as possible.
    ///
    /// At least the last one does: its logits are needed.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty prompt and [`Error::Context`] for one that does not fit,
    /// both before anything is done; [`Error::Interrupted`] between two chunks where
    /// [`set_cancel`](Sequence::set_cancel)'s flag is set; the sequence's own. What had been cached
    /// until then stays cached.
    pub fn read(&mut self, prompt: &[u32]) -> Result<Read> {
        let Some(last) = prompt.len().checked_sub(1) else {
            return Err(Error::Argument { name: "prompt".into(), message: "it has no tokens".into() });
        };
        self.check(prompt.len())?;
        let common = prompt.iter().zip(&self.tokens).take_while(|(a, b)| a == b).count();
        let reused = common.min(last);
        self.truncate(reused);
        let logits = self.append(&prompt[reused..], Logits::Last)?;
        Ok(Read { reused, logits })
    }

    fn check(&self, needed: usize) -> Result<()> {
        let capacity = self.sequence.capacity();
        if needed > capacity { Err(Error::Context { needed, capacity }) } else { Ok(()) }
    }

    fn step_by(&mut self, token: u32, step: impl FnOnce(&mut dyn Sequence) -> Result<u32>) -> Result<u32> {
        if self.sequence.position() < self.tokens.len() {
            return argmax(&self.forward(&[token], Logits::Last)?);
        }
        let next = step(&mut *self.sequence).inspect_err(|_| self.sequence.truncate(self.tokens.len()))?;
        self.tokens.push(token);
        Ok(next)
    }

    /// Reads what is missing and then `tokens`, chunk by chunk; each is remembered when it has been
    /// read.
    fn append(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>> {
        let missing = &self.tokens[self.sequence.position()..];
        let (due, all) = (missing.len(), [missing, tokens].concat());
        if all.is_empty() {
            return self.sequence.forward(&[], logits);
        }
        let (mut found, mut done) = (Vec::new(), 0);
        while done < all.len() {
            self.cancel.check()?;
            let end = all.len().min(done + self.sequence.chunk().max(1));
            let wanted = match logits {
                Logits::Last if end < all.len() => Logits::None,
                Logits::All if end <= due => Logits::None,
                logits => logits,
            };
            let mut some = self.sequence.forward(&all[done..end], wanted).inspect_err(|_| self.sequence.truncate(self.tokens.len()))?;
            if wanted == Logits::All {
                // Those that were asked for are at the end.
                let (count, vocab) = (end - done, some.len() / (end - done));
                some.drain(..vocab * count.saturating_sub(end - due));
            }
            found.append(&mut some);
            self.tokens.extend_from_slice(&all[done.max(due).min(end)..end]);
            done = end;
        }
        Ok(found)
    }
}

impl Sequence for Context {
    fn position(&self) -> usize {
        self.tokens.len()
    }

    fn capacity(&self) -> usize {
        self.sequence.capacity()
    }

    fn chunk(&self) -> usize {
        self.sequence.chunk()
    }

    /// Where this fails nothing is appended.
    fn forward(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>> {
        self.check(self.tokens.len().saturating_add(tokens.len()))?;
        let before = self.tokens.len();
        self.append(tokens, logits).inspect_err(|_| self.truncate(before))
    }

    fn step(&mut self, token: u32) -> Result<u32> {
        self.step_by(token, |sequence| sequence.step(token))
    }

    fn step_ahead(&mut self, token: u32) -> Result<u32> {
        self.step_by(token, |sequence| sequence.step_ahead(token))
    }

    fn verifiable(&self) -> usize {
        if self.sequence.position() < self.tokens.len() { 1 } else { self.sequence.verifiable() }
    }

    fn verify(&mut self, tokens: &[u32]) -> Result<Vec<u32>> {
        if self.sequence.position() < self.tokens.len() {
            return tokens.iter().map(|token| self.step(*token)).collect();
        }
        let next = self.sequence.verify(tokens).inspect_err(|_| self.sequence.truncate(self.tokens.len()))?;
        self.tokens.extend_from_slice(tokens);
        Ok(next)
    }

    fn truncate(&mut self, position: usize) {
        self.tokens.truncate(position);
        self.sequence.truncate(position);
    }

    fn memory(&self) -> KvMemory {
        self.sequence.memory()
    }

    fn counters(&self) -> StepCounters {
        self.sequence.counters()
    }

    fn set_cancel(&mut self, cancel: Cancel) {
        self.sequence.set_cancel(cancel.clone());
        self.cancel = cancel;
    }

    fn lost(&mut self) -> Result<Option<[f64; 2]>> {
        self.sequence.lost()
    }

    fn save(&mut self) -> Result<Saved> {
        let Context { sequence, tokens, cancel: _ } = self;
        Ok(Saved { tokens: tokens.clone(), ..sequence.save()? })
    }

    fn restore(&mut self, saved: &Saved) -> Result<()> {
        self.check(saved.tokens.len())?;
        if saved.tokens.len() < saved.standing.position {
            let message = format!("has {} tokens and a cache of {}", saved.tokens.len(), saved.standing.position);
            return Err(Error::Argument { name: "session".into(), message });
        }
        self.sequence.restore(saved)?;
        self.tokens.clone_from(&saved.tokens);
        Ok(())
    }

    fn rows(&self) -> &[LatentSpec] {
        self.sequence.rows()
    }

    fn remark(&self) -> Option<String> {
        self.sequence.remark()
    }
}
