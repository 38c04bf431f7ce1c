//! A sequence's rows: exact ones by layer, and where the model has a basis for them, coded ones
//! beside.
//!
//! For a dense cache all rows are exact. With latents ([`LatentSet`]) the first tokens stay exact,
//! and the newest in a ring; the rule of what reads which is [`kv::Exact`](crate::kv::Exact)'s. A
//! sequence that evicts has no latents, or has them and keeps candidates exactly beside them
//! ([`Eviction`]). Many queries read the keys and values that latents stand for, rebuilt once for
//! all of them; a few read the coordinates themselves, where they can ([`Absorbed`]).

use super::RowType;
use super::absorb::Absorbed;
use super::columns::Columns;
use super::eviction::{Eviction, Leaving};
use super::landmarks::Landmarks;
use super::latents::{Coded, means};
use super::rope::Ropes;
use super::rows::Rows;
use crate::Result;
use crate::kv::{Call, Coding, Energy, KvSide, LatentKind, LatentSet, LatentSpec, Reach, Saved, SavedLayer, Selection, Slots, Standing, Stores};
use crate::linalg::stack;
use nalgebra::DMatrix;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// All rows of a sequence.
pub(super) struct Cache {
    /// The model's layer that is the first here.
    first: usize,
    layers: Vec<LayerRows>,
    slots: Slots,
    coded: Option<Coded>,
    /// Room that was read into before.
    spare: Vec<Vec<f32>>,
}

/// Rows that a core reads at a time.
const PART: usize = 128;

/// One layer's exact rows by slot: keys after RoPE, and values.
struct LayerRows {
    keys: Rows,
    values: Rows,
}

/// How a cache of latents is to be.
pub(super) struct CodedOptions {
    pub(super) set: Arc<LatentSet>,
    pub(super) coding: Coding,
    pub(super) select: Option<Selection>,
    pub(super) stores: Option<Stores>,
    pub(super) head_dim: usize,
}

impl Cache {
    /// Room for `capacity` tokens in `layers` of the model, of `width` numbers a side. From here on
    /// they are counted from the first of them.
    pub(super) fn new(layers: Range<usize>, width: usize, capacity: usize, row_type: RowType, coded: Option<CodedOptions>) -> Cache {
        let (first, layers) = (layers.start, layers.len());
        let slots = coded.as_ref().map_or(Slots::ALL, |coded| coded.coding.slots);
        let exact = if slots == Slots::ALL { capacity } else { slots.count() };
        let coded = coded.map(|CodedOptions { set, coding, select, stores, head_dim }| Coded {
            words: set.specs.iter().map(|spec| vec![0; capacity * spec.format.words()]).collect(),
            set,
            schedule: coding.schedule,
            head_dim,
            energy: Energy::default(),
            landmarks: select.map(|selection| Landmarks::new(selection, layers, width, head_dim, capacity)),
            eviction: stores.map(|stores| Eviction::new(stores, layers, width, exact, row_type)),
        });
        let rows = || Rows::new(width, exact, row_type);
        Cache { first, layers: (0..layers).map(|_| LayerRows { keys: rows(), values: rows() }).collect(), slots, coded, spare: Vec::new() }
    }

    /// Whether a token that goes through alone chooses what it reads.
    pub(super) fn chooses(&self) -> bool {
        self.coded.as_ref().is_some_and(|coded| coded.landmarks.is_some())
    }

    /// Appends a layer's exact rows, the columns of `keys` and `values`, from `position` on.
    pub(super) fn append(&mut self, layer: usize, position: usize, keys: &DMatrix<f32>, values: &DMatrix<f32>) {
        for (index, (key, value)) in keys.column_iter().zip(values.column_iter()).enumerate() {
            let slot = self.slots.of(position + index);
            self.layers[layer].keys.write(slot, key.as_slice());
            self.layers[layer].values.write(slot, value.as_slice());
            self.eviction_mut().into_iter().for_each(|eviction| eviction.begin(layer, slot));
        }
    }

