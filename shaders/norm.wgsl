// RMSNorm of many tokens: out[t] = x[t] / sqrt(mean(x[t]²) + ε) ⊙ gain. (For one token the norm is
// part of the projection that follows.)
//
// Grid: x = tokens.
#include "lib/reduce.wgsl"

struct Params {
    width: u32,   // D / 4
    count: u32,   // D
    epsilon: f32,
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;         // [tokens][width]
@group(0) @binding(1) var<storage, read> gain: array<vec4<f32>>;      // [width]
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>; // [tokens][width]

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let base = group.x * params.width;
    var squares = 0.0;
    for (var k = local; k < params.width; k += WORKGROUP) {
        squares += dot(x[base + k], x[base + k]);
    }
    let scale = inverseSqrt(workgroup_sum(squares, local) / f32(params.count) + params.epsilon);
    for (var k = local; k < params.width; k += WORKGROUP) {
        out[base + k] = x[base + k] * scale * gain[k];
    }
}
