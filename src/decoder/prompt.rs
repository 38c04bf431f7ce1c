//! Reads a prompt and codes it in bases of its own: xKV, as [`compress::xkv`](crate::compress::xkv)
//! has it, and as [`crate::cpu`] does it.
//!
//! The prompt goes through the model group by group of layers, its residual stream kept between
//! them. When it has gone through one group, second moments of its keys and values there are summed
//! on the device, their eigenvectors found on the processor, and its rows coded; then the next
//! group's exact rows take the place of this one's.

use super::Model;
use super::attention::AttentionPlan;
use super::coding::{Coding, CodingBuffers, Row};
use super::executor::{ModelPlans, Shared};
use super::latents::Latents;
use super::prefill::AllLogits;
use super::scratch::{Buffers, CHUNK};
use super::sequence::{GpuSequence, Own, check_capacity, finite};
use crate::Result;
use crate::cache::Cache;
use crate::gpu::{ElementType, Pass, Shape, Tensor, pad};
use crate::kernels::exact::ExactRows;
use crate::kernels::gather::{Gather, Source};
use crate::kernels::gram::Gram;
use crate::kernels::landmark::Landmark;
use crate::kv::{self, Call, Cursor, Energy, Exact, Format, LatentKind, LatentSet, LatentSpec, RUN, Saved, SavedBases, Slots, Xkv};
use crate::linalg::Moments;
use crate::sequence::{ChunkPolicy, Logits, Prompt, SequenceOptions};
use crate::task::Cancel;
use nalgebra::{DMatrix, DVector};
use std::ops::Range;
use std::sync::Arc;

impl Model {
    /// A sequence that has read `prompt`, coded in bases of its own, and the logits asked for.
    ///
    /// # Errors
    /// As [`PromptBases::rows`](crate::kv::PromptBases::rows) and [`sequence`](Self::sequence), and
    /// [`Error::Interrupted`](crate::Error::Interrupted) where the prompt is cancelled.
    pub fn read_prompt(self: &Arc<Self>, prompt: &Prompt, options: SequenceOptions) -> Result<(GpuSequence, Vec<f32>)> {
        let (tokens, xkv, capacity) = (prompt.tokens, prompt.bases.options(), options.capacity);
        let (config, device, geometry) = (&self.config, &self.device, self.config.geometry());
        xkv.check_prompt(&geometry, tokens.len(), capacity)?;
        let (mut cache, exact, (cursor, policy)) = self.for_prompt(&options, xkv.layers > 1)?;
        cursor.check(tokens, config.vocab_size)?;
        let coded = exact.coded(tokens.len());
        let shared = &mut *self.executor.lock();
        let reading = Reading::new(self, tokens, xkv, shared)?;
        let groups = xkv.groups(&geometry);
        let mut rows = Latents::none(device, exact, 2 * groups.len())?;
        let mut set = LatentSet { specs: Vec::new(), coders: Vec::new(), exact };
        for group in groups {
            reading.run(group.clone(), prompt.cancel)?;
            let moments = |kind| reading.moments(&group, kind, exact.sinks.min(tokens.len() - 1));
            let moments = [&moments(LatentKind::PreRopeKeys)?, &moments(LatentKind::Values)?];
            for (spec, coder) in prompt.bases.rows(&geometry, &group, moments, tokens.len())? {
                cache.add_store(device, spec.format.words())?;
                set.specs.push(spec);
                set.coders.push(coder);
            }
            rows.append(device, config, &set, group.clone())?;
            reading.code(&rows, &cache, &group, coded)?;
            reading.keep_exact(&cache, &group)?;
        }
        reading.buffers.check_reach(self)?;
        let energy = rows.energy(device)?;
        let mut sequence = GpuSequence::on(self.clone(), Some(Arc::new(rows)), cache, (cursor, policy), shared)?;
        sequence.resume(tokens.len(), coded, Own { set: Arc::new(set), prompt: energy, since: Energy::default(), counted: energy });
        let found = match prompt.logits {
            Logits::None => Vec::new(),
            Logits::Last => reading.last(&sequence)?,
            Logits::All => reading.all()?,
        };
        Ok((sequence, finite(found)?))
    }

