//! A sequence on the device: its cache, its buffers, and the two ways forward, one token or a chunk.

use super::Model;
use super::chunk::{AllLogits, Chunk};
use super::coded::CodedRows;
use super::coding::{Coding, Turn};
use super::step::Step;
use crate::cache::{Cache, Slots};
use crate::gpu::pad;
use crate::kernels::score::most_keys;
use crate::kernels::values;
use crate::kernels::{prepare, turns};
use crate::rows::{Energy, Exact, Reach, RowSet, RowSpec, Schedule, Selection, Stores};
use crate::sequence::{KvMemory, Logits, Sequence, SequenceOptions, StepCounters};
use crate::{Error, Result};
use std::sync::Arc;
use std::time::Instant;

/// The most tokens that go through the layers together.
pub(super) const CHUNK: usize = 128;
/// Bytes that the scores of a block of tokens may take; longer contexts are attended to in smaller blocks.
const SCORE_BYTES: u64 = 32 << 20;
/// No submit should keep the device for longer: drivers stop those that take seconds, and the screen stands still meanwhile.
const SUBMIT_SECONDS: f64 = 0.2;

/// Everything between the weights and the cache, f32 unless said, allocated once.
pub(super) struct Buffers {
    /// Token ids, u32 `[CHUNK]`.
    pub tokens: wgpu::Buffer,
    /// The residual stream `[CHUNK][pad(D)]`, and normalised.
    pub x: wgpu::Buffer,
    pub normed: wgpu::Buffer,
    /// Query heads, key heads and value heads `[CHUNK][…]`.
    pub projected: wgpu::Buffer,
    /// Turned `[CHUNK][H][pad(head_dim)]`, and behind those of a token what is taken to coded keys.
    pub queries: wgpu::Buffer,
    /// `[block][H][columns]`.
    pub scores: wgpu::Buffer,
    pub sums: wgpu::Buffer,
    pub weights: wgpu::Buffer,
    pub attended: wgpu::Buffer,
    pub gated: wgpu::Buffer,
    /// After one token: `[vocab]`, and the largest's index, u32.
    pub logits: wgpu::Buffer,
    pub token: wgpu::Buffer,
    /// What rows are coded from, `[CHUNK][pad(w)]`, and its coordinates, `[CHUNK][r]`.
    pub coded: wgpu::Buffer,
    pub coordinates: wgpu::Buffer,
    /// RoPE's [`turns`].
    pub turns: wgpu::Buffer,
    /// Columns of scores, and some more to keep lines apart: the capacity, and where there are coded rows as many again as a chunk may read both ways; where tokens are forgotten, what can be left of them, and the capacity for rows.
    pub columns: usize,
    /// Tokens attended to together.
    pub block: usize,
    /// Where a token chooses among coded rows.
    pub choice: Option<Choice>,
}

/// What a token chooses with.
pub(super) struct Choice {
    pub selection: Selection,
    /// Scores of landmarks, `[H][chunks]`.
    pub dots: wgpu::Buffer,
    /// Chunks, u32 `[H_kv][most]`.
    pub chosen: wgpu::Buffer,
}

impl Choice {
    fn new(model: &Model, selection: Selection, capacity: usize) -> Result<Choice> {
        let (device, c) = (&*model.device, &model.config);
        Ok(Choice {
            selection,
            dots: device.buffer("scores of landmarks", (4 * c.num_attention_heads * capacity.div_ceil(Selection::CHUNK)) as u64)?,
            chosen: device.buffer("chosen chunks", (4 * c.num_key_value_heads) as u64 * selection.chunks() as u64)?,
        })
    }
}

/// At least so many columns that lines of them do not all begin in the same few sets of a cache, as they would where a context is a power of two.
fn apart(columns: usize) -> usize {
    32 * (columns.div_ceil(32) | 1)
}

