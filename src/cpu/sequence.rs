//! One sequence decoded on the CPU.

use super::cache::{Cache, CodedOptions};
use super::layer::ForwardPass;
use super::rope::Ropes;
use super::{Model, Observer, RowType};
use crate::kv::{CacheMethod, Coding, Cursor, Energy, LatentSet, LatentSpec, Room, Saved, SavedBases, SavedPrompt, Slots, Stores};
use crate::logits::argmax;
use crate::sequence::{ChunkPolicy, KvMemory, Logits, Sequence, SequenceOptions, StepCounters};
use crate::{Error, Result};
use std::sync::Arc;

/// A sequence of tokens with its cache, in main memory.
pub struct CpuSequence {
    model: Arc<Model>,
    pub(super) cache: Cache,
    pub(super) ropes: Ropes,
    pub(super) cursor: Cursor,
    /// Bytes of bases that belong to this sequence alone, and what they hold of the prompt that
    /// they were made of.
    bases: usize,
    prompt: Energy,
    chunk: usize,
}

impl CpuSequence {
    /// Tokens that go through the model together: enough for matrix products to run at full speed.
    pub(super) const CHUNK: usize = 256;

    /// A sequence of `model` whose rows are coded as `rows` say, if at all.
    pub(super) fn with_latents(model: Arc<Model>, rows: Option<Arc<LatentSet>>, options: SequenceOptions, row_type: RowType) -> Result<CpuSequence> {
        let (config, capacity) = (&model.config, options.capacity);
        let rows = rows.filter(|_| options.method != CacheMethod::Full);
        let specs = rows.as_ref().map_or(&[][..], |rows| &rows.specs);
        options.method.check(&config.geometry(), config.window(), specs, capacity)?;
        if capacity == 0 {
            return Err(Error::Argument { name: "context".into(), message: "no room for any token; ask for at least one".into() });
        }
        let exact = options.exact.or(rows.as_ref().map(|rows| rows.exact)).unwrap_or_default().within(capacity);
        let eviction = options.method.eviction();
        let stores = eviction.map(|eviction| eviction.stores(&config.geometry(), specs, exact, capacity)).transpose()?;
        fits(&model, specs, stores.as_ref(), capacity, row_type)?;
        let policy = ChunkPolicy::new(&options, rows.as_ref().is_some_and(|rows| rows.spans()), Self::CHUNK, capacity);
        // A dense sequence that evicts is one of latents, of which it has none.
        let set = rows.or_else(|| stores.map(|_| Arc::new(LatentSet { specs: Vec::new(), coders: Vec::new(), exact })));
        let coding = set.as_ref().map(|set| {
            let schedule = exact.blocks(LatentSet::block(&set.specs));
            Coding { schedule, slots: Slots::new(&schedule, policy.max, capacity), strict: policy.strict, evicts: stores.is_some() }
        });
        let select = options.method.read().selection();
        let coded = set.zip(coding).map(|(set, coding)| CodedOptions { set, coding, select, stores, head_dim: config.head_dim });
        let cache = Cache::new(0..config.num_hidden_layers, config.geometry().kv_width(), capacity, row_type, coded);
        let (ropes, cursor) = (Ropes::new(config, capacity), Cursor::new(capacity, coding));
        Ok(CpuSequence { cache, ropes, cursor, bases: 0, prompt: Energy::default(), chunk: policy.max, model })
    }

    /// An empty sequence with exact rows beside those of the prompt's own bases that are to come:
    /// [`adopt`](Self::adopt).
    pub(super) fn for_prompt(model: Arc<Model>, options: SequenceOptions, spans: bool, row_type: RowType) -> Result<CpuSequence> {
        let (config, capacity) = (&model.config, options.capacity);
        let exact = options.exact.unwrap_or_default().within(capacity);
        let policy = ChunkPolicy::new(&options, spans, Self::CHUNK, capacity);
        let slots = Slots::new(&exact.blocks(1), policy.max, capacity);
        let coding = Coding { schedule: exact.blocks(1), slots, strict: policy.strict, evicts: false };
        let set = Arc::new(LatentSet { specs: Vec::new(), coders: Vec::new(), exact });
        let coded = CodedOptions { set, coding, select: options.method.read().selection(), stores: None, head_dim: config.head_dim };
        let cache = Cache::new(0..config.num_hidden_layers, config.geometry().kv_width(), capacity, row_type, Some(coded));
        let (ropes, cursor) = (Ropes::new(config, capacity), Cursor::new(capacity, Some(coding)));
        Ok(CpuSequence { cache, ropes, cursor, bases: 0, prompt: Energy::default(), chunk: policy.max, model })
    }

