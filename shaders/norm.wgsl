// RMSNorm of many tokens: out[t] = x[t] / sqrt(mean(x[t]²) + ε) ⊙ gain. (For one token the norm is
// part of the projection that follows, where it is RMSNorm and one follows.)
//
// Grid: x = tokens.
//
// CENTRED  LayerNorm: the mean is subtracted first
// BIASED   bias is added
// ONTO     it is multiplied by scale and added to what is there
#include "lib/reduce.wgsl"

struct Params {
    width: u32,   // D / 4
    count: u32,   // D
    epsilon: f32,
#if ONTO
    scale: f32,
#endif
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;         // [tokens][width]
@group(0) @binding(1) var<storage, read> gain: array<vec4<f32>>;      // [width]
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>; // [tokens][width]
#if BIASED
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;      // [width]
#endif

#if CENTRED
// A vector less the mean, and zeros where there is padding.
fn centred(v: vec4<f32>, k: u32, mean: f32) -> vec4<f32> {
    let place = vec4<u32>(4u * k, 4u * k + 1u, 4u * k + 2u, 4u * k + 3u);
    return select(vec4<f32>(), v - mean, place < vec4<u32>(params.count));
}
#endif

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let base = group.x * params.width;
    var squares = 0.0;
#if CENTRED
    var total = 0.0;
    for (var k = local; k < params.width; k += WORKGROUP) {
        total += dot(x[base + k], vec4<f32>(1.0));
    }
    let mean = workgroup_sum(total, local) / f32(params.count);
    for (var k = local; k < params.width; k += WORKGROUP) {
        let v = centred(x[base + k], k, mean);
        squares += dot(v, v);
    }
#else
    for (var k = local; k < params.width; k += WORKGROUP) {
        squares += dot(x[base + k], x[base + k]);
    }
#endif
    let scale = inverseSqrt(workgroup_sum(squares, local) / f32(params.count) + params.epsilon);
    for (var k = local; k < params.width; k += WORKGROUP) {
#if CENTRED
        let normed = centred(x[base + k], k, mean) * scale;
#else
        let normed = x[base + k] * scale;
#endif
#if BIASED
        let y = normed * gain[k] + bias[k];
#else
        let y = normed * gain[k];
#endif
#if ONTO
        out[base + k] += params.scale * y;
#else
        out[base + k] = y;
#endif
    }
}
