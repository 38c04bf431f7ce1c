// The most likely token: the lowest index of the largest logit, or `count` where a logit is not
// finite, or `count + 1` where `queries` has a record of what did not fit into 16 bits.
//
// Grid: x = lots of `lot` numbers, y = tokens. One lot is all; else each leaves its largest, and
// one workgroup then chooses among these.
//
// LEAVE     there are several lots: each leaves its largest
// CHOOSE    the numbers are what lots have left
// RECORD    there is such a record (prepare.wgsl)

#include "lib/lowest.wgsl"

struct Params {
    count: u32,   // logits
    numbers: u32, // of what is looked at
    lot: u32,
    stride: u32,  // numbers from one token to the next
    record: u32,  // where in `queries` the record is
}
var<immediate> params: Params;

// A logit and its index; the largest of all and `count` where a logit is not finite.
struct Best {
    value: f32,
    index: u32,
}

#if CHOOSE
@group(0) @binding(0) var<storage, read> left: array<Best>;
#else
@group(0) @binding(0) var<storage, read> logits: array<f32>;
#endif
#if LEAVE
@group(0) @binding(1) var<storage, read_write> out: array<Best>; // [tokens][lots]
#else
@group(0) @binding(1) var<storage, read_write> out: array<u32>;  // [tokens]
#endif
#if RECORD
@group(0) @binding(2) var<storage, read> queries: array<f32>;
#endif

const AHEAD = 4u; // numbers that a lane loads before it compares the first

var<workgroup> values: array<f32, WORKGROUP>;
var<workgroup> indices: array<u32, WORKGROUP>;

fn better(a: Best, b: Best) -> bool {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
}

fn look(token: u32, i: u32) -> Best {
#if CHOOSE
    return left[token * params.stride + i];
#else
    // By its bits: compilers may assume that no number is infinite or none at all.
    let logit = logits[token * params.stride + i];
    if (bitcast<u32>(logit) & 0x7f800000u) == 0x7f800000u {
        return Best(-LOWEST, params.count);
    }
    return Best(logit, i);
#endif
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let end = min(params.numbers, (id.x + 1u) * params.lot);
    var best = Best(LOWEST, params.count);
    for (var i = id.x * params.lot + local; i < end; i += WORKGROUP * AHEAD) {
        // Past the last it is looked at again.
        var seen: array<Best, AHEAD>;
        for (var j = 0u; j < AHEAD; j++) {
            seen[j] = look(id.y, min(i + j * WORKGROUP, end - 1u));
        }
        for (var j = 0u; j < AHEAD; j++) {
            if better(seen[j], best) {
                best = seen[j];
            }
        }
    }
    values[local] = best.value;
    indices[local] = best.index;
    for (var width = WORKGROUP / 2u; width > 0u; width /= 2u) {
        workgroupBarrier();
        if local < width {
            let other = Best(values[local + width], indices[local + width]);
            if better(other, Best(values[local], indices[local])) {
                values[local] = other.value;
                indices[local] = other.index;
            }
        }
    }
    if local == 0u {
#if LEAVE
        out[id.y * ((params.numbers + params.lot - 1u) / params.lot) + id.x] = Best(values[0], indices[0]);
#else
        out[id.y] = indices[0];
#if RECORD
        if bitcast<u32>(queries[params.record]) != 0u {
            out[id.y] = params.count + 1u;
        }
#endif
#endif
    }
}