    /// A sequence that goes on from `saved`, which has bases of its own.
    ///
    /// # Errors
    /// As [`Sequence::restore`](crate::sequence::Sequence::restore), and
    /// [`Error::Argument`](crate::Error::Argument) where it has none.
    pub fn resume(self: &Arc<Self>, saved: &Saved, options: SequenceOptions) -> Result<GpuSequence> {
        let SavedBases { set, prompt, since } = saved.bases()?;
        saved.bases()?.check(&self.config.geometry())?;
        let (mut cache, _, at) = self.for_prompt(&options, set.spans())?;
        set.specs.iter().try_for_each(|spec| cache.add_store(&self.device, spec.format.words()))?;
        let rows = Latents::load(&self.device, &self.config, set)?;
        let mut sequence = GpuSequence::on(self.clone(), Some(Arc::new(rows)), cache, at, &mut self.executor.lock())?;
        sequence.bases = Some(Own { set: set.clone(), prompt: *prompt, since: *since, counted: Energy::default() });
        sequence.take_over(saved)?;
        Ok(sequence)
    }

    /// The cache of a text with bases of its own, none of them yet, and what stays exact.
    fn for_prompt(&self, options: &SequenceOptions, spans: bool) -> Result<(Cache, Exact, (Cursor, ChunkPolicy))> {
        let capacity = options.capacity;
        check_capacity(capacity, self.config.head_dim, Some(1), false)?;
        let exact = options.exact.unwrap_or_default().within(capacity);
        let policy = ChunkPolicy::new(options, spans, CHUNK, CHUNK);
        let slots = Slots::new(&exact.blocks(1), policy.max, capacity);
        let coding = kv::Coding { schedule: exact.blocks(1), slots, strict: policy.strict, evicts: false };
        let cache = Cache::beside(&self.device, self.cache_shape(capacity), slots, options.method.read().selection())?;
        Ok((cache, exact, (Cursor::new(capacity, Some(coding)), policy)))
    }
}

/// A prompt on its way through the model.
struct Reading<'a> {
    model: &'a Model,
    tokens: &'a [u32],
    /// Exact rows of all tokens, for the layers of one group at a time.
    exact: Cache,
    buffers: Buffers,
    plans: Arc<ModelPlans>,
    attention: AttentionPlan,
    coding: Coding,
    /// The residual stream, by chunk `[CHUNK][D]`.
    stream: Vec<Tensor>,
    /// What rows are made from, `[CHUNK][w]`, and their coordinates: room for those of any group.
    vectors: Tensor,
    coordinates: Tensor,
}