    /// Codes the rows that end with `layer`, where that is due before (`reading`) or after they are
    /// read.
    pub(super) fn code(&mut self, layer: usize, call: &Call, reading: bool, ropes: &Ropes) {
        let Some(coded) = &self.coded else { return };
        if call.code.is_empty() || call.code_first != reading {
            return;
        }
        let made: Vec<(usize, (Vec<u32>, Energy))> = coded
            .set
            .specs
            .iter()
            .enumerate()
            .filter(|(_, spec)| spec.last_layer() == layer)
            .map(|(row, spec)| {
                let mut y = DMatrix::zeros(spec.width(coded.head_dim), call.code.len());
                let (first, height) = (spec.first_head * coded.head_dim, spec.kv_heads * coded.head_dim);
                for layer in spec.first_layer..=spec.last_layer() {
                    for side in [KvSide::Keys, KvSide::Values] {
                        let Some(offset) = spec.offset(layer, side, coded.head_dim) else { continue };
                        let mut part = self.exact(layer, side, call.code.clone()).rows(first, height).into_owned();
                        if side == KvSide::Keys && spec.kind != LatentKind::PostRopeKeys {
                            ropes.of(layer).rotate_back(&mut part, call.code.start);
                        }
                        y.rows_mut(offset, height).copy_from(&part);
                    }
                }
                let coder = &coded.set.coders[row];
                y -= means(coder, spec, 0..y.nrows(), call.code.clone(), ropes.of(spec.first_layer));
                (row, coder.encode_centred(&y))
            })
            .collect();
        let keys = coded.landmarks.is_some().then(|| {
            let leaving = call.leaving(coded.schedule.exact.sinks);
            (leaving.start, self.exact(layer, KvSide::Keys, leaving))
        });
        let leaving = self.leaving(layer, call);
        let Some(coded) = &mut self.coded else { return };
        if let Some(eviction) = &mut coded.eviction {
            eviction.evict(layer, &leaving);
        }
        if let (Some(landmarks), Some((first, keys))) = (&mut coded.landmarks, keys) {
            landmarks.make(layer, first, &keys);
        }
        for (row, (made, energy)) in made {
            coded.energy += energy;
            let words = coded.set.specs[row].format.words();
            coded.words[row][call.code.start * words..][..made.len()].copy_from_slice(&made);
        }
    }

    /// What the queries of `call`, `[H·d, tokens]`, see in `layer`.
    pub(super) fn read(&mut self, layer: usize, call: &Call, queries: &DMatrix<f32>, ropes: &Ropes) -> Columns {
        let (Range { start: position, end }, reach) = (call.tokens.clone(), call.reach.unwrap_or(Reach::ALL_EXACT));
        let sinks = reach.sinks.min(end);
        let window = reach.of(position).clamp(sinks, end);
        let exact = sinks + end - window;
        let last = reach.of(end - 1).clamp(sinks, end);
        let (runs, chosen) = match &self.coded {
            Some(coded) if last > sinks => coded.runs(layer, queries, sinks..last, exact),
            _ => (Vec::new(), None),
        };
        let width = self.layers[layer].keys.width();
        let absorbed = self.absorbed(layer, call, ropes).is_some();
        let columns = exact + if absorbed { 0 } else { runs.iter().map(|run| run.tokens.len()).sum::<usize>() };
        let [mut keys, mut values] = [(); 2].map(|()| {
            let mut room = self.spare.pop().unwrap_or_default();
            room.resize(width * columns, 0.0);
            DMatrix::from_vec(width, columns, room)
        });
        for (side, all) in [(KvSide::Keys, &mut keys), (KvSide::Values, &mut values)] {
            let (first, rest) = all.as_mut_slice().split_at_mut(width * sinks);
            self.read_exact(layer, side, 0..sinks, first);
            self.read_exact(layer, side, window..end, &mut rest[..width * (end - window)]);
        }
        if let (Some(rows), false) = (&self.coded, absorbed || runs.is_empty()) {
            rows.rebuild(layer, &runs, exact, [&mut keys, &mut values], ropes.of(layer));
        }
        let columns = Columns { keys, values, reach, sinks, window, runs, chosen, evicted: None };
        match self.coded.as_ref().and_then(|coded| coded.eviction.as_ref()) {
            Some(eviction) => columns.beside(eviction.columns(layer)),
            None => columns,
        }
    }

    /// What the queries of `call` read as coordinates: the coded columns that [`read`](Self::read)
    /// has then left out.
    pub(super) fn absorbed<'a>(&'a self, layer: usize, call: &Call, ropes: &'a Ropes) -> Option<Absorbed<'a>> {
        let (end, reach) = (call.tokens.end, call.reach?);
        let sinks = reach.sinks.min(end);
        let tokens = sinks..reach.of(end - 1).clamp(sinks, end);
        self.coded.as_ref()?.absorbed(layer, tokens, call.tokens.len(), ropes.of(layer))
    }

