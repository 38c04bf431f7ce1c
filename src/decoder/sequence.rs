//! A sequence on the device: its cache, its buffers, and the two ways forward, one token or a
//! chunk.

use super::Model;
use super::ahead::Ahead;
use super::attention::AttentionPlan;
use super::coding::Coding;
use super::executor::{ModelPlans, Pacing, Shared};
use super::latents::Latents;
use super::scratch::{Buffers, CHUNK};
use super::verify::VERIFIED;
use crate::cache::Cache;
use crate::kernels::score::most_keys;
use crate::kv::{self, CacheMethod, Call, Cursor, Energy, Exact, LatentSet, LatentSpec, Saved, Slots};
use crate::sequence::{ChunkPolicy, KvMemory, Logits, Sequence, SequenceOptions, StepCounters};
use crate::task::Cancel;
use crate::{Error, Result};
use std::sync::Arc;
use std::time::Instant;

/// One sequence on the device.
pub struct GpuSequence {
    pub(super) model: Arc<Model>,
    pub(super) cache: Cache,
    pub(super) buffers: Buffers,
    /// The scratch that plans are bound to: [`Shared::generation`].
    pub(super) generation: u64,
    /// The model's, bound to the same scratch.
    pub(super) plans: Arc<ModelPlans>,
    /// Of one token, and of many.
    pub(super) attention: [AttentionPlan; 2],
    pub(super) coding: Coding,
    pub(super) cursor: Cursor,
    pub(super) ahead: Ahead,
    pub(super) rows: Option<Arc<Latents>>,
    /// Bytes of bases that belong to this sequence alone.
    pub(super) own: u64,
    pub(super) bases: Option<Own>,
    pub(super) counters: StepCounters,
    pub(super) policy: ChunkPolicy,
    pub(super) pacing: Pacing,
    /// Whether the cache is still to be cleared of evicted tokens.
    pub(super) stale: bool,
    pub(super) cancel: Cancel,
}

/// Bases that belong to one sequence.
pub(super) struct Own {
    pub set: Arc<LatentSet>,
    /// What they hold of the prompt that they were made of.
    pub prompt: Energy,
    /// What they held of later tokens when the sequence went on from a saved one.
    pub since: Energy,
    /// What the device had counted when later tokens began to come.
    pub counted: Energy,
}

/// Whether so many tokens can be attended to, where rows are coded in blocks of `coded` or not at
/// all, and where tokens are evicted: what stands beside is up to three times as many columns.
///
/// # Errors
/// [`Error::Argument`] with how many can.
pub(super) fn check_capacity(capacity: usize, head_dim: usize, coded: Option<usize>, evicts: bool) -> Result<()> {
    // With latents a chunk, and a block less one, is scored both ways, and either begins with a
    // tile of its own.
    let most = most_keys(head_dim) - coded.map_or(0, |block| 2 * CHUNK + block - 1);
    let most = if evicts { most / 4 } else { most };
    if capacity > 0 && capacity <= most {
        return Ok(());
    }
    Err(Error::Argument { name: "context".into(), message: format!("{capacity} tokens; between 1 and {most} are possible") })
}

