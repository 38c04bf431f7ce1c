// How well every cached key answers every query: scores[row][key] = (q · k) / √head_dim, masked where the query may not look.
//
// Grid: x = tiles of TILE keys, y = key/value heads, z = blocks of `span` rows. A row is one query head of one token; those of a key/value head share its tile.
// The tile is brought into workgroup memory once, in f32, and every row of the block is scored against it:
//
// DIRECT    the cache holds the keys themselves, normalised and turned
// REBUILT   it holds latent rows: k = RoPE(QK-norm(z · B + bias), position), TILE × head_dim at a time, never written out. (ReCalKV, Palu, xKV.) A lane
//           owns a pair of RoPE, which it turns in registers.
// QK_NORM   (REBUILT) RMSNorm of the rebuilt key. Its scale is one number per key and commutes with RoPE: it multiplies the score.
// BIAS      (REBUILT) the key projection's bias
// WINDOW    keys `window` or more before the query are masked
#include "lib/half.wgsl"
#include "lib/lowest.wgsl"
#if REBUILT
#include "lib/rope.wgsl"
#endif

struct Step {
    first: u32,   // position of the block's first token
    tokens: u32,  // tokens of the block
    at: u32,      // the block's first token in queries
    start: u32,   // first key scored; column 0
    stride: u32,  // columns of scores
    span: u32,    // rows per workgroup
    window: u32,  // (WINDOW)
    scale: f32,   // 1 / √head_dim
    epsilon: f32, // (QK_NORM)
}
var<immediate> step: Step;

@group(0) @binding(0) var<storage, read> queries: array<vec4<f32>>;     // [tokens][KV_HEADS · GROUP][PADDED / 4], padding zero
@group(0) @binding(1) var<storage, read> keys: array<half4>;            // [capacity][KEY_ROW / 4]
@group(0) @binding(2) var<storage, read_write> scores: array<f32>;      // [tokens][KV_HEADS · GROUP][stride]
#if REBUILT
@group(0) @binding(3) var<storage, read> turns: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read> heads: array<vec4<u32>>;       // [KV_HEADS]: vector at which the row's slice begins, its vectors, vector at which up begins
@group(0) @binding(5) var<storage, read> up: array<half4>;              // by head: [rank / 4][HEAD], transposed for neighbouring lanes
#if BIAS
@group(0) @binding(6) var<storage, read> bias: array<f32>;              // [KV_HEADS][HEAD]
#endif
#if QK_NORM
@group(0) @binding(7) var<storage, read> gain: array<f32>;              // [HEAD]
#endif
#endif

const HEAD = PAIRS * 2u;
const PADDED = (HEAD + 3u) / 4u * 4u;
const TEAMS = WORKGROUP / TILE; // lanes that share a key

var<workgroup> tile: array<f32, PADDED * TILE>; // [PADDED][TILE]

#if REBUILT
const STRETCH = min(8u, TILE); // keys that a lane rebuilds at a time
#if QK_NORM
var<workgroup> squares: array<f32, PAIRS * TILE>; // [PAIRS][TILE]
#endif

