// From one projection to attention's inputs: bias, QK-norm and RoPE on queries and keys, and the append of the new rows to the cache.
//
// Grid: x = units of one token, y = tokens. The units are the query heads, then the key heads (direct keys) or blocks of the key row (rebuilt keys: latent rows are
// stored before RoPE and as they are), then blocks of the value row; a block is 4·WORKGROUP numbers. Positions are first, first + 1, …
//
// DIRECT    keys are whole heads: normalised, turned, then stored
// BIAS      query, key and value have a bias (a latent row's is added when it is rebuilt or summed)
// QK_NORM   query and key heads are normalised before RoPE
#include "lib/half.wgsl"
#include "lib/reduce.wgsl"
#include "lib/rope.wgsl"

struct Step {
    first: u32,    // position of the first token
    stride: u32,   // numbers from one token to the next in projected
    epsilon: f32,  // (QK_NORM)
}
var<immediate> step: Step;

@group(0) @binding(0) var<storage, read> projected: array<f32>;          // [tokens][stride]: query heads (PADDED each), key row, value row
@group(0) @binding(1) var<storage, read> turns: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read_write> queries: array<f32>;      // [tokens][QUERY_HEADS][PADDED], padding zero
@group(0) @binding(3) var<storage, read_write> keys: array<half4>;       // [capacity][KEY_ROW / 4]
@group(0) @binding(4) var<storage, read_write> values: array<half4>;     // [capacity][VALUE_ROW / 4]
#if BIAS
@group(0) @binding(5) var<storage, read> bias: array<f32>;               // as a token in projected
#endif
#if QK_NORM
@group(0) @binding(6) var<storage, read> gains: array<f32>;              // [2][HEAD]: query, key
#endif

const HEAD = PAIRS * 2u;
const PADDED = (HEAD + 3u) / 4u * 4u;
const BLOCK = WORKGROUP * 4u;
const QUERY_WIDTH = QUERY_HEADS * PADDED;
var<workgroup> head: array<f32, PADDED>;

fn input(token: u32, at: u32) -> f32 {
#if BIAS
    return projected[token * step.stride + at] + bias[at];
#else
    return projected[token * step.stride + at];
#endif
}

fn input4(token: u32, at: u32) -> vec4<f32> {
    return vec4<f32>(input(token, at), input(token, at + 1u), input(token, at + 2u), input(token, at + 3u));
}

// Loads a head into workgroup memory, normalised and turned.
fn load_head(token: u32, at: u32, side: u32, local: u32) {
    var scale = 1.0;
#if QK_NORM
    var squares = 0.0;
    for (var i = local; i < HEAD; i += WORKGROUP) {
        squares += input(token, at + i) * input(token, at + i);
    }
    scale = inverseSqrt(workgroup_sum(squares, local) / f32(HEAD) + step.epsilon);
#endif
    for (var i = local; i < PAIRS; i += WORKGROUP) {
        var a = input(token, at + i) * scale;
        var b = input(token, at + i + PAIRS) * scale;
#if QK_NORM
        a *= gains[side * HEAD + i];
        b *= gains[side * HEAD + i + PAIRS];
#endif
        let c = turn(step.first + token, i);
        head[i] = a * c.x - b * c.y;
        head[i + PAIRS] = b * c.x + a * c.y;
    }
    if local < PADDED - HEAD {
        head[HEAD + local] = 0.0;
    }
    workgroupBarrier();
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let token = group.y;
    let position = step.first + token;
    var unit = group.x;
    if unit < QUERY_HEADS {
        load_head(token, unit * PADDED, 0u, local);
        for (var i = local; i < PADDED; i += WORKGROUP) {
            queries[token * QUERY_WIDTH + unit * PADDED + i] = head[i];
        }
        return;
    }
    unit -= QUERY_HEADS;
    if unit < KEY_UNITS {
#if DIRECT
        load_head(token, QUERY_WIDTH + unit * PADDED, 1u, local);
        for (var i = local; i < PADDED / 4u; i += WORKGROUP) {
            keys[position * (KEY_ROW / 4u) + unit * (PADDED / 4u) + i] = narrow(vec4<f32>(head[4u * i], head[4u * i + 1u], head[4u * i + 2u], head[4u * i + 3u]));
        }
#else
        let i = unit * BLOCK + local * 4u;
        if i < KEY_ROW {
            keys[(position * KEY_ROW + i) / 4u] = narrow(input4(token, QUERY_WIDTH + i));
        }
#endif
        return;
    }
    unit -= KEY_UNITS;
    let i = unit * BLOCK + local * 4u;
    if i < VALUE_ROW {
        values[(position * VALUE_ROW + i) / 4u] = narrow(input4(token, QUERY_WIDTH + KEY_ROW + i));
    }
}
