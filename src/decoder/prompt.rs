//! Reads a prompt and codes it in bases of its own: xKV, as [`compress::xkv`](crate::compress::xkv) has it, and as [`crate::cpu`] does it.
//!
//! The prompt goes through the model group by group of layers, its residual stream kept between them. When it has gone through one group, second moments of its keys and values there are summed
//! on the device, their eigenvectors found on the processor, and its rows coded; then the next group's exact rows take the place of this one's.

use super::Model;
use super::chunk::{AllLogits, Chunk};
use super::coded::CodedRows;
use super::coding::{Coding, Row, Turn};
use super::sequence::{Buffers, CHUNK, GpuSequence, Shape, finite};
use crate::cache::{Cache, LandmarkCache, LayerCache, Slots, store};
use crate::calibrate::Moments;
use crate::cancel::Cancel;
use crate::compress::Xkv;
use crate::gpu::{Pass, pad};
use crate::kernels::gather::Gather;
use crate::kernels::gram::Gram;
use crate::kernels::landmark::Landmark;
use crate::rows::{Exact, Format, Holds, RUN, RowSet, RowSpec};
use crate::sequence::{Logits, SequenceOptions};
use crate::{Error, Result};
use nalgebra::{DMatrix, DVector};
use std::ops::Range;
use std::sync::Arc;

impl Model {
    /// A sequence that has read `tokens`, coded as `xkv` says, and the logits asked for.
    ///
    /// # Errors
    /// As [`Xkv::rows`] and [`sequence`](Self::sequence), and [`Error::Interrupted`] where `cancel` is set.
    pub fn read_prompt(
        self: &Arc<Self>,
        tokens: &[u32],
        xkv: &Xkv,
        options: SequenceOptions,
        logits: Logits,
        cancel: &Cancel,
    ) -> Result<(GpuSequence, Vec<f32>)> {
        xkv.check_prompt(&self.config, tokens.len(), options.capacity)?;
        if let Some(token) = tokens.iter().find(|token| **token as usize >= self.config.vocab_size) {
            let message = format!("{token} is outside the vocabulary of {}", self.config.vocab_size);
            return Err(Error::Argument { name: "token".into(), message });
        }
        Shape::check(options.capacity, self.config.head_dim, Some(1), false)?;
        let shape = Shape::new(&options, Exact::default(), xkv.layers > 1);
        let exact = shape.exact;
        let slots = Slots::new(&exact.blocks(1), shape.most, options.capacity);
        let whose = |layer: usize| format!("for a context of {} layer {layer}", options.capacity);
        let layers = (0..self.config.num_hidden_layers).map(|l| LayerCache::new(&self.device, &self.config, &whose(l), slots.count()));
        let with_landmarks = if options.select.is_some() { self.config.num_hidden_layers } else { 0 };
        let landmarks = (0..with_landmarks).map(|l| LandmarkCache::new(&self.device, &self.config, l, options.capacity));
        let mut cache = Cache {
            layers: layers.collect::<Result<_>>()?,
            stores: Vec::new(),
            landmarks: landmarks.collect::<Result<_>>()?,
            sketched: None,
            slots,
            capacity: options.capacity,
        };

        let coded = exact.coded(tokens.len());
        let reading = Reading::new(self, tokens, xkv)?;
        let groups = xkv.groups(&self.config);
        let mut rows = CodedRows::none(&self.device, exact, 2 * groups.len())?;
        let mut set = RowSet { specs: Vec::new(), coders: Vec::new(), exact };
        for group in groups {
            reading.run(group.clone(), cancel)?;
            let moments = |holds| reading.moments(&group, holds, exact.sinks.min(tokens.len() - 1));
            for (spec, coder) in xkv.rows(&self.config, &group, [&moments(Holds::Keys)?, &moments(Holds::Values)?], tokens.len())? {
                cache.stores.push(store(&self.device, set.specs.len(), spec.format.words(), options.capacity)?);
                set.specs.push(spec);
                set.coders.push(coder);
            }
            rows.append(&self.device, &self.config, &set, group.clone())?;
            reading.code(&rows, &cache, &group, coded)?;
            reading.keep_exact(&cache, &group);
        }
        let energy = rows.energy(&self.device)?;
        let mut sequence = GpuSequence::on(self.clone(), Some(Arc::new(rows)), cache, shape, options.select)?;
        sequence.resume(tokens.len(), coded, energy);
        let found = match logits {
            Logits::None => Vec::new(),
            Logits::Last => reading.last(&sequence)?,
            Logits::All => reading.all()?,
        };
        Ok((sequence, finite(found)?))
    }
}

