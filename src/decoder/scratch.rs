//! Buffers between the weights and the cache: one set for a model, in turns for all of its
//! sequences.

use super::Model;
use super::experts::routing;
use super::latents::Latents;
use crate::Result;
use crate::cache::Cache;
use crate::checkpoint::{Config, Rope};
use crate::gpu::{Device, ElementType, Shape, Tensor, pad};
use crate::kernels::blocks::Blocks;
use crate::kernels::prepare::record_len;
use crate::kernels::{AttentionBuffers, rope_table, values};
use crate::kv::{Format, LatentSet, Scale, Selection};

/// The most tokens that go through the layers together.
pub(super) const CHUNK: usize = 128;
/// Bytes that the scores of a block of tokens may take; longer contexts are attended to in smaller
/// blocks.
const SCORE_BYTES: u64 = 32 << 20;

/// What a sequence needs room for, in numbers of four bytes unless said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Needs {
    queries: usize,
    scores: usize,
    sums: usize,
    weights: usize,
    vectors: usize,
    coordinates: usize,
    scales: usize,
    landmarks: usize,
    chosen: usize,
    rebuilt: usize,
    /// Rows that stand for several tokens each.
    counted: usize,
    /// Positions of RoPE's tables.
    pub positions: usize,
}

/// How a sequence uses the scratch.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    pub needs: Needs,
    /// Columns of scores, and some more to keep lines apart.
    ///
    /// The capacity, and where there are latents as many again as a chunk may read both ways; where
    /// tokens are evicted, what can be left of them, and the capacity for rows.
    pub columns: usize,
    /// Tokens attended to together.
    pub block: usize,
}

/// Everything between the weights and the cache, f32 unless said. Clones are the same buffers.
#[derive(Clone)]
pub(super) struct Scratch {
    /// Token ids, u32 `[CHUNK][1]`.
    pub tokens: Tensor,
    /// The residual stream `[CHUNK][D]`, and normalised.
    pub x: Tensor,
    pub normed: Tensor,
    /// Of `CHUNK` tokens, and of a block of them; its columns are those of one sequence.
    pub attention: AttentionBuffers,
    /// Between the matrices of an MLP, or of each expert that a token goes through.
    pub gated: Tensor,
    /// These experts, and what each counts for, u32.
    pub routes: Tensor,
    /// RoPE's tables of the model.
    pub ropes: Vec<Tensor>,
    /// After one token: `[1][vocab]`, and the largest's index, u32.
    pub logits: Tensor,
    pub token: Tensor,
    /// Where logits are read back, and behind them whether something was too large for 16 bits.
    ///
    /// After a chunk that alone.
    pub logits_back: wgpu::Buffer,
    pub reach_back: wgpu::Buffer,
    /// What rows are coded from, their coordinates, and the numbers that scale blocks of tokens.
    ///
    /// Room for the largest of each; a row has its own view of them.
    pub vectors: Tensor,
    pub coordinates: Tensor,
    pub scales: Tensor,
}

/// The scratch as one sequence uses it.
#[derive(Clone)]
pub(super) struct Buffers {
    pub scratch: Scratch,
    /// Tokens attended to together.
    pub block: usize,
}

impl std::ops::Deref for Buffers {
    type Target = Scratch;

    fn deref(&self) -> &Scratch {
        &self.scratch
    }
}

impl Buffers {
    /// What attention of a layer has of them.
    pub(super) fn of_layer(&self, config: &Config, layer: usize) -> AttentionBuffers {
        AttentionBuffers { rope: self.ropes[config.layers[layer].rope].clone(), ..self.attention.clone() }
    }
}

/// RoPE's tables of sequences with room for `context` tokens.
///
/// # Errors
/// [`OutOfMemory`](crate::Error::OutOfMemory).
pub(super) fn ropes(device: &Device, config: &Config, context: usize) -> Result<Vec<Tensor>> {
    let table = |rope: &Rope| {
        let table = rope_table(&rope.frequencies(config.head_dim, context), context);
        let shape = Shape::dense(2 * table.len() / config.head_dim, config.head_dim);
        Tensor::upload(device, "RoPE tables", table.as_flattened(), shape)
    };
    config.ropes.iter().map(table).collect()
}

