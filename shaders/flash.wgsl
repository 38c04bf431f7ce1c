// Attention of one token in one pass over a split of its columns, as FlashDecoding has it: with m
// the split's largest score and p = exp(score − m), writes Σ p · value row, m and Σ p, which
// merge.wgsl joins. Nothing is written between scores and values, and a row is unpacked once for
// all query heads that read it.
//
// Grid: x = splits of plain columns (lib/columns.wgsl), KVS workgroups each, then of coded ones; y
// = rows of SPAN key/value heads, z = blocks of ROWS of the query heads that read one: all of KVS
// key/value heads, or one of BLOCKS parts of one's. LANES lanes of a subgroup share a row, CHUNKS
// times eight numbers each, and have KEYS keys under way: a key's scores are added up over them,
// and each then weighs its part of the value. Teams of lanes take keys in turn, each with a maximum
// of its own.
//
// CODED   there are coded columns, after RoPE: q · k = q̃ · ẑ + q · R_t μ, as in score.wgsl. A
//         row of keys is of the same heads as one of values, which are summed as coordinates
// REBUILT coded keys have been rebuilt (rebuild.wgsl), in f16; values are summed the same
// CAPPED  scores are capped: lib/mask.wgsl
#include "lib/half.wgsl"
#include "lib/lowest.wgsl"
#include "lib/columns.wgsl"
#include "lib/mask.wgsl"
#if CODED
#include "lib/rows.wgsl"
#if !REBUILT
#include "lib/rope.wgsl"
#endif
#endif

struct Params {
    position: u32, // of the token
    plain: u32,    // plain columns
    coded: u32,    // coded columns
    start: u32,    // the first coded token
    length: u32,   // plain columns in a split
    along: u32,    // coded columns in a split
    sums: u32,     // vectors of sums in a split
    near: u32,     // the first exact key beside the sinks
    fixed: u32,    // columns of sinks
    base: u32,     // as in lib/columns.wgsl's Plain
    window: u32,   // keys so far before the query, or farther, are masked
    sinks: u32,    // from here on as in exact.rs
    ring: u32,
    recent: u32,
    low: u32,
    high: u32,
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> queries: array<vec4<f32>>;        // [HEADS][2 · EXACT_LANES], then absorbed queries
@group(0) @binding(1) var<storage, read> keys: array<vec4<u32>>;           // [slots][KV_HEADS][EXACT_LANES], after RoPE
@group(0) @binding(2) var<storage, read> values: array<vec4<u32>>;         // [slots][KV_HEADS][EXACT_LANES]
@group(0) @binding(3) var<storage, read_write> sums: array<vec4<f32>>;     // [splits][sums]
@group(0) @binding(4) var<storage, read_write> weights: array<vec2<f32>>;  // [splits][HEADS]: m, Σ p
#if CODED
#if REBUILT
@group(0) @binding(5) var<storage, read> rebuilt: array<vec4<u32>>;        // [columns][KV_HEADS][EXACT_LANES]
#else
@group(0) @binding(5) var<storage, read> key_rows: array<u32>;             // [capacity], so many words each as the table says
#endif
@group(0) @binding(6) var<storage, read> table: array<vec4<u32>>;          // as in score.wgsl; its last vector of codebooks ends with the words of a token
#if !REBUILT
@group(0) @binding(7) var<storage, read> rope_table: array<vec2<f32>>;
#endif
@group(0) @binding(8) var<storage, read> value_rows: array<u32>;           // the same
@group(0) @binding(9) var<storage, read> value_table: array<vec4<u32>>;    // the same; codebooks, runs
@group(0) @binding(10) var<storage, read> groups: array<array<u32, 8>>;    // as in values.wgsl; from EXACT_ENTRIES on ENTRIES for each coded row
#endif

const HEADS = KV_HEADS * GROUP;
const TEAMS = WORKGROUP / LANES;
const SCALE = 1.0 / sqrt(f32(8u * EXACT_LANES));
const EXACT_CHUNKS = (EXACT_LANES + LANES - 1u) / LANES;

// Eight numbers.
struct Eight {
    a: vec4<f32>,
    b: vec4<f32>,
}

fn eight(words: vec4<u32>) -> Eight {
    return Eight(vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y)), vec4<f32>(unpack2x16float(words.z), unpack2x16float(words.w)));
}

var<workgroup> ends: array<vec4<f32>, 2u * WORKGROUP>; // [TEAMS][2 · LANES]
var<workgroup> team_max: array<array<f32, ROWS>, TEAMS>;
var<workgroup> team_total: array<array<f32, ROWS>, TEAMS>;

