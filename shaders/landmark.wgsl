// Landmarks of coded tokens (src/rows/selection.rs): the mean of a chunk's keys after RoPE, and the least cosine between it and one of them.
//
// Grid: x = chunks from `chunk` on, y = key/value heads. Lanes share a key's numbers.
#include "lib/half.wgsl"
#include "lib/reduce.wgsl"
#include "lib/ring.wgsl"

struct Step {
    chunk: u32,
    first: u32, // the first token that counts, and the one after the last
    end: u32,
    sinks: u32,
    ring: u32,
    chunks: u32, // that there is room for
}
var<immediate> step: Step;

@group(0) @binding(0) var<storage, read> keys: array<half4>;              // [slots][KV_HEADS][PADDED / 4], after RoPE
@group(0) @binding(1) var<storage, read_write> landmarks: array<half4>;   // [chunks][KV_HEADS][PADDED / 4]
@group(0) @binding(2) var<storage, read_write> cosines: array<f32>;       // [KV_HEADS][chunks]

const VECTORS = (HEAD + 3u) / 4u;
const UNITS = (VECTORS + WORKGROUP - 1u) / WORKGROUP;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let chunk = step.chunk + group.x;
    let kv = group.y;
    let from_token = max(chunk * CHUNK, step.first);
    let to_token = min((chunk + 1u) * CHUNK, step.end);
    var mean: array<vec4<f32>, UNITS>;
    for (var token = from_token; token < to_token; token++) {
        for (var u = 0u; u < UNITS; u++) {
            let i = local + u * WORKGROUP;
            if i < VECTORS {
                mean[u] += widen(keys[(slot(token) * KV_HEADS + kv) * VECTORS + i]);
            }
        }
    }
    var squares = 0.0;
    for (var u = 0u; u < UNITS; u++) {
        mean[u] /= f32(to_token - from_token);
        squares += dot(mean[u], mean[u]);
    }
    let length = sqrt(workgroup_sum(squares, local));
    var least = 1e30;
    for (var token = from_token; token < to_token; token++) {
        var product = 0.0;
        var norm = 0.0;
        for (var u = 0u; u < UNITS; u++) {
            let i = local + u * WORKGROUP;
            if i < VECTORS {
                let k = widen(keys[(slot(token) * KV_HEADS + kv) * VECTORS + i]);
                product += dot(k, mean[u]);
                norm += dot(k, k);
            }
        }
        product = workgroup_sum(product, local);
        norm = sqrt(workgroup_sum(norm, local));
        least = min(least, product / max(norm * length, 1.2e-38));
    }
    for (var u = 0u; u < UNITS; u++) {
        let i = local + u * WORKGROUP;
        if i < VECTORS {
            landmarks[(chunk * KV_HEADS + kv) * VECTORS + i] = narrow(mean[u]);
        }
    }
    if local == 0u {
        cosines[kv * step.chunks + chunk] = least;
    }
}
