// Landmarks of coded tokens (src/kv/select/mod.rs): the mean of a chunk's keys after RoPE, packed
// in four bits as src/kv/format.rs lays them out, a row for each key/value head.
//
// Grid: x = chunks from `chunk` on, y = key/value heads. Lanes share a key's vectors.
#include "lib/half.wgsl"
#include "lib/reduce.wgsl"
#include "lib/ring.wgsl"

struct Params {
    chunk: u32,
    first: u32, // the first token that counts, and the one after the last
    end: u32,
    sinks: u32,
    ring: u32,
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> keys: array<half4>;               // [slots][KV_HEADS][PADDED / 4], after RoPE
@group(0) @binding(1) var<storage, read_write> landmarks: array<u32>;      // [chunks][KV_HEADS][1 + WORDS]: step and least number, codes

const VECTORS = (HEAD + 3u) / 4u;
const WORDS = (HEAD + 15u) / 16u * 2u; // of two vectors each
const UNITS = (2u * WORDS + WORKGROUP - 1u) / WORKGROUP;
const LARGEST = 65504.0; // of f16

var<workgroup> codes: array<u32, 2u * WORDS>;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let chunk = params.chunk + group.x;
    let kv = group.y;
    let from_token = max(chunk * CHUNK, params.first);
    let to_token = min((chunk + 1u) * CHUNK, params.end);
    var mean: array<vec4<f32>, UNITS>;
    var low = LARGEST;
    var high = -LARGEST;
    for (var u = 0u; u < UNITS; u++) {
        let i = local + u * WORKGROUP;
        if i < VECTORS {
            for (var token = from_token; token < to_token; token++) {
                mean[u] += widen(keys[(slot(token) * KV_HEADS + kv) * VECTORS + i]);
            }
            mean[u] = clamp(mean[u] / f32(to_token - from_token), vec4<f32>(-LARGEST), vec4<f32>(LARGEST));
            for (var j = 0u; j < min(4u, HEAD - 4u * i); j++) {
                low = min(low, mean[u][j]);
                high = max(high, mean[u][j]);
            }
        }
    }
    low = -workgroup_max(-low, local);
    high = workgroup_max(high, local);
    // As f16 holds them: what codes are read with.
    let least = unpack2x16float(pack2x16float(vec2<f32>(low, 0.0))).x;
    let header = pack2x16float(vec2<f32>(max((high - least) / 15.0, 6.103515625e-5), least));
    let size = unpack2x16float(header).x;
    for (var u = 0u; u < UNITS; u++) {
        let i = local + u * WORKGROUP;
        if i < 2u * WORDS {
            var bits = 0u;
            for (var j = 0u; j < 4u; j++) {
                if 4u * i + j < HEAD {
                    bits |= u32(clamp(round((mean[u][j] - least) / size), 0.0, 15.0)) << (4u * j);
                }
            }
            codes[i] = bits;
        }
    }
    workgroupBarrier();
    let row = (chunk * KV_HEADS + kv) * (1u + WORDS);
    if local == 0u {
        landmarks[row] = header;
    }
    for (var w = local; w < WORDS; w += WORKGROUP) {
        landmarks[row + 1u + w] = codes[2u * w] | (codes[2u * w + 1u] << 16u);
    }
}
