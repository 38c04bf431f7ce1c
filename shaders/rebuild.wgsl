// Coded keys as they were: k = RoPE(ẑ·B + μ), in f16, for columns of one key/value head.
//
// Grid: x = tiles of TILE columns, y = key/value heads. A lane owns a pair of RoPE for STRETCH
// keys, UNITS times, and rotates it in registers. Neighbouring lanes have neighbouring pairs: they
// share the coordinates and read `up` in a row.
//
// LISTED    columns are those of a list (lib/columns.wgsl)
#include "lib/half.wgsl"
#include "lib/rows.wgsl"
#include "lib/columns.wgsl"
#include "lib/rope.wgsl"
#include "lib/unpack.wgsl"

struct Params {
    start: u32, // as in lib/columns.wgsl
    coded: u32, // columns
    words: u32, // of a token in rows
    sinks: u32,
    ring: u32,
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> rows: array<u32>;               // [capacity][words]
@group(0) @binding(1) var<storage, read> table: array<vec4<u32>>;        // as in score.wgsl
@group(0) @binding(2) var<storage, read> rope_table: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read> up: array<half4>;               // by head: [rank / 4][HEAD]
@group(0) @binding(4) var<storage, read_write> rebuilt: array<half4>;    // [columns][EXACT_ROW / 4]

const HEAD = PAIRS * 2u;
const PADDED = (HEAD + 3u) / 4u * 4u;
const VECTORS = PADDED / 4u;
const STRETCH = min(8u, TILE); // keys that a lane rebuilds at a time
const UNITS = (PAIRS * (TILE / STRETCH) + WORKGROUP - 1u) / WORKGROUP;
// When all coordinates are used up, a tile of keys after RoPE until they are written in a row.
const ROOM = TILE * VECTORS;

fn mean(i: u32) -> f32 {
    return bitcast<f32>(table[BOOKS + 2u * KV_HEADS + i / 4u][i % 4u]);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let kv = group.y;
    let begin = group.x * TILE;
    let info = table[BOOKS + 2u * kv];
    let up_begin = table[BOOKS + 2u * kv + 1u].x;
    load_book(local);
    var low: array<array<f32, STRETCH>, UNITS>;
    var high: array<array<f32, STRETCH>, UNITS>;
    for (var first = 0u; first < info.z; first += STAGE) {
        unpack_stage(info, first, kv, begin, local);
        let vectors = 4u * min(STAGE, info.z - first);
        for (var u = 0u; u < UNITS; u++) {
            let unit = local + u * WORKGROUP;
            if unit < PAIRS * (TILE / STRETCH) {
                let pair = unit % PAIRS;
                let stretch = (unit / PAIRS) * STRETCH;
                for (var v = 0u; v < vectors; v++) {
                    let at = up_begin + (4u * first + v) * HEAD + pair;
                    let a = widen(up[at]);
                    let b = widen(up[at + PAIRS]);
                    for (var t = 0u; t < STRETCH; t++) {
                        let z = stage[v * ACROSS + stretch + t];
                        low[u][t] = dot_add(z, a, low[u][t]);
                        high[u][t] = dot_add(z, b, high[u][t]);
                    }
                }
            }
        }
    }
    workgroupBarrier();
    for (var u = 0u; u < UNITS; u++) {
        let unit = local + u * WORKGROUP;
        if unit < PAIRS * (TILE / STRETCH) {
            let pair = unit % PAIRS;
            let stretch = (unit / PAIRS) * STRETCH;
            for (var t = 0u; t < STRETCH; t++) {
                let a = low[u][t] + mean(kv * HEAD + pair);
                let b = high[u][t] + mean(kv * HEAD + pair + PAIRS);
                let c = rope(column_row(kv, begin + stretch + t), pair);
                let at = (stretch + t) * VECTORS;
                stage[at + pair / 4u][pair % 4u] = a * c.x - b * c.y;
                stage[at + (pair + PAIRS) / 4u][(pair + PAIRS) % 4u] = b * c.x + a * c.y;
            }
        }
    }
    if HEAD < PADDED {
        for (var t = local; t < TILE; t += WORKGROUP) {
            for (var i = HEAD; i < PADDED; i++) {
                stage[t * VECTORS + i / 4u][i % 4u] = 0.0;
            }
        }
    }
    workgroupBarrier();
    for (var i = local; i < TILE * VECTORS; i += WORKGROUP) {
        let t = i / VECTORS;
        if begin + t < params.coded {
            rebuilt[((begin + t) * KV_HEADS + kv) * VECTORS + i % VECTORS] = narrow(stage[t * VECTORS + i % VECTORS]);
        }
    }
}
