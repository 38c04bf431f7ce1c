// What every query of a sequence that forgets sees besides (src/rows/reviver.rs), in columns behind those of exact rows: candidates, which stand in slots behind the ring; then two for each
// bucket of a sketch, one for a sign, or one for the mean of all that is vague.
//
// Wants `step.side`: columns, VAGUE_COLUMNS of them not candidates; EXACT_ROW; `step.sinks` and `step.ring`.

// First a bit for every token, whether it is a candidate (CODED); or four words for each bucket, how many vectors it has of either sign, the last one's position and its weight (SKETCH); or the
// number of the vague (MEAN alone). Then, candidate by candidate, position and attention received. Then what exact rows have received, by slot.
@group(0) @binding(8) var<storage, read> marks: array<u32>;
#if SKETCH
@group(0) @binding(9) var<storage, read> bucket_sums: array<vec4<i32>>; // [buckets][2][EXACT_ROW / 4], keys and values, in 1/65536
#endif
#if MEAN
@group(0) @binding(10) var<storage, read> totals: array<vec4<u32>>;     // [3][2][EXACT_ROW / 4]: the mean in f32; low and high words of the sum of all, in 1/65536
#endif

#if CODED
// Whether the token at `position` is read exactly instead of from its row.
fn is_candidate(position: u32) -> bool {
    return ((marks[position / 32u] >> (position % 32u)) & 1u) == 1u;
}
#endif

// The slot of a candidate's exact row.
fn side_slot(column: u32) -> u32 {
    return step.sinks + step.ring + column;
}

#if VAGUE
fn is_vague(column: u32) -> bool {
    return column + VAGUE_COLUMNS >= step.side;
}

// Vector `v` of what a column of the vague is read as, the key's and then the value's: src/rows/sketch.rs.
fn vague(column: u32, v: u32) -> vec4<f32> {
#if SKETCH
    let of_sketch = column + VAGUE_COLUMNS - step.side;
    let bucket = of_sketch / 2u;
    let sign = 1.0 - 2.0 * f32(of_sketch % 2u);
    let sum = vec4<f32>(bucket_sums[bucket * (EXACT_ROW / 2u) + v]) / 65536.0;
#if MEAN
    let plus = f32(marks[4u * bucket]);
    let minus = f32(marks[4u * bucket + 1u]);
    let mean = bitcast<vec4<f32>>(totals[v]);
    return mean + sign * (sum - (plus - minus) * mean) / max(plus + minus, 1.0);
#else
    return sign * sum;
#endif
#else
    return bitcast<vec4<f32>>(totals[v]);
#endif
}
#endif

// How many tokens a column is.
fn side_count(column: u32) -> u32 {
#if VAGUE
    if is_vague(column) {
#if SKETCH
        let of_sketch = column + VAGUE_COLUMNS - step.side;
        return marks[4u * (of_sketch / 2u) + of_sketch % 2u];
#else
        return marks[0];
#endif
    }
#endif
    return 1u;
}