impl Buffers {
    /// For a sequence that reads `coded` rows or none, `select`s among them, or forgets what there is no room for in `stores`, beside exact rows in their slots.
    pub(super) fn new(
        model: &Model,
        coded: Option<&CodedRows>,
        select: Option<Selection>,
        stores: Option<(Stores, Slots)>,
        capacity: usize,
    ) -> Result<Buffers> {
        let (device, c) = (&*model.device, &model.config);
        let floats = |what: &str, rows: usize, width: usize| device.buffer(what, rows as u64 * width as u64 * 4);
        let heads = c.num_attention_heads;
        let (specs, layers) = coded.map_or((&[][..], &[][..]), |coded| (&coded.specs, &coded.layers));
        let all = capacity + coded.map_or(0, |_| CHUNK + RowSet::block(specs) - 1);
        let columns = apart(match stores {
            None => all,
            Some((stores, slots)) => {
                let beside = slots.count() + stores.candidates + stores.vague_columns();
                beside + if coded.is_some() { capacity } else { 0 }
            }
        });
        // Of a token in a block: exact and coded values are summed apart.
        let sides = if coded.is_some() { 2 } else { 1 };
        let sums = layers.iter().map(|layer| values::sums(c, Some(&layer.values))).max().unwrap_or(values::sums(c, None));
        let queries = layers.iter().map(|layer| layer.keys.query_stride(c, layer.taken)).max().unwrap_or(heads * pad(c.head_dim));
        // What a token of a block takes, in the larger of its two tables.
        let line = (heads * columns).max(sides * sums) as u64 * 4;
        let block = (SCORE_BYTES.min(device.max_binding()) / line.max(1)).clamp(1, CHUNK as u64) as usize;
        // One token's attention is split, a block's is not.
        let tuning = device.tuning();
        let splits = tuning.splits + if coded.is_some() { tuning.coded_splits } else { 0 };
        let parts = (sides * block).max(splits as usize);
        Ok(Buffers {
            tokens: device.buffer("tokens", 4 * CHUNK as u64)?,
            x: floats("residual stream", CHUNK, pad(c.hidden_size))?,
            normed: floats("normalised input", CHUNK, pad(c.hidden_size))?,
            projected: floats("projected input", CHUNK, prepare::stride(c))?,
            queries: floats("queries", CHUNK, queries)?,
            scores: floats("attention scores", block, heads * columns)?,
            sums: floats("value sums", parts, sums)?,
            weights: floats("attention weights", parts, 2 * heads)?,
            attended: floats("attention output", CHUNK, heads * pad(c.head_dim))?,
            gated: floats("MLP activations", CHUNK, pad(c.intermediate_size))?,
            logits: floats("logits", 1, c.vocab_size)?,
            token: device.buffer("token", 4)?,
            coded: floats("rows to be coded", CHUNK, specs.iter().map(|row| pad(row.width(c.head_dim))).max().unwrap_or(0))?,
            coordinates: floats("coordinates of rows", CHUNK, specs.iter().map(|row| row.format.rank()).max().unwrap_or(0))?,
            turns: device.upload("RoPE tables", &turns(&c.rope_frequencies(), capacity))?,
            columns,
            block,
            choice: select.map(|selection| Choice::new(model, selection, capacity)).transpose()?,
        })
    }
}

/// One sequence on the device.
pub struct GpuSequence {
    pub(super) model: Arc<Model>,
    pub(super) cache: Cache,
    pub(super) buffers: Buffers,
    pub(super) step: Step,
    chunk: Chunk,
    coding: Coding,
    coded: Option<Coded>,
    pub(super) rows: Option<Arc<CodedRows>>,
    /// Bytes of bases that belong to this sequence alone.
    own: u64,
    /// What they hold of the prompt that they were made of.
    prompt: Energy,
    all: Option<AllLogits>,
    token_back: wgpu::Buffer,
    pub(super) logits_back: wgpu::Buffer,
    position: usize,
    counters: StepCounters,
    /// Tokens per chunk and layers per submit, as the device turned out to be fast.
    tokens_per_chunk: usize,
    layers_per_submit: usize,
    /// The least and the most tokens per chunk.
    least: usize,
    most: usize,
}

/// How a sequence divides its tokens, from what is asked of it and of rows that are coded.
pub(super) struct Shape {
    /// What stays exact beside coded rows.
    pub exact: Exact,
    strict: bool,
    /// The least and the most tokens per chunk.
    least: usize,
    pub most: usize,
}