// What a team knows of the keys that it has seen.
struct State {
    largest: array<f32, ROWS>,
    total: array<f32, ROWS>,
    sum: array<array<Eight, CHUNKS>, ROWS>,
}

// The query heads of a workgroup: the first, and how many there are.
struct Heads {
    first: u32,
    count: u32,
}

// Whether a head is one too many, where a workgroup can have fewer than ROWS by far.
fn beyond(r: u32, heads: Heads) -> bool {
    return KVS > 1u && r >= heads.count;
}

// A number of every lane added up over those that share a row.
fn over_lanes(x: f32) -> f32 {
    var sum = x;
    for (var step = 1u; step < LANES; step *= 2u) {
        sum += subgroupShuffleXor(sum, step);
    }
    return sum;
}

// From the lanes' products with KEYS keys, and whether each is seen, to the weights of these keys.
fn weigh(state: ptr<function, State>, heads: Heads, products: array<array<f32, ROWS>, KEYS>, seen: array<bool, KEYS>) -> array<array<f32, ROWS>, KEYS> {
    var p: array<array<f32, ROWS>, KEYS>;
    for (var r = 0u; r < ROWS; r++) {
        if beyond(r, heads) {
            break;
        }
        var largest = (*state).largest[r];
        for (var j = 0u; j < KEYS; j++) {
            var s = over_lanes(products[j][r]) * SCALE;
#if CAPPED
            s = soft_cap(s);
#endif
            p[j][r] = select(LOWEST, s, seen[j]);
            largest = max(largest, p[j][r]);
        }
        let before = exp((*state).largest[r] - largest);
        var total = (*state).total[r] * before;
        for (var j = 0u; j < KEYS; j++) {
            p[j][r] = select(0.0, exp(p[j][r] - largest), seen[j]);
            total += p[j][r];
        }
        (*state).largest[r] = largest;
        (*state).total[r] = total;
        for (var c = 0u; c < CHUNKS; c++) {
            (*state).sum[r][c].a *= before;
            (*state).sum[r][c].b *= before;
        }
    }
    return p;
}

fn add(state: ptr<function, State>, heads: Heads, p: array<f32, ROWS>, v: Eight, c: u32) {
    for (var r = 0u; r < ROWS; r++) {
        if beyond(r, heads) {
            break;
        }
        (*state).sum[r][c].a = fma(vec4<f32>(p[r]), v.a, (*state).sum[r][c].a);
        (*state).sum[r][c].b = fma(vec4<f32>(p[r]), v.b, (*state).sum[r][c].b);
    }
}

alias Queries = array<array<Eight, CHUNKS>, ROWS>;

// `kv`: which of the workgroup's key/value heads the key is, or KVS where it is all of them's.
fn multiply(k: Eight, q: Queries, c: u32, kv: u32, heads: Heads, onto: array<f32, ROWS>) -> array<f32, ROWS> {
    var sums = onto;
    for (var r = 0u; r < ROWS; r++) {
        if beyond(r, heads) {
            break;
        }
        if KVS > 1u && kv < KVS && r / GROUP != kv {
            continue;
        }
        sums[r] = dot_add(k.b, q[r][c].b, dot_add(k.a, q[r][c].a, sums[r]));
    }
    return sums;
}

// The lane's part of the queries of a workgroup's heads: `eights` of each, the first at a vector,
// the next `stride` vectors after it.
fn load_queries(at: u32, stride: u32, eights: u32, heads: Heads, part: u32) -> Queries {
    var q: Queries;
    for (var r = 0u; r < ROWS; r++) {
        for (var c = 0u; c < CHUNKS; c++) {
            let i = c * LANES + part;
            if i < eights && r < heads.count {
                q[r][c] = Eight(queries[at + r * stride + 2u * i], queries[at + r * stride + 2u * i + 1u]);
            }
        }
    }
    return q;
}

