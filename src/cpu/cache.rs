//! A sequence's rows: exact ones by layer, and where the model has a basis for them, coded ones beside.
//!
//! For a dense cache all rows are exact. With coded rows ([`RowSet`]) the first tokens stay exact, and the newest in a ring; the rule of who reads what is
//! [`rows::Exact`](crate::rows::Exact)'s. To read coded rows here is to rebuild the keys and values they stand for, whatever is done with them on a GPU: simple, and the same numbers.

use super::RowType;
use super::rope::Rope;
use super::rows::Rows;
use crate::linalg::tr_product;
use crate::rows::{Exact, Holds, Reach, RowSet, Side};
use nalgebra::DMatrix;
use std::ops::Range;
use std::sync::Arc;

/// All rows of a sequence.
pub(super) struct Cache {
    layers: Vec<LayerRows>,
    /// Slots of a layer: all tokens, or the sinks and then a ring.
    sinks: usize,
    ring: usize,
    coded: Option<Coded>,
}

/// One layer's exact rows by slot: keys after RoPE, and values.
struct LayerRows {
    keys: Rows,
    values: Rows,
}

struct Coded {
    set: Arc<RowSet>,
    exact: Exact,
    strict: bool,
    head_dim: usize,
    /// By row: `[capacity][words]`.
    words: Vec<Vec<u32>>,
    /// Tokens whose rows are coded.
    done: usize,
    /// Exact rows below this have been overwritten, sinks apart.
    exact_from: usize,
}

/// What the queries of one call read, and what is coded meanwhile.
pub(super) struct Turn {
    /// The first of them, and the one after the last.
    pub(super) position: usize,
    end: usize,
    reach: Reach,
    /// Rows that are coded in this call.
    code: Range<usize>,
    /// Whether before they are read, layer by layer.
    at_once: bool,
}

/// Keys and values as attention sees them: `[H_kv·d, columns]`, exact ones first.
pub(super) struct Columns {
    pub(super) keys: DMatrix<f32>,
    pub(super) values: DMatrix<f32>,
    reach: Reach,
    /// Exact columns: tokens `0..sinks`, then those from `window` on, up to `coded`; then coded ones from `reach.sinks` on.
    sinks: usize,
    window: usize,
    coded: usize,
    /// The token after the last coded one.
    last: usize,
}

impl Cache {
    /// Room for `capacity` tokens in `layers` layers of `width` numbers a side, in chunks of at most `chunk`.
    pub(super) fn new(
        layers: usize,
        width: usize,
        capacity: usize,
        chunk: usize,
        row_type: RowType,
        coded: Option<(Arc<RowSet>, Exact, bool, usize)>,
    ) -> Cache {
        let coded = coded.map(|(set, exact, strict, head_dim)| Coded {
            words: set.specs.iter().map(|spec| vec![0; capacity * spec.format.words()]).collect(),
            strict: strict && !set.spans(),
            set,
            exact,
            head_dim,
            done: 0,
            exact_from: 0,
        });
        let (sinks, ring) = coded.as_ref().map_or((0, capacity), |coded| (coded.exact.sinks.min(capacity), coded.exact.window(chunk).min(capacity)));
        let rows = || Rows::new(width, sinks + ring, row_type);
        Cache { layers: (0..layers).map(|_| LayerRows { keys: rows(), values: rows() }).collect(), sinks, ring, coded }
    }

    /// What `tokens` queries from `position` on are to read.
    pub(super) fn begin(&self, position: usize, tokens: usize) -> Turn {
        let end = position + tokens;
        let Some(coded) = &self.coded else {
            return Turn { position, end, reach: Reach { sinks: 0, low: 0, high: 0, recent: 0 }, code: 0..0, at_once: false };
        };
        let reach = coded.exact.reach(position, tokens, coded.strict, coded.exact_from);
        let to = if coded.strict { reach.of(end - 1) } else { coded.exact.coded(end) };
        Turn { position, end, reach, code: coded.done..to.max(coded.done), at_once: coded.strict }
    }

    /// Appends a layer's exact rows, the columns of `keys` and `values`, from `position` on.
    pub(super) fn append(&mut self, layer: usize, position: usize, keys: &DMatrix<f32>, values: &DMatrix<f32>) {
        for (index, (key, value)) in keys.column_iter().zip(values.column_iter()).enumerate() {
            let slot = self.slot(position + index);
            self.layers[layer].keys.write(slot, key.as_slice());
            self.layers[layer].values.write(slot, value.as_slice());
        }
    }

    /// Codes the rows that end with `layer`, where that is due before (`reading`) or after they are read.
    pub(super) fn code(&mut self, layer: usize, turn: &Turn, reading: bool, rope: &Rope) {
        let Some(coded) = &self.coded else { return };
        if turn.code.is_empty() || turn.at_once != reading {
            return;
        }
        let made: Vec<(usize, Vec<u32>)> = coded
            .set
            .specs
            .iter()
            .enumerate()
            .filter(|(_, spec)| spec.last_layer() == layer)
            .map(|(row, spec)| {
                let mut y = DMatrix::zeros(spec.width(coded.head_dim), turn.code.len());
                let (first, height) = (spec.first_head * coded.head_dim, spec.kv_heads * coded.head_dim);
                for layer in spec.first_layer..=spec.last_layer() {
                    for side in [Side::Keys, Side::Values] {
                        let Some(offset) = spec.offset(layer, side, coded.head_dim) else { continue };
                        let mut part = self.exact(layer, side, turn.code.clone()).rows(first, height).into_owned();
                        if side == Side::Keys && spec.holds != Holds::TurnedKeys {
                            rope.turn_back(&mut part, turn.code.start);
                        }
                        y.rows_mut(offset, height).copy_from(&part);
                    }
                }
                (row, coded.set.coders[row].encode(&y))
            })
            .collect();
        let Some(coded) = &mut self.coded else { return };
        for (row, made) in made {
            let words = coded.set.specs[row].format.words();
            coded.words[row][turn.code.start * words..][..made.len()].copy_from_slice(&made);
        }
    }

