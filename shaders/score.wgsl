// How well every cached key answers every query: scores[row][column] = (q · k) / √head_dim, masked where the query may not look.
//
// Grid: x = tiles of TILE columns, y = key/value heads, z = blocks of `span` rows. A row is one query head of one token; those of a key/value head share its tile.
// Columns are exact keys: in a dense cache all from `near` on; else (RING) the sinks first, then from `near` on, and then what stands beside (lib/side.wgsl). After them come
// `coded` coded keys.
// A tile of keys is brought into workgroup memory once, as it is stored, and every row of the block is scored against it.
//
// WIDE      some keys of the tile are not stored but computed: it is held in f32
// RING      few keys are exact; CODED or SIDE
// SIDE      the sequence forgets: some columns every query sees
// CODED     there are coded rows; which query reads which keys exactly, and which by their codes, is src/rows/exact.rs. A tile is exact or coded as a whole
// REBUILT   (CODED) k = RoPE(ẑ·B + μ), TILE × head_dim at a time, never written out. A lane owns a pair of RoPE, which it turns in registers.
// CHOSEN    (CODED) coded keys are those of chosen chunks, else all from `start` on (lib/chosen.wgsl)
// TAKEN     (CODED) coded keys are those after RoPE, and prepare.wgsl has taken the query to their coordinates: q · k = q̃ · ẑ + q · R_t μ, the mean before
//           RoPE turned to the key's position t
// BLOCKS    (TAKEN) they are coded in blocks (lib/rows.wgsl)
// ALIGNED   (CODED) rows of either side are coded in blocks of ALIGN tokens: coded keys are whole blocks
// WINDOW    keys `window` or more before the query are masked
#include "lib/half.wgsl"
#include "lib/lowest.wgsl"
#if CODED
#include "lib/chosen.wgsl"
#include "lib/rows.wgsl"
#endif
#if RING
#include "lib/ring.wgsl"
#endif
#if SIDE
#include "lib/side.wgsl"
#endif
#if CODED
#include "lib/rope.wgsl"
#endif

struct Step {
    first: u32,   // position of the block's first token
    tokens: u32,  // tokens of the block
    at: u32,      // the block's first token in queries
    stride: u32,  // columns of scores
    span: u32,    // rows per workgroup
    queries: u32, // numbers from one token to the next in queries
    near: u32,    // the first exact key, beside the sinks
#if SIDE
    side: u32,    // columns of what stands beside
#else
    window: u32,  // (WINDOW)
#endif
    start: u32,   // (CODED) the first coded key; (CHOSEN) the last
    coded: u32,   // (CODED) coded columns
    sinks: u32,   // (RING) and all below as in exact.rs
    ring: u32,
    recent: u32,
    low: u32,
    high: u32,
    words: u32,   // (CODED) words of a token in rows
}
var<immediate> step: Step;

@group(0) @binding(0) var<storage, read> queries: array<vec4<f32>>;     // [tokens][queries / 4]: [KV_HEADS · GROUP][PADDED / 4], padding zero; then taken queries
@group(0) @binding(1) var<storage, read> keys: array<half4>;            // [slots][KV_HEADS][PADDED / 4], after RoPE
@group(0) @binding(2) var<storage, read_write> scores: array<f32>;      // [tokens][KV_HEADS · GROUP][stride]
#if CODED
@group(0) @binding(3) var<storage, read> rows: array<u32>;              // [capacity][words]
// Codebooks; two vectors for each key/value head: (word at which its row begins, first run, runs, vector of queries at which its taken queries begin), (vector of up,
// vector at which the pairs begin whose mean turns, how many); means [KV_HEADS][HEAD] in f32; those pairs, four to a vector; runs.
@group(0) @binding(4) var<storage, read> table: array<vec4<u32>>;
#endif
#if CODED
@group(0) @binding(5) var<storage, read> turns: array<vec2<f32>>;
#endif
#if REBUILT
@group(0) @binding(6) var<storage, read> up: array<half4>;              // by head: [rank / 4][HEAD]
#endif
#if CHOSEN
@group(0) @binding(7) var<storage, read> chosen: array<u32>;            // [KV_HEADS][MOST]
#endif

const HEAD = PAIRS * 2u;
const PADDED = (HEAD + 3u) / 4u * 4u;
const EXACT_ROW = KV_HEADS * PADDED;
const TEAMS = WORKGROUP / TILE; // lanes that share a key
const SCALE = 1.0 / sqrt(f32(HEAD));
const VECTORS = PADDED / 4u;
// A key's vectors are neighbours, so that lanes that bring them in do not meet in a bank of memory; one more between keys, so that lanes that read different keys do not either.
const PITCH = VECTORS + 1u;

#if WIDE
alias Cell = vec4<f32>;
fn wide(c: Cell) -> vec4<f32> {
    return c;
}
#else
alias Cell = half4;
fn wide(c: Cell) -> vec4<f32> {
    return widen(c);
}
#endif
#if REBUILT
// Coordinates, and when all of them are used up, keys.
var<workgroup> tile: array<Cell, max(TILE * PITCH, STAGE * 4u * ACROSS)>;
#else
var<workgroup> tile: array<Cell, TILE * PITCH>; // [TILE][PITCH]
#endif

