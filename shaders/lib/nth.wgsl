// The n-th largest of many keys, found digit by digit, eight bits at a time, by counting; and
// places in a list that lanes append to. Called by all WORKGROUP lanes in uniform control flow.
//
// Wants `fn key(list: u32, i: u32, by: u32) -> u32`: the key of item `i`.

var<workgroup> counts: array<atomic<u32>, 256>;
var<workgroup> digit: vec2<u32>;           // the digit found, and how many are still to be taken within it
var<workgroup> places: array<u32, WORKGROUP>;

// The `wanted`-th largest key, and how many of those equal to it belong to the `wanted` largest.
fn nth(list: u32, count: u32, wanted: u32, by: u32, local: u32) -> vec2<u32> {
    var prefix = 0u;
    var left = wanted;
    for (var shift = 32u; shift > 0u; ) {
        shift -= 8u;
        for (var i = local; i < 256u; i += WORKGROUP) {
            atomicStore(&counts[i], 0u);
        }
        workgroupBarrier();
        for (var c = local; c < count; c += WORKGROUP) {
            let k = key(list, c, by);
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

// The sum of what the lanes before this one have, and of what all have: where each writes in a list
// that all append to.
fn place(own: u32, local: u32) -> vec2<u32> {
    places[local] = own;
    workgroupBarrier();
    for (var width = 1u; width < WORKGROUP; width *= 2u) {
        let before = select(0u, places[max(local, width) - width], local >= width);
        workgroupBarrier();
        places[local] += before;
        workgroupBarrier();
    }
    let result = vec2<u32>(places[local] - own, places[WORKGROUP - 1u]);
    workgroupBarrier();
    return result;
}
