// Joins the splits of one attention: with M the largest m, u = Σ_s e^(m_s − M) · sums_s / Σ_s e^(m_s − M) · Σp_s, per query head and token.
//
// Grid: x = query heads, y = tokens.
//
// UP    u is a sum of latent rows: out = B·u + bias, head_dim wide. (Without it u is the head's output as it is, or what a fused output projection takes.)
// BIAS  (UP) the value projection's bias; attention's weights add up to one, so it is added once
#include "lib/half.wgsl"
#include "lib/lowest.wgsl"

struct Step {
    splits: u32, // at most SPLITS
    at: u32,     // the block's first token in out
    stride: u32, // numbers from one token to the next in out
}
var<immediate> step: Step;

struct Head {
    sums: u32,  // vector of sums at which the head begins
    width: u32, // its vectors
    up: u32,    // (UP) vector of up at which its key/value head begins
    kv: u32,    // (UP) that head
}

@group(0) @binding(0) var<storage, read> sums: array<vec4<f32>>;     // [tokens][splits][SUMS / 4]
@group(0) @binding(1) var<storage, read> weights: array<vec2<f32>>;  // [tokens][splits][HEADS]
@group(0) @binding(2) var<storage, read> heads: array<Head>;         // [HEADS]
@group(0) @binding(3) var<storage, read_write> out: array<f32>;      // [tokens][stride]: HEADS · HEAD (UP) or SUMS
#if UP
@group(0) @binding(4) var<storage, read> up: array<half4>;           // by key/value head: [HEAD][width]
#if BIAS
@group(0) @binding(5) var<storage, read> bias: array<f32>;           // [key/value heads][HEAD]
#endif
#endif

const SLAB = 256u; // vectors of u held at a time
var<workgroup> share: array<f32, SPLITS>;
var<workgroup> u: array<vec4<f32>, SLAB>;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let head = heads[id.x];
    let splits = id.y * step.splits;
    var largest = LOWEST;
    for (var s = 0u; s < step.splits; s++) {
        largest = max(largest, weights[(splits + s) * HEADS + id.x].x);
    }
    var total = 0.0;
    for (var s = 0u; s < step.splits; s++) {
        let w = weights[(splits + s) * HEADS + id.x];
        total += exp(w.x - largest) * w.y;
    }
    for (var s = local; s < step.splits; s += WORKGROUP) {
        share[s] = exp(weights[(splits + s) * HEADS + id.x].x - largest) / total;
    }
    let base = (step.at + id.y) * step.stride;
#if UP
    var result: array<f32, OUTPUTS>;
#endif
    for (var slab = 0u; slab < head.width; slab += SLAB) {
        workgroupBarrier();
        let vectors = min(SLAB, head.width - slab);
        for (var i = local; i < vectors; i += WORKGROUP) {
            var v = vec4<f32>();
            for (var s = 0u; s < step.splits; s++) {
                v += share[s] * sums[(splits + s) * (SUMS / 4u) + head.sums + slab + i];
            }
            u[i] = v;
        }
        workgroupBarrier();
#if UP
        for (var o = 0u; o < OUTPUTS; o++) {
            let c = local + o * WORKGROUP;
            if c < HEAD {
                for (var i = 0u; i < vectors; i++) {
                    result[o] = dot_add(widen(up[head.up + c * head.width + slab + i]), u[i], result[o]);
                }
            }
        }
#else
        for (var i = local; i < vectors; i += WORKGROUP) {
            for (var j = 0u; j < 4u; j++) {
                out[base + 4u * (head.sums + slab + i) + j] = u[i][j];
            }
        }
#endif
    }
#if UP
    for (var o = 0u; o < OUTPUTS; o++) {
        let c = local + o * WORKGROUP;
        if c < HEAD {
#if BIAS
            out[base + id.x * HEAD + c] = result[o] + bias[head.kv * HEAD + c];
#else
            out[base + id.x * HEAD + c] = result[o];
#endif
        }
    }
#endif
}
