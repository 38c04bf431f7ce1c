// How well the landmark of every chunk answers a token's queries: dots[head][chunk] = (q ·
// landmark) / √head_dim (src/kv/select/mod.rs).
//
// Grid: x = tiles of WORKGROUP chunks, a lane each; y = key/value heads.
struct Params {
    first: u32,  // the first chunk
    count: u32,  // chunks
    stride: u32, // from one query head to the next in dots
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> queries: array<vec4<f32>>;   // [KV_HEADS · GROUP][PADDED / 4], padding zero
@group(0) @binding(1) var<storage, read> landmarks: array<u32>;       // [chunks][KV_HEADS][1 + WORDS], as landmark.wgsl packs them
@group(0) @binding(2) var<storage, read_write> dots: array<f32>;      // [KV_HEADS · GROUP][stride]

const VECTORS = (HEAD + 3u) / 4u;
const WORDS = (HEAD + 15u) / 16u * 2u;
const SCALE = 1.0 / sqrt(f32(HEAD));

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let kv = id.y;
    if id.x >= params.count {
        return;
    }
    let row = ((params.first + id.x) * KV_HEADS + kv) * (1u + WORDS);
    let header = unpack2x16float(landmarks[row]);
    var sums: array<f32, GROUP>;
    for (var v = 0u; v < VECTORS; v++) {
        let word = landmarks[row + 1u + v / 2u] >> (16u * (v % 2u));
        let codes = (vec4<u32>(word) >> vec4<u32>(0u, 4u, 8u, 12u)) & vec4<u32>(15u);
        let landmark = header.y + header.x * vec4<f32>(codes);
        for (var h = 0u; h < GROUP; h++) {
            sums[h] += dot(landmark, queries[(kv * GROUP + h) * VECTORS + v]);
        }
    }
    for (var h = 0u; h < GROUP; h++) {
        dots[(kv * GROUP + h) * params.stride + id.x] = sums[h] * SCALE;
    }
}
