//! A sequence on the device: its cache, its buffers, and the two ways forward, one token or a chunk.

use super::Model;
use super::chunk::{AllLogits, Chunk};
use super::step::Step;
use crate::cache::Cache;
use crate::gpu::pad;
use crate::kernels::score::most_keys;
use crate::kernels::turns;
use crate::kernels::values::SPLITS;
use crate::sequence::{KvMemory, Logits, Sequence, StepCounters};
use crate::{Error, Result};
use std::sync::Arc;
use std::time::Instant;

/// The most tokens that go through the layers together.
const CHUNK: usize = 128;
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
    /// Query heads, key row and value row `[CHUNK][…]`.
    pub projected: wgpu::Buffer,
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
    /// RoPE's [`turns`].
    pub turns: wgpu::Buffer,
    /// Columns of scores: the capacity.
    pub columns: usize,
    /// Tokens attended to together.
    pub block: usize,
}

impl Buffers {
    fn new(model: &Model, capacity: usize) -> Result<Buffers> {
        let (device, c) = (&*model.device, &model.config);
        let floats = |what: &str, rows: usize, width: usize| device.buffer(what, rows as u64 * width as u64 * 4);
        let widest = |f: &dyn Fn(&super::weights::Layer) -> usize| model.layers.iter().map(f).max().unwrap_or(0);
        let heads = c.num_attention_heads;
        let sums = widest(&|l| l.layout.sums(c).1);
        // What a token of a block takes, in the larger of its two tables.
        let line = (heads * capacity).max(sums) as u64 * 4;
        let block = (SCORE_BYTES.min(device.max_binding()) / line.max(1)).clamp(1, CHUNK as u64) as usize;
        // One token's attention is split, a block's is not.
        let parts = block.max(SPLITS as usize);
        Ok(Buffers {
            tokens: device.buffer("tokens", 4 * CHUNK as u64)?,
            x: floats("residual stream", CHUNK, pad(c.hidden_size))?,
            normed: floats("normalised input", CHUNK, pad(c.hidden_size))?,
            projected: floats("projected input", CHUNK, widest(&|l| l.projection.rows as usize))?,
            queries: floats("queries", CHUNK, heads * pad(c.head_dim))?,
            scores: floats("attention scores", block, heads * capacity)?,
            sums: floats("value sums", parts, sums)?,
            weights: floats("attention weights", parts, 2 * heads)?,
            attended: floats("attention output", CHUNK, widest(&|l| l.output.stride as usize))?,
            gated: floats("MLP activations", CHUNK, pad(c.intermediate_size))?,
            logits: floats("logits", 1, c.vocab_size)?,
            token: device.buffer("token", 4)?,
            turns: device.upload("RoPE tables", &turns(&c.rope_frequencies(), capacity))?,
            columns: capacity,
            block,
        })
    }
}

/// One sequence on the device.
pub struct GpuSequence {
    model: Arc<Model>,
    cache: Cache,
    buffers: Buffers,
    step: Step,
    chunk: Chunk,
    all: Option<AllLogits>,
    token_back: wgpu::Buffer,
    logits_back: wgpu::Buffer,
    position: usize,
    counters: StepCounters,
    /// Tokens per chunk and layers per submit, as the device turned out to be fast.
    tokens_per_chunk: usize,
    layers_per_submit: usize,
}

