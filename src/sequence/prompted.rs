//! A sequence whose bases are made of its own prompt: xKV's
//! ([`compress::xkv`](crate::compress::xkv)).
//!
//! The first call that appends to an empty sequence is the prompt. It is read exactly, and then
//! coded; what comes after it is read as with any latents. A sequence that is cut within its prompt
//! is empty, and so is one whose text has gone elsewhere, where the bases lose much more of what
//! came after the prompt than of the prompt itself: with the next token the whole text is read anew
//! as a prompt ([`super::Context`]), with bases of its own. Below the length from which the bases
//! pay there is nothing to gain, and the cache stays exact; [`Sequence::remark`] says so.

use super::{Logits, Prompt, Sequence, SequenceOptions, StepCounters};
use crate::kv::{CacheMethod, Geometry, KvMemory, LatentSpec, PromptBases, Saved, SavedPrompt};
use crate::logits::argmax;
use crate::task::Cancel;
use crate::{Error, Result};

/// What reads prompts: a model on one device.
pub(crate) trait Reader: Send {
    /// One that is empty.
    fn sequence(&self, options: SequenceOptions) -> Result<Box<dyn Sequence>>;

    /// One that goes on from a saved one with bases of its own.
    fn resume(&self, saved: &Saved, options: SequenceOptions) -> Result<Box<dyn Sequence>>;

    /// One that has read `prompt`, coded in bases of its own, and the logits asked for.
    fn prompt(&self, prompt: &Prompt, options: SequenceOptions) -> Result<(Box<dyn Sequence>, Vec<f32>)>;
}

/// After so many tokens it is looked whether the bases still hold what comes.
const REFIT: usize = 256;
/// They do not where what they lose is so many times what they lost of the prompt, or of a
/// hundredth where they lost less.
const LOST: f64 = 1.5;
const LEAST: f64 = 0.01;

/// A sequence before and after its prompt.
pub(crate) struct Prompted<R> {
    reader: R,
    bases: Box<dyn PromptBases>,
    options: SequenceOptions,
    /// The length from which bases pay.
    pays_from: usize,
    cancel: Cancel,
    /// Tokens of the prompt, and at how many it is looked next whether its bases still hold.
    prompt: usize,
    check_at: usize,
    /// What has read them; nothing where that is still to be done.
    inner: Option<Box<dyn Sequence>>,
}

impl<R: Reader> Prompted<R> {
    /// For a model of this geometry, whose prompts' bases `bases` makes.
    pub(crate) fn new(reader: R, bases: Box<dyn PromptBases>, options: SequenceOptions, geometry: &Geometry) -> Result<Prompted<R>> {
        if options.capacity == 0 {
            return Err(Error::Argument { name: "context".into(), message: "no room for any token; ask for at least one".into() });
        }
        let pays_from = bases.options().pays_from(geometry)?;
        Ok(Prompted { reader, bases, options, pays_from, cancel: Cancel::default(), prompt: 0, check_at: 0, inner: None })
    }

    /// One for a text that is too short for bases.
    fn exact(&self) -> Result<Box<dyn Sequence>> {
        self.reader.sequence(SequenceOptions { method: CacheMethod::Full, ..self.options })
    }

    /// Reads `tokens`, the prompt.
    fn begin(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>> {
        if tokens.len() > self.options.capacity {
            return Err(Error::Context { needed: tokens.len(), capacity: self.options.capacity });
        }
        let (inner, found) = if tokens.len() < self.pays_from.max(1) {
            let mut inner = self.exact()?;
            inner.set_cancel(self.cancel.clone());
            let found = inner.forward(tokens, logits)?;
            (inner, found)
        } else {
            let prompt = Prompt { tokens, bases: self.bases.as_ref(), logits, cancel: &self.cancel };
            let (mut inner, found) = self.reader.prompt(&prompt, self.options)?;
            inner.set_cancel(self.cancel.clone());
            (inner, found)
        };
        (self.inner, self.prompt, self.check_at) = (Some(inner), tokens.len(), tokens.len() + REFIT);
        Ok(found)
    }

    /// After tokens were appended: has the text read anew where its bases no longer hold.
    fn look(&mut self) -> Result<()> {
        let position = self.position();
        if position < self.check_at {
            return Ok(());
        }
        self.check_at = position + REFIT;
        if self.prompt < self.pays_from {
            // A text that began short has grown: not when bases begin to pay, but when they pay for
            // reading it again.
            if position / 2 >= self.pays_from {
                self.inner = None;
            }
        } else if let Some(inner) = &mut self.inner
            && let Some([prompt, since]) = inner.lost()?
            && since > LOST * prompt.max(LEAST)
        {
            self.inner = None;
        }
        Ok(())
    }
}

impl<R: Reader> Sequence for Prompted<R> {
    fn position(&self) -> usize {
        self.inner.as_ref().map_or(0, |inner| inner.position())
    }

