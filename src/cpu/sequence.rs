//! One sequence decoded on the CPU.

use super::attention::LayerRows;
use super::rope::Rope;
use super::{Model, Observer, RowType};
use crate::sequence::{KvMemory, Logits, Sequence, StepCounters};
use crate::{Error, Result};
use std::sync::Arc;

/// A sequence of tokens with its cache, in main memory.
pub struct CpuSequence {
    model: Arc<Model>,
    cache: Vec<LayerRows>,
    rope: Rope,
    position: usize,
    capacity: usize,
}

impl CpuSequence {
    /// Tokens that go through the model together: enough for matrix products to run at full speed.
    const CHUNK: usize = 256;

    pub(super) fn new(model: Arc<Model>, capacity: usize, row_type: RowType) -> Result<CpuSequence> {
        let refuse = |message: &str| Error::Argument { name: "context".into(), message: message.into() };
        if capacity == 0 {
            return Err(refuse("no room for any token; ask for at least one"));
        }
        let bytes_per_token = model.layers.iter().map(|layer| layer.attention.row_width()).sum::<usize>() * row_type.bytes();
        // Tried out first: an allocation that fails would end the process.
        let fits = |bytes: usize| Vec::<u8>::new().try_reserve_exact(bytes).is_ok();
        if !capacity.checked_mul(bytes_per_token).is_some_and(fits) {
            return Err(refuse("more tokens than memory has room for; ask for fewer"));
        }
        let cache = model.layers.iter().map(|layer| layer.attention.rows(capacity, row_type)).collect();
        Ok(CpuSequence { cache, rope: Rope::new(&model.config), position: 0, capacity, model })
    }

    /// [`Sequence::forward`] under the eyes of `observer`.
    ///
    /// # Errors
    /// As [`Sequence::forward`], and [`Error::Numeric`] where a logit is not finite.
    pub fn observe(&mut self, tokens: &[u32], logits: Logits, observer: &mut dyn Observer) -> Result<Vec<f32>> {
        self.run(tokens, logits, Some(observer))
    }

    fn run(&mut self, tokens: &[u32], logits: Logits, mut observer: Option<&mut dyn Observer>) -> Result<Vec<f32>> {
        let needed = self.position.saturating_add(tokens.len());
        if needed > self.capacity {
            return Err(Error::Context { needed, capacity: self.capacity });
        }
        let vocab = self.model.config.vocab_size;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            return Err(Error::Argument { name: "tokens".into(), message: format!("token {token} is outside the vocabulary of {vocab}") });
        }
        if tokens.is_empty() && logits == Logits::Last {
            return Err(Error::Argument { name: "tokens".into(), message: "no token was given, so there are no logits after the last".into() });
        }
        self.rope.reach(needed);
        let begin = self.position;
        let mut wanted = Vec::new();
        let chunks = tokens.len().div_ceil(Self::CHUNK);
        for (index, chunk) in tokens.chunks(Self::CHUNK).enumerate() {
            let here = match logits {
                Logits::Last if index + 1 < chunks => Logits::None,
                logits => logits,
            };
            // `map` with a plain reborrow does not shorten the lifetime of the trait object.
            let observer = observer.as_mut().map(|observer| &mut **observer as &mut dyn Observer);
            let found = self.model.forward(chunk, self.position, &mut self.cache, &self.rope, here, observer);
            self.position += chunk.len();
            if let Some(at) = found.iter().position(|logit| !logit.is_finite()) {
                let what = format!("the logits after position {}", self.position - found.ncols() + at / vocab);
                let message = format!("that of token {} is {}: the weights or the cached rows overflow", at % vocab, found[at]);
                // Nothing is appended by a call that fails.
                self.position = begin;
                return Err(Error::Numeric { what, message });
            }
            wanted.extend_from_slice(found.as_slice());
        }
        Ok(wanted)
    }
}

impl Sequence for CpuSequence {
    fn position(&self) -> usize {
        self.position
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn chunk(&self) -> usize {
        Self::CHUNK
    }

    fn forward(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>> {
        self.run(tokens, logits, None)
    }

    fn step(&mut self, token: u32) -> Result<u32> {
        let logits = self.run(&[token], Logits::Last, None)?;
        let best = logits.iter().enumerate().fold(0, |best, (id, &logit)| if logit > logits[best] { id } else { best });
        Ok(best as u32)
    }

    fn truncate(&mut self, position: usize) {
        self.position = self.position.min(position);
    }

    fn memory(&self) -> KvMemory {
        let allocated_bytes = self.cache.iter().map(|rows| rows.keys.bytes() + rows.values.bytes()).sum::<usize>() as u64;
        KvMemory { kv_bytes_per_token: allocated_bytes / self.capacity as u64, kv_fixed_bytes: 0, allocated_bytes }
    }

    fn counters(&self) -> StepCounters {
        StepCounters::default()
    }
}