/// A prompt on its way through the model.
struct Reading<'a> {
    model: &'a Model,
    tokens: &'a [u32],
    /// Exact rows of all tokens, for the layers of one group at a time.
    exact: Cache,
    buffers: Buffers,
    chunk: Chunk,
    coding: Coding,
    /// The residual stream, by chunk `[CHUNK][pad(D)]`.
    stream: Vec<wgpu::Buffer>,
    /// What rows are made from, `[CHUNK][pad(w)]`, and their coordinates, `[CHUNK][w]`.
    vectors: wgpu::Buffer,
    coordinates: wgpu::Buffer,
}

impl<'a> Reading<'a> {
    fn new(model: &'a Model, tokens: &'a [u32], xkv: &Xkv) -> Result<Reading<'a>> {
        let (device, config, count) = (&*model.device, &model.config, tokens.len());
        let together = xkv.layers.min(config.num_hidden_layers);
        let some =
            (0..together).map(|_| LayerCache::new(device, config, &format!("a prompt of {count} tokens"), count)).collect::<Result<Vec<_>>>()?;
        // The layers of a group have exact rows of their own; those of the next group the same again.
        let layers = (0..config.num_hidden_layers).map(|l| some[l % together].clone()).collect();
        let exact = Cache { layers, stores: Vec::new(), landmarks: Vec::new(), sketched: None, slots: Slots::ALL, capacity: count };
        let buffers = Buffers::new(model, None, None, None, count)?;
        let width = together * config.num_key_value_heads * config.head_dim;
        let floats = |what: &str, width: usize| device.buffer(what, (4 * CHUNK * width) as u64);
        Ok(Reading {
            chunk: Chunk::plan(model, None, &exact, &buffers)?,
            coding: Coding::plan(model, None, &exact, &buffers, CHUNK)?,
            stream: tokens.chunks(CHUNK).map(|_| floats("the prompt's residual stream", pad(config.hidden_size))).collect::<Result<_>>()?,
            vectors: floats("rows of the prompt to be coded", pad(width))?,
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
            device.queue.write_buffer(&self.buffers.tokens, 0, bytemuck::cast_slice(tokens));
            if group.start > 0 {
                self.copy(stream, 0, &self.buffers.x, stream.size());
            }
            let first = (index * CHUNK) as u32;
            for layer in group.clone() {
                // One submit for each: long prompts have long attention.
                self.submit(|pass| self.chunk.record(pass, first, tokens.len() as u32, layer..layer + 1, &self.coding, &Turn::exact()));
            }
            self.copy(&self.buffers.x, 0, stream, stream.size());
            device.wait(None)?;
        }
        Ok(())
    }

    /// Mean and second moment of one side of a group's layers, over the tokens from `from` on.
    fn moments(&self, group: &Range<usize>, holds: Holds, from: usize) -> Result<Moments> {
        let (device, config) = (&*self.model.device, &self.model.config);
        let spec = RowSpec {
            first_layer: group.start,
            layers: group.len(),
            holds,
            first_head: 0,
            kv_heads: config.num_key_value_heads,
            format: Format::half(1),
        };
        let width = spec.width(config.head_dim);
        let zero = device.upload("no mean", &vec![0f32; width])?;
        let bytes = 4 * (width * (width + 1)) as u64;
        let sums = device.buffer("second moments", bytes)?;
        let gather = |layer: usize| {
            Gather::plan(device, config, &spec, layer, &self.exact.layers[layer], Slots::ALL, &self.buffers.turns, &zero, &self.vectors)
        };
        let gathers = group.clone().map(gather).collect::<Result<Vec<_>>>()?;
        let gram = Gram::plan(device, &self.vectors, width, &sums)?;
        for start in (from..self.tokens.len()).step_by(CHUNK) {
            let count = CHUNK.min(self.tokens.len() - start) as u32;
            self.submit(|pass| {
                gathers.iter().for_each(|gather| gather.record(pass, start as u32, count));
                gram.record(pass, count);
            });
            device.wait(None)?;
        }
        let back = device.readback("second moments", bytes)?;
        let mut found = vec![0f32; width * (width + 1)];
        let (commands, _) = device.encode("moments", |_| (), |encoder| encoder.copy_buffer_to_buffer(&sums, 0, &back, 0, bytes));
        device.submit_and_read(commands, &back, &mut found)?;
        let count = (self.tokens.len() - from) as f32;
        found.iter_mut().for_each(|sum| *sum /= count);
        let (second, mean) = found.split_at(width * width);
        let second = DMatrix::from_column_slice(width, width, second);
        // Sums come in another order on either side of the diagonal.
        let second = (&second + second.transpose()) / 2.0;
        Ok(Moments { mean: DVector::from_column_slice(mean), second })
    }

