// How much of rows' vectors an orthonormal basis holds: adds Σ y² and Σ z² over some tokens to two
// numbers, in LOTS parts.
//
// Grid: x = parts, at most LOTS: of every so many tokens one.
#include "lib/reduce.wgsl"

struct Params {
    tokens: u32,
    width: u32,
    stride: u32, // numbers from one token to the next in y
    rank: u32,
    at: u32,     // of the row in out
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> y: array<f32>;            // [tokens][stride]
@group(0) @binding(1) var<storage, read> z: array<f32>;            // [tokens][rank]
@group(0) @binding(2) var<storage, read_write> out: array<f32>;    // [rows][LOTS][2]

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    var all = 0.0;
    var held = 0.0;
    for (var t = id.x; t < params.tokens; t += grid.x) {
        for (var i = local; i < params.width; i += WORKGROUP) {
            all += y[t * params.stride + i] * y[t * params.stride + i];
        }
        for (var i = local; i < params.rank; i += WORKGROUP) {
            held += z[t * params.rank + i] * z[t * params.rank + i];
        }
    }
    all = workgroup_sum(all, local);
    held = workgroup_sum(held, local);
    if local == 0u {
        let at = 2u * (params.at * LOTS + id.x);
        out[at] += all;
        out[at + 1u] += held;
    }
}
