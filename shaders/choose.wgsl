// Which chunks of coded keys a token reads (src/rows/selection.rs): the MOST with the highest scores, in their order, OUTLIERS of them for their landmark's sake.
//
// Grid: x = key/value heads. The largest of a head's queries counts, each as the logarithm of its softmax over the chunks. The n-th largest is found digit by digit, eight bits at a
// time, by counting.
#include "lib/lowest.wgsl"
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

var<workgroup> counts: array<atomic<u32>, 256>;
var<workgroup> digit: vec2<u32>;           // the digit found, and how many are still to be taken within it
var<workgroup> places: array<u32, WORKGROUP>;

// Bits that are ordered as the numbers are.
fn ordered(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

fn key(kv: u32, chunk: u32, of_cosines: bool) -> u32 {
    if of_cosines {
        return ~ordered(cosines[kv * step.chunks + step.first + chunk]);
    }
    return ordered(dots[kv * GROUP * step.stride + chunk]);
}

// The `wanted`-th largest key, and how many of those equal to it belong to the `wanted` largest.
fn nth(kv: u32, wanted: u32, of_cosines: bool, local: u32) -> vec2<u32> {
    var prefix = 0u;
    var left = wanted;
    for (var shift = 32u; shift > 0u; ) {
        shift -= 8u;
        for (var i = local; i < 256u; i += WORKGROUP) {
            atomicStore(&counts[i], 0u);
        }
        workgroupBarrier();
        for (var c = local; c < step.count; c += WORKGROUP) {
            let k = key(kv, c, of_cosines);
            // Shifts by 32 are undefined.
            if shift == 24u || (k >> (shift + 8u)) == (prefix >> (shift + 8u)) {
                atomicAdd(&counts[(k >> shift) & 255u], 1u);
            }
        }
        workgroupBarrier();
        if local == 0u {
            var rest = left;
            var d = 255u;
            while atomicLoad(&counts[d]) < rest {
                rest -= atomicLoad(&counts[d]);
                d--;
            }
            digit = vec2<u32>(d, rest);
        }
        workgroupBarrier();
        prefix |= digit.x << shift;
        left = digit.y;
        workgroupBarrier();
    }
    return vec2<u32>(prefix, left);
}

// How many lanes before this one are `on`, and how many in all.
fn place(on: bool, local: u32) -> vec2<u32> {
    places[local] = u32(on);
    workgroupBarrier();
    for (var width = 1u; width < WORKGROUP; width *= 2u) {
        let before = select(0u, places[max(local, width) - width], local >= width);
        workgroupBarrier();
        places[local] += before;
        workgroupBarrier();
    }
    let result = vec2<u32>(places[local] - u32(on), places[WORKGROUP - 1u]);
    workgroupBarrier();
    return result;
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
        let last = nth(kv, OUTLIERS, true, local);
        var equal = 0u;
        for (var begin = 0u; begin < step.count; begin += WORKGROUP) {
            let c = begin + local;
            let there = c < step.count;
            let k = select(0u, key(kv, min(c, step.count - 1u), true), there);
            let at = place(there && k == last.x, local);
            if there && (k > last.x || (k == last.x && equal + at.x < last.y)) {
                dots[lines + c] = -LOWEST;
            }
            equal += at.y;
        }
        storageBarrier();
        workgroupBarrier();
    }
    let last = nth(kv, MOST, false, local);
    var equal = 0u;
    var taken = 0u;
    for (var begin = 0u; begin < step.count; begin += WORKGROUP) {
        let c = begin + local;
        let there = c < step.count;
        let k = select(0u, key(kv, min(c, step.count - 1u), false), there);
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
