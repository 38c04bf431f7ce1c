// Which keys a query reads, and the soft cap of its scores.
//
// Wants of params what src/kv/exact.rs says: `sinks`, `recent`, `low`, `high`; and `window`.
//
// CAPPED  a score s becomes c·tanh(s / c), with c = CAP / 2^CAP_SHIFT

#if CAPPED
fn soft_cap(s: f32) -> f32 {
    let cap = f32(CAP) / f32(1u << CAP_SHIFT);
    // tanh(10) is one in f32; of larger numbers some drivers make what is no number.
    return cap * tanh(clamp(s / cap, -10.0, 10.0));
}
#endif

// The first key that the query at a position reads exactly again.
fn reach(position: u32) -> u32 {
    let due = max(position + 1u, params.recent) - params.recent;
    return clamp(params.sinks + (max(due, params.sinks) - params.sinks) / ALIGN * ALIGN, params.low, params.high);
}

// Whether the query at a position reads a key that is no column beside, from its codes or not.
fn reads(position: u32, key: u32, coded: bool) -> bool {
    return key <= position && position - key < params.window && (key >= params.sinks && key < reach(position)) == coded;
}
