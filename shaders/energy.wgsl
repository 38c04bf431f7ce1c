// How much of rows' vectors an orthonormal basis holds: adds Σ y² and Σ z² over some tokens to two numbers.
//
// Grid: one workgroup.
#include "lib/reduce.wgsl"

struct Step {
    tokens: u32,
    width: u32,
    stride: u32, // numbers from one token to the next in y
    rank: u32,
    at: u32,     // of the two numbers
}
var<immediate> step: Step;

@group(0) @binding(0) var<storage, read> y: array<f32>;            // [tokens][stride]
@group(0) @binding(1) var<storage, read> z: array<f32>;            // [tokens][rank]
@group(0) @binding(2) var<storage, read_write> out: array<f32>;    // [rows][2]

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(local_invocation_index) local: u32) {
    var all = 0.0;
    var held = 0.0;
    for (var t = 0u; t < step.tokens; t++) {
        for (var i = local; i < step.width; i += WORKGROUP) {
            all += y[t * step.stride + i] * y[t * step.stride + i];
        }
        for (var i = local; i < step.rank; i += WORKGROUP) {
            held += z[t * step.rank + i] * z[t * step.rank + i];
        }
    }
    all = workgroup_sum(all, local);
    held = workgroup_sum(held, local);
    if local == 0u {
        out[step.at] += all;
        out[step.at + 1u] += held;
    }
}