impl Shape {
    /// Whether so many tokens can be attended to, where rows are coded in blocks of `coded` or not at all, and where tokens are forgotten: what stands beside is up to three times as many columns.
    pub fn check(capacity: usize, head_dim: usize, coded: Option<usize>, forgets: bool) -> Result<()> {
        // With coded rows a chunk, and a block less one, is scored both ways, and either begins with a tile of its own.
        let most = most_keys(head_dim) - coded.map_or(0, |block| 2 * CHUNK + block - 1);
        let most = if forgets { most / 4 } else { most };
        if capacity > 0 && capacity <= most {
            return Ok(());
        }
        Err(Error::Argument { name: "context".into(), message: format!("{capacity} tokens; between 1 and {most} are possible") })
    }

    /// `spans`: whether rows belong to several layers.
    pub fn new(options: &SequenceOptions, exact: Exact, spans: bool) -> Shape {
        // Rows over several layers, and those with landmarks, are coded after a chunk: small ones come closest to one token at a time. What is forgotten is so on the way, block by block.
        let forgets = options.reviver.is_some();
        let together = spans || options.select.is_some() || forgets;
        let largest = if options.strict && together || forgets { Exact::BLOCK } else { CHUNK };
        let most = options.chunk.unwrap_or(largest).clamp(1, largest);
        let Exact { sinks, recent } = options.exact.unwrap_or(exact);
        Shape {
            // More than there are tokens is all of them.
            exact: Exact { sinks: sinks.min(options.capacity), recent: recent.min(options.capacity) },
            strict: options.strict && !together,
            // What was asked for is kept to: it decides which rows a query reads exactly.
            least: if options.chunk.is_some() || (options.strict && together) || forgets { most } else { 8 },
            most,
        }
    }
}

/// How far coded rows have come.
struct Coded {
    schedule: Schedule,
    strict: bool,
    /// Tokens whose rows are coded.
    done: usize,
    /// Exact rows below this have been overwritten, sinks apart.
    exact_from: usize,
    /// Where the sequence forgets: what there is room for.
    stores: Option<Stores>,
}

impl GpuSequence {
    /// A sequence of `model` whose rows are coded as `rows` say, if at all.
    pub(super) fn new(model: Arc<Model>, rows: Option<Arc<CodedRows>>, options: SequenceOptions) -> Result<GpuSequence> {
        options.check(rows.as_ref().map(|rows| &rows.specs[..]))?;
        let (capacity, config, device) = (options.capacity, &model.config, &model.device);
        let block = rows.as_ref().map(|rows| RowSet::block(&rows.specs));
        Shape::check(capacity, config.head_dim, block, options.reviver.is_some())?;
        let shape = Shape::new(&options, rows.as_ref().map_or(Exact::default(), |rows| rows.exact), rows.as_ref().is_some_and(|rows| rows.spans()));
        let slots = Slots::new(&shape.exact.blocks(block.unwrap_or(1)), shape.most, capacity);
        let cache = match options.reviver {
            Some(reviver) => {
                let specs = rows.as_ref().map_or(&[][..], |rows| &rows.specs);
                let stores = reviver.stores(config, specs, shape.exact, capacity)?;
                Cache::forgetting(device, config, rows.as_ref().map(|rows| &rows.layout), slots, stores, capacity)?
            }
            None => Cache::new(device, config, rows.as_ref().map(|rows| (&rows.layout, slots)), options.select, capacity)?,
        };
        GpuSequence::on(model, rows, cache, shape, options.select)
    }