    /// The queries of `call` have given each of `columns` so much `attention`.
    pub(super) fn accumulate(&mut self, layer: usize, call: &Call, columns: Columns, attention: &[f32]) {
        let slots: Vec<usize> = (0..columns.sinks).chain(columns.window..call.tokens.end).map(|position| self.slots.of(position)).collect();
        let first = attention.len() - columns.evicted.as_ref().map_or(0, Vec::len);
        self.eviction_mut().into_iter().for_each(|eviction| eviction.accumulate(layer, call.tokens.len(), attention, slots.iter().copied(), first));
        self.spare.extend([columns.keys, columns.values].map(|matrix| matrix.data.into()));
    }

    fn eviction_mut(&mut self) -> Option<&mut Eviction> {
        self.coded.as_mut()?.eviction.as_mut()
    }

    /// The tokens that leave the exact window of a sequence that evicts.
    fn leaving(&self, layer: usize, call: &Call) -> Vec<Leaving> {
        let Some(coded) = self.coded.as_ref().filter(|coded| coded.eviction.is_some()) else { return Vec::new() };
        let tokens = call.leaving(coded.schedule.exact.sinks);
        let [keys, values] = [KvSide::Keys, KvSide::Values].map(|side| self.exact(layer, side, tokens.clone()));
        let token = |(index, position)| Leaving {
            position,
            slot: self.slots.of(position),
            key: keys.column(index).into_owned(),
            value: values.column(index).into_owned(),
        };
        tokens.enumerate().map(token).collect()
    }

    /// Takes over what `from`, a dense cache of the layers from `first` on, holds of `position`
    /// tokens: the exact rows that are kept.
    pub(super) fn keep_exact(&mut self, first: usize, from: &Cache, position: usize) {
        for within in 0..from.layers.len() {
            for positions in self.slots.held(position) {
                let [keys, values] = [KvSide::Keys, KvSide::Values].map(|side| from.exact(within, side, positions.clone()));
                self.append(first + within, positions.start, &keys, &values);
            }
        }
    }

    /// Makes the landmarks of the layers from `first` on, whose keys after RoPE `from` holds.
    pub(super) fn make_landmarks(&mut self, first: usize, from: &Cache, tokens: Range<usize>) {
        if let Some(landmarks) = self.coded.as_mut().and_then(|coded| coded.landmarks.as_mut()) {
            (0..from.layers.len()).for_each(|within| landmarks.make(first + within, tokens.start, &from.exact(within, KvSide::Keys, tokens.clone())));
        }
    }

    /// Begins with the rows of `set`, of which `words` are the first tokens', packed.
    pub(super) fn adopt(&mut self, set: Arc<LatentSet>, words: Vec<Vec<u32>>, capacity: usize) {
        if let Some(coded) = &mut self.coded {
            coded.words = words;
            coded.words.iter_mut().zip(&set.specs).for_each(|(words, spec)| {
                words.reserve_exact(capacity * spec.format.words() - words.len());
                words.resize(capacity * spec.format.words(), 0);
            });
            coded.set = set;
        }
    }

    /// One side of all layers of a dense cache, keys as they are before RoPE:
    /// `[layers·H_kv·d, tokens]`.
    pub(super) fn vectors(&self, side: KvSide, tokens: Range<usize>, ropes: &Ropes) -> DMatrix<f32> {
        let parts: Vec<DMatrix<f32>> = (0..self.layers.len())
            .map(|layer| {
                let mut part = self.exact(layer, side, tokens.clone());
                if side == KvSide::Keys {
                    ropes.of(self.first + layer).rotate_back(&mut part, tokens.start);
                }
                part
            })
            .collect();
        stack(&parts)
    }

    /// All that it holds of a sequence that stands there: by layer, and the latents.
    pub(super) fn save(&self, standing: &Standing) -> Result<(Vec<SavedLayer>, Vec<Vec<u32>>)> {
        let Cache { first: _, layers, slots, coded, spare: _ } = self;
        let mut saved = Vec::new();
        for LayerRows { keys, values } in layers {
            let mut layer = SavedLayer::default();
            for (_, stretch) in standing.stretches(slots) {
                keys.save(stretch.slot, stretch.count, &mut layer.keys)?;
                values.save(stretch.slot, stretch.count, &mut layer.values)?;
            }
            saved.push(layer);
        }
        let Some(coded) = coded else { return Ok((saved, Vec::new())) };
        // What its bases hold of later tokens is read apart: `energy`.
        let Coded { set, schedule: _, head_dim: _, words, landmarks, eviction, energy: _ } = coded;
        for (index, layer) in saved.iter_mut().enumerate() {
            layer.landmarks = landmarks.as_ref().map_or(Vec::new(), |landmarks| landmarks.save(index, standing.coded.div_ceil(Selection::CHUNK)));
            layer.eviction = eviction.as_ref().map(|eviction| eviction.save(index, standing, slots)).transpose()?;
        }
        let rows = words.iter().zip(&set.specs).map(|(words, spec)| words[..standing.coded * spec.format.words()].to_vec());
        Ok((saved, rows.collect()))
    }

