// From one projection to attention's inputs: bias, QK-norm and RoPE on queries and keys, and the
// append of the new exact rows to the cache.
//
// Grid: x = units of one token, y = tokens. The units are the query heads, then the key heads, then
// blocks of the value row; a block is 4·WORKGROUP numbers. (ABSORBED) Of a query head there are
// SHARES units, each of which makes SHARE coordinates of the absorbed query. Positions are first,
// first + 1, …
//
// BIAS      query, key and value have a bias
// QK_NORM   query and key heads are normalised before RoPE, or (ROTATED) after it; or (WHOLE) all
//           heads of a side together before it
// SCALED    queries are multiplied by what the softmax's scale differs from 1 / √HEAD by
// ABSORBED  coded keys are scored without being rebuilt: their basis is absorbed into the query,
//           q̃ = B·q, and so is what their mean adds to a score, which rotates with the key: q ·
//           R_t μ = Σ cos(tθ)·(q₁μ₁ + q₂μ₂) + sin(tθ)·(q₂μ₁ − q₁μ₂), over the pairs of RoPE in
//           which there is a mean
#include "lib/half.wgsl"
#include "lib/reduce.wgsl"
#include "lib/rope.wgsl"
#include "lib/ring.wgsl"

struct Params {
    first: u32,    // position of the first token
    stride: u32,   // numbers from one token to the next in projected
    queries: u32,  // and in queries
    sinks: u32,
    ring: u32,
    epsilon: f32,  // (QK_NORM)
    record: u32,   // number of queries from which it stands what was too large for 16 bits: the largest, and by layer the largest of keys and of values
    layer: u32,
#if SCALED
    rotating: f32, // what the first `pairs` pairs of a query's head are multiplied by
    still: f32,    // and the others
    pairs: u32,
    beta: f32,     // at position p also by 1 + beta·ln(1 + ⌊p / period⌋)
    period: f32,
#endif
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> projected: array<f32>;          // [tokens][stride]: query heads (PADDED each), key heads, value heads
@group(0) @binding(1) var<storage, read> rope_table: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read_write> queries: array<f32>;      // [tokens][queries]: [QUERY_HEADS][PADDED], padding zero; (ABSORBED) then where table says
@group(0) @binding(3) var<storage, read_write> keys: array<half4>;       // [slots][EXACT_ROW / 4]
@group(0) @binding(4) var<storage, read_write> values: array<half4>;     // [slots][EXACT_ROW / 4]
#if ADDED
@group(0) @binding(5) var<storage, read> added: array<f32>;              // (QK_NORM) gains [2][HEAD] of query and key, (BIAS) then biases as a token in projected
#endif
#if ABSORBED
@group(0) @binding(6) var<storage, read> table: array<vec4<u32>>;        // as in score.wgsl
@group(0) @binding(7) var<storage, read> up: array<half4>;               // by key/value head: [PADDED / 4][rank]
#endif

const HEAD = PAIRS * 2u;
const PADDED = (HEAD + 3u) / 4u * 4u;
const BLOCK = WORKGROUP * 4u;
const QUERY_WIDTH = QUERY_HEADS * PADDED;
const EXACT_ROW = KV_HEADS * PADDED;
const BEYOND = 65520.0;                 // rounds to infinity in 16 bits, or where a driver rounds down, to what it is not
#if WHOLE
const BIASES = QUERY_WIDTH + EXACT_ROW;
#else
#if QK_NORM
const BIASES = 2u * HEAD;
#else
const BIASES = 0u;
#endif
#endif
var<workgroup> head: array<f32, PADDED>;

fn input(token: u32, at: u32) -> f32 {
#if BIAS
    return projected[token * params.stride + at] + added[BIASES + at];
#else
    return projected[token * params.stride + at];
#endif
}

fn input4(token: u32, at: u32) -> vec4<f32> {
    return vec4<f32>(input(token, at), input(token, at + 1u), input(token, at + 2u), input(token, at + 3u));
}

#if QK_NORM
// What number i of the head at a place in the projection is multiplied by.
fn gain(at: u32, side: u32, i: u32) -> f32 {
#if WHOLE
    return added[at + i];
#else
    return added[side * HEAD + i];
#endif
}
#endif

#if SCALED
fn query_scale(position: u32, pair: u32) -> f32 {
    let temperature = 1.0 + params.beta * log(1.0 + floor(f32(position) / params.period));
    return select(params.still, params.rotating, pair < params.pairs) * temperature;
}
#endif

// Loads a head into workgroup memory, normalised and rotated.
fn load_head(token: u32, at: u32, side: u32, local: u32) {
    var scale = 1.0;
#if QK_NORM
    var squares = 0.0;
#if WHOLE
    // Padding is zero.
    let width = select(QUERY_WIDTH, EXACT_ROW, side > 0u);
    for (var i = local; i < width; i += WORKGROUP) {
        squares += input(token, side * QUERY_WIDTH + i) * input(token, side * QUERY_WIDTH + i);
    }
    scale = inverseSqrt(workgroup_sum(squares, local) / f32(width / PADDED * HEAD) + params.epsilon);
#else
    for (var i = local; i < HEAD; i += WORKGROUP) {
        squares += input(token, at + i) * input(token, at + i);
    }
    scale = inverseSqrt(workgroup_sum(squares, local) / f32(HEAD) + params.epsilon);
#endif
#endif
    for (var i = local; i < PAIRS; i += WORKGROUP) {
        var a = input(token, at + i) * scale;
        var b = input(token, at + i + PAIRS) * scale;
#if QK_NORM
#if !ROTATED
        a *= gain(at, side, i);
        b *= gain(at, side, i + PAIRS);
#endif
#endif
        let c = rope(params.first + token, i);
        head[i] = a * c.x - b * c.y;
        head[i + PAIRS] = b * c.x + a * c.y;
#if ROTATED
        head[i] *= gain(at, side, i);
        head[i + PAIRS] *= gain(at, side, i + PAIRS);
#endif
#if SCALED
        if side == 0u {
            head[i] *= query_scale(params.first + token, i);
            head[i + PAIRS] *= query_scale(params.first + token, i);
        }
#endif
    }
    if local < PADDED - HEAD {
        head[HEAD + local] = 0.0;
    }
    workgroupBarrier();
}

fn head4(i: u32) -> vec4<f32> {
    return vec4<f32>(head[4u * i], head[4u * i + 1u], head[4u * i + 2u], head[4u * i + 3u]);
}

#if ABSORBED
// The query in workgroup memory, with the basis of its keys absorbed.
fn absorb(token: u32, query: u32, unit: u32, local: u32) {
    let kv = query / GROUP;
    let info = table[BOOKS + 2u * kv];
    let rank = info.z * 16u;
    let more = table[BOOKS + 2u * kv + 1u];
    let first = more.x;
    let pair_vectors = (more.z + 1u) / 2u; // vectors of two pairs
    let out = token * params.queries + 4u * (info.w + query % GROUP * (rank / 4u + pair_vectors));
    for (var i = unit * SHARE + local; i < min(rank, (unit + 1u) * SHARE); i += WORKGROUP) {
        var sum = 0.0;
        for (var v = 0u; v < PADDED / 4u; v++) {
            sum = dot_add(widen(up[first + v * rank + i]), head4(v), sum);
        }
        queries[out + i] = sum;
    }
    if unit > 0u {
        return;
    }
    for (var i = local; i < 2u * pair_vectors; i += WORKGROUP) {
        var both = vec2<f32>();
        if i < more.z {
            let pair = table[more.y + i / 4u][i % 4u];
            let mean = vec2<f32>(mean_of(kv, pair), mean_of(kv, pair + PAIRS));
            both = vec2<f32>(head[pair] * mean.x + head[pair + PAIRS] * mean.y, head[pair + PAIRS] * mean.x - head[pair] * mean.y);
        }
        queries[out + rank + 2u * i] = both.x;
        queries[out + rank + 2u * i + 1u] = both.y;
    }
}

fn mean_of(kv: u32, i: u32) -> f32 {
    let at = kv * HEAD + i;
    return bitcast<f32>(table[BOOKS + 2u * KV_HEADS + at / 4u][at % 4u]);
}
#endif

// Which of several lanes that find something is the last to write is all the same: each is a reason
// to stop.
fn note(v: vec4<f32>, side: u32) {
    let most = max(max(abs(v.x), abs(v.y)), max(abs(v.z), abs(v.w)));
    if most >= BEYOND {
        let at = params.record + 1u + 2u * params.layer + side;
        queries[params.record] = max(queries[params.record], most);
        queries[at] = max(queries[at], most);
    }
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let token = group.y;
    let at = slot(params.first + token) * EXACT_ROW;
    var unit = group.x;
    if unit < QUERY_HEADS * SHARES {
        let query = unit / SHARES;
        load_head(token, query * PADDED, 0u, local);
        if unit % SHARES == 0u {
            for (var i = local; i < PADDED; i += WORKGROUP) {
                queries[token * params.queries + query * PADDED + i] = head[i];
            }
        }
#if ABSORBED
        absorb(token, query, unit % SHARES, local);
#endif
        return;
    }
    unit -= QUERY_HEADS * SHARES;
    if unit < KV_HEADS {
        load_head(token, QUERY_WIDTH + unit * PADDED, 1u, local);
        for (var i = local; i < PADDED / 4u; i += WORKGROUP) {
            note(head4(i), 0u);
            keys[at / 4u + unit * (PADDED / 4u) + i] = narrow(head4(i));
        }
        return;
    }
    unit -= KV_HEADS;
    let i = unit * BLOCK + local * 4u;
    if i < EXACT_ROW {
        let row = input4(token, QUERY_WIDTH + EXACT_ROW + i);
        note(row, 1u);
        values[(at + i) / 4u] = narrow(row);
    }
}