impl GpuSequence {
    /// A sequence of `model` whose rows are coded as `rows` say, if at all.
    pub(super) fn new(model: Arc<Model>, rows: Option<Arc<Latents>>, options: SequenceOptions) -> Result<GpuSequence> {
        let rows = rows.filter(|_| options.method != CacheMethod::Full);
        let specs = rows.as_ref().map_or(&[][..], |rows| &rows.specs);
        let (capacity, config, device, eviction) = (options.capacity, &model.config, &model.device, options.method.eviction());
        options.method.check(&config.geometry(), config.window(), specs, capacity)?;
        let block = rows.as_ref().map(|_| LatentSet::block(specs));
        check_capacity(capacity, config.head_dim, block, eviction.is_some())?;
        let exact = options.exact.or(rows.as_ref().map(|rows| rows.exact)).unwrap_or_default().within(capacity);
        let policy = ChunkPolicy::new(&options, rows.as_ref().is_some_and(|rows| rows.spans()), CHUNK, CHUNK);
        let schedule = exact.blocks(block.unwrap_or(1));
        let slots = Slots::new(&schedule, policy.max, capacity);
        let shape = model.cache_shape(capacity);
        let cache = match eviction {
            Some(eviction) => Cache::evicting(device, shape, slots, eviction.stores(&config.geometry(), specs, exact, capacity)?)?,
            None if rows.is_some() => Cache::beside(device, shape, slots, options.method.read().selection())?,
            None => Cache::exact(device, shape)?,
        };
        let cache = match &rows {
            Some(rows) => cache.with_latents(device, &rows.layout)?,
            None => cache,
        };
        let coding = kv::Coding { schedule, slots, strict: policy.strict, evicts: eviction.is_some() };
        let cursor = Cursor::new(capacity, (rows.is_some() || coding.evicts).then_some(coding));
        let shared = &mut *model.executor.lock();
        GpuSequence::on(model.clone(), rows, cache, (cursor, policy), shared)
    }

    /// A sequence with this cache, which is empty.
    pub(super) fn on(
        model: Arc<Model>,
        rows: Option<Arc<Latents>>,
        cache: Cache,
        (cursor, policy): (Cursor, ChunkPolicy),
        shared: &mut Shared,
    ) -> Result<GpuSequence> {
        let own = rows.as_ref().filter(|rows| !model.coded.as_ref().is_some_and(|shared| Arc::ptr_eq(shared, rows))).map_or(0, |rows| rows.bytes());
        let read = rows.as_deref();
        let buffers = shared.buffers(&model, read, &cache)?;
        Ok(GpuSequence {
            plans: shared.plans(&model, &buffers)?,
            attention: [AttentionPlan::plan(&model, read, &cache, &buffers, false)?, AttentionPlan::plan(&model, read, &cache, &buffers, true)?],
            coding: Coding::plan(&model, read, &cache, &buffers, CHUNK)?,
            generation: shared.generation,
            cursor,
            ahead: Ahead::new(&model.device)?,
            rows,
            own,
            bases: None,
            counters: StepCounters::default(),
            policy,
            pacing: shared.pacing,
            stale: false,
            cancel: Cancel::default(),
            cache,
            buffers,
            model,
        })
    }

    /// Makes all plans anew, as the device's tuning now says.
    ///
    /// # Errors
    /// As [`Model::sequence`].
    pub fn replan(&mut self) -> Result<()> {
        let model = self.model.clone();
        let shared = &mut *model.executor.lock();
        shared.replan();
        self.bind(shared)
    }

    /// Binds all plans to the scratch as it is.
    fn bind(&mut self, shared: &mut Shared) -> Result<()> {
        let (model, rows, cache) = (&self.model, self.rows.as_deref(), &self.cache);
        let buffers = shared.buffers(model, rows, cache)?;
        self.plans = shared.plans(model, &buffers)?;
        let attention = |many: bool| AttentionPlan::plan(model, rows, cache, &buffers, many);
        self.attention = [attention(false)?, attention(true)?];
        self.coding = Coding::plan(model, rows, cache, &buffers, CHUNK)?;
        (self.buffers, self.generation) = (buffers, shared.generation);
        Ok(())
    }

    /// What stays exact beside latents; `None` where every row is exact.
    pub(super) fn exact(&self) -> Option<Exact> {
        self.cursor.coding().map(|coding| coding.schedule.exact)
    }

    /// Goes on where `position` tokens have gone through the model and the rows of the first
    /// `coded` of them are coded with these bases.
    pub(super) fn resume(&mut self, position: usize, coded: usize, bases: Own) {
        self.bases = Some(bases);
        self.cursor.resume(position, coded);
    }

    /// Counts what a call costs.
    pub(super) fn count(&mut self, dispatches: u32, readback_bytes: u64) {
        self.counters.dispatches += dispatches;
        self.counters.submits += 1;
        self.counters.readback_bytes += readback_bytes;
    }

