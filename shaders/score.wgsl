// How well every column answers every query: scores[line][column] = (q · k) / √head_dim, masked
// where the query may not look.
//
// Grid: x = tiles of columns, y = key/value heads, z = blocks of lines. A line is one query head of
// one token. Plain columns come first, then coded ones (lib/columns.wgsl); a tile is of either
// kind. Which query reads which keys exactly, and which by their codes, is src/kv/exact.rs.
//
// A tile of TILE keys that are stored in f16 is brought into workgroup memory once, and SPAN lines
// of its key/value head are scored against it.
//
// ABSORBED  coded keys are those after RoPE, and prepare.wgsl has absorbed their basis into the
//           query: q · k = q̃ · ẑ + q · R_t μ, the mean before RoPE rotated to the position t.
//           A lane has KEYS keys, and unpacks their rows run by run for CODED_ROWS lines, whose
//           numbers are the same for all lanes. The first of the key/value heads that share a
//           row does so for all of them
// REBUILT   coded keys have been rebuilt (rebuild.wgsl), in f16
// LISTED    coded columns are those of a list
// CAPPED    a score is capped: lib/mask.wgsl
// COUNTED   the last COUNTED_COLUMNS of the plain columns are rows of their own, each of which
//           stands for several tokens
#include "lib/half.wgsl"
#include "lib/lowest.wgsl"
#include "lib/columns.wgsl"
#include "lib/mask.wgsl"
#if ABSORBED
#include "lib/rows.wgsl"
#include "lib/rope.wgsl"
#endif

