// The most likely token: the lowest index of the largest logit, or `count` where a logit is not finite.
//
// Grid: one workgroup. A vocabulary is 50,000 to 150,000 numbers that were just written: reading them once is not worth a second stage.

#include "lib/lowest.wgsl"

struct Step {
    count: u32,
}
var<immediate> step: Step;

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read_write> token: array<u32>; // [1]

var<workgroup> values: array<f32, WORKGROUP>;
var<workgroup> indices: array<u32, WORKGROUP>;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(local_invocation_index) local: u32) {
    var best = LOWEST;
    var index = step.count;
    var bad = false;
    for (var i = local; i < step.count; i += WORKGROUP) {
        // By its bits: compilers may assume that no number is infinite or none at all.
        let finite = (bitcast<u32>(logits[i]) & 0x7f800000u) != 0x7f800000u;
        bad = bad || !finite;
        if finite && logits[i] > best {
            best = logits[i];
            index = i;
        }
    }
    if bad {
        best = -LOWEST;
        index = step.count;
    }
    values[local] = best;
    indices[local] = index;
    for (var width = WORKGROUP / 2u; width > 0u; width /= 2u) {
        workgroupBarrier();
        if local < width {
            let other = values[local + width];
            if other > values[local] || (other == values[local] && indices[local + width] < indices[local]) {
                values[local] = other;
                indices[local] = indices[local + width];
            }
        }
    }
    if local == 0u {
        token[0] = indices[0];
    }
}