    /// Tokens through the chunk's plan, and the logits after each of them where `logits` is given.
    fn run_chunk(&mut self, tokens: &[u32], call: Call, logits: Option<&mut Vec<f32>>, shared: &mut Shared) -> Result<()> {
        let device = self.model.device.clone();
        device.write(&self.buffers.tokens, 0, tokens)?;
        let (count, layers, mut reach) = (tokens.len() as u32, self.model.layers.len(), [0f32]);
        let started = Instant::now();
        for start in (0..layers).step_by(self.pacing.layers_per_submit) {
            let end = (start + self.pacing.layers_per_submit).min(layers);
            let copy = |encoder: &mut wgpu::CommandEncoder| self.buffers.copy_reach(encoder, &self.buffers.reach_back, 0);
            let (commands, dispatches) =
                device.encode("chunk", |pass| self.plans.prefill.record(pass, start..end, (&self.attention[1], &self.coding), &call), copy)?;
            if end < layers {
                device.submit(commands)?;
            } else {
                device.submit_and_read_unless(commands, &self.buffers.reach_back, &mut reach, &|| self.cancel.is_set())?;
            }
            self.count(dispatches, if end < layers { 0 } else { 4 });
        }
        if reach[0] > 0.0 {
            return Err(self.buffers.too_large(&self.model)?);
        }
        self.pacing = Pacing::new(started.elapsed().as_secs_f64() / layers as f64 * CHUNK as f64 / tokens.len() as f64, layers);
        shared.pacing = self.pacing;
        if let Some(logits) = logits {
            let all = shared.all_logits(&self.model, &self.buffers)?;
            let (at, vocab) = (logits.len(), self.model.config.vocab_size);
            logits.resize(at + tokens.len() * vocab, 0.0);
            let bytes = (tokens.len() * vocab * 4) as u64;
            let copy = |encoder: &mut wgpu::CommandEncoder| encoder.copy_buffer_to_buffer(&all.logits, 0, &all.readback, 0, bytes);
            let (commands, dispatches) = device.encode("logits", |pass| all.record(pass, count), copy)?;
            device.submit_and_read_unless(commands, &all.readback, &mut logits[at..], &|| self.cancel.is_set())?;
            self.count(dispatches, bytes);
        }
        self.cursor.advance(&call);
        Ok(())
    }

    /// A call from its counters on; where it fails the position is what it was, so that the same
    /// tokens can be given again. A sequence that evicts is then empty.
    pub(super) fn whole<T>(&mut self, call: impl FnOnce(&mut GpuSequence, &mut Shared) -> Result<T>) -> Result<T> {
        let (model, position) = (self.model.clone(), self.cursor.position());
        let shared = &mut *model.executor.lock();
        self.counters = StepCounters::default();
        self.forget();
        if shared.generation != self.generation {
            self.bind(shared)?;
        }
        if self.stale {
            self.cache.clear_evicted(&self.model.device)?;
            self.stale = false;
        }
        call(self, shared).inspect_err(|_| {
            self.forget();
            self.stale |= self.cursor.fail(position, self.policy.max);
        })
    }

    /// Tokens chunk by chunk, and the logits that are asked for.
    fn run(&mut self, tokens: &[u32], logits: Logits, shared: &mut Shared) -> Result<Vec<f32>> {
        // One token is a step, whichever logits are asked for.
        let logits = if tokens.len() == 1 && logits == Logits::All { Logits::Last } else { logits };
        let mut out = Vec::new();
        let mut longest = self.policy.max;
        if logits == Logits::All {
            longest = longest.min(shared.all_logits(&self.model, &self.buffers)?.tokens);
            out.reserve_exact(tokens.len() * self.model.config.vocab_size);
        }
        let mut rest = tokens;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(self.chunk().min(longest).min(rest.len()));
            let reach = self.cursor.reach(now.len());
            match now.split_last() {
                // The last token is a step of its own, whose plan ends in logits; but it reads what
                // its chunk does.
                Some((last, many)) if logits == Logits::Last && later.is_empty() => {
                    if !many.is_empty() {
                        let mut call = self.cursor.call_within(many.len(), reach);
                        if self.cursor.evicts() {
                            // What is evicted is decided when all of the chunk have given their
                            // attention.
                            call.code.end = call.code.start;
                        }
                        self.run_chunk(many, call, None, shared)?;
                    }
                    out = self.run_last(*last, reach)?;
                }
                _ => self.run_chunk(now, self.cursor.call_within(now.len(), reach), (logits == Logits::All).then_some(&mut out), shared)?,
            }
            rest = later;
        }
        finite(out)
    }
}

