//! What a model and a context take on the processor, from shapes alone.

use super::sequence::CpuSequence;
use crate::checkpoint::{Checkpoint, WeightStorage};
use crate::kv::{CacheMethod, LatentSet, Selection, Slots};
use crate::sequence::{ChunkPolicy, MemoryPlan, SequenceOptions};

/// Counts what `options` take of a checkpoint whose weights are to be as `storage` says.
///
/// Rows of a method that works on the prompt are counted as if they were exact, as they are at
/// first. Weights that are read where they are in the file are counted too: a step reads all of
/// them, and waits for the disk where memory has no room.
pub fn plan_memory(checkpoint: &Checkpoint, storage: WeightStorage, options: &SequenceOptions) -> MemoryPlan {
    let (c, context) = (checkpoint.config(), options.capacity);
    let factored = checkpoint.factored().filter(|_| matches!(options.method, CacheMethod::Calibrated(_)));
    let specs = factored.map_or(&[][..], |factored| &factored.rows);
    let (layers, width) = (c.num_hidden_layers, c.geometry().kv_width());
    let exact = options.exact.or(factored.map(|factored| factored.exact)).unwrap_or_default().within(context);
    let policy = ChunkPolicy::new(options, specs.iter().any(|spec| spec.layers > 1), CpuSequence::CHUNK, context);
    let chunk = policy.max.min(context);
    let slots = if specs.is_empty() { context } else { Slots::new(&exact.blocks(LatentSet::block(specs)), policy.max, context).count() };
    let landmarks = match options.method.read().selection() {
        Some(_) if !specs.is_empty() => layers * c.num_key_value_heads * Selection::landmark_bytes(c.head_dim, context),
        _ => 0,
    };
    // A layer's keys and values as attention reads them; attention weights of the heads that are at
    // work; activations.
    let columns = 2 * width * context;
    let scores = rayon::current_num_threads() * chunk * context;
    let activations = chunk * (6 * c.hidden_size + 3 * c.intermediate_size + 3 * c.num_attention_heads * c.head_dim + 4 * width);
    let weights = checkpoint.weight_bytes(storage);
    MemoryPlan {
        context,
        weights,
        bases: specs.iter().map(|spec| (size_of::<f32>() * 2 * spec.width(c.head_dim) * (spec.format.rank() + 1)) as u64).sum(),
        exact_rows: (layers * slots * 2 * width * 2) as u64,
        coded_rows: LatentSet::bytes_per_token(specs) * context as u64 + landmarks as u64,
        scratch: (size_of::<f32>() * (columns + scores + activations + c.vocab_size)) as u64,
        staging: 0,
    }
}
