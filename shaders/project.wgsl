// Coordinates of rows whose basis is orthonormal, from the up-projection that keys or values are
// read with: z[t] (+)= Σ_h y[t][h] · B_hᵀ, one layer's heads.
//
// Grid: x = blocks of WORKGROUP vectors of coordinates, y = blocks of TOKENS tokens. A lane has one
// vector, of all tokens of its block.
#include "lib/half.wgsl"

struct Params {
    tokens: u32,
    at: u32,      // where the layer begins in y
    stride: u32,  // numbers from one token to the next in y
    heads: u32,
    vectors: u32, // of coordinates
    onto: u32,    // whether to add to what is there
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> y: array<f32>;                // [tokens][stride]
@group(0) @binding(1) var<storage, read> up: array<half4>;             // [heads][vectors][HEAD]
@group(0) @binding(2) var<storage, read_write> z: array<vec4<f32>>;    // [tokens][vectors]

const TOKENS = 8u;
var<workgroup> part: array<f32, TOKENS * HEAD>;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let vector = group.x * WORKGROUP + local;
    let first = group.y * TOKENS;
    var sums: array<vec4<f32>, TOKENS>;
    for (var h = 0u; h < params.heads; h++) {
        workgroupBarrier();
        for (var n = local; n < TOKENS * HEAD; n += WORKGROUP) {
            let t = min(first + n / HEAD, params.tokens - 1u);
            part[n] = y[t * params.stride + params.at + h * HEAD + n % HEAD];
        }
        workgroupBarrier();
        if vector < params.vectors {
            for (var k = 0u; k < HEAD; k++) {
                let b = widen(up[(h * params.vectors + vector) * HEAD + k]);
                for (var t = 0u; t < TOKENS; t++) {
                    sums[t] = fma(vec4<f32>(part[t * HEAD + k]), b, sums[t]);
                }
            }
        }
    }
    if vector < params.vectors {
        for (var t = 0u; t < TOKENS && first + t < params.tokens; t++) {
            let at = (first + t) * params.vectors + vector;
            if params.onto != 0u {
                z[at] += sums[t];
            } else {
                z[at] = sums[t];
            }
        }
    }
}