    fn capacity(&self) -> usize {
        self.options.capacity
    }

    fn chunk(&self) -> usize {
        // The prompt is one call.
        self.inner.as_ref().map_or(self.options.capacity, |inner| inner.chunk())
    }

    fn forward(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>> {
        let Some(inner) = &mut self.inner else { return self.begin(tokens, logits) };
        let found = inner.forward(tokens, logits)?;
        self.look()?;
        Ok(found)
    }

    fn step(&mut self, token: u32) -> Result<u32> {
        let Some(inner) = &mut self.inner else { return argmax(&self.begin(&[token], Logits::Last)?) };
        let next = inner.step(token)?;
        self.look()?;
        Ok(next)
    }

    fn step_ahead(&mut self, token: u32) -> Result<u32> {
        let Some(inner) = &mut self.inner else { return self.step(token) };
        let next = inner.step_ahead(token)?;
        self.look()?;
        Ok(next)
    }

    fn verifiable(&self) -> usize {
        self.inner.as_ref().map_or(1, |inner| inner.verifiable())
    }

    fn verify(&mut self, tokens: &[u32]) -> Result<Vec<u32>> {
        let Some(inner) = &mut self.inner else { return tokens.iter().map(|token| self.step(*token)).collect() };
        let next = inner.verify(tokens)?;
        self.look()?;
        Ok(next)
    }

    fn truncate(&mut self, position: usize) {
        match &mut self.inner {
            Some(inner) if position >= self.prompt => inner.truncate(position),
            inner => *inner = None,
        }
    }

    fn kept_from(&self) -> usize {
        self.prompt
    }

    fn memory(&self) -> KvMemory {
        self.inner.as_ref().map_or(KvMemory::default(), |inner| inner.memory())
    }

    fn counters(&self) -> StepCounters {
        self.inner.as_ref().map_or(StepCounters::default(), |inner| inner.counters())
    }

    fn set_cancel(&mut self, cancel: Cancel) {
        if let Some(inner) = &mut self.inner {
            inner.set_cancel(cancel.clone());
        }
        self.cancel = cancel;
    }

    fn lost(&mut self) -> Result<Option<[f64; 2]>> {
        self.inner.as_mut().map_or(Ok(None), |inner| inner.lost())
    }

    fn save(&mut self) -> Result<Saved> {
        let Prompted { reader: _, bases: _, options: _, pays_from: _, cancel: _, prompt, check_at, inner } = self;
        let Some(inner) = inner else { return Ok(Saved::default()) };
        let saved = inner.save()?;
        let bases = saved.prompt.and_then(|prompt| prompt.bases);
        Ok(Saved { prompt: Some(SavedPrompt { tokens: *prompt, check_at: *check_at, bases }), ..saved })
    }

    fn restore(&mut self, saved: &Saved) -> Result<()> {
        if saved.standing.position == 0 {
            self.inner = None;
            return Ok(());
        }
        let refuse = |message: &str| Err(Error::Argument { name: "session".into(), message: message.into() });
        let Some(SavedPrompt { tokens, check_at, bases }) = &saved.prompt else {
            return refuse("was saved of a cache without bases of its own; leave out --method xkv");
        };
        if *tokens > saved.standing.position {
            return refuse("has a prompt that is longer than its text");
        }
        let mut inner = match bases {
            Some(_) => self.reader.resume(saved, self.options)?,
            None => {
                let mut inner = self.exact()?;
                inner.restore(saved)?;
                inner
            }
        };
        inner.set_cancel(self.cancel.clone());
        (self.inner, self.prompt, self.check_at) = (Some(inner), *tokens, *check_at);
        Ok(())
    }

    fn rows(&self) -> &[LatentSpec] {
        self.inner.as_ref().map_or(&[], |inner| inner.rows())
    }

    fn remark(&self) -> Option<String> {
        let (short, prompt, pays_from) = (self.inner.is_some() && self.prompt < self.pays_from, self.prompt, self.pays_from);
        short.then(|| format!("xkv keeps the cache exact: its bases pay from {pays_from} tokens on, and the prompt's number is {prompt}"))
    }
}
