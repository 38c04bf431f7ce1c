//! A sequence's rows: exact ones by layer, and where the model has a basis for them, coded ones
//! beside.
//!
//! For a dense cache all rows are exact. With latents ([`LatentSet`]) the first tokens stay exact,
//! and the newest in a ring; the rule of what reads which is [`kv::Exact`](crate::kv::Exact)'s. A
//! sequence that evicts has no latents, or has them and keeps candidates exactly beside them
//! ([`Eviction`]). To read latents here is to rebuild the keys and values they stand for, whatever
//! is done with them on a GPU: simple, and the same numbers.

use super::RowType;
use super::columns::{Columns, Run};
use super::eviction::{Eviction, Leaving};
use super::landmarks::Landmarks;
use super::rope::{Rope, Ropes};
use super::rows::Rows;
use crate::kv::{Call, Coder, Coding, Energy, KvSide, LatentKind, LatentSet, LatentSpec, Reach, Schedule, Selection, Slots, Stores};
use crate::linalg::stack;
use crate::linalg::tr_product;
use nalgebra::DMatrix;
use std::ops::Range;
use std::sync::Arc;

/// All rows of a sequence.
pub(super) struct Cache {
    /// The model's layer that is the first here.
    first: usize,
    layers: Vec<LayerRows>,
    slots: Slots,
    coded: Option<Coded>,
}

/// One layer's exact rows by slot: keys after RoPE, and values.
struct LayerRows {
    keys: Rows,
    values: Rows,
}

struct Coded {
    set: Arc<LatentSet>,
    schedule: Schedule,
    head_dim: usize,
    /// By row: `[capacity][words]`.
    words: Vec<Vec<u32>>,
    landmarks: Option<Landmarks>,
    /// Candidates and what is left of evicted tokens, where the sequence evicts.
    eviction: Option<Eviction>,
    /// What bases hold of the rows that were coded here.
    energy: Energy,
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
        Cache { first, layers: (0..layers).map(|_| LayerRows { keys: rows(), values: rows() }).collect(), slots, coded }
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
    pub(super) fn read(&self, layer: usize, call: &Call, queries: &DMatrix<f32>, ropes: &Ropes) -> Columns {
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
        let columns = exact + runs.iter().map(|run| run.tokens.len()).sum::<usize>();
        let [mut keys, mut values] = [(); 2].map(|()| DMatrix::zeros(width, columns));
        for (side, all) in [(KvSide::Keys, &mut keys), (KvSide::Values, &mut values)] {
            all.columns_mut(0, sinks).copy_from(&self.exact(layer, side, 0..sinks));
            all.columns_mut(sinks, end - window).copy_from(&self.exact(layer, side, window..end));
        }
        if let (Some(rows), false) = (&self.coded, runs.is_empty()) {
            rows.rebuild(layer, &runs, exact, [&mut keys, &mut values], ropes.of(layer));
        }
        let columns = Columns { keys, values, reach, sinks, window, runs, chosen, evicted: None };
        match self.coded.as_ref().and_then(|coded| coded.eviction.as_ref()) {
            Some(eviction) => columns.beside(eviction.columns(layer)),
            None => columns,
        }
    }

    /// The queries of `call` have given each of `columns` so much `attention`.
    pub(super) fn accumulate(&mut self, layer: usize, call: &Call, columns: &Columns, attention: &[f32]) {
        let slots: Vec<usize> = (0..columns.sinks).chain(columns.window..call.tokens.end).map(|position| self.slots.of(position)).collect();
        let first = attention.len() - columns.evicted.as_ref().map_or(0, Vec::len);
        self.eviction_mut().into_iter().for_each(|eviction| eviction.accumulate(layer, call.tokens.len(), attention, slots.iter().copied(), first));
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
        let LayerRows { keys, values } = &self.layers[layer];
        let rows = if side == KvSide::Keys { keys } else { values };
        let mut all = DMatrix::zeros(rows.width(), positions.len());
        for stretch in self.slots.stretches(positions.clone()) {
            let first = (stretch.position - positions.start) * rows.width();
            rows.read(stretch.slot, &mut all.as_mut_slice()[first..first + stretch.count * rows.width()]);
        }
        all
    }
}