pub(super) fn finite(logits: Vec<f32>) -> Result<Vec<f32>> {
    if logits.iter().all(|l| l.is_finite()) { Ok(logits) } else { Err(not_a_number()) }
}

pub(super) fn not_a_number() -> Error {
    Error::Numeric {
        what: "the model's output".into(),
        message: "a logit is not a number; the checkpoint's weights are damaged, or too large for this arithmetic".into(),
    }
}

impl Sequence for GpuSequence {
    fn position(&self) -> usize {
        self.cursor.position()
    }

    fn capacity(&self) -> usize {
        self.cursor.capacity()
    }

    fn chunk(&self) -> usize {
        self.pacing.tokens_per_chunk.clamp(self.policy.min, self.policy.max)
    }

    fn forward(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>> {
        self.cursor.check(tokens, self.model.config.vocab_size)?;
        self.whole(|sequence, shared| sequence.run(tokens, logits, shared))
    }

    fn step(&mut self, token: u32) -> Result<u32> {
        self.step_and(token, false)
    }

    fn step_ahead(&mut self, token: u32) -> Result<u32> {
        self.step_and(token, true)
    }

    fn verifiable(&self) -> usize {
        // One that goes through alone may choose what it reads.
        let most = if self.cache.select.is_some() { 1 } else { VERIFIED.min(self.policy.max) };
        self.cursor.takes_back(most).max(1)
    }

    fn verify(&mut self, tokens: &[u32]) -> Result<Vec<u32>> {
        if let [token] = tokens {
            return Ok(vec![self.step(*token)?]);
        }
        self.cursor.check(tokens, self.model.config.vocab_size)?;
        let most = self.verifiable();
        if tokens.len() > most {
            return Err(Error::Argument { name: "draft".into(), message: format!("{} tokens; {most} can be verified together here", tokens.len()) });
        }
        self.whole(|sequence, shared| sequence.run_draft(tokens, shared))
    }

    fn truncate(&mut self, position: usize) {
        self.forget();
        self.stale |= self.cursor.truncate(position);
    }

    fn kept_from(&self) -> usize {
        self.cursor.kept_from()
    }

    fn memory(&self) -> KvMemory {
        let memory = self.cache.memory();
        KvMemory {
            kv_fixed_bytes: memory.kv_fixed_bytes + self.own,
            allocated_bytes: memory.allocated_bytes + self.own,
            scratch_bytes: self.model.executor.lock().bytes(),
            ..memory
        }
    }

    fn counters(&self) -> StepCounters {
        self.counters
    }

    fn set_cancel(&mut self, cancel: Cancel) {
        self.cancel = cancel;
    }

    fn lost(&mut self) -> Result<Option<[f64; 2]>> {
        let Some(prompt) = self.bases.as_ref().map(|bases| bases.prompt) else { return Ok(None) };
        Ok(Some([prompt.lost(), self.since()?.lost()]))
    }

    fn save(&mut self) -> Result<Saved> {
        self.saved()
    }

    fn restore(&mut self, saved: &Saved) -> Result<()> {
        saved.check_shared()?;
        self.take_over(saved)
    }

    fn rows(&self) -> &[LatentSpec] {
        self.rows.as_ref().map_or(&[], |rows| &rows.specs)
    }
}