struct Params {
    first: u32,   // position of the block's first token
    tokens: u32,  // tokens of the block
    at: u32,      // the block's first token in queries
    stride: u32,  // columns of scores
    queries: u32, // numbers from one token to the next in queries
    near: u32,    // the first exact key beside the sinks
    beside: u32,  // columns of what stands beside
    window: u32,  // keys so far before the query, or farther, are masked
    start: u32,   // the first coded token, or (LISTED) the last
    coded: u32,   // coded columns
    sinks: u32,   // from here on as in exact.rs
    ring: u32,
    recent: u32,
    low: u32,
    high: u32,
    words: u32,   // (ABSORBED) words of a token in rows; (REBUILT) the first coded column's row in rebuilt
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> queries: array<vec4<f32>>;     // [tokens][queries / 4]: [KV_HEADS · GROUP][PADDED / 4], padding zero; then absorbed queries
@group(0) @binding(1) var<storage, read> keys: array<half4>;            // [slots][KV_HEADS][PADDED / 4], after RoPE
@group(0) @binding(2) var<storage, read_write> scores: array<f32>;      // [tokens][KV_HEADS · GROUP][stride]
#if ABSORBED
@group(0) @binding(3) var<storage, read> rows: array<u32>;              // [capacity][words]
// Codebooks; two vectors for each key/value head: (word at which its row begins, first run, runs,
// vector of queries at which its absorbed queries begin), (vector of up, vector at which the pairs
// begin whose mean rotates, how many, how many heads from this one on share its row, 0 where it is
// not the first); means [KV_HEADS][HEAD] in f32; those pairs, four to a vector; runs.
@group(0) @binding(4) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> rope_table: array<vec2<f32>>;
#endif
#if REBUILT
@group(0) @binding(6) var<storage, read> rebuilt: array<half4>;         // [columns][KV_HEADS][PADDED / 4]
#endif
#if COUNTED
@group(0) @binding(7) var<storage, read> counted: array<half4>;         // [COUNTED_COLUMNS][KV_HEADS][PADDED / 4]
@group(0) @binding(8) var<storage, read> counts: array<u32>;            // [COUNTED_COLUMNS]: how many tokens
#endif

const HEAD = PAIRS * 2u;
const PADDED = (HEAD + 3u) / 4u * 4u;
const EXACT_ROW = KV_HEADS * PADDED;
const TEAMS = WORKGROUP / TILE; // lanes that share a key
const SCALE = 1.0 / sqrt(f32(HEAD));
const VECTORS = PADDED / 4u;
// A key's vectors are neighbours, so that lanes that bring them in do not meet in a bank of memory;
// one more between keys, so that lanes that read different keys do not either.
const PITCH = VECTORS + 1u;
const LOADS = (TILE * VECTORS + WORKGROUP - 1u) / WORKGROUP; // vectors of a tile that a lane brings in

var<workgroup> tile: array<half4, TILE * PITCH>; // [TILE][PITCH]

// A vector of the key of a column of either kind, which is stored.
fn stored_key(plain: Plain, coded: bool, column: u32, vector: u32) -> half4 {
#if REBUILT
    if coded {
        return rebuilt[(params.words + column) * (EXACT_ROW / 4u) + vector];
    }
#endif
#if COUNTED
    if column >= plain.exact + params.beside - COUNTED_COLUMNS {
        return counted[(column + COUNTED_COLUMNS - plain.exact - params.beside) * (EXACT_ROW / 4u) + vector];
    }
#endif
    return keys[plain_slot(plain, column) * (EXACT_ROW / 4u) + vector];
}

#if ABSORBED
fn rotate_both(position: u32, pairs: vec2<u32>) -> vec4<f32> {
    return vec4<f32>(rope_by_pair(position, pairs.x), rope_by_pair(position, pairs.y));
}

// Scores KEYS coded columns for each lane, of those that begin with `begin`.
fn score_rows(kv: u32, begin: u32, z: u32, columns: u32, local: u32) {
    let info = table[BOOKS + 2u * kv];
    let more = table[BOOKS + 2u * kv + 1u];
    let of_token = select(more.w, 1u, APART) * GROUP;
    let lines = params.tokens * of_token;
    let first_line = z * CODED_ROWS;
    if first_line >= lines {
        return; // the whole workgroup
    }
    if TOGETHER {
        load_book(local);
        workgroupBarrier();
    }
    let pair_vectors = (more.z + 1u) / 2u; // vectors of two pairs
    var row: array<u32, KEYS>;
    var row_scales: array<u32, KEYS>;
    var words: array<Fetched, KEYS>;
    var sums: array<array<f32, CODED_ROWS>, KEYS>;
    var base: array<u32, CODED_ROWS>;
    for (var r = 0u; r < CODED_ROWS; r++) {
        let q = min(first_line + r, lines - 1u);
        base[r] = (params.at + q / of_token) * (params.queries / 4u) + info.w + q % of_token * (4u * info.z + pair_vectors);
    }
    // The words of a run whose codes are chosen together are read while the one before is used.
    var run = table[info.y];
    for (var j = 0u; j < KEYS; j++) {
        row[j] = coded_row(kv, min(begin + local + j * WORKGROUP, params.coded - 1u));
        row_scales[j] = scales(row[j], info.x);
        if together(run) {
            words[j] = fetch(row[j], info.x, run, 0u);
        }
    }
    for (var i = 0u; i < info.z; i++) {
        let this_run = run;
        var these = words;
        run = table[info.y + min(i + 1u, info.z - 1u)];
        if together(run) {
            for (var j = 0u; j < KEYS; j++) {
                words[j] = fetch(row[j], info.x, run, 0u);
            }
        }
        for (var quarter = 0u; quarter < quarters(); quarter++) {
            var coordinates: array<vec4<f32>, KEYS>;
            for (var j = 0u; j < KEYS; j++) {
                if !together(this_run) {
                    these[j] = fetch(row[j], info.x, this_run, quarter);
                }
                coordinates[j] = decode(these[j], row_scales[j], this_run, quarter);
            }
            for (var r = 0u; r < CODED_ROWS; r++) {
                let q = queries[base[r] + 4u * i + quarter];
                for (var j = 0u; j < KEYS; j++) {
                    sums[j][r] = dot_add(coordinates[j], q, sums[j][r]);
                }
            }
        }
    }
    for (var v = 0u; v < pair_vectors; v++) {
        let pairs = vec2<u32>(table[more.y + v / 2u][2u * (v % 2u)], table[more.y + v / 2u][2u * (v % 2u) + 1u]);
        var rotations: array<vec4<f32>, KEYS>;
        rotations[0] = rotate_both(row[0], pairs);
        for (var j = 1u; j < KEYS; j++) {
#if LISTED
            rotations[j] = rotate_both(row[j], pairs);
#else
            // So many positions on.
            rotations[j] = vec4<f32>(add_angles(rotations[j - 1u].xy, multiple(WORKGROUP, pairs.x)), add_angles(rotations[j - 1u].zw, multiple(WORKGROUP, pairs.y)));
#endif
        }
        for (var r = 0u; r < CODED_ROWS; r++) {
            let q = queries[base[r] + 4u * info.z + v];
            for (var j = 0u; j < KEYS; j++) {
                sums[j][r] = dot_add(rotations[j], q, sums[j][r]);
            }
        }
    }
    for (var j = 0u; j < KEYS; j++) {
        let column = begin + local + j * WORKGROUP;
        if column < params.coded {
            let key = coded_token(kv, column);
            for (var r = 0u; r < CODED_ROWS; r++) {
                let q = first_line + r;
                if q < lines {
                    let seen = reads(params.first + q / of_token, key, true);
                    let line = q / of_token * KV_HEADS * GROUP + kv * GROUP + q % of_token;
#if CAPPED
                    scores[line * params.stride + columns + column] = select(LOWEST, soft_cap(sums[j][r] * SCALE), seen);
#else
                    scores[line * params.stride + columns + column] = select(LOWEST, sums[j][r] * SCALE, seen);
#endif
                }
            }
        }
    }
}
#endif

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let kv = group.y;
    let end = params.first + params.tokens;
    let fixed = min(params.sinks, end);
    let plain = Plain(fixed, fixed + max(end, params.near) - params.near, (max(params.near, params.sinks) - params.sinks) % params.ring);
    let plain_columns = plain.exact + params.beside;
    let tiles = (plain_columns + TILE - 1u) / TILE;
    let coded = group.x >= tiles;
#if ABSORBED
    if coded {
        score_rows(kv, (group.x - tiles) * WORKGROUP * KEYS, group.z, plain_columns, local);
        return;
    }
#endif
    let lines = params.tokens * GROUP;
    if group.z * SPAN >= lines {
        return; // the whole workgroup: before any barrier
    }
    let t = local % TILE;
    let team = local / TILE;
    let begin = select(group.x, group.x - tiles, coded) * TILE; // among the columns of its kind
    let count = select(plain_columns, params.coded, coded);
    // The key that this lane scores, its column, and whether there is one.
    let there = begin + t < count;
    let own = min(begin + t, count - 1u);
    let column = select(0u, plain_columns, coded) + begin + t;
    var key = select(params.near + own - fixed, own, own < fixed);
    if coded {
        key = coded_token(kv, own);
    }
    // All is read before the first is written. Past the last column its key is brought in again,
    // and not scored.
    var vectors: array<half4, LOADS>;
    for (var i = 0u; i < LOADS; i++) {
        let at = local + i * WORKGROUP;
        vectors[i] = stored_key(plain, coded, min(begin + at / VECTORS, count - 1u), kv * VECTORS + at % VECTORS);
    }
    for (var i = 0u; i < LOADS; i++) {
        let at = local + i * WORKGROUP;
        if at < TILE * VECTORS {
            tile[at / VECTORS * PITCH + at % VECTORS] = vectors[i];
        }
    }
    workgroupBarrier();