impl GpuSequence {
    pub(super) fn new(model: Arc<Model>, capacity: usize) -> Result<GpuSequence> {
        let most = most_keys(model.config.head_dim);
        if capacity == 0 || capacity > most {
            return Err(Error::Argument { name: "context".into(), message: format!("{capacity} tokens; between 1 and {most} are possible") });
        }
        let device = model.device.clone();
        let cache = Cache::new(&device, &model.layouts(), capacity)?;
        let buffers = Buffers::new(&model, capacity)?;
        Ok(GpuSequence {
            step: Step::plan(&model, &cache, &buffers)?,
            chunk: Chunk::plan(&model, &cache, &buffers)?,
            all: None,
            token_back: device.readback("token", 4)?,
            logits_back: device.readback("logits", 4 * model.config.vocab_size as u64)?,
            position: 0,
            counters: StepCounters::default(),
            tokens_per_chunk: CHUNK,
            layers_per_submit: 2,
            cache,
            buffers,
            model,
        })
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

    /// One token through the step's plan; copies `bytes` of a result to a readback buffer and reads them.
    fn run_step<T: bytemuck::Pod>(&mut self, token: u32, from: fn(&GpuSequence) -> (&wgpu::Buffer, &wgpu::Buffer), out: &mut [T]) -> Result<()> {
        let device = self.model.device.clone();
        device.queue.write_buffer(&self.buffers.tokens, 0, bytemuck::bytes_of(&token));
        let (result, back) = from(self);
        let bytes = std::mem::size_of_val(out) as u64;
        let position = self.position as u32;
        let (commands, dispatches) =
            device.encode("step", |pass| self.step.record(pass, position), |encoder| encoder.copy_buffer_to_buffer(result, 0, back, 0, bytes));
        device.submit_and_read(commands, back, out)?;
        self.count(dispatches, bytes);
        self.position += 1;
        Ok(())
    }

    /// Tokens through the chunk's plan, and the logits after each of them where `logits` is given.
    fn run_chunk(&mut self, tokens: &[u32], logits: Option<&mut Vec<f32>>) -> Result<()> {
        let device = self.model.device.clone();
        device.queue.write_buffer(&self.buffers.tokens, 0, bytemuck::cast_slice(tokens));
        let (first, count, layers) = (self.position as u32, tokens.len() as u32, self.model.layers.len());
        let started = Instant::now();
        for start in (0..layers).step_by(self.layers_per_submit) {
            let end = (start + self.layers_per_submit).min(layers);
            let (commands, dispatches) = device.encode("chunk", |pass| self.chunk.record(pass, first, count, start..end), |_| ());
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
        self.position += tokens.len();
        Ok(())
    }

    /// A call from its counters on; where it fails the position is what it was, so that the same tokens can be given again.
    fn whole<T>(&mut self, call: impl FnOnce(&mut GpuSequence) -> Result<T>) -> Result<T> {
        let position = self.position;
        self.counters = StepCounters::default();
        call(self).inspect_err(|_| self.position = position)
    }

    /// Tokens chunk by chunk, and the logits that are asked for.
    fn run(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>> {
        // The last token is a step of its own: its plan ends in logits.
        let (many, last) = match (logits, tokens.split_last()) {
            (Logits::Last, Some((last, many))) => (many, Some(*last)),
            _ => (tokens, None),
        };
        let mut out = Vec::new();
        let mut longest = usize::MAX;
        if logits == Logits::All {
            if self.all.is_none() {
                self.all = Some(AllLogits::plan(&self.model, &self.buffers, CHUNK)?);
            }
            longest = self.all.as_ref().map_or(1, |a| a.tokens);
            out.reserve_exact(tokens.len() * self.model.config.vocab_size);
        }
        let mut rest = many;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(self.tokens_per_chunk.min(longest).min(rest.len()));
            self.run_chunk(now, (logits == Logits::All).then_some(&mut out))?;
            rest = later;
        }
        if let Some(last) = last {
            out = vec![0.0; self.model.config.vocab_size];
            self.run_step(last, |s| (&s.buffers.logits, &s.logits_back), &mut out)?;
        }
        finite(out)
    }

    /// Sizes the next submits by how long a layer takes a whole chunk.
    fn adapt(&mut self, layer_seconds: f64) {
        self.layers_per_submit = ((SUBMIT_SECONDS / layer_seconds) as usize).clamp(1, self.model.layers.len().max(1));
        self.tokens_per_chunk =
            if layer_seconds > SUBMIT_SECONDS { ((CHUNK as f64 * SUBMIT_SECONDS / layer_seconds) as usize).max(8) } else { CHUNK };
    }
}

fn finite(logits: Vec<f32>) -> Result<Vec<f32>> {
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
            sequence.run_step(token, |s| (&s.buffers.token, &s.token_back), &mut next)?;
            if (next[0] as usize) < sequence.model.config.vocab_size { Ok(next[0]) } else { Err(not_a_number()) }
        })
    }

    fn truncate(&mut self, position: usize) {
        self.position = self.position.min(position);
    }

    fn memory(&self) -> KvMemory {
        self.cache.memory()
    }

    fn counters(&self) -> StepCounters {
        self.counters
    }
}
