// The highest of many items, listed in their order. Called by all WORKGROUP lanes in uniform
// control flow.
//
// Wants what lib/nth.wgsl does, and `fn take(line: u32, at: u32, item: u32)`, which makes an item
// the `at`-th of a list.
#include "lib/nth.wgsl"

// Bits that are ordered as the numbers are.
fn ordered(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

// The `most` highest of `count`.
fn take_highest(line: u32, count: u32, most: u32, local: u32) {
    let last = nth(line, count, most, 0u, local);
    // A lane lists a stretch of items: two sums over the lanes say where, whatever their number.
    let stretch = (count + WORKGROUP - 1u) / WORKGROUP;
    let begin = min(local * stretch, count);
    let end = min(begin + stretch, count);
    var above = 0u;
    var equal = 0u;
    for (var i = begin; i < end; i++) {
        let k = key(line, i, 0u);
        above += u32(k > last.x);
        equal += u32(k == last.x);
    }
    // Among equals the first are taken.
    let before = min(place(equal, local).x, last.y);
    equal = min(equal, last.y - before);
    var to = place(above + equal, local).x;
    for (var i = begin; i < end; i++) {
        let k = key(line, i, 0u);
        if k > last.x || (k == last.x && equal > 0u) {
            take(line, to, i);
            to++;
            equal -= u32(k == last.x);
        }
    }
}
