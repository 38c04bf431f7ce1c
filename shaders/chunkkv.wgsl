// Which coded tokens all heads of a layer read (src/kv/select/chunkkv.rs): those of the MOST
// stretches whose pairs receive the most attention in the mean, in their order. Writes the list
// that lib/columns.wgsl reads; where the last stretch is short, of no token.
//
// Grid: one workgroup.
#include "lib/lowest.wgsl"
#include "lib/highest.wgsl"
#include "lib/reduce.wgsl"

struct Params {
    first: u32,   // the first pair
    count: u32,   // pairs
    stride: u32,  // from one query head to the next in dots
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read_write> dots: array<f32>;    // [HEADS][stride]: scores of landmarks; the first line then holds, where each stretch begins, its mean
@group(0) @binding(1) var<storage, read_write> list: array<u32>;    // [MOST · STRETCH · CHUNK]

const NOBODY = 0xffffffffu;

var<workgroup> normaliser: array<f32, HEADS>;

fn key(line: u32, stretch: u32, by: u32) -> u32 {
    return ordered(dots[stretch * STRETCH]);
}

fn take(line: u32, at: u32, stretch: u32) {
    for (var i = 0u; i < STRETCH * CHUNK; i++) {
        let pair = stretch * STRETCH + i / CHUNK;
        list[at * STRETCH * CHUNK + i] = select(NOBODY, (params.first + pair) * CHUNK + i % CHUNK, pair < params.count);
    }
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(local_invocation_index) local: u32) {
    if params.count <= PAIRS {
        for (var i = local; i < params.count * CHUNK; i += WORKGROUP) {
            list[i] = params.first * CHUNK + i;
        }
        return;
    }
    for (var h = 0u; h < HEADS; h++) {
        var highest = LOWEST;
        for (var c = local; c < params.count; c += WORKGROUP) {
            highest = max(highest, dots[h * params.stride + c]);
        }
        highest = workgroup_max(highest, local);
        var sum = 0.0;
        for (var c = local; c < params.count; c += WORKGROUP) {
            sum += exp(dots[h * params.stride + c] - highest);
        }
        sum = workgroup_sum(sum, local);
        if local == 0u {
            normaliser[h] = highest + log(sum);
        }
    }
    workgroupBarrier();
    let stretches = (params.count + STRETCH - 1u) / STRETCH;
    for (var s = local; s < stretches; s += WORKGROUP) {
        let end = min((s + 1u) * STRETCH, params.count);
        var sum = 0.0;
        for (var c = s * STRETCH; c < end; c++) {
            for (var h = 0u; h < HEADS; h++) {
                sum += exp(dots[h * params.stride + c] - normaliser[h]);
            }
        }
        dots[s * STRETCH] = sum / f32(end - s * STRETCH);
    }
    storageBarrier();
    workgroupBarrier();
    take_highest(0u, stretches, MOST, local);
}
