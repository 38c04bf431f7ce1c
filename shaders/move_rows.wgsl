// Moves rows as evict.wgsl has decided: out of the sketch (src/kv/sketch.rs) those that were alone
// in their bucket, into it those that lose their place, and into the slots those that take one.
//
// Grid: x = lots of WORKGROUP vectors of a key and a value. A lane looks after its vector of all
// rows, so that sums are those of one after the other.
//
// SKETCH    there are buckets
// MEAN      there is a sum of all, and its mean
#include "lib/moves.wgsl"
#include "lib/half.wgsl"

struct Params {
    promoted: u32, // where in the list of moves the tokens that take a slot begin
    stash: u32,    // and where vectors that come out of the sketch wait, four numbers in the place of a move: [promoted][2][EXACT_ROW / 4]
    evicted: u32,  // tokens that are evicted afterwards
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read_write> keys: array<half4>;    // [slots][EXACT_ROW / 4]
@group(0) @binding(1) var<storage, read_write> values: array<half4>;
@group(0) @binding(2) var<storage, read_write> moves: Moves;
#if SKETCH
@group(0) @binding(3) var<storage, read_write> bucket_sums: array<vec4<i32>>;  // as in sketch.wgsl
#endif
#if MEAN
@group(0) @binding(4) var<storage, read_write> totals: array<vec4<u32>>;
#endif

const VECTORS = EXACT_ROW / 4u; // of a key
const ALONE = 0x80000000u;
const UNIT = 65536.0;

fn row(at: u32, v: u32) -> half4 {
    if v < VECTORS {
        return keys[at * VECTORS + v];
    }
    return values[at * VECTORS + v - VECTORS];
}

#if SUMS
fn fixed(x: vec4<f32>) -> vec4<i32> {
    return vec4<i32>(clamp(x, vec4<f32>(-32767.0), vec4<f32>(32767.0)) * UNIT);
}
#endif

#if MEAN
// A sum has 64 bits, in two halves.
fn add_to_total(v: u32, x: vec4<i32>) {
    let low = totals[2u * VECTORS + v];
    let sum = low + bitcast<vec4<u32>>(x);
    let carry = select(vec4<u32>(0u), vec4<u32>(1u), sum < low);
    totals[2u * VECTORS + v] = sum;
    totals[4u * VECTORS + v] += bitcast<vec4<u32>>(x >> vec4<u32>(31u)) + carry;
}

fn mean(v: u32) -> vec4<f32> {
    var low = totals[2u * VECTORS + v];
    var high = totals[4u * VECTORS + v];
    // As a sign and a size: halves of unlike sign would cancel.
    let negative = (high >> vec4<u32>(31u)) == vec4<u32>(1u);
    let borrow = select(vec4<u32>(0u), vec4<u32>(1u), low == vec4<u32>(0u));
    high = select(high, ~high + borrow, negative);
    low = select(low, ~low + vec4<u32>(1u), negative);
    let size = vec4<f32>(high) * 4294967296.0 + vec4<f32>(low);
    return select(size, -size, negative) / UNIT / f32(max(params.evicted, 1u));
}
#endif

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let v = id.x;
    if v >= 2u * VECTORS {
        return;
    }
    let evicted = moves.evicted;
    let promoted = moves.promoted;
#if SKETCH
    for (var j = 0u; j < promoted; j++) {
        let source = moves.list[params.promoted + j].source;
        if source >= ALONE {
            let place = source - ALONE;
            let at = (place / 2u) * (2u * VECTORS) + v;
            let x = bucket_sums[at] * (1 - 2 * i32(place % 2u));
            bucket_sums[at] = vec4<i32>();
            let bits = bitcast<vec4<u32>>(x);
            moves.list[params.stash + j * 2u * VECTORS + v] = Move(bits.x, bits.y, bits.z, bits.w);
#if MEAN
            add_to_total(v, -x);
#endif
        }
    }
#endif
#if SUMS
    for (var j = 0u; j < evicted; j++) {
        let x = fixed(widen(row(moves.list[j].source, v)));
#if SKETCH
        let place = moves.list[j].to;
        bucket_sums[(place / 2u) * (2u * VECTORS) + v] += x * (1 - 2 * i32(place % 2u));
#endif
#if MEAN
        add_to_total(v, x);
#endif
    }
#endif
    for (var j = 0u; j < promoted; j++) {
        let source = moves.list[params.promoted + j].source;
        let to = moves.list[params.promoted + j].to;
        var x: half4;
#if SKETCH
        if source >= ALONE {
            let bits = moves.list[params.stash + j * 2u * VECTORS + v];
            let sum = bitcast<vec4<i32>>(vec4<u32>(bits.source, bits.to, bits.position, bits.mass));
            x = narrow(vec4<f32>(sum) / UNIT);
        } else {
            x = row(source, v);
        }
#else
        x = row(source, v);
#endif
        if v < VECTORS {
            keys[to * VECTORS + v] = x;
        } else {
            values[to * VECTORS + v - VECTORS] = x;
        }
    }
#if MEAN
    totals[v] = bitcast<vec4<u32>>(mean(v));
#endif
}