/// Experts that a token goes through, and how many numbers there are between an MLP's matrices.
pub(super) fn inner(config: &Config) -> (usize, usize) {
    config.design.experts.as_ref().map_or((0, config.intermediate_size), |spec| (routing(spec).slots(), spec.width))
}

/// At least so many columns that lines of them do not all begin in the same few sets of a cache, as
/// they would where a context is a power of two.
pub(super) fn apart(columns: usize) -> usize {
    32 * (columns.div_ceil(32) | 1)
}

/// How many tokens are attended to together that take `line` bytes each in the larger of their
/// tables, of which none is larger than `max_binding`.
pub(super) fn block_of(line: u64, max_binding: u64) -> usize {
    (SCORE_BYTES.min(max_binding) / line.max(1)).clamp(1, CHUNK as u64) as usize
}

impl View {
    /// Of a sequence with this cache, which reads `coded` rows or none.
    pub(super) fn new(model: &Model, coded: Option<&Latents>, cache: &Cache) -> View {
        let attention = &super::attention_shape(&model.config);
        let (capacity, stores) =
            (cache.shape.capacity, cache.layers.first().and_then(|layer| layer.eviction.as_ref()).map(|eviction| eviction.stores));
        let (device, c) = (&*model.device, &model.config);
        let heads = c.num_attention_heads;
        let (specs, layers) = coded.map_or((&[][..], &[][..]), |coded| (&coded.specs, &coded.layers));
        let all = capacity + coded.map_or(0, |_| CHUNK + LatentSet::block(specs) - 1);
        let columns = apart(match stores {
            None => all,
            Some(stores) => {
                let beside = cache.slots.count() + stores.candidates + stores.evicted_columns();
                beside + if coded.is_some() { capacity } else { 0 }
            }
        });
        // Of a token in a block: exact and coded values are summed apart.
        let sides = if coded.is_some() { 2 } else { 1 };
        let sums = layers.iter().map(|layer| values::sums(attention, Some(&layer.values))).max().unwrap_or(values::sums(attention, None));
        let queries = layers.iter().map(|layer| layer.keys.query_stride(attention, layer.absorbed)).max().unwrap_or(attention.query_row());
        // What a token of a block takes, in the larger of its two tables.
        let line = (heads * columns).max(sides * sums) as u64 * 4;
        let block = block_of(line, device.max_binding());
        // One token's attention is split, a block's is not.
        let tuning = device.tuning();
        let splits = tuning.splits + if coded.is_some() { tuning.coded_splits } else { 0 };
        let parts = (sides * block).max(splits as usize);
        let scales = |format: &Format| match format.scale {
            Scale::Blocks(shape) => Blocks::numbers(format, shape, CHUNK),
            _ => 0,
        };
        let needs = Needs {
            queries: CHUNK * queries,
            scores: block * heads * columns,
            sums: parts * sums,
            weights: parts * 2 * heads,
            vectors: CHUNK * specs.iter().map(|row| pad(row.width(c.head_dim))).max().unwrap_or(0),
            coordinates: CHUNK * specs.iter().map(|row| row.format.rank()).max().unwrap_or(0),
            scales: specs.iter().map(|row| scales(&row.format)).max().unwrap_or(0),
            landmarks: cache.select.map_or(0, |_| heads * capacity.div_ceil(Selection::CHUNK)),
            chosen: cache.select.map_or(0, |selection| c.num_key_value_heads * selection.listed(usize::MAX)),
            rebuilt: if layers.iter().any(|layer| !layer.absorbed) { capacity * attention.kv_row() / 2 } else { 0 },
            counted: stores.map_or(0, |stores| stores.evicted_columns()),
            positions: capacity,
        };
        View { needs, columns, block }
    }
}

