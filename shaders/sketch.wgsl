// What is left of evicted tokens in a sketch (src/kv/sketch.rs), as rows in f16 with how many
// tokens each stands for, which attention reads beside exact ones. Two rows for each bucket, one
// for a sign, or one for the mean of all.
//
// Grid: x = lots of WORKGROUP vectors of a key and a value, y = columns.
//
// SKETCH    there are buckets
// MEAN      there is a mean of all
#include "lib/half.wgsl"

@group(0) @binding(0) var<storage, read_write> keys: array<half4>;       // [columns][EXACT_ROW / 4]
@group(0) @binding(1) var<storage, read_write> values: array<half4>;
@group(0) @binding(2) var<storage, read_write> counts: array<u32>;       // [columns]
@group(0) @binding(3) var<storage, read> marks: array<u32>;              // as src/kernels/eviction.rs has them
#if SKETCH
@group(0) @binding(4) var<storage, read> bucket_sums: array<vec4<i32>>;  // [buckets][2][EXACT_ROW / 4], keys and values, in 1/65536
#endif
#if MEAN
@group(0) @binding(5) var<storage, read> totals: array<vec4<u32>>;       // [3][2][EXACT_ROW / 4]: the mean in f32; low and high words of the sum of all, in 1/65536
#endif

const VECTORS = EXACT_ROW / 4u; // of a key

fn estimate(column: u32, v: u32) -> vec4<f32> {
#if SKETCH
    let bucket = column / 2u;
    let sign = 1.0 - 2.0 * f32(column % 2u);
    let sum = vec4<f32>(bucket_sums[bucket * 2u * VECTORS + v]) / 65536.0;
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

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let v = id.x;
    let column = id.y;
    if v >= 2u * VECTORS {
        return;
    }
    // A sum of many may be beyond what 16 bits hold.
    let row = narrow(clamp(estimate(column, v), vec4<f32>(-65504.0), vec4<f32>(65504.0)));
    let at = column * VECTORS;
    if v < VECTORS {
        keys[at + v] = row;
    } else {
        values[at + v - VECTORS] = row;
    }
    if v == 0u {
#if SKETCH
        counts[column] = marks[4u * (column / 2u) + column % 2u];
#else
        counts[column] = marks[0];
#endif
    }
}
