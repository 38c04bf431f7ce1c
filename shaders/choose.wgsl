// Which chunks of coded keys a token reads (src/rows/selection.rs): the MOST with the highest scores, in their order, OUTLIERS of them for their landmark's sake.
//
// Grid: x = key/value heads. The largest of a head's queries counts, each as the logarithm of its softmax over the chunks.
#include "lib/lowest.wgsl"
#include "lib/nth.wgsl"
#include "lib/reduce.wgsl"

struct Step {
    first: u32,   // the first chunk
    count: u32,   // chunks
    chunks: u32,  // from one line of cosines to the next
    stride: u32,  // from one query head to the next in dots
}
var<immediate> step: Step;

@group(0) @binding(0) var<storage, read_write> dots: array<f32>;    // [KV_HEADS · GROUP][stride]: scores of landmarks; the first line of a key/value head then holds its chunks' scores
@group(0) @binding(1) var<storage, read> cosines: array<f32>;       // [KV_HEADS][chunks]
@group(0) @binding(2) var<storage, read_write> chosen: array<u32>;  // [KV_HEADS][MOST]

// Bits that are ordered as the numbers are.
fn ordered(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

// What chunks of a key/value head are ordered by.
const BY_SCORE = 0u;
const BY_COSINE = 1u;

fn key(kv: u32, chunk: u32, by: u32) -> u32 {
    if by == BY_COSINE {
        return ~ordered(cosines[kv * step.chunks + step.first + chunk]);
    }
    return ordered(dots[kv * GROUP * step.stride + chunk]);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let kv = group.x;
    let lines = kv * GROUP * step.stride;
    if step.count <= MOST {
        for (var c = local; c < step.count; c += WORKGROUP) {
            chosen[kv * MOST + c] = step.first + c;
        }
        return;
    }
    var normaliser: array<f32, GROUP>;
    for (var h = 0u; h < GROUP; h++) {
        var highest = LOWEST;
        for (var c = local; c < step.count; c += WORKGROUP) {
            highest = max(highest, dots[lines + h * step.stride + c]);
        }
        highest = workgroup_max(highest, local);
        var sum = 0.0;
        for (var c = local; c < step.count; c += WORKGROUP) {
            sum += exp(dots[lines + h * step.stride + c] - highest);
        }
        normaliser[h] = highest + log(workgroup_sum(sum, local));
    }
    for (var c = local; c < step.count; c += WORKGROUP) {
        var score = LOWEST;
        for (var h = 0u; h < GROUP; h++) {
            score = max(score, dots[lines + h * step.stride + c] - normaliser[h]);
        }
        dots[lines + c] = score;
    }
    storageBarrier();
    workgroupBarrier();
    // Outliers first: above every score.
    if OUTLIERS > 0u {
        let last = nth(kv, step.count, OUTLIERS, BY_COSINE, local);
        var equal = 0u;
        for (var begin = 0u; begin < step.count; begin += WORKGROUP) {
            let c = begin + local;
            let there = c < step.count;
            let k = select(0u, key(kv, min(c, step.count - 1u), BY_COSINE), there);
            let at = place(there && k == last.x, local);
            if there && (k > last.x || (k == last.x && equal + at.x < last.y)) {
                dots[lines + c] = -LOWEST;
            }
            equal += at.y;
        }
        storageBarrier();
        workgroupBarrier();
    }
    let last = nth(kv, step.count, MOST, BY_SCORE, local);
    var equal = 0u;
    var taken = 0u;
    for (var begin = 0u; begin < step.count; begin += WORKGROUP) {
        let c = begin + local;
        let there = c < step.count;
        let k = select(0u, key(kv, min(c, step.count - 1u), BY_SCORE), there);
        let at = place(there && k == last.x, local);
        let take = there && (k > last.x || (k == last.x && equal + at.x < last.y));
        equal += at.y;
        let to = place(take, local);
        if take {
            chosen[kv * MOST + taken + to.x] = step.first + c;
        }
        taken += to.y;
    }
}
