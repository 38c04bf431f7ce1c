// What matrix-vector products are given, and what becomes of their sums.
//
// NORM      x is the residual stream: out = W·(x / rms(x) ⊙ gain). The scale does not depend on k
//           and is applied to the sum.
// GATED     rows come in pairs (gate, up): out[row / 2] = silu(gate) · up, or another activation's
// RESIDUAL  out[row] += …, and BIAS adds bias[row]
// MORE      something of lib/finish.wgsl

struct Params {
    first: u32,   // row of the whole matrix at which this part begins
    rows: u32,    // rows of this part
    width: u32,   // K / 4
    count: u32,   // numbers under the mean of squares: K without padding (NORM)
    epsilon: f32, // (NORM)
    tokens: u32,  // up to COLUMNS
    stride: u32,  // numbers from one token to the next in out
#if MORE
    scale: f32,
    cap: f32,
#endif
}
var<immediate> params: Params;
#if MORE
#include "lib/finish.wgsl"
#endif

@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;    // [tokens][width]
@group(0) @binding(2) var<storage, read_write> out: array<f32>;  // [tokens][stride]
#if NORM
@group(0) @binding(3) var<storage, read> gain: array<vec4<f32>>; // [width]
#endif
#if BIAS
@group(0) @binding(3) var<storage, read> bias: array<f32>;       // [all rows]
#endif

// Writes the sums of UNROLL rows from `row` on, each to be multiplied by `scale`.
fn finish(row: u32, token: u32, sums: array<f32, UNROLL>, scale: f32) {
    var s = sums;
    let first = token * params.stride;
#if GATED
    for (var u = 0u; u < UNROLL; u += 2u) {
        if row + u < params.rows {
#if MORE
            var pair = vec2<f32>(s[u], s[u + 1u]) * scale;
#if BIAS
            pair += vec2<f32>(bias[params.first + row + u], bias[params.first + row + u + 1u]);
#endif
            out[first + (params.first + row + u) / 2u] = activate(pair.x) * pair.y;
#else
            let gate = s[u] * scale;
            out[first + (params.first + row + u) / 2u] = gate / (1.0 + exp(-gate)) * (s[u + 1u] * scale);
#endif
        }
    }
#else
    for (var u = 0u; u < UNROLL; u++) {
        if row + u < params.rows {
            let i = params.first + row + u;
            var y = s[u] * scale;
#if BIAS
            y += bias[i];
#endif
#if MORE
            y = finished(y);
#endif
#if RESIDUAL
            y += out[first + i];
#endif
            out[first + i] = y;
        }
    }
#endif
}
