//! Buffers between the weights and the cache.

use super::Model;
use super::coded::CodedRows;
use crate::Result;
use crate::cache::Cache;
use crate::gpu::pad;
use crate::kernels::prepare::record_len;
use crate::kernels::{turns, values};
use crate::rows::{RowSet, Selection};

/// The most tokens that go through the layers together.
pub(super) const CHUNK: usize = 128;
/// Bytes that the scores of a block of tokens may take; longer contexts are attended to in smaller blocks.
const SCORE_BYTES: u64 = 32 << 20;

/// Everything between the weights and the cache, f32 unless said, allocated once.
pub(super) struct Buffers {
    /// Token ids, u32 `[CHUNK]`.
    pub tokens: wgpu::Buffer,
    /// The residual stream `[CHUNK][pad(D)]`, and normalised.
    pub x: wgpu::Buffer,
    pub normed: wgpu::Buffer,
    /// Query heads, key heads and value heads `[CHUNK][…]`.
    pub projected: wgpu::Buffer,
    /// Turned `[CHUNK][H][pad(head_dim)]`, and behind those of a token what is taken to coded keys; from number `record` on what was too large for 16 bits.
    pub queries: wgpu::Buffer,
    pub record: u32,
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
    /// For a sequence with this cache, which reads `coded` rows or none.
    pub(super) fn new(model: &Model, coded: Option<&CodedRows>, cache: &Cache) -> Result<Buffers> {
        let attention = &super::attention(&model.config);
        let (capacity, stores) = (cache.shape.capacity, cache.layers.first().and_then(|layer| layer.side.as_ref()).map(|side| side.stores));
        let (device, c) = (&*model.device, &model.config);
        let floats = |what: &str, rows: usize, width: usize| device.buffer(what, rows as u64 * width as u64 * 4);
        let heads = c.num_attention_heads;
        let (specs, layers) = coded.map_or((&[][..], &[][..]), |coded| (&coded.specs, &coded.layers));
        let all = capacity + coded.map_or(0, |_| CHUNK + RowSet::block(specs) - 1);
        let columns = apart(match stores {
            None => all,
            Some(stores) => {
                let beside = cache.slots.count() + stores.candidates + stores.vague_columns();
                beside + if coded.is_some() { capacity } else { 0 }
            }
        });
        // Of a token in a block: exact and coded values are summed apart.
        let sides = if coded.is_some() { 2 } else { 1 };
        let sums = layers.iter().map(|layer| values::sums(attention, Some(&layer.values))).max().unwrap_or(values::sums(attention, None));
        let queries = layers.iter().map(|layer| layer.keys.query_stride(attention, layer.taken)).max().unwrap_or(heads * pad(c.head_dim));
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
            projected: floats("projected input", CHUNK, attention.projection_row())?,
            queries: floats("queries", CHUNK * queries + record_len(c.num_hidden_layers), 1)?,
            record: (CHUNK * queries) as u32,
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
            choice: cache.select.map(|selection| Choice::new(model, selection, capacity)).transpose()?,
        })
    }
}