    /// Codes the first `coded` tokens' rows of a group, the last of `rows`, and makes their landmarks.
    fn code(&self, rows: &CodedRows, cache: &Cache, group: &Range<usize>, coded: usize) -> Result<()> {
        let (device, config, model) = (&*self.model.device, &self.model.config, self.model);
        let buffers = (&self.buffers.turns, &self.vectors, &self.coordinates);
        let plan = |row: usize| Row::plan(model, rows, row, &self.exact.layers, Slots::ALL, &cache.stores, buffers);
        let count = rows.specs.len();
        for row in [plan(count - 2)?, plan(count - 1)?] {
            for start in (0..coded).step_by(CHUNK) {
                self.submit(|pass| row.record(pass, start as u32, CHUNK.min(coded - start) as u32));
                device.wait(None)?;
            }
        }
        let sinks = (cache.slots.sinks as usize).min(coded);
        for (layer, landmarks) in group.clone().zip(cache.landmarks.get(group.clone()).unwrap_or(&[])) {
            let landmark = Landmark::plan(device, config, &self.exact.layers[layer], Slots::ALL, landmarks)?;
            self.submit(|pass| landmark.record(pass, sinks..coded));
        }
        device.wait(None)
    }

    /// Copies the exact rows that are kept of a group's layers: sinks and the newest.
    fn keep_exact(&self, cache: &Cache, group: &Range<usize>) {
        let (slots, count) = (cache.slots, self.tokens.len());
        let sinks = (slots.sinks as usize).min(count);
        let row = 2 * (self.model.config.num_key_value_heads * pad(self.model.config.head_dim)) as u64;
        let mut at = 0;
        while at < count {
            // A stretch ends with the sinks, with the ring, or with the prompt.
            let slot = slots.of(at);
            let until = if at < sinks { sinks - at } else { slots.count() - slot }.min(count - at);
            for layer in group.clone() {
                let (from, to) = (&self.exact.layers[layer], &cache.layers[layer]);
                for (from, to) in [(&from.keys, &to.keys), (&from.values, &to.values)] {
                    let copy = |encoder: &mut wgpu::CommandEncoder| {
                        encoder.copy_buffer_to_buffer(from, at as u64 * row, to, slot as u64 * row, until as u64 * row);
                    };
                    self.model.device.queue.submit([self.model.device.encode("keep", |_| (), copy).0]);
                }
            }
            // What the ring would hold only for a while need not be copied.
            at = if at < sinks { sinks.max(count.saturating_sub(slots.ring as usize)) } else { at + until };
        }
    }

    /// Logits after the last token.
    fn last(&self, sequence: &GpuSequence) -> Result<Vec<f32>> {
        let (device, row) = (&*self.model.device, 4 * pad(self.model.config.hidden_size) as u64);
        let last = self.tokens.len() - 1;
        self.copy(&self.stream[last / CHUNK], (last % CHUNK) as u64 * row, &sequence.buffers.x, row);
        let mut out = vec![0f32; self.model.config.vocab_size];
        let bytes = 4 * out.len() as u64;
        let copy = |encoder: &mut wgpu::CommandEncoder| encoder.copy_buffer_to_buffer(&sequence.buffers.logits, 0, &sequence.logits_back, 0, bytes);
        let (commands, _) = device.encode("logits", |pass| sequence.step.end(pass), copy);
        device.submit_and_read(commands, &sequence.logits_back, &mut out)?;
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
            self.copy(&self.stream[done / CHUNK], (done % CHUNK) as u64 * row, &self.buffers.x, count as u64 * row);
            let bytes = (4 * count * vocab) as u64;
            let copy = |encoder: &mut wgpu::CommandEncoder| encoder.copy_buffer_to_buffer(&all.logits, 0, &all.readback, 0, bytes);
            let (commands, _) = device.encode("logits", |pass| all.record(pass, count as u32), copy);
            device.submit_and_read(commands, &all.readback, &mut out[done * vocab..(done + count) * vocab])?;
            done += count;
        }
        Ok(out)
    }

    fn submit(&self, record: impl FnOnce(&mut Pass)) {
        self.model.device.queue.submit([self.model.device.encode("prompt", record, |_| ()).0]);
    }

    fn copy(&self, from: &wgpu::Buffer, at: u64, to: &wgpu::Buffer, bytes: u64) {
        let copy = |encoder: &mut wgpu::CommandEncoder| encoder.copy_buffer_to_buffer(from, at, to, 0, bytes);
        self.model.device.queue.submit([self.model.device.encode("copy", |_| (), copy).0]);
    }
}
