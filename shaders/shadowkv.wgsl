// Which coded tokens a token reads (src/kv/select/shadowkv.rs): those of the MOST chunks with the
// highest scores, in their order. Writes the list that lib/columns.wgsl reads.
//
// Grid: x = key/value heads. The largest of a head's queries counts, each as the logarithm of its
// softmax over the chunks.
#include "lib/lowest.wgsl"
#include "lib/highest.wgsl"
#include "lib/reduce.wgsl"

struct Params {
    first: u32,   // the first chunk
    count: u32,   // chunks
    stride: u32,  // from one query head to the next in dots
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read_write> dots: array<f32>;    // [KV_HEADS · GROUP][stride]: scores of landmarks; the first line of a key/value head then holds its chunks' scores
@group(0) @binding(1) var<storage, read_write> list: array<u32>;    // [KV_HEADS][MOST · CHUNK]

// The tokens of a chunk as the `at`-th of a key/value head's.
fn take(kv: u32, at: u32, chunk: u32) {
    for (var i = 0u; i < CHUNK; i++) {
        list[(kv * MOST + at) * CHUNK + i] = (params.first + chunk) * CHUNK + i;
    }
}

fn key(kv: u32, chunk: u32, by: u32) -> u32 {
    return ordered(dots[kv * GROUP * params.stride + chunk]);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let kv = group.x;
    let lines = kv * GROUP * params.stride;
    if params.count <= MOST {
        for (var c = local; c < params.count; c += WORKGROUP) {
            take(kv, c, c);
        }
        return;
    }
    var normaliser: array<f32, GROUP>;
    for (var h = 0u; h < GROUP; h++) {
        var highest = LOWEST;
        for (var c = local; c < params.count; c += WORKGROUP) {
            highest = max(highest, dots[lines + h * params.stride + c]);
        }
        highest = workgroup_max(highest, local);
        var sum = 0.0;
        for (var c = local; c < params.count; c += WORKGROUP) {
            sum += exp(dots[lines + h * params.stride + c] - highest);
        }
        normaliser[h] = highest + log(workgroup_sum(sum, local));
    }
    for (var c = local; c < params.count; c += WORKGROUP) {
        var score = LOWEST;
        for (var h = 0u; h < GROUP; h++) {
            score = max(score, dots[lines + h * params.stride + c] - normaliser[h]);
        }
        dots[lines + c] = score;
    }
    storageBarrier();
    workgroupBarrier();
    take_highest(kv, params.count, MOST, local);
}
