// The keys of coded columns.
//
// Wants `step.start`: the first of them, and columns are consecutive keys. CHOSEN: the last of them, and `chosen: array<u32>`, chunks of CHUNK keys, `[KV_HEADS][MOST]`. A chunk may
// reach beyond the last key: such columns are masked, and read as the last.

fn coded_key(kv: u32, column: u32) -> u32 {
#if CHOSEN
    return chosen[kv * MOST + column / CHUNK] * CHUNK + column % CHUNK;
#else
    return step.start + column;
#endif
}

// The key whose row a column reads.
fn row_key(kv: u32, column: u32) -> u32 {
#if CHOSEN
    return min(coded_key(kv, column), step.start);
#else
    return coded_key(kv, column);
#endif
}