    /// Goes on where `position` tokens have gone through the model and `words` are the packed rows
    /// of the first `done` of them: [`Cache::adopt`].
    pub(super) fn adopt(&mut self, set: Arc<LatentSet>, words: Vec<Vec<u32>>, prompt: Energy, done: usize, position: usize) {
        self.prompt = prompt;
        self.bases = set.coders.iter().map(|coder| size_of::<f32>() * (coder.up.len() + coder.mean.len())).sum();
        self.cache.adopt(set, words, self.cursor.capacity());
        self.cursor.resume(position, done);
    }

    /// A sequence that goes on from one with bases of its own.
    ///
    /// # Errors
    /// As [`Sequence::restore`].
    pub(super) fn resumed(model: Arc<Model>, saved: &Saved, bases: &SavedBases, options: SequenceOptions, row_type: RowType) -> Result<CpuSequence> {
        bases.check(&model.config.geometry())?;
        fits(&model, &bases.set.specs, None, options.capacity, row_type)?;
        let mut sequence = CpuSequence::for_prompt(model, options, bases.set.spans(), row_type)?;
        sequence.adopt(bases.set.clone(), vec![Vec::new(); bases.set.specs.len()], bases.prompt, 0, 0);
        saved.check(&sequence.room())?;
        sequence.take_over(saved);
        Ok(sequence)
    }

    fn room(&self) -> Room<'_> {
        Room {
            geometry: self.model.config.geometry(),
            capacity: self.cursor.capacity(),
            coding: self.cursor.coding(),
            rows: self.cache.rows(),
            selects: self.cache.chooses(),
            stores: self.cache.stores(),
        }
    }

    /// Goes on from what was saved, which fits.
    fn take_over(&mut self, saved: &Saved) {
        self.truncate(0);
        if saved.standing.position == 0 {
            return;
        }
        self.cache.restore(saved);
        self.cursor.stand(&saved.standing);
    }

    /// [`Sequence::forward`] under the eyes of `observer`.
    ///
    /// # Errors
    /// As [`Sequence::forward`], and [`Error::Numeric`] where a logit is not finite.
    pub fn observe(&mut self, tokens: &[u32], logits: Logits, observer: &mut dyn Observer) -> Result<Vec<f32>> {
        self.run(tokens, logits, Some(observer))
    }

    fn run(&mut self, tokens: &[u32], logits: Logits, mut observer: Option<&mut dyn Observer>) -> Result<Vec<f32>> {
        let vocab = self.model.config.vocab_size;
        self.cursor.check(tokens, vocab)?;
        if tokens.is_empty() && logits == Logits::Last {
            return Err(Error::Argument { name: "tokens".into(), message: "no token was given, so there are no logits after the last".into() });
        }
        self.model.files.check()?;
        let begin = self.cursor.position();
        self.ropes.reach(begin + tokens.len());
        let mut wanted = Vec::new();
        let chunks = tokens.len().div_ceil(self.chunk);
        for (index, chunk) in tokens.chunks(self.chunk).enumerate() {
            let here = match logits {
                Logits::Last if index + 1 < chunks => Logits::None,
                logits => logits,
            };
            // `map` with a plain reborrow does not shorten the lifetime of the trait object.
            let observer = observer.as_mut().map(|observer| &mut **observer as &mut dyn Observer);
            let call = self.cursor.call(chunk.len());
            let found = self.model.forward(chunk, ForwardPass { call: &call, ropes: &self.ropes }, &mut self.cache, here, observer);
            self.cursor.advance(&call);
            if let Some(at) = found.iter().position(|logit| !logit.is_finite()) {
                let what = format!("the logits after position {}", call.tokens.end - found.ncols() + at / vocab);
                let message = format!("that of token {} is {}: the weights or the cached rows overflow", at % vocab, found[at]);
                if self.cursor.fail(begin, chunk.len()) {
                    self.cache.clear();
                }
                return Err(Error::Numeric { what, message });
            }
            wanted.extend_from_slice(found.as_slice());
        }
        Ok(wanted)
    }
}