    /// Takes over what was saved, which fits.
    pub(super) fn restore(&mut self, saved: &Saved) {
        let Saved { tokens: _, standing, layers, rows, prompt } = saved;
        let slots = self.slots;
        for (index, SavedLayer { keys, values, landmarks, eviction }) in layers.iter().enumerate() {
            let layer = &mut self.layers[index];
            let width = layer.keys.width();
            for (first, stretch) in standing.stretches(&slots) {
                let numbers = first * width..(first + stretch.count) * width;
                layer.keys.restore(stretch.slot, &keys[numbers.clone()]);
                layer.values.restore(stretch.slot, &values[numbers]);
            }
            let Some(coded) = &mut self.coded else { continue };
            if let Some(own) = &mut coded.landmarks {
                own.restore(index, landmarks);
            }
            if let (Some(own), Some(saved)) = (&mut coded.eviction, eviction) {
                own.restore(index, saved, standing, &slots);
            }
        }
        if let Some(coded) = &mut self.coded {
            coded.words.iter_mut().zip(rows).for_each(|(words, saved)| words[..saved.len()].copy_from_slice(saved));
            coded.energy = prompt.as_ref().and_then(|prompt| prompt.bases.as_ref()).map_or(Energy::default(), |bases| bases.since);
        }
    }

    /// What there is room for beside exact rows, where tokens are evicted.
    pub(super) fn stores(&self) -> Option<&Stores> {
        self.coded.as_ref()?.eviction.as_ref().map(Eviction::stores)
    }

    /// The latents with their bases.
    pub(super) fn set(&self) -> Option<&Arc<LatentSet>> {
        self.coded.as_ref().map(|coded| &coded.set)
    }

    /// Drops all candidates and what is left of evicted tokens.
    pub(super) fn clear(&mut self) {
        self.eviction_mut().into_iter().for_each(Eviction::clear);
    }

    /// What bases hold of the rows that were coded here.
    pub(super) fn energy(&self) -> Energy {
        self.coded.as_ref().map_or(Energy::default(), |coded| coded.energy)
    }

    /// The latents.
    pub(super) fn rows(&self) -> &[LatentSpec] {
        self.coded.as_ref().map_or(&[], |coded| &coded.set.specs)
    }

    /// Bytes allocated: of rows that grow with the capacity, and of those that do not.
    pub(super) fn bytes(&self) -> (usize, usize) {
        let exact = self.layers.iter().map(|rows| rows.keys.bytes() + rows.values.bytes()).sum();
        match &self.coded {
            None => (exact, 0),
            Some(coded) => {
                let words: usize = coded.words.iter().map(|words| words.capacity() * size_of::<u32>()).sum();
                let (eviction, received) = coded.eviction.as_ref().map_or((0, 0), Eviction::bytes);
                (words + eviction + coded.landmarks.as_ref().map_or(0, Landmarks::bytes), exact + received)
            }
        }
    }

    /// One side's exact rows of `positions`, as columns.
    fn exact(&self, layer: usize, side: KvSide, positions: Range<usize>) -> DMatrix<f32> {
        let mut all = DMatrix::zeros(self.layers[layer].keys.width(), positions.len());
        self.read_exact(layer, side, positions, all.as_mut_slice());
        all
    }

    /// The same, into `out`.
    fn read_exact(&self, layer: usize, side: KvSide, positions: Range<usize>, out: &mut [f32]) {
        let LayerRows { keys, values } = &self.layers[layer];
        let rows = if side == KvSide::Keys { keys } else { values };
        let width = rows.width();
        for stretch in self.slots.stretches(positions.clone()) {
            let first = (stretch.position - positions.start) * width;
            let parts = out[first..first + stretch.count * width].par_chunks_mut(PART * width).enumerate();
            parts.for_each(|(part, out)| rows.read(stretch.slot + part * PART, out));
        }
    }
}