#if RING
// The first key that the query at a position reads exactly again.
fn reach(position: u32) -> u32 {
    var due = max(position + 1u, step.recent) - step.recent;
#if ALIGNED
    due = step.sinks + (max(due, step.sinks) - step.sinks) / ALIGN * ALIGN;
#endif
    return clamp(due, step.low, step.high);
}
#endif

// Vector `c` of the key of a column that is not coded; the first `exact` are tokens'.
fn plain_key(kv: u32, column: u32, fixed: u32, exact: u32, c: u32) -> Cell {
    let vector = kv * VECTORS + c;
#if RING
    var at = slot(select(step.near + column - fixed, column, column < fixed));
#else
    let at = step.near + column;
#endif
#if SIDE
    if column >= exact {
#if VAGUE
        if is_vague(column - exact) {
            return vague(column - exact, vector);
        }
#endif
        at = side_slot(column - exact);
    }
#endif
#if WIDE
    return widen(keys[at * (EXACT_ROW / 4u) + vector]);
#else
    return keys[at * (EXACT_ROW / 4u) + vector];
#endif
}

#if CODED
const STAGE = 2u; // runs unpacked at a time
const ACROSS = TILE + 1u;
const UNPACKED = (STAGE * 4u * TILE + WORKGROUP - 1u) / WORKGROUP; // vectors of them that a lane brings in
#if !REBUILT
var<workgroup> stage: array<vec4<f32>, STAGE * 4u * ACROSS>; // [STAGE · 4][ACROSS]
#endif

// The key that a lane brings in for a coded column; past the last column, the last's.
fn key_at(kv: u32, column: u32) -> u32 {
    return row_key(kv, min(column, step.coded - 1u));
}

// Brings runs first, … of the tile's keys into workgroup memory, from coded column `begin` on. Past the last key the last is unpacked again, and not scored.
fn unpack_stage(info: vec4<u32>, first: u32, kv: u32, begin: u32, local: u32) {
    let runs = min(STAGE, info.z - first);
    // All is read before the first is used.
    var run: array<vec4<u32>, UNPACKED>;
    var words: array<Fetched, UNPACKED>;
    for (var i = 0u; i < UNPACKED; i++) {
        let v = (local + i * WORKGROUP) % (4u * STAGE);
        let t = min((local + i * WORKGROUP) / (4u * STAGE), TILE - 1u);
        run[i] = table[info.y + first + min(v / 4u, runs - 1u)];
        words[i] = fetch(key_at(kv, begin + t), info.x, run[i], v % 4u);
    }
    workgroupBarrier();
    for (var i = 0u; i < UNPACKED; i++) {
        let v = (local + i * WORKGROUP) % (4u * STAGE);
        let t = (local + i * WORKGROUP) / (4u * STAGE);
        if v < 4u * runs && t < TILE {
            let z = decode(words[i], run[i], v % 4u);
#if REBUILT
            tile[v * ACROSS + t] = z;
#else
            stage[v * ACROSS + t] = z;
#endif
        }
    }
    workgroupBarrier();
}
#endif

#if REBUILT
const STRETCH = min(8u, TILE); // keys that a lane rebuilds at a time
const UNITS = (PAIRS * (TILE / STRETCH) + WORKGROUP - 1u) / WORKGROUP;

// A lane's work is a pair of RoPE for STRETCH keys, UNITS times. Neighbouring lanes have neighbouring pairs: they share the coordinates and read `up` in a row.
fn rebuild(kv: u32, begin: u32, local: u32) {
    let info = table[BOOKS + 2u * kv];
    let up_begin = table[BOOKS + 2u * kv + 1u].x;
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
                        let z = tile[v * ACROSS + stretch + t];
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
                let c = turn(key_at(kv, begin + stretch + t), pair);
                let at = (stretch + t) * PITCH;
                tile[at + pair / 4u][pair % 4u] = a * c.x - b * c.y;
                tile[at + (pair + PAIRS) / 4u][(pair + PAIRS) % 4u] = b * c.x + a * c.y;
            }
        }
    }
    if HEAD < PADDED {
        for (var t = local; t < TILE; t += WORKGROUP) {
            for (var i = HEAD; i < PADDED; i++) {
                tile[t * PITCH + i / 4u][i % 4u] = 0.0;
            }
        }
    }
}

fn mean(i: u32) -> f32 {
    return bitcast<f32>(table[BOOKS + 2u * KV_HEADS + i / 4u][i % 4u]);
}
#endif

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let kv = group.y;
    let end = step.first + step.tokens;
    let t = local % TILE;
    let team = local / TILE;
    // The key that this lane scores, its column, and whether there is one.
    var column = group.x * TILE + t;
#if CODED
    load_book(local);