    /// What the queries of `turn` see in `layer`.
    pub(super) fn read(&self, layer: usize, turn: &Turn, rope: &Rope) -> Columns {
        let Turn { position, end, reach, .. } = *turn;
        let sinks = reach.sinks.min(end);
        let window = reach.of(position).clamp(sinks, end);
        let coded = sinks + end - window;
        let last = reach.of(end - 1).clamp(sinks, end);
        let width = self.layers[layer].keys.width();
        let [mut keys, mut values] = [(); 2].map(|()| DMatrix::zeros(width, coded + last - sinks));
        for (side, all) in [(Side::Keys, &mut keys), (Side::Values, &mut values)] {
            all.columns_mut(0, sinks).copy_from(&self.exact(layer, side, 0..sinks));
            all.columns_mut(sinks, end - window).copy_from(&self.exact(layer, side, window..end));
        }
        if let Some(rows) = &self.coded
            && last > sinks
        {
            rows.rebuild(layer, sinks..last, &mut keys, &mut values, coded, rope);
        }
        Columns { keys, values, reach, sinks, window, coded, last }
    }

    /// When all layers have run.
    pub(super) fn end(&mut self, turn: Turn) {
        if let Some(coded) = &mut self.coded {
            coded.done = turn.code.end;
            coded.exact_from = coded.exact_from.max(turn.end.saturating_sub(self.ring));
        }
    }

    /// Forgets tokens from `position` on.
    pub(super) fn truncate(&mut self, position: usize) {
        if let Some(coded) = &mut self.coded {
            coded.done = coded.done.min(position);
            coded.exact_from = coded.exact_from.min(position);
        }
    }

    /// Bytes allocated: of rows that grow with the capacity, and of those that do not.
    pub(super) fn bytes(&self) -> (usize, usize) {
        let exact = self.layers.iter().map(|rows| rows.keys.bytes() + rows.values.bytes()).sum();
        match &self.coded {
            None => (exact, 0),
            Some(coded) => (coded.words.iter().map(|words| words.capacity() * size_of::<u32>()).sum(), exact),
        }
    }

    fn slot(&self, position: usize) -> usize {
        if position < self.sinks { position } else { self.sinks + (position - self.sinks) % self.ring }
    }

    /// One side's exact rows of `positions`, as columns.
    fn exact(&self, layer: usize, side: Side, positions: Range<usize>) -> DMatrix<f32> {
        let LayerRows { keys, values } = &self.layers[layer];
        let rows = if side == Side::Keys { keys } else { values };
        let mut all = DMatrix::zeros(rows.width(), positions.len());
        let mut at = positions.start;
        while at < positions.end {
            // A stretch ends with the sinks, with the ring, or with what was asked for.
            let slot = self.slot(at);
            let until = if at < self.sinks { self.sinks - at } else { self.sinks + self.ring - slot };
            let count = until.min(positions.end - at);
            let first = (at - positions.start) * rows.width();
            rows.read(slot, &mut all.as_mut_slice()[first..first + count * rows.width()]);
            at += count;
        }
        all
    }
}

impl Coded {
    /// Fills columns `first..` of `keys` and `values` with what the rows of `positions` stand for.
    fn rebuild(&self, layer: usize, positions: Range<usize>, keys: &mut DMatrix<f32>, values: &mut DMatrix<f32>, first: usize, rope: &Rope) {
        for (row, (spec, coder)) in self.set.specs.iter().zip(&self.set.coders).enumerate() {
            let offsets = [Side::Keys, Side::Values].map(|side| spec.offset(layer, side, self.head_dim));
            if offsets == [None, None] {
                continue;
            }
            let words = coder.format.words();
            let z = coder.coordinates(&self.words[row][positions.start * words..positions.end * words]);
            let (head, height) = (spec.first_head * self.head_dim, spec.kv_heads * self.head_dim);
            for (side, (offset, all)) in offsets.into_iter().zip([&mut *keys, &mut *values]).enumerate() {
                let Some(offset) = offset else { continue };
                let mut y = tr_product(coder.up.columns(offset, height), z.as_view());
                let mean = coder.mean.rows(offset, height);
                y.column_iter_mut().for_each(|mut column| column += mean);
                if side == 0 && spec.holds != Holds::TurnedKeys {
                    rope.turn(&mut y, positions.start);
                }
                all.view_mut((head, first), (height, positions.len())).copy_from(&y);
            }
        }
    }
}

impl Columns {
    /// The columns that the query at `position` sees, where it sees no further back than `window` tokens, itself included: exact sinks, exact others, coded.
    pub(super) fn seen(&self, position: usize, window: usize) -> [Range<usize>; 3] {
        let oldest = (position + 1).saturating_sub(window);
        let exact_from = self.reach.of(position).max(oldest).max(self.window);
        let range = |start: usize, end: usize| start.min(end)..end;
        [
            range(oldest, self.sinks.min(position + 1)),
            range(self.sinks + exact_from - self.window, self.sinks + (position + 1).saturating_sub(self.window)),
            range(self.coded + oldest.saturating_sub(self.sinks), self.coded + self.reach.of(position).min(self.last).saturating_sub(self.sinks)),
        ]
    }
}
