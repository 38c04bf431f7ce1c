// Joins the splits of one attention: with M the largest m, u = Σ_s e^(m_s − M) · sums_s / Σ_s
// e^(m_s − M) · Σp_s, per query head and token.
//
// Grid: x = query heads, y = tokens.
//
// CODED     the splits after the first `exact` have summed coordinates: with w the part of the
//           weights that falls to them, out = Σ exact + B·(Σ coded) + w · μ
// HEAD_SINKS  every head has a score whose value is zero
#include "lib/half.wgsl"
#include "lib/lowest.wgsl"

struct Params {
    splits: u32, // at least one, at most SPLITS
    exact: u32,  // those of exact values
    at: u32,     // the block's first token in out
    stride: u32, // numbers from one token to the next in out
    sums: u32,   // vectors of sums in a split
}
var<immediate> params: Params;

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
#if HEAD_SINKS
@group(0) @binding(6) var<storage, read> head_sinks: array<f32>;     // [HEADS]
#endif

const PADDED = (HEAD + 3u) / 4u * 4u;
const LOTS = (SPLITS + WORKGROUP - 1u) / WORKGROUP;

var<workgroup> share: array<f32, SPLITS>;
var<workgroup> parts: array<vec2<f32>, WORKGROUP>;
var<workgroup> joined: array<vec4<f32>, WORKGROUP>;
#if CODED
const COLUMNS = min(HEAD, WORKGROUP);     // lanes along a head
const SLICES = WORKGROUP / COLUMNS;       // lanes that share a number of it
const OUTPUTS = (HEAD + COLUMNS - 1u) / COLUMNS;
var<workgroup> whole: array<vec4<f32>, PADDED / 4u>;
var<workgroup> ends: array<f32, WORKGROUP>;
#endif

// The least power of two that is no less, but at most all lanes.
fn lanes_for(count: u32) -> u32 {
    var lanes = 1u;
    while lanes < min(count, WORKGROUP) {
        lanes *= 2u;
    }
    return lanes;
}

// Up to WORKGROUP vectors from `at` on, weighed and summed over splits `first`, … `end`, into
// `joined`. Lanes share the vectors, and what is over of them the splits; each loads IN_FLIGHT
// before it adds the first.
fn join(at: u32, vectors: u32, first: u32, end: u32, local: u32) {
    let dims = lanes_for(vectors);
    let teams = WORKGROUP / dims;
    let vector = at + min(local % dims, vectors - 1u);
    var sum = vec4<f32>();
    for (var s = first + local / dims; s < end; s += teams * IN_FLIGHT) {
        var v: array<vec4<f32>, IN_FLIGHT>;
        for (var j = 0u; j < IN_FLIGHT; j++) {
            v[j] = sums[min(s + j * teams, end - 1u) * params.sums + vector];
        }
        for (var j = 0u; j < IN_FLIGHT; j++) {
            let i = s + j * teams;
            sum += select(0.0, share[min(i, SPLITS - 1u)], i < end) * v[j];
        }
    }
    workgroupBarrier();
    joined[local] = sum;
    for (var width = WORKGROUP / 2u; width >= dims; width /= 2u) {
        workgroupBarrier();
        if local < width {
            joined[local] += joined[local + width];
        }
    }
    workgroupBarrier();
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let splits = id.y * params.splits;
    let across = lanes_for(params.splits);
    var largest = LOWEST;
    for (var lot = 0u; lot < LOTS; lot++) {
        let s = min(lot * WORKGROUP + local, params.splits - 1u);
        largest = max(largest, weights[(splits + s) * HEADS + id.x].x);
    }
    parts[local].x = largest;
    for (var width = across / 2u; width > 0u; width /= 2u) {
        workgroupBarrier();
        if local < width {
            parts[local].x = max(parts[local].x, parts[local + width].x);
        }
    }
    workgroupBarrier();
    largest = parts[0].x;
#if HEAD_SINKS
    largest = max(largest, head_sinks[id.x]);
#endif
    workgroupBarrier();
    // All weights, and those of coded splits.
    var total = vec2<f32>();
    for (var lot = 0u; lot < LOTS; lot++) {
        let s = lot * WORKGROUP + local;
        if s < params.splits {
            let w = weights[(splits + s) * HEADS + id.x];
            let e = exp(w.x - largest);
            share[s] = e;
            total += e * w.y * vec2<f32>(1.0, select(0.0, 1.0, s >= params.exact));
        }
    }
    parts[local] = total;
    for (var width = across / 2u; width > 0u; width /= 2u) {
        workgroupBarrier();
        if local < width {
            parts[local] += parts[local + width];
        }
    }
    workgroupBarrier();
    total = parts[0];
#if HEAD_SINKS
    total.x += exp(head_sinks[id.x] - largest);
#endif

    let base = (params.at + id.y) * params.stride + id.x * PADDED;
    let begin = splits * params.sums;
    for (var block = 0u; block < PADDED / 4u; block += WORKGROUP) {
        let vectors = min(WORKGROUP, PADDED / 4u - block);
        join(begin + id.x * (PADDED / 4u) + block, vectors, 0u, params.exact, local);
        if local < vectors {
#if CODED
            whole[block + local] = joined[local];
#else
            let v = joined[local] / total.x;
            for (var j = 0u; j < 4u; j++) {
                out[base + 4u * (block + local) + j] = v[j];
            }
#endif
        }
    }
#if CODED
    let head = heads[id.x];
    let column = local % COLUMNS;
    let slice = local / COLUMNS; // lanes that are over have one beyond the last
    var result: array<f32, OUTPUTS>;
    if params.exact < params.splits {
        for (var slab = 0u; slab < head.width; slab += WORKGROUP) {
            let vectors = min(WORKGROUP, head.width - slab);
            join(begin + head.sums + slab, vectors, params.exact, params.splits, local);
            if slice < SLICES {
                for (var o = 0u; o < OUTPUTS; o++) {
                    let c = column + o * COLUMNS;
                    for (var i = slice; i < vectors; i += SLICES * IN_FLIGHT) {
                        var b: array<half4, IN_FLIGHT>;
                        for (var j = 0u; j < IN_FLIGHT; j++) {
                            b[j] = up[head.up + (slab + min(i + j * SLICES, vectors - 1u)) * HEAD + min(c, HEAD - 1u)];
                        }
                        for (var j = 0u; j < IN_FLIGHT; j++) {
                            let at = i + j * SLICES;
                            let u = select(vec4<f32>(), joined[min(at, WORKGROUP - 1u)], at < vectors);
                            result[o] = dot_add(widen(b[j]), u, result[o]);
                        }
                    }
                }
            }
        }
    }
    for (var o = 0u; o < OUTPUTS; o++) {
        workgroupBarrier();
        ends[local] = result[o];
        workgroupBarrier();
        let c = column + o * COLUMNS;
        if slice == 0u && c < HEAD {
            var sum = 0.0;
            for (var a = 0u; a < SLICES; a++) {
                sum += ends[a * COLUMNS + column];
            }
            out[base + c] = (sum + total.y * means[head.mean + c] + whole[c / 4u][c % 4u]) / total.x;
        }
    }
#endif
}