// Plain columns `begin`, … `end` for query heads of a key/value head.
fn walk_plain(state: ptr<function, State>, kv: u32, heads: Heads, range: vec2<u32>, team: u32, part: u32) {
    let plain = Plain(params.fixed, params.plain, params.base);
    let q = load_queries(2u * heads.first * EXACT_LANES, 2u * EXACT_LANES, EXACT_LANES, heads, part);
    for (var begin = range.x; begin < range.y; begin += TEAMS * KEYS) {
        var k: array<array<vec4<u32>, EXACT_CHUNKS>, KEYS>;
        var v: array<array<vec4<u32>, EXACT_CHUNKS>, KEYS>;
        var seen: array<bool, KEYS>;
        for (var j = 0u; j < KEYS; j++) {
            // Past the last column it is read again, and not seen.
            let column = min(begin + j * TEAMS + team, range.y - 1u);
            let at = (plain_slot(plain, column) * KV_HEADS + kv) * EXACT_LANES;
            for (var c = 0u; c < EXACT_CHUNKS; c++) {
                let own = min(c * LANES + part, EXACT_LANES - 1u);
                k[j][c] = keys[at + own];
                v[j][c] = values[at + own];
            }
            let key = select(params.near + column - params.fixed, column, column < params.fixed);
            seen[j] = begin + j * TEAMS + team < range.y && reads(params.position, key, false);
        }
        var products: array<array<f32, ROWS>, KEYS>;
        for (var j = 0u; j < KEYS; j++) {
            for (var c = 0u; c < EXACT_CHUNKS; c++) {
                products[j] = multiply(eight(k[j][c]), q, c, KVS, heads, products[j]);
            }
        }
        let p = weigh(state, heads, products, seen);
        for (var j = 0u; j < KEYS; j++) {
            for (var c = 0u; c < EXACT_CHUNKS; c++) {
                add(state, heads, p[j], eight(v[j][c]), c);
            }
        }
    }
}

#if CODED
// What eight coordinates are in, half a run: two words, in 16 bits four, and the header's that has
// their steps.
struct Half {
    words: vec4<u32>,
    steps: u32,
}

// Where in a row these words are. The first two hold both of a half's quarters in up to 8 bits.
fn places(run: vec4<u32>, half: u32) -> vec4<u32> {
    let first = run.x + half * run.y / 4u;
    let pair = select(vec2<u32>(first, select(first, first + 1u, run.y > 4u)), vec2<u32>(run.x, run.z / 2u), trellis(run));
    return vec4<u32>(pair, first + 2u, first + 3u);
}

#if !REBUILT
fn fetch_key(row: u32, run: vec4<u32>, half: u32) -> Half {
    let at = places(run, half) + vec4<u32>(row);
    var it: Half;
    it.words = vec4<u32>(key_rows[at.x], key_rows[at.y], 0u, 0u);
    if SIXTEEN {
        it.words.z = key_rows[at.z];
        it.words.w = key_rows[at.w];
    }
    if STEPS {
        it.steps = key_rows[row + max(run.w, AFFINE) - AFFINE];
    }
    return it;
}
#endif

fn fetch_value(row: u32, run: vec4<u32>, half: u32) -> Half {
    let at = places(run, half) + vec4<u32>(row);
    var it: Half;
    it.words = vec4<u32>(value_rows[at.x], value_rows[at.y], 0u, 0u);
    if SIXTEEN {
        it.words.z = value_rows[at.z];
        it.words.w = value_rows[at.w];
    }
    if STEPS {
        it.steps = value_rows[row + max(run.w, AFFINE) - AFFINE];
    }
    return it;
}

fn decode_half(it: Half, scales: u32, run: vec4<u32>, half: u32) -> Eight {
    let first = it.words.xy;
    var second = first;
    if (EIGHT || STEPS) && run.y == 8u {
        second = first.yy;
    }
    if SIXTEEN && run.y == 16u {
        second = it.words.zw;
    }
    return Eight(decode(vec3<u32>(first, it.steps), scales, run, 2u * half), decode(vec3<u32>(second, it.steps), scales, run, 2u * half + 1u));
}

alias Row = array<Eight, CHUNKS>;

// The lane's part of a row. Compilers do not know how many turns the loop takes where it takes
// several: some take minutes over turns that they write one after the other.
fn decode_row(halves: array<Half, CHUNKS>, scales: u32, runs: array<vec4<u32>, CHUNKS>, half: u32) -> Row {
    var row: Row;
    for (var c = 0u; c < select(min(CHUNKS, params.sums), 1u, CHUNKS == 1u); c++) {
        row[c] = decode_half(halves[c], scales, runs[c], half);
    }
    return row;
}