    let heads = KV_HEADS * GROUP;
    let lines_end = min(lines, (group.z + 1u) * SPAN);
    for (var block = group.z * SPAN; block < lines_end; block += TEAMS * ROWS) {
        let line = block + team * ROWS;
        var sums: array<f32, ROWS>;
        var base: array<u32, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            let q = min(line + r, lines - 1u);
            base[r] = (params.at + q / GROUP) * (params.queries / 4u) + (kv * GROUP + q % GROUP) * VECTORS;
        }
        // Some vectors at a time, and a bound that compilers do not know: all of them at once would
        // take all registers.
        for (var c = 0u; c < min(VECTORS, params.queries); c += VECTORS_AT_ONCE) {
            for (var j = 0u; j < VECTORS_AT_ONCE; j++) {
                let k = widen(tile[t * PITCH + c + j]);
                for (var r = 0u; r < ROWS; r++) {
                    sums[r] = dot_add(k, queries[base[r] + c + j], sums[r]);
                }
            }
        }
        if there {
            for (var r = 0u; r < ROWS; r++) {
                let q = line + r;
                if q < lines_end {
                    var s = sums[r] * SCALE;
#if CAPPED
                    s = soft_cap(s);
#endif
                    var seen = reads(params.first + q / GROUP, key, coded);
                    if !coded && own >= plain.exact {
                        seen = true;
#if COUNTED
                        if own + COUNTED_COLUMNS >= count {
                            let tokens = counts[own + COUNTED_COLUMNS - count];
                            seen = tokens > 0u;
                            s += log(f32(max(tokens, 1u)));
                        }
#endif
                    }
                    scores[((q / GROUP) * heads + kv * GROUP + q % GROUP) * params.stride + column] = select(LOWEST, s, seen);
                }
            }
        }
    }
}