impl Coded {
    /// The runs of `tokens` that `queries` read, columns from `column` on, and which key/value head
    /// reads which.
    fn runs(&self, layer: usize, queries: &DMatrix<f32>, tokens: Range<usize>, column: usize) -> (Vec<Run>, Option<Vec<Vec<usize>>>) {
        let chosen = match &self.landmarks {
            Some(landmarks) if queries.ncols() == 1 => landmarks.choose(layer, queries, Selection::range(tokens.start, tokens.end)),
            _ => None,
        };
        let Some(chosen) = chosen else { return (self.between(layer, tokens, column), None) };
        let mut chunks = chosen.concat();
        chunks.sort_unstable();
        chunks.dedup();
        let mut next = column;
        let run = |&chunk: &usize| {
            let within = (chunk * Selection::CHUNK).max(tokens.start)..((chunk + 1) * Selection::CHUNK).min(tokens.end);
            next += within.len();
            Run { column: next - within.len(), tokens: within }
        };
        let runs = chunks.iter().map(run).collect();
        let heads = chosen.iter().map(|head| head.iter().filter_map(|chunk| chunks.binary_search(chunk).ok()).collect()).collect();
        (runs, Some(heads))
    }

    /// The runs of `tokens` that have nothing but a row: all in one, or those between the
    /// candidates.
    fn between(&self, layer: usize, tokens: Range<usize>, column: usize) -> Vec<Run> {
        let candidates = match &self.eviction {
            None => return vec![Run { tokens, column }],
            Some(eviction) if eviction.beside_rows() => eviction.positions(layer),
            // Without rows there is nothing between.
            Some(_) => return Vec::new(),
        };
        let (mut runs, mut start, mut next) = (Vec::new(), tokens.start, column);
        for end in candidates.into_iter().chain([tokens.end]) {
            if start < end {
                runs.push(Run { tokens: start..end, column: next });
                next += end - start;
            }
            start = end + 1;
        }
        runs
    }

    /// The coordinates of the tokens of `runs`, `[r, tokens]`.
    fn coordinates(&self, row: usize, runs: &[Run]) -> DMatrix<f32> {
        let (coder, words) = (&self.set.coders[row], self.set.coders[row].format.words());
        let packed = |tokens: Range<usize>| &self.words[row][tokens.start * words..tokens.end * words];
        if coder.format.block() == 1 {
            return coder.coordinates(&runs.iter().flat_map(|run| packed(run.tokens.clone())).copied().collect::<Vec<u32>>());
        }
        let parts: Vec<DMatrix<f32>> = runs
            .iter()
            .map(|run| {
                // Whole blocks, of which a run may begin or end within one.
                let block = coder.format.block();
                let first = self.schedule.whole(run.tokens.start);
                let end = self.schedule.whole(run.tokens.end + block - 1);
                coder.coordinates(packed(first..end)).columns(run.tokens.start - first, run.tokens.len()).into_owned()
            })
            .collect();
        let mut all = DMatrix::zeros(coder.format.rank(), parts.iter().map(DMatrix::ncols).sum());
        let mut next = 0;
        for part in parts {
            all.columns_mut(next, part.ncols()).copy_from(&part);
            next += part.ncols();
        }
        all
    }

    /// Fills the columns of `runs`, which begin at `first`, of both sides, keys and values, with
    /// what their rows stand for.
    fn rebuild(&self, layer: usize, runs: &[Run], first: usize, mut sides: [&mut DMatrix<f32>; 2], rope: &Rope) {
        let count = sides[0].ncols() - first;
        for (row, (spec, coder)) in self.set.specs.iter().zip(&self.set.coders).enumerate() {
            let offsets = [KvSide::Keys, KvSide::Values].map(|side| spec.offset(layer, side, self.head_dim));
            if offsets == [None, None] {
                continue;
            }
            let z = self.coordinates(row, runs);
            let (head, height) = (spec.first_head * self.head_dim, spec.kv_heads * self.head_dim);
            for (side, (offset, all)) in offsets.into_iter().zip(&mut sides).enumerate() {
                let Some(offset) = offset else { continue };
                let mut y = tr_product(coder.up.columns(offset, height), z.as_view());
                for run in runs {
                    let mut y = y.columns_mut(run.column - first, run.tokens.len());
                    y += means(coder, spec, offset..offset + height, run.tokens.clone(), rope);
                    if side == 0 && spec.kind != LatentKind::PostRopeKeys {
                        rope.rotate(y, run.tokens.start);
                    }
                }
                all.view_mut((head, first), (height, count)).copy_from(&y);
            }
        }
    }
}

/// What a part of a row is about, for some tokens: the mean, which rotates as the keys do where
/// they are coded after RoPE.
fn means(coder: &Coder, spec: &LatentSpec, part: Range<usize>, tokens: Range<usize>, rope: &Rope) -> DMatrix<f32> {
    let mean = coder.mean.rows_range(part);
    let mut means = DMatrix::from_fn(mean.len(), tokens.len(), |i, _| mean[i]);
    if spec.kind == LatentKind::PostRopeKeys {
        rope.rotate(&mut means, tokens.start);
    }
    means
}
