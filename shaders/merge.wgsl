// Joins the splits of one attention: with M the largest m, u = Σ_s e^(m_s − M) · sums_s / Σ_s e^(m_s − M) · Σp_s, per query head and token.
//
// Grid: x = query heads, y = tokens.
//
// CODED     the splits after the first `exact` have summed coordinates: with w the part of the weights that falls to them, out = Σ exact + B·(Σ coded) + w · μ
#include "lib/half.wgsl"
#include "lib/lowest.wgsl"

struct Step {
    splits: u32, // at most SPLITS
    exact: u32,  // those of exact values
    at: u32,     // the block's first token in out
    stride: u32, // numbers from one token to the next in out
    sums: u32,   // vectors of sums in a split
}
var<immediate> step: Step;

@group(0) @binding(0) var<storage, read> sums: array<vec4<f32>>;     // [tokens][splits][sums]: exact ones [HEADS][PADDED / 4]
@group(0) @binding(1) var<storage, read> weights: array<vec2<f32>>;  // [tokens][splits][HEADS]
@group(0) @binding(2) var<storage, read_write> out: array<f32>;      // [tokens][stride]: [HEADS][PADDED]
#if CODED
struct Head {
    sums: u32,  // vector of coded sums at which the head begins
    width: u32, // its vectors
    up: u32,    // vector of up at which its key/value head begins
    mean: u32,  // and in mean
}
@group(0) @binding(3) var<storage, read> heads: array<Head>;         // [HEADS]
@group(0) @binding(4) var<storage, read> up: array<half4>;           // by key/value head: [width][HEAD]
@group(0) @binding(5) var<storage, read> means: array<f32>;          // [key/value heads][HEAD]
#endif

const PADDED = (HEAD + 3u) / 4u * 4u;
var<workgroup> share: array<f32, SPLITS>;
#if CODED
const SLAB = 256u; // vectors of u held at a time
var<workgroup> u: array<vec4<f32>, SLAB>;
var<workgroup> whole: array<vec4<f32>, PADDED / 4u>;
#endif

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let splits = id.y * step.splits;
    var largest = LOWEST;
    for (var s = 0u; s < step.splits; s++) {
        largest = max(largest, weights[(splits + s) * HEADS + id.x].x);
    }
    var total = 0.0;
    var coded = 0.0;
    for (var s = 0u; s < step.splits; s++) {
        let w = weights[(splits + s) * HEADS + id.x];
        let part = exp(w.x - largest) * w.y;
        total += part;
        coded += select(0.0, part, s >= step.exact);
    }
    for (var s = local; s < step.splits; s += WORKGROUP) {
        share[s] = exp(weights[(splits + s) * HEADS + id.x].x - largest) / total;
    }
    let base = (step.at + id.y) * step.stride + id.x * PADDED;
    workgroupBarrier();
    for (var i = local; i < PADDED / 4u; i += WORKGROUP) {
        var v = vec4<f32>();
        for (var s = 0u; s < step.exact; s++) {
            v += share[s] * sums[(splits + s) * step.sums + id.x * (PADDED / 4u) + i];
        }
#if CODED
        whole[i] = v;
#else
        for (var j = 0u; j < 4u; j++) {
            out[base + 4u * i + j] = v[j];
        }
#endif
    }
#if CODED
    let head = heads[id.x];
    var result: array<f32, OUTPUTS>;
    for (var slab = 0u; slab < head.width; slab += SLAB) {
        workgroupBarrier();
        let vectors = min(SLAB, head.width - slab);
        for (var i = local; i < vectors; i += WORKGROUP) {
            var v = vec4<f32>();
            for (var s = step.exact; s < step.splits; s++) {
                v += share[s] * sums[(splits + s) * step.sums + head.sums + slab + i];
            }
            u[i] = v;
        }
        workgroupBarrier();
        if step.exact < step.splits {
            for (var o = 0u; o < OUTPUTS; o++) {
                let c = local + o * WORKGROUP;
                if c < HEAD {
                    for (var i = 0u; i < vectors; i++) {
                        result[o] = dot_add(widen(up[head.up + (slab + i) * HEAD + c]), u[i], result[o]);
                    }
                }
            }
        }
    }
    for (var o = 0u; o < OUTPUTS; o++) {
        let c = local + o * WORKGROUP;
        if c < HEAD {
            out[base + c] = result[o] + coded / total * means[head.mean + c] + whole[c / 4u][c % 4u];
        }
    }
#endif
}
