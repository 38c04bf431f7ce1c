//! What a model and a context take on a GPU, from shapes alone. At most: a basis whose mean is zero
//! in places takes less.

use super::attention_shape;
use super::scratch::{CHUNK, apart, block_of, inner};
use super::stored::weight_bytes;
use crate::checkpoint::{Checkpoint, WeightStorage};
use crate::gpu::pad;
use crate::kernels::{NEAR, blocks::Blocks};
use crate::kv::{CacheMethod, LatentKind, LatentSet, LatentSpec, Layout, Scale, Selection, Slots};
use crate::sequence::{ChunkPolicy, MemoryPlan, SequenceOptions};

/// Parts of a token's attention that a device splits it into, at most, of exact and of coded rows.
const SPLITS: usize = 256;

/// Counts what `options` take of a checkpoint whose weights are to be as `storage` says.
///
/// Rows of a method that works on the prompt are counted as if they were exact, as they are at
/// first.
pub fn plan_memory(checkpoint: &Checkpoint, storage: WeightStorage, options: &SequenceOptions) -> MemoryPlan {
    let (c, attention, context) = (checkpoint.config(), attention_shape(checkpoint.config()), options.capacity);
    let factored = checkpoint.factored().filter(|_| matches!(options.method, CacheMethod::Calibrated(_)));
    let specs = factored.map_or(&[][..], |factored| &factored.rows);
    let (layers, heads) = (c.num_hidden_layers, c.num_attention_heads);
    let select = options.method.read().selection();

    let exact = options.exact.or(factored.map(|factored| factored.exact)).unwrap_or_default().within(context);
    let spans = specs.iter().any(|spec| spec.layers > 1);
    let chunk = ChunkPolicy::new(options, spans, CHUNK, CHUNK).max;
    let slots = if specs.is_empty() { context } else { Slots::new(&exact.blocks(LatentSet::block(specs)), chunk, context).count() };
    let stored: usize = Layout::new(specs, layers, c.head_dim).stores.iter().sum();
    let landmarks = match select {
        Some(_) if !specs.is_empty() => layers * attention.kv_heads * Selection::landmark_bytes(c.head_dim, context),
        _ => 0,
    };

    let near = NEAR as usize;

    // Of a layer: coordinates of keys and values by query head, at most.
    let ranks = |spec: &LatentSpec| spec.format.rank() + c.head_dim + 4;
    let widest = specs.iter().map(ranks).max().unwrap_or(0);
    let whole = heads * pad(c.head_dim);
    let (queries, sums) = (whole + heads * widest, whole.max(heads * widest));
    let columns = apart(if specs.is_empty() { context } else { context + CHUNK + LatentSet::block(specs) - 1 });
    let sides = if specs.is_empty() { 1 } else { 2 };
    let block = block_of((heads * columns).max(sides * sums) as u64 * 4, u64::MAX);
    let parts = (sides * block).max(sides * SPLITS);
    let scales = |spec: &LatentSpec| match spec.format.scale {
        Scale::Blocks(shape) => Blocks::numbers(&spec.format, shape, CHUNK),
        _ => 0,
    };
    let most = |of: &dyn Fn(&LatentSpec) -> usize| specs.iter().map(of).max().unwrap_or(0);
    let rebuilt =
        if specs.iter().any(|spec| matches!(spec.kind, LatentKind::PreRopeKeys | LatentKind::Both)) { context * attention.kv_row() / 2 } else { 0 };
    let (ways, width) = inner(c);
    let numbers = CHUNK * (2 * c.hidden_size + ways.max(1) * pad(width) + 2 * ways + attention.projection_row() + attention.query_row() + queries)
        + block * heads * columns
        + parts * (sums + 2 * heads)
        + CHUNK * (most(&|spec| pad(spec.width(c.head_dim))) + most(&|spec| spec.format.rank()))
        + most(&scales)
        + 2 * c.vocab_size
        + c.ropes.len() * (2 * near + context.div_ceil(near)) * c.head_dim
        + rebuilt
        + select.map_or(0, |selection| heads * context.div_ceil(Selection::CHUNK) + c.num_key_value_heads * selection.listed(usize::MAX));

    // Down in f16 or as codes, up, and tables.
    let basis = |spec: &LatentSpec| (4 * (spec.width(c.head_dim) + 64) * pad(spec.format.rank()) + 16 * spec.width(c.head_dim) + 4096) as u64;
    let (weights, largest) = weight_bytes(checkpoint, storage);
    MemoryPlan {
        context,
        weights,
        bases: specs.iter().map(basis).sum(),
        exact_rows: (4 * layers * slots * attention.kv_row()) as u64,
        coded_rows: (4 * context * stored + landmarks) as u64,
        scratch: 4 * numbers as u64,
        staging: largest,
    }
}
