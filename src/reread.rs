//! A sequence that can be cut anywhere, though what it keeps of its text cannot: where a cut goes further back than [`Sequence::kept_from`], or the sequence
//! empties itself, the text is read anew with what comes next.

use crate::cancel::Cancel;
use crate::rows::RowSpec;
use crate::sequence::{KvMemory, Logits, Sequence, StepCounters};
use crate::{Error, Result};

/// A sequence, and the tokens that it is to have read.
pub(crate) struct Reread<S> {
    inner: S,
    tokens: Vec<u32>,
    cancel: Cancel,
}

impl<S: Sequence> Reread<S> {
    /// Of an empty sequence.
    pub(crate) fn new(inner: S) -> Reread<S> {
        Reread { inner, tokens: Vec::new(), cancel: Cancel::default() }
    }

    /// Reads what is still to be read, and `tokens` after it.
    fn catch_up(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>> {
        let behind = &self.tokens[self.inner.position()..];
        let (due, whole) = (behind.len(), [behind, tokens].concat());
        let (mut found, mut done) = (Vec::new(), 0);
        for piece in whole.chunks(self.inner.chunk().max(1)) {
            self.cancel.check()?;
            done += piece.len();
            let wanted = match logits {
                Logits::Last if done < whole.len() => Logits::None,
                Logits::All if done <= due => Logits::None,
                logits => logits,
            };
            let mut some = self.inner.forward(piece, wanted)?;
            if wanted == Logits::All {
                // Those that were asked for are at the end.
                let vocab = some.len() / piece.len();
                some.drain(..vocab * piece.len().saturating_sub(done - due));
            }
            found.append(&mut some);
        }
        Ok(found)
    }

    fn read(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>> {
        let (needed, capacity) = (self.tokens.len().saturating_add(tokens.len()), self.inner.capacity());
        if needed > capacity {
            return Err(Error::Context { needed, capacity });
        }
        match self.inner.position() == self.tokens.len() {
            true => self.inner.forward(tokens, logits),
            false => self.catch_up(tokens, logits),
        }
    }
}

impl<S: Sequence> Sequence for Reread<S> {
    fn position(&self) -> usize {
        self.tokens.len()
    }

    fn capacity(&self) -> usize {
        self.inner.capacity()
    }

    fn chunk(&self) -> usize {
        self.inner.chunk()
    }

    fn forward(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>> {
        let found = self.read(tokens, logits);
        match &found {
            Ok(_) => self.tokens.extend_from_slice(tokens),
            // Nothing is appended by a call that fails.
            Err(_) => self.inner.truncate(self.tokens.len()),
        }
        found
    }

    fn step(&mut self, token: u32) -> Result<u32> {
        if self.inner.position() < self.tokens.len() {
            return crate::session::argmax(&self.forward(&[token], Logits::Last)?);
        }
        let next = self.inner.step(token)?;
        self.tokens.push(token);
        Ok(next)
    }

    fn truncate(&mut self, position: usize) {
        self.tokens.truncate(position);
        self.inner.truncate(position);
    }

    fn memory(&self) -> KvMemory {
        self.inner.memory()
    }

    fn counters(&self) -> StepCounters {
        self.inner.counters()
    }

    fn set_cancel(&mut self, cancel: Cancel) {
        self.inner.set_cancel(cancel.clone());
        self.cancel = cancel;
    }

    fn lost(&mut self) -> Result<Option<[f64; 2]>> {
        self.inner.lost()
    }

    fn rows(&self) -> &[RowSpec] {
        self.inner.rows()
    }

    fn remark(&self) -> Option<String> {
        self.inner.remark()
    }
}
