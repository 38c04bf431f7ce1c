// Which coded tokens a token reads (src/rows/selection.rs): those of the MOST chunks with the highest scores, in their order. Writes the list that lib/columns.wgsl reads.
//
// Grid: x = key/value heads. The largest of a head's queries counts, each as the logarithm of its softmax over the chunks.
#include "lib/lowest.wgsl"
#include "lib/nth.wgsl"
#include "lib/reduce.wgsl"

struct Step {
    first: u32,   // the first chunk
    count: u32,   // chunks
    stride: u32,  // from one query head to the next in dots
}
var<immediate> step: Step;

@group(0) @binding(0) var<storage, read_write> dots: array<f32>;    // [KV_HEADS · GROUP][stride]: scores of landmarks; the first line of a key/value head then holds its chunks' scores
@group(0) @binding(1) var<storage, read_write> list: array<u32>;    // [KV_HEADS][MOST · CHUNK]

// The tokens of a chunk as the `at`-th of a key/value head's.
fn take(kv: u32, at: u32, chunk: u32) {
    for (var i = 0u; i < CHUNK; i++) {
        list[(kv * MOST + at) * CHUNK + i] = chunk * CHUNK + i;
    }
}

// Bits that are ordered as the numbers are.
fn ordered(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

fn key(kv: u32, chunk: u32, by: u32) -> u32 {
    return ordered(dots[kv * GROUP * step.stride + chunk]);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let kv = group.x;
    let lines = kv * GROUP * step.stride;
    if step.count <= MOST {
        for (var c = local; c < step.count; c += WORKGROUP) {
            take(kv, c, step.first + c);
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
    let last = nth(kv, step.count, MOST, 0u, local);
    // A lane lists a stretch of chunks: two sums over the lanes say where, whatever the number of chunks.
    let stretch = (step.count + WORKGROUP - 1u) / WORKGROUP;
    let begin = min(local * stretch, step.count);
    let end = min(begin + stretch, step.count);
    var above = 0u;
    var equal = 0u;
    for (var c = begin; c < end; c++) {
        let k = key(kv, c, 0u);
        above += u32(k > last.x);
        equal += u32(k == last.x);
    }
    // Among equals the first are taken.
    let before = min(place(equal, local).x, last.y);
    equal = min(equal, last.y - before);
    var to = place(above + equal, local).x;
    for (var c = begin; c < end; c++) {
        let k = key(kv, c, 0u);
        if k > last.x || (k == last.x && equal > 0u) {
            take(kv, to, step.first + c);
            to++;
            equal -= u32(k == last.x);
        }
    }
}
