//! What a cache takes.

/// What one sequence's cache holds, counted from what is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct KvMemory {
    /// Bytes the cache grows by per token, over the whole model.
    ///
    /// Allocated bytes of the rows divided by the capacity.
    pub kv_bytes_per_token: u64,
    /// Bytes that do not grow with the context.
    pub kv_fixed_bytes: u64,
    /// Bytes allocated for `capacity` tokens, fixed ones included.
    pub allocated_bytes: u64,
    /// Bytes between weights and cache, which all sequences of a model share. Not in the others.
    pub scratch_bytes: u64,
}
