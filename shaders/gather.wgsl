// What rows are coded from: one layer's part of y − μ, from exact keys and values.
//
// Grid: x = the row's key heads, then its value heads; y = tokens, at positions first, first + 1, …
#include "lib/half.wgsl"
#include "lib/rope.wgsl"
#include "lib/ring.wgsl"

struct Params {
    first: u32,  // position of the first token
    sinks: u32,
    ring: u32,
    head: u32,   // the row's first key/value head
    keys: u32,   // its key heads, or 0
    pre_rope: u32, // whether keys are wanted as they were before RoPE; else their mean rotates with them
    at: u32,     // where the layer begins in y: keys, then values
    width: u32,  // of y
    stride: u32, // numbers from one token to the next in out
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> keys: array<half4>;     // [slots][EXACT_ROW / 4], after RoPE
@group(0) @binding(1) var<storage, read> values: array<half4>;   // [slots][EXACT_ROW / 4]
@group(0) @binding(2) var<storage, read> rope_table: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read> mean: array<f32>;       // [width]
@group(0) @binding(4) var<storage, read_write> out: array<f32>;  // [tokens][stride], padding zero

const HEAD = PAIRS * 2u;
const PADDED = (HEAD + 3u) / 4u * 4u;

fn key(at: u32, i: u32) -> f32 {
    return widen(keys[(at + i) / 4u])[i % 4u];
}

fn value(at: u32, i: u32) -> f32 {
    return widen(values[(at + i) / 4u])[i % 4u];
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let position = params.first + group.y;
    let is_key = group.x < params.keys;
    let head = params.head + select(group.x - params.keys, group.x, is_key);
    let row = slot(position) * EXACT_ROW + head * PADDED;
    let at = params.at + group.x * HEAD;
    let base = group.y * params.stride;
    for (var i = local; i < PAIRS; i += WORKGROUP) {
        var a: f32;
        var b: f32;
        if is_key {
            a = key(row, i);
            b = key(row, i + PAIRS);
            if params.pre_rope != 0u {
                let c = rope(position, i);
                let rotated = vec2<f32>(a, b);
                a = rotated.x * c.x + rotated.y * c.y;
                b = rotated.y * c.x - rotated.x * c.y;
            }
        } else {
            a = value(row, i);
            b = value(row, i + PAIRS);
        }
        var about = vec2<f32>(mean[at + i], mean[at + i + PAIRS]);
        if is_key && params.pre_rope == 0u {
            let c = rope(position, i);
            about = vec2<f32>(about.x * c.x - about.y * c.y, about.y * c.x + about.x * c.y);
        }
        out[base + at + i] = a - about.x;
        out[base + at + i + PAIRS] = b - about.y;
    }
    if group.x == 0u && local < params.stride - params.width {
        out[base + params.width + local] = 0.0;
    }
}