#endif
#if RING
    let fixed = min(step.sinks, end);
    let exact = fixed + max(end, step.near) - step.near;
    var key = select(step.near + column - fixed, column, column < fixed);
#else
    let fixed = 0u;
    let exact = end - step.near;
    let key = step.near + column;
#endif
    // Columns that are not coded.
#if SIDE
    let plain = exact + step.side;
#else
    let plain = exact;
#endif
    var there = column < plain;
#if CODED
    let tiles = (plain + TILE - 1u) / TILE;
    let coded = group.x >= tiles;
    let begin = (group.x - tiles) * TILE; // of a coded tile, among the coded columns
    if coded {
        there = begin + t < step.coded;
        key = coded_key(kv, min(begin + t, step.coded - 1u));
        column = plain + begin + t;
    }
#endif

#if CODED
    if !coded {
#endif
        // Past the last column its key is brought in again, and not scored.
        for (var i = local; i < TILE * VECTORS; i += WORKGROUP) {
            let c = i % VECTORS;
            let u = i / VECTORS;
            tile[u * PITCH + c] = plain_key(kv, min(group.x * TILE + u, plain - 1u), fixed, exact, c);
        }
#if CODED
    }
#endif
#if REBUILT
    if coded {
        rebuild(kv, begin, local);
    }
#endif
    workgroupBarrier();

    let heads = KV_HEADS * GROUP;
    let lines = step.tokens * GROUP;
    let lines_end = min(lines, (group.z + 1u) * step.span);
#if TAKEN
    // Every team passes through the loop equally often: there are barriers in it.
    for (var block = group.z * step.span; block < lines_end; block += TEAMS * ROWS) {
        let row = block + team * ROWS;
#else
    for (var row = group.z * step.span + team * ROWS; row < lines_end; row += TEAMS * ROWS) {
#endif
        var sums: array<f32, ROWS>;
        var base: array<u32, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            let q = min(row + r, lines - 1u);
            base[r] = (step.at + q / GROUP) * (step.queries / 4u) + (kv * GROUP + q % GROUP) * VECTORS;
        }
#if TAKEN
        if coded {
            let info = table[BOOKS + 2u * kv];
            let more = table[BOOKS + 2u * kv + 1u];
            let turning = (more.z + 1u) / 2u; // vectors of two pairs
            for (var r = 0u; r < ROWS; r++) {
                let q = min(row + r, lines - 1u);
                base[r] = (step.at + q / GROUP) * (step.queries / 4u) + info.w + q % GROUP * (4u * info.z + turning);
            }
            let position = key_at(kv, begin + t);
            for (var v = 0u; v < turning; v++) {
                let pairs = table[more.y + v / 2u];
                let z = vec4<f32>(turn(position, pairs[2u * (v % 2u)]), turn(position, pairs[2u * (v % 2u) + 1u]));
                for (var r = 0u; r < ROWS; r++) {
                    sums[r] = dot_add(z, queries[base[r] + 4u * info.z + v], sums[r]);
                }
            }
            for (var first = 0u; first < info.z; first += STAGE) {
                unpack_stage(info, first, kv, begin, local);
                let vectors = 4u * min(STAGE, info.z - first);
                for (var v = 0u; v < vectors; v++) {
                    let z = stage[v * ACROSS + t];
                    for (var r = 0u; r < ROWS; r++) {
                        sums[r] = dot_add(z, queries[base[r] + 4u * first + v], sums[r]);
                    }
                }
            }
        } else {
#endif
        // Some vectors at a time, and a bound that compilers do not know: all of them at once would take all registers.
        for (var c = 0u; c < min(VECTORS, step.queries); c += VECTORS_AT_ONCE) {
            for (var j = 0u; j < VECTORS_AT_ONCE; j++) {
                let k = wide(tile[t * PITCH + c + j]);
                for (var r = 0u; r < ROWS; r++) {
                    sums[r] = dot_add(k, queries[base[r] + c + j], sums[r]);
                }
            }
        }
#if TAKEN
        }
#endif
        if there {
            for (var r = 0u; r < ROWS; r++) {
                let q = row + r;
                if q < lines_end {
                    let position = step.first + q / GROUP;
                    var s = sums[r] * SCALE;
                    var seen = key <= position;
#if CODED
                    seen = seen && (key >= step.sinks && key < reach(position)) == coded;
#if SIDE
                    seen = seen && !(coded && is_candidate(key));
#endif
#else
#if RING
                    seen = seen && (key < step.sinks || key >= reach(position));
#endif
#endif
#if WINDOW
                    seen = seen && key + step.window > position;
#endif
#if SIDE
                    if column >= exact && column < plain {
                        let tokens = side_count(column - exact);
                        seen = tokens > 0u;
                        s += log(f32(max(tokens, 1u)));
                    }
#endif
                    if !seen {
                        s = LOWEST;
                    }
                    scores[((q / GROUP) * heads + kv * GROUP + q % GROUP) * step.stride + column] = s;
                }
            }
        }
    }
}