// `row`: which of the rows that a token has.
fn walk_coded(state: ptr<function, State>, row: u32, heads: Heads, range: vec2<u32>, team: u32, part: u32) {
    let group = groups[EXACT_ENTRIES + row * ENTRIES];
    let value_words = value_table[BOOKS - 1u].z;
    let half = part % 2u;
    var value_runs: array<vec4<u32>, CHUNKS>;
    for (var c = 0u; c < CHUNKS; c++) {
        value_runs[c] = value_table[group[7] + min((c * LANES + part) / 2u, group[1] / 4u - 1u)];
    }
#if REBUILT
    let q = load_queries(2u * heads.first * EXACT_LANES, 2u * EXACT_LANES, EXACT_LANES, heads, part);
    let kv = heads.first / GROUP;
#else
    let kv = row * SPAN;
    let key_words = table[BOOKS - 1u].z;
    let info = table[BOOKS + 2u * kv];
    let more = table[BOOKS + 2u * kv + 1u];
    let pair_vectors = (more.z + 1u) / 2u;
    let stride = 4u * info.z + pair_vectors;
    let absorbed = info.w + (heads.first - kv * GROUP) * stride;
    let q = load_queries(absorbed, stride, 2u * info.z, heads, part);
    var runs: array<vec4<u32>, CHUNKS>;
    for (var c = 0u; c < CHUNKS; c++) {
        runs[c] = table[info.y + min((c * LANES + part) / 2u, info.z - 1u)];
    }
    // The lane's pairs of RoPE in which the mean rotates: how they stand at the team's first key,
    // and what they rotate by from one of its keys to the next.
    var turns: array<vec4<f32>, TURNS>;
    var steps: array<vec4<f32>, TURNS>;
    var turned: array<array<vec4<f32>, TURNS>, ROWS>;
    for (var i = 0u; i < TURNS; i++) {
        let v = part + i * LANES;
        if v < pair_vectors {
            let pairs = table[more.y + v / 2u];
            let two = select(pairs.xy, pairs.zw, v % 2u == 1u);
            let first = params.start + range.x + team;
            turns[i] = vec4<f32>(rope_by_pair(first, two.x), rope_by_pair(first, two.y));
            steps[i] = vec4<f32>(rope_by_pair(TEAMS, two.x), rope_by_pair(TEAMS, two.y));
            for (var r = 0u; r < ROWS; r++) {
                if r < heads.count {
                    turned[r][i] = queries[absorbed + r * stride + 4u * info.z + v];
                }
            }
        }
    }
#endif
    for (var begin = range.x; begin < range.y; begin += TEAMS * KEYS) {
#if REBUILT
        var k: array<array<array<vec4<u32>, EXACT_CHUNKS>, KVS>, KEYS>;
#else
        var k: array<array<Half, CHUNKS>, KEYS>;
#endif
        var v: array<array<Half, CHUNKS>, KEYS>;
        var scales: array<vec2<u32>, KEYS>;
        var seen: array<bool, KEYS>;
        for (var j = 0u; j < KEYS; j++) {
            let column = min(begin + j * TEAMS + team, range.y - 1u);
            let key = params.start + column;
            let value_row = key * value_words + group[0];
            for (var c = 0u; c < CHUNKS; c++) {
                v[j][c] = fetch_value(value_row, value_runs[c], half);
            }
            if SCALED {
                scales[j].y = value_rows[value_row];
            }
#if REBUILT
            for (var h = 0u; h < KVS; h++) {
                let at = (column * KV_HEADS + min(kv + h, KV_HEADS - 1u)) * EXACT_LANES;
                for (var c = 0u; c < EXACT_CHUNKS; c++) {
                    k[j][h][c] = rebuilt[at + min(c * LANES + part, EXACT_LANES - 1u)];
                }
            }
#else
            let key_row = key * key_words + info.x;
            for (var c = 0u; c < CHUNKS; c++) {
                k[j][c] = fetch_key(key_row, runs[c], half);
            }
            if SCALED {
                scales[j].x = key_rows[key_row];
            }
#endif
            seen[j] = begin + j * TEAMS + team < range.y && reads(params.position, key, true);
        }
        var products: array<array<f32, ROWS>, KEYS>;
        for (var j = 0u; j < KEYS; j++) {
#if REBUILT
            for (var h = 0u; h < KVS; h++) {
                for (var c = 0u; c < EXACT_CHUNKS; c++) {
                    products[j] = multiply(eight(k[j][h][c]), q, c, h, heads, products[j]);
                }
            }
#else
            for (var i = 0u; i < TURNS; i++) {
                for (var r = 0u; r < ROWS; r++) {
                    products[j][r] = dot_add(turns[i], turned[r][i], products[j][r]);
                }
                turns[i] = vec4<f32>(add_angles(turns[i].xy, steps[i].xy), add_angles(turns[i].zw, steps[i].zw));
            }
            let row = decode_row(k[j], scales[j].x, runs, half);
            for (var c = 0u; c < CHUNKS; c++) {
                products[j] = multiply(row[c], q, c, KVS, heads, products[j]);
            }
#endif
        }
        let p = weigh(state, heads, products, seen);
        for (var j = 0u; j < KEYS; j++) {
            let value = decode_row(v[j], scales[j].y, value_runs, half);
            for (var c = 0u; c < CHUNKS; c++) {
                add(state, heads, p[j], value[c], c);
            }
        }
    }
}
#endif

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    // The lanes of a team are of one subgroup.
    let me = subgroup * min(size, WORKGROUP) + lane;
    let team = me / LANES;
    let part = me % LANES;
    let row = id.y;
    // The key/value heads of the row, and of the workgroup.
    let end = min((row + 1u) * SPAN, KV_HEADS);
    var kv = row * SPAN + id.z / BLOCKS * KVS;
    if kv >= end {
        return;
    }
    let ahead = id.z % BLOCKS * ROWS;
    let kvs = min(KVS, end - kv);
    var heads = Heads(kv * GROUP + ahead, min(ROWS, kvs * GROUP - ahead));
    let splits = (params.plain + max(params.length, 1u) - 1u) / max(params.length, 1u);
    // Of plain columns a workgroup has one key/value head.
    let coded = id.x >= splits * KVS;
    let split = select(id.x / KVS, id.x - splits * (KVS - 1u), coded);
    if KVS > 1u && !coded {
        if id.x % KVS >= kvs {
            return;
        }
        kv += id.x % KVS;
        heads = Heads(kv * GROUP, GROUP);
    }
    var state: State;
    for (var r = 0u; r < ROWS; r++) {
        state.largest[r] = LOWEST;
    }
    // Where a split's sums of the first head begin, and vectors of one.
    var place = vec2<u32>(heads.first * 2u * EXACT_LANES, 2u * EXACT_LANES);
