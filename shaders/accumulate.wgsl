// Attention that a block's queries give, added up over all of them and their heads, to what
// competes for a slot (src/kv/reviver.rs): exact rows, candidates, buckets. What was given
// HALF_LIFE tokens ago counts half.
//
// Grid: x = lots of WORKGROUP receivers, exact columns first. Every lot weighs each line of scores
// once, WORKGROUP lines at a time.
#include "lib/lowest.wgsl"
#include "lib/ring.wgsl"

struct Params {
    first: u32,    // position of the block's first token
    tokens: u32,
    exact: u32,    // columns of exact rows
    held: u32,     // and of candidates behind them; then buckets' in pairs
    buckets: u32,
    fixed: u32,    // columns of sinks
    near: u32,     // the first exact key beside them
    stride: u32,   // columns of scores
    splits: u32,
    sinks: u32,
    ring: u32,
    places: u32,   // word of marks at which candidates begin
    received: u32, // and what exact rows have received
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> scores: array<f32>;         // [tokens][HEADS][stride]
@group(0) @binding(1) var<storage, read> weights: array<vec2<f32>>;  // [tokens][splits][HEADS]: m, Σ p
@group(0) @binding(2) var<storage, read_write> marks: array<u32>;    // as src/kernels/eviction.rs has them

#if HEAD_SINKS
@group(0) @binding(3) var<storage, read> head_sinks: array<f32>;     // [HEADS]: a score that no receiver has
#endif

var<workgroup> norms: array<vec2<f32>, WORKGROUP>; // of a line: its largest score, and what a weight is to be multiplied by

fn weight(line: u32, column: u32, norm: vec2<f32>) -> f32 {
    return exp(scores[line * params.stride + column] - norm.x) * norm.y;
}

fn fade(tokens: u32) -> f32 {
    return exp2(-f32(tokens) / f32(HALF_LIFE));
}

fn add(word: u32, mass: f32) {
    marks[word] = bitcast<u32>(fma(bitcast<f32>(marks[word]), fade(params.tokens), mass));
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let receiver = group.x * WORKGROUP + local;
    let own = params.exact + params.held;
    let there = receiver < own + params.buckets;
    let is_bucket = receiver >= own;
    let column = select(receiver, own + 2u * (receiver - own), is_bucket);
    let lines = params.tokens * HEADS;
    var mass = 0.0;
    for (var begin = 0u; begin < lines; begin += WORKGROUP) {
        let line = begin + local;
        if line < lines {
            let at = line / HEADS * params.splits * HEADS + line % HEADS;
            var largest = LOWEST;
            for (var s = 0u; s < params.splits; s++) {
                largest = max(largest, weights[at + s * HEADS].x);
            }
            var total = 0.0;
#if HEAD_SINKS
            largest = max(largest, head_sinks[line % HEADS]);
            total = exp(head_sinks[line % HEADS] - largest);
#endif
            for (var s = 0u; s < params.splits; s++) {
                let w = weights[at + s * HEADS];
                total += exp(w.x - largest) * w.y;
            }
            norms[local] = vec2<f32>(largest, fade(params.tokens - 1u - line / HEADS) / total);
        }
        workgroupBarrier();
        if there {
            for (var i = 0u; i < min(WORKGROUP, lines - begin); i++) {
                mass += weight(begin + i, column, norms[i]);
                if is_bucket {
                    mass += weight(begin + i, column + 1u, norms[i]);
                }
            }
        }
        workgroupBarrier();
    }
    if !there {
        return;
    }
    if is_bucket {
        add(4u * (receiver - own) + 3u, mass);
    } else if receiver >= params.exact {
        add(params.places + 2u * (receiver - params.exact) + 1u, mass);
    } else {
        let key = select(params.near + column - params.fixed, column, column < params.fixed);
        let word = params.received + slot(key);
        if key >= params.first {
            // A row of the block's own: what was counted here was another's.
            marks[word] = bitcast<u32>(mass);
        } else {
            add(word, mass);
        }
    }
}
