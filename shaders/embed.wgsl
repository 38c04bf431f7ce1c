// Looks tokens up in a part of the embedding table: out[t] = table[token], where the token's row
// lies in this part.
//
// Grid: x = tokens. lib/weights.wgsl says how the table is stored.
//
// SCALED  rows are multiplied by scale
#include "lib/weights.wgsl"

struct Params {
    first: u32, // row of the whole table at which this part begins
    rows: u32,  // rows of this part
    width: u32, // D / 4
#if SCALED
    scale: f32,
#endif
}
var<immediate> params: Params;

@group(0) @binding(1) var<storage, read> tokens: array<u32>;             // [tokens]
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;    // [tokens][width]

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let row = tokens[group.x] - params.first; // wraps below: then it is no less than rows
    if row < params.rows {
        let loads = row_loads(params.width);
        for (var k = local; k < params.width; k += WORKGROUP) {
#if SCALED
            out[group.x * params.width + k] = weights_at(row, loads, k) * params.scale;
#else
            out[group.x * params.width + k] = weights_at(row, loads, k);
#endif
        }
    }
}