#if CODED
    if TOGETHER {
        load_book(local);
        workgroupBarrier();
    }
    if coded {
        let begin = (split - splits) * params.along;
        walk_coded(&state, row, heads, vec2<u32>(begin, min(begin + params.along, params.coded)), team, part);
        let group = groups[EXACT_ENTRIES + row * ENTRIES];
        place = vec2<u32>(group[4] + (heads.first - row * SPAN * GROUP) * group[1], group[1]);
    } else {
#endif
        let begin = split * params.length;
        walk_plain(&state, kv, heads, vec2<u32>(begin, min(begin + params.length, params.plain)), team, part);
#if CODED
    }
#endif

    if TEAMS == 1u {
        for (var r = 0u; r < ROWS; r++) {
            if r < heads.count {
                let at = split * params.sums + place.x + r * place.y;
                for (var c = 0u; c < CHUNKS; c++) {
                    let i = 2u * (c * LANES + part);
                    if i < place.y {
                        sums[at + i] = state.sum[r][c].a;
                        sums[at + i + 1u] = state.sum[r][c].b;
                    }
                }
                if part == 0u {
                    weights[split * HEADS + heads.first + r] = vec2<f32>(state.largest[r], state.total[r]);
                }
            }
        }
        return;
    }

    // Teams meet: all by one maximum, then their sums, head by head.
    if part == 0u {
        team_max[team] = state.largest;
    }
    workgroupBarrier();
    for (var r = 0u; r < ROWS; r++) {
        var largest = LOWEST;
        for (var i = 0u; i < TEAMS; i++) {
            largest = max(largest, team_max[i][r]);
        }
        let share = exp(state.largest[r] - largest);
        state.largest[r] = largest;
        state.total[r] *= share;
        for (var c = 0u; c < CHUNKS; c++) {
            state.sum[r][c].a *= share;
            state.sum[r][c].b *= share;
        }
    }
    if part == 0u {
        team_total[team] = state.total;
    }
    for (var r = 0u; r < ROWS; r++) {
        if beyond(r, heads) {
            break;
        }
        for (var c = 0u; c < CHUNKS; c++) {
            workgroupBarrier();
            ends[2u * me] = state.sum[r][c].a;
            ends[2u * me + 1u] = state.sum[r][c].b;
            workgroupBarrier();
            let left = place.y - min(place.y, c * 2u * LANES);
            let vectors = select(0u, min(2u * LANES, left), r < heads.count);
            for (var i = local; i < vectors; i += WORKGROUP) {
                var sum = vec4<f32>();
                for (var t = 0u; t < TEAMS; t++) {
                    sum += ends[t * 2u * LANES + i];
                }
                sums[split * params.sums + place.x + r * place.y + c * 2u * LANES + i] = sum;
            }
        }
        if r < heads.count && local == 0u {
            var total = 0.0;
            for (var t = 0u; t < TEAMS; t++) {
                total += team_total[t][r];
            }
            weights[split * HEADS + heads.first + r] = vec2<f32>(state.largest[r], total);
        }
    }
}