// A lane's work is one pair of RoPE for STRETCH keys. Neighbouring lanes have neighbouring pairs: they share the latent vectors and read `up` in a row.
fn rebuild(kv: u32, first_key: u32, keys_end: u32, local: u32) {
    let info = heads[kv];
    for (var unit = local; unit < PAIRS * (TILE / STRETCH); unit += WORKGROUP) {
        let pair = unit % PAIRS;
        let stretch = (unit / PAIRS) * STRETCH;
        var low: array<f32, STRETCH>;
        var high: array<f32, STRETCH>;
        var base: array<u32, STRETCH>;
        for (var t = 0u; t < STRETCH; t++) {
            // Past the last key the last is rebuilt again, and not scored.
            base[t] = min(first_key + stretch + t, keys_end - 1u) * (KEY_ROW / 4u) + info.x;
        }
        for (var v = 0u; v < info.y; v++) {
            let a = widen(up[info.z + v * HEAD + pair]);
            let b = widen(up[info.z + v * HEAD + pair + PAIRS]);
            for (var t = 0u; t < STRETCH; t++) {
                let z = widen(keys[base[t] + v]);
                low[t] = dot_add(z, a, low[t]);
                high[t] = dot_add(z, b, high[t]);
            }
        }
        for (var t = 0u; t < STRETCH; t++) {
            var a = low[t];
            var b = high[t];
#if BIAS
            a += bias[kv * HEAD + pair];
            b += bias[kv * HEAD + pair + PAIRS];
#endif
#if QK_NORM
            squares[pair * TILE + stretch + t] = a * a + b * b;
            a *= gain[pair];
            b *= gain[pair + PAIRS];
#endif
            let c = turn(min(first_key + stretch + t, keys_end - 1u), pair);
            tile[pair * TILE + stretch + t] = a * c.x - b * c.y;
            tile[(pair + PAIRS) * TILE + stretch + t] = b * c.x + a * c.y;
        }
    }
}
#endif

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let kv = group.y;
    let first_key = step.start + group.x * TILE;
    let keys_end = step.first + step.tokens;
#if DIRECT
    for (var i = local; i < TILE * (PADDED / 4u); i += WORKGROUP) {
        let c = i % (PADDED / 4u);
        let t = i / (PADDED / 4u);
        var k = vec4<f32>();
        if first_key + t < keys_end {
            k = widen(keys[(first_key + t) * (KEY_ROW / 4u) + kv * (PADDED / 4u) + c]);
        }
        for (var j = 0u; j < 4u; j++) {
            tile[(4u * c + j) * TILE + t] = k[j];
        }
    }
#else
    rebuild(kv, first_key, keys_end, local);
    for (var i = HEAD * TILE + local; i < PADDED * TILE; i += WORKGROUP) {
        tile[i] = 0.0;
    }
#endif
    workgroupBarrier();

    let t = local % TILE;
    let team = local / TILE;
    let key = first_key + t;
    var scale = step.scale;
#if QK_NORM
    var total = 0.0;
    for (var pair = 0u; pair < PAIRS; pair++) {
        total += squares[pair * TILE + t];
    }
    scale *= inverseSqrt(total / f32(HEAD) + step.epsilon);
#endif
    let rows = step.tokens * GROUP;
    let rows_end = min(rows, (group.z + 1u) * step.span);
    for (var row = group.z * step.span + team * ROWS; row < rows_end; row += TEAMS * ROWS) {
        var sums: array<f32, ROWS>;
        var base: array<u32, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            let q = min(row + r, rows - 1u);
            base[r] = ((step.at + q / GROUP) * KV_HEADS * GROUP + kv * GROUP + q % GROUP) * (PADDED / 4u);
        }
        for (var c = 0u; c < PADDED / 4u; c++) {
            let k = vec4<f32>(tile[4u * c * TILE + t], tile[(4u * c + 1u) * TILE + t], tile[(4u * c + 2u) * TILE + t], tile[(4u * c + 3u) * TILE + t]);
            for (var r = 0u; r < ROWS; r++) {
                sums[r] = dot_add(k, queries[base[r] + c], sums[r]);
            }
        }
        if key < keys_end {
            for (var r = 0u; r < ROWS; r++) {
                let q = row + r;
                if q < rows_end {
                    let position = step.first + q / GROUP;
                    var s = sums[r] * scale;
                    if key > position {
                        s = LOWEST;
                    }
#if WINDOW
                    if key + step.window <= position {
                        s = LOWEST;
                    }
#endif
                    scores[((q / GROUP) * KV_HEADS * GROUP + kv * GROUP + q % GROUP) * step.stride + key - step.start] = s;
                }
            }
        }
    }
}