impl Needs {
    /// Room for either.
    pub(super) fn or(self, other: Needs) -> Needs {
        Needs {
            queries: self.queries.max(other.queries),
            scores: self.scores.max(other.scores),
            sums: self.sums.max(other.sums),
            weights: self.weights.max(other.weights),
            vectors: self.vectors.max(other.vectors),
            coordinates: self.coordinates.max(other.coordinates),
            scales: self.scales.max(other.scales),
            landmarks: self.landmarks.max(other.landmarks),
            chosen: self.chosen.max(other.chosen),
            rebuilt: self.rebuilt.max(other.rebuilt),
            counted: self.counted.max(other.counted),
            positions: self.positions.max(other.positions),
        }
    }
}

impl Scratch {
    /// # Errors
    /// [`OutOfMemory`](crate::Error::OutOfMemory).
    pub(super) fn new(model: &Model, needs: &Needs) -> Result<Scratch> {
        let (device, c, attention) = (&*model.device, &model.config, &super::attention_shape(&model.config));
        let numbers = |what: &str, count: usize| device.buffer(what, 4 * count as u64);
        let floats = |what: &str, shape: Shape| Tensor::zeroed(device, what, ElementType::F32, shape);
        let words = |what: &str, count: usize| Tensor::zeroed(device, what, ElementType::U32, Shape::dense(count, 1));
        let each = |what: &str, width: usize| floats(what, Shape::padded(CHUNK, width));
        let room = |what: &str, count: usize| floats(what, Shape::dense(1, count));
        let counted = |what: &str| numbers(&format!("{what} of a sketch"), needs.counted * attention.kv_row() / 2);
        let ropes = ropes(device, c, needs.positions)?;
        let (slots, inner) = inner(c);
        Ok(Scratch {
            tokens: words("tokens", CHUNK)?,
            x: each("residual stream", c.hidden_size)?,
            normed: each("normalised input", c.hidden_size)?,
            attention: AttentionBuffers {
                projected: each("projected input", attention.projection_row())?,
                rope: ropes[0].clone(),
                queries: numbers("queries", needs.queries + record_len(c.num_hidden_layers))?,
                record: needs.queries as u32,
                scores: numbers("attention scores", needs.scores)?,
                columns: 0,
                sums: numbers("value sums", needs.sums)?,
                weights: numbers("attention weights", needs.weights)?,
                attended: each("attention output", attention.query_row())?,
                landmarks: numbers("scores of landmarks", needs.landmarks)?,
                chosen: numbers("chosen tokens", needs.chosen)?,
                rebuilt: numbers("rebuilt keys", needs.rebuilt)?,
                counted: [counted("keys")?, counted("values")?],
                counts: numbers("tokens of a sketch", needs.counted)?,
                head_sinks: None,
            },
            gated: floats("MLP activations", Shape::padded(CHUNK * slots.max(1), inner))?,
            routes: Tensor::zeroed(device, "routes to experts", ElementType::U32, Shape::dense(CHUNK, 2 * slots))?,
            ropes,
            logits: room("logits", c.vocab_size)?,
            token: words("token", 1)?,
            logits_back: device.readback("logits", 4 * c.vocab_size as u64 + 4)?,
            reach_back: device.readback("reach", 4)?,
            vectors: room("rows to be coded", needs.vectors)?,
            coordinates: room("coordinates of rows", needs.coordinates)?,
            scales: room("scales of blocks", needs.scales)?,
        })
    }

    /// Bytes in all, those of readback included.
    pub(super) fn bytes(&self) -> u64 {
        let Scratch { tokens, x, normed, gated, routes, logits, token, logits_back, vectors, coordinates, scales, .. } = self;
        let all: [&wgpu::Buffer; 11] = [tokens, x, normed, gated, routes, logits, token, logits_back, vectors, coordinates, scales];
        let ropes = self.ropes.iter().skip(1).map(|table| table.size()).sum::<u64>();
        self.attention.bytes() + ropes + all.iter().map(|buffer| buffer.size()).sum::<u64>()
    }
}