impl<'a> Reading<'a> {
    fn new(model: &'a Model, tokens: &'a [u32], xkv: &Xkv, shared: &mut Shared) -> Result<Reading<'a>> {
        let (device, config, count) = (&*model.device, &model.config, tokens.len());
        let together = xkv.layers.min(config.num_hidden_layers);
        let attention = &super::attention_shape(config);
        let some = (0..together)
            .map(|_| ExactRows::new(device, attention, &format!("a prompt of {count} tokens"), Slots::ALL, count))
            .collect::<Result<Vec<_>>>()?;
        // The layers of a group have exact rows of their own; those of the next group the same
        // again.
        let exact = Cache::of((0..config.num_hidden_layers).map(|l| some[l % together].clone()).collect(), model.cache_shape(count));
        let buffers = shared.buffers(model, None, &exact)?;
        let width = together * config.num_key_value_heads * config.head_dim;
        let floats = |what: &str, width: usize| Tensor::zeroed(device, what, ElementType::F32, Shape::padded(CHUNK, width));
        Ok(Reading {
            plans: shared.plans(model, &buffers)?,
            attention: AttentionPlan::plan(model, None, &exact, &buffers, true)?,
            coding: Coding::plan(model, None, &exact, &buffers, CHUNK)?,
            stream: tokens.chunks(CHUNK).map(|_| floats("the prompt's residual stream", config.hidden_size)).collect::<Result<_>>()?,
            vectors: floats("rows of the prompt to be coded", width)?,
            coordinates: floats("coordinates of the prompt's rows", width.next_multiple_of(RUN))?,
            model,
            tokens,
            exact,
            buffers,
        })
    }

    /// The prompt through the layers of `group`.
    fn run(&self, group: Range<usize>, cancel: &Cancel) -> Result<()> {
        let device = &*self.model.device;
        for ((index, tokens), stream) in self.tokens.chunks(CHUNK).enumerate().zip(&self.stream) {
            cancel.check()?;
            device.write(&self.buffers.tokens, 0, tokens)?;
            if group.start > 0 {
                self.copy(stream, 0, &self.buffers.x, stream.size())?;
            }
            let call = Call::exact(index * CHUNK..index * CHUNK + tokens.len());
            for layer in group.clone() {
                // One submit for each: long prompts have long attention.
                self.submit(|pass| self.plans.prefill.record(pass, layer..layer + 1, (&self.attention, &self.coding), &call))?;
            }
            self.copy(&self.buffers.x, 0, stream, stream.size())?;
            device.wait_unless(&|| cancel.is_set())?;
        }
        Ok(())
    }

    /// Mean and second moment of one side of a group's layers, over the tokens from `from` on.
    fn moments(&self, group: &Range<usize>, kind: LatentKind, from: usize) -> Result<Moments> {
        let (device, config) = (&*self.model.device, &self.model.config);
        let attention = &super::attention_shape(config);
        let spec = LatentSpec {
            first_layer: group.start,
            layers: group.len(),
            kind,
            first_head: 0,
            kv_heads: config.num_key_value_heads,
            format: Format::half(1),
        };
        let width = spec.width(config.head_dim);
        let zero = Tensor::vector(device, "no mean", &vec![0f32; width])?;
        let bytes = 4 * (width * (width + 1)) as u64;
        let sums = Tensor::zeroed(device, "second moments", ElementType::F32, Shape::dense(width + 1, width))?;
        let vectors = self.vectors.view(Shape::padded(CHUNK, width));
        let gather = |layer: usize| {
            let from =
                Source { attention, rows: &self.exact.layers[layer], slots: Slots::ALL, rope_table: &self.buffers.ropes[config.layers[layer].rope] };
            Gather::plan(device, from, &spec, layer, &zero, &vectors)
        };
        let gathers = group.clone().map(gather).collect::<Result<Vec<_>>>()?;
        let gram = Gram::plan(device, &vectors, &sums)?;
        for start in (from..self.tokens.len()).step_by(CHUNK) {
            let count = CHUNK.min(self.tokens.len() - start) as u32;
            self.submit(|pass| {
                gathers.iter().for_each(|gather| gather.record(pass, start as u32, count));
                gram.record(pass, count);
            })?;
            device.wait()?;
        }
        let back = device.readback("second moments", bytes)?;
        let mut found = vec![0f32; width * (width + 1)];
        let (commands, _) = device.encode("moments", |_| (), |encoder| encoder.copy_buffer_to_buffer(&sums, 0, &back, 0, bytes))?;
        device.submit_and_read(commands, &back, &mut found)?;
        let count = (self.tokens.len() - from) as f32;
        found.iter_mut().for_each(|sum| *sum /= count);
        let (second, mean) = found.split_at(width * width);
        let second = DMatrix::from_column_slice(width, width, second);
        // Sums come in another order on either side of the diagonal.
        let second = (&second + second.transpose()) / 2.0;
        Ok(Moments { mean: DVector::from_column_slice(mean), second })
    }

    /// Codes the first `coded` tokens' rows of a group, the last of `rows`, and makes their
    /// landmarks.
    fn code(&self, rows: &Latents, cache: &Cache, group: &Range<usize>, coded: usize) -> Result<()> {
        let (device, config, model) = (&*self.model.device, &self.model.config, self.model);
        let attention = &super::attention_shape(config);
        let buffers = CodingBuffers {
            exact: &self.exact.layers,
            slots: Slots::ALL,
            ropes: &self.buffers.ropes,
            vectors: &self.vectors,
            coordinates: &self.coordinates,
            scales: &self.buffers.scales,
        };
        let plan = |row: usize| Row::plan(model, rows, row, &cache.stores, buffers);
        let count = rows.specs.len();
        for row in [plan(count - 2)?, plan(count - 1)?] {
            for start in (0..coded).step_by(CHUNK) {
                self.submit(|pass| row.record(pass, start as u32, CHUNK.min(coded - start) as u32))?;
                device.wait()?;
            }
        }
        let sinks = (cache.slots.sinks as usize).min(coded);
        for (layer, landmarks) in group.clone().zip(cache.landmarks.get(group.clone()).unwrap_or(&[])) {
            let landmark = Landmark::plan(device, attention, &self.exact.layers[layer], Slots::ALL, landmarks)?;
            self.submit(|pass| landmark.record(pass, sinks..coded))?;
        }
        device.wait()
    }

    /// Copies the exact rows that are kept of a group's layers: sinks and the newest.
    fn keep_exact(&self, cache: &Cache, group: &Range<usize>) -> Result<()> {
        let row = 2 * (self.model.config.num_key_value_heads * pad(self.model.config.head_dim)) as u64;
        for stretch in cache.slots.held(self.tokens.len()).into_iter().flat_map(|positions| cache.slots.stretches(positions)) {
            let [position, slot, count] = [stretch.position, stretch.slot, stretch.count].map(|n| n as u64 * row);
            for layer in group.clone() {
                let (from, to) = (&self.exact.layers[layer], &cache.layers[layer]);
                for (from, to) in [(&from.keys, &to.keys), (&from.values, &to.values)] {
                    let copy = |encoder: &mut wgpu::CommandEncoder| encoder.copy_buffer_to_buffer(from, position, to, slot, count);
                    self.model.device.submit(self.model.device.encode("keep", |_| (), copy)?.0)?;
                }
            }
        }
        Ok(())
    }

    /// Logits after the last token.
    fn last(&self, sequence: &GpuSequence) -> Result<Vec<f32>> {
        let (device, row) = (&*self.model.device, 4 * pad(self.model.config.hidden_size) as u64);
        let last = self.tokens.len() - 1;
        self.copy(&self.stream[last / CHUNK], (last % CHUNK) as u64 * row, &sequence.buffers.x, row)?;
        let mut out = vec![0f32; self.model.config.vocab_size];
        let bytes = 4 * out.len() as u64;
        let copy =
            |encoder: &mut wgpu::CommandEncoder| encoder.copy_buffer_to_buffer(&sequence.buffers.logits, 0, &sequence.buffers.logits_back, 0, bytes);
        let (commands, _) = device.encode("logits", |pass| sequence.plans.decode.end(pass, 1), copy)?;
        device.submit_and_read(commands, &sequence.buffers.logits_back, &mut out)?;
        Ok(out)
    }

    /// Logits after every token.
    fn all(&self) -> Result<Vec<f32>> {
        let (device, row, vocab) = (&*self.model.device, 4 * pad(self.model.config.hidden_size) as u64, self.model.config.vocab_size);
        let all = AllLogits::plan(self.model, &self.buffers, CHUNK)?;
        let mut out = vec![0f32; self.tokens.len() * vocab];
        let mut done = 0;
        while done < self.tokens.len() {
            let count = all.tokens.min(CHUNK - done % CHUNK).min(self.tokens.len() - done);
            self.copy(&self.stream[done / CHUNK], (done % CHUNK) as u64 * row, &self.buffers.x, count as u64 * row)?;
            let bytes = (4 * count * vocab) as u64;
            let copy = |encoder: &mut wgpu::CommandEncoder| encoder.copy_buffer_to_buffer(&all.logits, 0, &all.readback, 0, bytes);
            let (commands, _) = device.encode("logits", |pass| all.record(pass, count as u32), copy)?;
            device.submit_and_read(commands, &all.readback, &mut out[done * vocab..(done + count) * vocab])?;
            done += count;
        }
        Ok(out)
    }

    fn submit(&self, record: impl FnOnce(&mut Pass)) -> Result<()> {
        self.model.device.submit(self.model.device.encode("prompt", record, |_| ())?.0).map(|_| ())
    }

    fn copy(&self, from: &wgpu::Buffer, at: u64, to: &wgpu::Buffer, bytes: u64) -> Result<()> {
        let copy = |encoder: &mut wgpu::CommandEncoder| encoder.copy_buffer_to_buffer(from, at, to, 0, bytes);
        self.model.device.submit(self.model.device.encode("copy", |_| (), copy)?.0).map(|_| ())
    }
}