/// Whether memory has room for `capacity` tokens, tried out first: an allocation that fails would
/// end the process.
fn fits(model: &Model, specs: &[LatentSpec], stores: Option<&Stores>, capacity: usize, row_type: RowType) -> Result<()> {
    let geometry = model.config.geometry();
    let bytes_per_token = match stores {
        None if specs.is_empty() => 2 * geometry.layers * geometry.kv_width() * row_type.bytes(),
        _ => LatentSet::bytes_per_token(specs) as usize,
    };
    let fits = |bytes: usize| Vec::<u8>::new().try_reserve_exact(bytes).is_ok();
    let all = |stores: &Stores| stores.bytes()?.checked_mul(geometry.layers)?.checked_add(stores.place_bytes()?.checked_mul(2)?);
    if capacity.checked_mul(bytes_per_token).is_some_and(fits) && stores.is_none_or(|stores| all(stores).is_some_and(fits)) {
        return Ok(());
    }
    Err(Error::Argument { name: "context".into(), message: "more tokens than memory has room for; ask for fewer".into() })
}

impl Sequence for CpuSequence {
    fn position(&self) -> usize {
        self.cursor.position()
    }

    fn capacity(&self) -> usize {
        self.cursor.capacity()
    }

    fn chunk(&self) -> usize {
        self.chunk
    }

    fn forward(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>> {
        // On a thread of the pool: from another one each product would wait to be handed over.
        rayon::join(|| self.run(tokens, logits, None), || ()).0
    }

    fn step(&mut self, token: u32) -> Result<u32> {
        argmax(&self.forward(&[token], Logits::Last)?)
    }

    fn verifiable(&self) -> usize {
        let most = if self.cache.chooses() { 1 } else { self.chunk };
        self.cursor.takes_back(most).max(1)
    }

    fn truncate(&mut self, position: usize) {
        if self.cursor.truncate(position) {
            self.cache.clear();
        }
    }

    fn kept_from(&self) -> usize {
        self.cursor.kept_from()
    }

    fn memory(&self) -> KvMemory {
        let (rows, exact) = self.cache.bytes();
        let fixed = exact + self.bases;
        KvMemory {
            kv_bytes_per_token: (rows / self.cursor.capacity()) as u64,
            kv_fixed_bytes: fixed as u64,
            allocated_bytes: (rows + fixed) as u64,
            scratch_bytes: 0,
        }
    }

    fn counters(&self) -> StepCounters {
        StepCounters::default()
    }

    fn save(&mut self) -> Result<Saved> {
        let CpuSequence { model: _, cache, ropes: _, cursor, bases, prompt, chunk: _ } = &*self;
        let standing = cursor.standing();
        if standing.position == 0 {
            return Ok(Saved::default());
        }
        let (layers, rows) = cache.save(&standing)?;
        let own = cache.set().filter(|_| *bases > 0);
        let prompt = own.map(|set| SavedPrompt::of(SavedBases { set: set.clone(), prompt: *prompt, since: cache.energy() }));
        Ok(Saved { tokens: Vec::new(), standing, layers, rows, prompt })
    }

    fn restore(&mut self, saved: &Saved) -> Result<()> {
        saved.check_shared()?;
        saved.check(&self.room())?;
        self.take_over(saved);
        Ok(())
    }

    fn lost(&mut self) -> Result<Option<[f64; 2]>> {
        Ok((self.bases > 0).then(|| [self.prompt.lost(), self.cache.energy().lost()]))
    }

    fn rows(&self) -> &[LatentSpec] {
        self.cache.rows()
    }
}