    /// A sequence with this cache, which is empty.
    pub(super) fn on(model: Arc<Model>, rows: Option<Arc<CodedRows>>, cache: Cache, shape: Shape, select: Option<Selection>) -> Result<GpuSequence> {
        let device = model.device.clone();
        let own = rows.as_ref().filter(|rows| !model.coded.as_ref().is_some_and(|shared| Arc::ptr_eq(shared, rows))).map_or(0, |rows| rows.bytes());
        let Shape { exact, strict, least, most } = shape;
        let stores = cache.layers.first().and_then(|layer| layer.side.as_ref()).map(|side| side.stores);
        let schedule = exact.blocks(rows.as_ref().map_or(1, |rows| RowSet::block(&rows.specs)));
        let coded = (rows.is_some() || stores.is_some()).then_some(Coded { schedule, strict, done: schedule.start(), exact_from: 0, stores });
        let read = rows.as_deref();
        let buffers = Buffers::new(&model, read, select, stores.map(|stores| (stores, cache.slots)), cache.capacity)?;
        Ok(GpuSequence {
            step: Step::plan(&model, read, &cache, &buffers)?,
            chunk: Chunk::plan(&model, read, &cache, &buffers)?,
            coding: Coding::plan(&model, read, &cache, &buffers, CHUNK)?,
            rows,
            coded,
            own,
            prompt: Energy::default(),
            all: None,
            token_back: device.readback("token", 4)?,
            logits_back: device.readback("logits", 4 * model.config.vocab_size as u64)?,
            position: 0,
            counters: StepCounters::default(),
            tokens_per_chunk: most,
            layers_per_submit: 2,
            least,
            most,
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
        let (model, rows, cache) = (&self.model, self.rows.as_deref(), &self.cache);
        let (select, stores) = (self.buffers.choice.as_ref().map(|choice| choice.selection), self.coded.as_ref().and_then(|coded| coded.stores));
        let buffers = Buffers::new(model, rows, select, stores.map(|stores| (stores, cache.slots)), cache.capacity)?;
        self.step = Step::plan(model, rows, cache, &buffers)?;
        self.chunk = Chunk::plan(model, rows, cache, &buffers)?;
        self.coding = Coding::plan(model, rows, cache, &buffers, CHUNK)?;
        (self.buffers, self.all) = (buffers, None);
        Ok(())
    }

    /// What stays exact beside coded rows; `None` where every row is exact.
    pub(super) fn exact(&self) -> Option<Exact> {
        self.coded.as_ref().map(|coded| coded.schedule.exact)
    }

    /// Goes on where `position` tokens have gone through the model and the rows of the first `done` of them are coded, of which the bases hold so much.
    pub(super) fn resume(&mut self, position: usize, done: usize, prompt: Energy) {
        (self.position, self.prompt) = (position, prompt);
        if let Some(coded) = &mut self.coded {
            (coded.done, coded.exact_from) = (done, position.saturating_sub(self.cache.slots.ring as usize));
        }
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
        let needed = self.position + tokens.len();
        if needed > self.cache.capacity {
            return Err(Error::Context { needed, capacity: self.cache.capacity });
        }
        match tokens.iter().find(|t| **t as usize >= self.model.config.vocab_size) {
            Some(t) => {
                Err(Error::Argument { name: "token".into(), message: format!("{t} is outside the vocabulary of {}", self.model.config.vocab_size) })
            }
            None => Ok(()),
        }
    }

    /// Counts what a call costs.
    fn count(&mut self, dispatches: u32, readback_bytes: u64) {
        self.counters.dispatches += dispatches;
        self.counters.submits += 1;
        self.counters.readback_bytes += readback_bytes;
    }

    /// Which coded rows the next `tokens` read.
    fn reach(&self, tokens: usize) -> Option<Reach> {
        self.coded.as_ref().map(|coded| {
            // What has been forgotten once is not read exactly again, though its row may still be there.
            let exact_from = if coded.stores.is_some() { coded.done } else { coded.exact_from };
            coded.schedule.reach(self.position, tokens, coded.strict, exact_from)
        })
    }

    /// What the next `tokens` are to read, and what is to be coded meanwhile.
    fn turn(&self, tokens: usize, reach: Option<Reach>) -> Turn {
        let (Some(coded), Some(reach)) = (&self.coded, reach) else { return Turn::exact() };
        let end = self.position + tokens;
        let to = if coded.strict { reach.of(end - 1) } else { coded.schedule.coded(end) };
        let evicted = coded.done.saturating_sub(coded.schedule.exact.sinks);
        let side = coded.stores.map_or(0, |stores| stores.held(evicted) + stores.vague_columns()) as u32;
        Turn { reach: Some(reach), code: coded.done..to.max(coded.done), at_once: coded.strict, side }
    }

    /// `tokens` have gone through the model.
    fn advance(&mut self, tokens: usize, turn: &Turn) {
        self.position += tokens;
        if let Some(coded) = &mut self.coded {
            coded.done = turn.code.end;
            coded.exact_from = coded.exact_from.max(self.position.saturating_sub(self.cache.slots.ring as usize));
        }
    }

    /// One token through the step's plan; copies `bytes` of a result to a readback buffer and reads them.
    fn run_step<T: bytemuck::Pod>(
        &mut self,
        token: u32,
        reach: Option<Reach>,
        from: fn(&GpuSequence) -> (&wgpu::Buffer, &wgpu::Buffer),
        out: &mut [T],
    ) -> Result<()> {
        let device = self.model.device.clone();
        device.queue.write_buffer(&self.buffers.tokens, 0, bytemuck::bytes_of(&token));
        let (result, back) = from(self);
        let bytes = std::mem::size_of_val(out) as u64;
        let (position, turn) = (self.position as u32, self.turn(1, reach));
        let (commands, dispatches) = device.encode(
            "step",
            |pass| self.step.record(pass, position, &self.coding, &turn),
            |encoder| encoder.copy_buffer_to_buffer(result, 0, back, 0, bytes),
        );
        device.submit_and_read(commands, back, out)?;
        self.count(dispatches, bytes);
        self.advance(1, &turn);
        Ok(())
    }

    /// Tokens through the chunk's plan, and the logits after each of them where `logits` is given.
    fn run_chunk(&mut self, tokens: &[u32], turn: Turn, logits: Option<&mut Vec<f32>>) -> Result<()> {
        let device = self.model.device.clone();
        device.queue.write_buffer(&self.buffers.tokens, 0, bytemuck::cast_slice(tokens));
        let (first, count, layers) = (self.position as u32, tokens.len() as u32, self.model.layers.len());
        let started = Instant::now();
        for start in (0..layers).step_by(self.layers_per_submit) {
            let end = (start + self.layers_per_submit).min(layers);
            let (commands, dispatches) =
                device.encode("chunk", |pass| self.chunk.record(pass, first, count, start..end, &self.coding, &turn), |_| ());
            device.queue.submit([commands]);
            self.count(dispatches, 0);
        }
        device.wait(None)?;
        self.adapt(started.elapsed().as_secs_f64() / layers as f64 * CHUNK as f64 / tokens.len() as f64);
        if let (Some(logits), Some(all)) = (logits, &self.all) {
            let (at, vocab) = (logits.len(), self.model.config.vocab_size);
            logits.resize(at + tokens.len() * vocab, 0.0);
            let bytes = (tokens.len() * vocab * 4) as u64;
            let copy = |encoder: &mut wgpu::CommandEncoder| encoder.copy_buffer_to_buffer(&all.logits, 0, &all.readback, 0, bytes);
            let (commands, dispatches) = device.encode("logits", |pass| all.record(pass, count), copy);
            device.submit_and_read(commands, &all.readback, &mut logits[at..])?;
            self.count(dispatches, bytes);
        }
        self.advance(tokens.len(), &turn);
        Ok(())
    }

    /// A call from its counters on; where it fails the position is what it was, so that the same tokens can be given again. A sequence that forgets is then empty.
    fn whole<T>(&mut self, call: impl FnOnce(&mut GpuSequence) -> Result<T>) -> Result<T> {
        let position = self.position;
        self.counters = StepCounters::default();
        call(self).inspect_err(|_| {
            // What failed may have overwritten as many exact rows as it would have appended.
            if let Some(coded) = &mut self.coded {
                coded.exact_from = coded.exact_from.max((self.position + self.most).saturating_sub(self.cache.slots.ring as usize));
            }
            self.truncate(position);
            if self.coded.as_ref().is_some_and(|coded| coded.stores.is_some()) {
                // Attention may have been counted, and rows moved, of tokens that did not get through.
                self.empty();
            }
        })
    }

    /// Forgets all that has been read.
    fn empty(&mut self) {
        self.position = 0;
        if let Some(coded) = &mut self.coded {
            (coded.done, coded.exact_from) = (coded.schedule.start(), 0);
        }
        self.cache.forget(&self.model.device);
    }

    /// Tokens chunk by chunk, and the logits that are asked for.
    fn run(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>> {
        // One token is a step, whichever logits are asked for.
        let logits = if tokens.len() == 1 && logits == Logits::All { Logits::Last } else { logits };
        let mut out = Vec::new();
        let mut longest = self.most;
        if logits == Logits::All {
            if self.all.is_none() {
                self.all = Some(AllLogits::plan(&self.model, &self.buffers, CHUNK)?);
            }
            longest = self.all.as_ref().map_or(1, |a| a.tokens);
            out.reserve_exact(tokens.len() * self.model.config.vocab_size);
        }
        let mut rest = tokens;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(self.tokens_per_chunk.min(longest).min(rest.len()));
            let reach = self.reach(now.len());
            match now.split_last() {
                // The last token is a step of its own, whose plan ends in logits; but it reads what its chunk does.
                Some((last, many)) if logits == Logits::Last && later.is_empty() => {
                    if !many.is_empty() {
                        let mut turn = self.turn(many.len(), reach);
                        if self.coded.as_ref().is_some_and(|coded| coded.stores.is_some()) {
                            // Who is forgotten is decided when all of the chunk have given their attention.
                            turn.code.end = turn.code.start;
                        }
                        self.run_chunk(many, turn, None)?;
                    }
                    out = vec![0.0; self.model.config.vocab_size];
                    self.run_step(*last, reach, |s| (&s.buffers.logits, &s.logits_back), &mut out)?;
                }
                _ => self.run_chunk(now, self.turn(now.len(), reach), (logits == Logits::All).then_some(&mut out))?,
            }
            rest = later;
        }
        finite(out)
    }

    /// Sizes the next submits by how long a layer takes a whole chunk.
    fn adapt(&mut self, layer_seconds: f64) {
        self.layers_per_submit = ((SUBMIT_SECONDS / layer_seconds) as usize).clamp(1, self.model.layers.len().max(1));
        let tokens = if layer_seconds > SUBMIT_SECONDS { (CHUNK as f64 * SUBMIT_SECONDS / layer_seconds) as usize } else { CHUNK };
        self.tokens_per_chunk = tokens.clamp(self.least, self.most);
    }
}

pub(super) fn finite(logits: Vec<f32>) -> Result<Vec<f32>> {
    if logits.iter().all(|l| l.is_finite()) { Ok(logits) } else { Err(not_a_number()) }
}

fn not_a_number() -> Error {
    Error::Numeric {
        what: "the model's output".into(),
        message: "a logit is not a number; the checkpoint's weights overflow 16-bit arithmetic or are damaged".into(),
    }
}

impl Sequence for GpuSequence {
    fn position(&self) -> usize {
        self.position
    }

    fn capacity(&self) -> usize {
        self.cache.capacity
    }

    fn chunk(&self) -> usize {
        self.tokens_per_chunk
    }

    fn forward(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>> {
        self.check(tokens)?;
        self.whole(|sequence| sequence.run(tokens, logits))
    }

    fn step(&mut self, token: u32) -> Result<u32> {
        self.check(&[token])?;
        self.whole(|sequence| {
            let mut next = [0u32];
            let reach = sequence.reach(1);
            sequence.run_step(token, reach, |s| (&s.buffers.token, &s.token_back), &mut next)?;
            if (next[0] as usize) < sequence.model.config.vocab_size { Ok(next[0]) } else { Err(not_a_number()) }
        })
    }

    fn truncate(&mut self, position: usize) {
        if position >= self.position {
            return;
        }
        if position == 0 || position < self.kept_from() {
            return self.empty();
        }
        self.position = position;
        if let Some(coded) = &mut self.coded {
            coded.done = coded.done.min(coded.schedule.whole(position));
            coded.exact_from = coded.exact_from.min(position);
        }
    }

    fn kept_from(&self) -> usize {
        // Of a block that is coded some tokens alone cannot be coded anew.
        let bound = |coded: &&Coded| coded.stores.is_some() || coded.schedule.block > 1 && coded.done > coded.schedule.start();
        self.coded.as_ref().filter(bound).map_or(0, |coded| coded.done)
    }

    fn memory(&self) -> KvMemory {
        let memory = self.cache.memory(&self.model.config);
        KvMemory { kv_fixed_bytes: memory.kv_fixed_bytes + self.own, allocated_bytes: memory.allocated_bytes + self.own, ..memory }
    }

    fn counters(&self) -> StepCounters {
        self.counters
    }

    fn lost(&mut self) -> Result<Option<[f64; 2]>> {
        let Some(rows) = self.rows.as_ref().filter(|_| self.own > 0) else { return Ok(None) };
        let (all, Energy { all: seen, held }) = (rows.energy(&self.model.device)?, self.prompt);
        Ok(Some([self.prompt.lost(), Energy { all: all.all - seen, held: all.held - held }.lost()]))
    }

    fn rows(&self) -> &[RowSpec] {
        self.rows.as_ref().map_or(&[], |rows| &rows.specs)
    }
}
