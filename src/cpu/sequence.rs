//! One sequence decoded on the CPU.

use super::cache::{Cache, CodedOptions};
use super::rope::Rope;
use super::{Model, Observer, RowType};
use crate::rows::{Energy, Exact, RowSet, RowSpec, Stores};
use crate::sequence::{KvMemory, Logits, Sequence, SequenceOptions, StepCounters};
use crate::{Error, Result};
use std::sync::Arc;

/// A sequence of tokens with its cache, in main memory.
pub struct CpuSequence {
    model: Arc<Model>,
    pub(super) cache: Cache,
    pub(super) rope: Rope,
    /// What stays exact beside coded rows.
    pub(super) exact: Exact,
    /// Bytes of bases that belong to this sequence alone, and what they hold of the prompt that they were made of.
    bases: usize,
    prompt: Energy,
    position: usize,
    capacity: usize,
    chunk: usize,
}

impl CpuSequence {
    /// Tokens that go through the model together: enough for matrix products to run at full speed.
    pub(super) const CHUNK: usize = 256;

    /// A sequence of `model` whose rows are coded as `rows` say, if at all.
    pub(super) fn with_rows(model: Arc<Model>, rows: Option<Arc<RowSet>>, options: SequenceOptions, row_type: RowType) -> Result<CpuSequence> {
        options.check(rows.as_ref().map(|rows| &rows.specs[..]))?;
        let refuse = |message: &str| Error::Argument { name: "context".into(), message: message.into() };
        let SequenceOptions { capacity, exact, strict, chunk, select, xkv, reviver } = options;
        let spans = rows.as_ref().is_some_and(|rows| rows.spans());
        // Rows over several layers, and those with landmarks, are coded after a chunk: small ones come closest to one token at a time. What is forgotten is so on the way, block by block.
        let together = spans || select.is_some() || xkv.is_some();
        let most = if strict && together || reviver.is_some() { Exact::BLOCK } else { capacity };
        let chunk = chunk.unwrap_or(Self::CHUNK).clamp(1, most.max(1));
        if capacity == 0 {
            return Err(refuse("no room for any token; ask for at least one"));
        }
        let (layers, head_dim) = (model.config.num_hidden_layers, model.config.head_dim);
        let width = model.config.num_key_value_heads * head_dim;
        let dense = 2 * layers * width * row_type.bytes();
        let bytes_per_token = match &rows {
            Some(rows) => RowSet::bytes_per_token(&rows.specs) as usize,
            None if reviver.is_some() => 0,
            None => dense,
        };
        // Tried out first: an allocation that fails would end the process.
        let fits = |bytes: usize| Vec::<u8>::new().try_reserve_exact(bytes).is_ok();
        if !capacity.checked_mul(bytes_per_token).is_some_and(fits) {
            return Err(refuse("more tokens than memory has room for; ask for fewer"));
        }
        let Exact { sinks, recent } = exact.or(rows.as_ref().map(|rows| rows.exact)).unwrap_or_default();
        // More than there are tokens is all of them.
        let exact = Exact { sinks: sinks.min(capacity), recent: recent.min(capacity) };
        let specs = rows.as_ref().map_or(&[][..], |rows| &rows.specs);
        let stores = reviver.map(|reviver| reviver.stores(&model.config, specs, exact, capacity)).transpose()?;
        let all = |stores: &Stores| stores.bytes()?.checked_mul(layers)?.checked_add(stores.place_bytes()?.checked_mul(2)?);
        if stores.as_ref().is_some_and(|stores| !all(stores).is_some_and(fits)) {
            return Err(refuse("more tokens than memory has room for; ask for fewer"));
        }
        // A dense sequence that forgets is one of coded rows, of which it has none.
        let none = || Arc::new(RowSet { specs: Vec::new(), coders: Vec::new(), exact });
        let rows = rows.or(stores.map(|_| none()));
        let coded = rows.map(|set| CodedOptions { schedule: exact.blocks(RowSet::block(&set.specs)), set, strict, select, stores, head_dim });
        let cache = Cache::new(layers, width, capacity, chunk, row_type, coded);
        Ok(CpuSequence { cache, rope: Rope::new(&model.config), exact, bases: 0, prompt: Energy::default(), position: 0, capacity, chunk, model })
    }

    /// Goes on from rows that are coded already: [`Cache::adopt`].
    pub(super) fn adopt(&mut self, set: Arc<RowSet>, words: Vec<Vec<u32>>, prompt: Energy, done: usize, position: usize) {
        self.prompt = prompt;
        self.bases = set.coders.iter().map(|coder| size_of::<f32>() * (coder.up.len() + coder.mean.len())).sum();
        self.cache.adopt(set, words, done, position, self.capacity);
        self.position = position;
    }

    /// Whether `tokens` can be appended.
    pub(super) fn check(&self, tokens: &[u32]) -> Result<()> {
        let needed = self.position.saturating_add(tokens.len());
        if needed > self.capacity {
            return Err(Error::Context { needed, capacity: self.capacity });
        }
        let vocab = self.model.config.vocab_size;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            return Err(Error::Argument { name: "tokens".into(), message: format!("token {token} is outside the vocabulary of {vocab}") });
        }
        Ok(())
    }

    /// [`Sequence::forward`] under the eyes of `observer`.
    ///
    /// # Errors
    /// As [`Sequence::forward`], and [`Error::Numeric`] where a logit is not finite.
    pub fn observe(&mut self, tokens: &[u32], logits: Logits, observer: &mut dyn Observer) -> Result<Vec<f32>> {
        self.run(tokens, logits, Some(observer))
    }

    fn run(&mut self, tokens: &[u32], logits: Logits, mut observer: Option<&mut dyn Observer>) -> Result<Vec<f32>> {
        self.check(tokens)?;
        let (needed, vocab) = (self.position + tokens.len(), self.model.config.vocab_size);
        if tokens.is_empty() && logits == Logits::Last {
            return Err(Error::Argument { name: "tokens".into(), message: "no token was given, so there are no logits after the last".into() });
        }
        self.rope.reach(needed);
        let begin = self.position;
        let mut wanted = Vec::new();
        let chunks = tokens.len().div_ceil(self.chunk);
        for (index, chunk) in tokens.chunks(self.chunk).enumerate() {
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
                // Nothing is appended by a call that fails; where tokens are forgotten, attention has been counted and rows have moved.
                self.truncate(if self.cache.forgets() { 0 } else { begin });
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
        self.chunk
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
        if position < self.position {
            self.position = if position < self.kept_from() { 0 } else { position };
            self.cache.truncate(self.position);
        }
    }

    fn kept_from(&self) -> usize {
        self.cache.kept_from()
    }

    fn memory(&self) -> KvMemory {
        let (rows, exact) = self.cache.bytes();
        let fixed = exact + self.bases;
        KvMemory { kv_bytes_per_token: (rows / self.capacity) as u64, kv_fixed_bytes: fixed as u64, allocated_bytes: (rows + fixed) as u64 }
    }

    fn counters(&self) -> StepCounters {
        StepCounters::default()
    }

    fn lost(&mut self) -> Result<Option<[f64; 2]>> {
        Ok((self.bases > 0).then(|| [self.prompt.lost(), self.cache.energy().lost()]))
    }

    fn rows(&self) -> &[RowSpec] {
        self.cache.rows()
    }
}
