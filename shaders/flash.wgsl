// Attention of one token in one pass over a split of its columns, as FlashDecoding has it: with m
// the split's largest score and p = exp(score − m), writes Σ p · value row, m and Σ p, which
// merge.wgsl joins. Nothing is written between scores and values, and a row is unpacked once for
// all query heads that read it.
//
// Grid: x = splits of plain columns, then of coded ones (lib/columns.wgsl); y = key/value heads, z
// = blocks of ROWS of the query heads that share one. LANES lanes of a subgroup share a row, eight
// numbers each, and have KEYS keys under way: a key's scores are added up over them, and each then
// weighs its part of the value. Teams of lanes take keys in turn, each with a maximum of its own.
//
// CODED   there are coded columns, after RoPE, and a row of keys or of values is one head's: q · k
//         = q̃ · ẑ + q · R_t μ, as in score.wgsl. Values are summed as coordinates
// CAPPED  scores are capped: lib/mask.wgsl
#include "lib/half.wgsl"
#include "lib/lowest.wgsl"
#include "lib/columns.wgsl"
#include "lib/mask.wgsl"
#if CODED
#include "lib/rows.wgsl"
#include "lib/rope.wgsl"
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
@group(0) @binding(5) var<storage, read> key_rows: array<u32>;             // [capacity][KEY_WORDS]
@group(0) @binding(6) var<storage, read> table: array<vec4<u32>>;          // as in score.wgsl
@group(0) @binding(7) var<storage, read> rope_table: array<vec2<f32>>;
@group(0) @binding(8) var<storage, read> value_rows: array<u32>;           // [capacity][VALUE_WORDS]
@group(0) @binding(9) var<storage, read> value_table: array<vec4<u32>>;    // codebooks, runs
@group(0) @binding(10) var<storage, read> groups: array<array<u32, 8>>;    // as in values.wgsl; from EXACT_ENTRIES on one for each key/value head
#endif

const HEADS = KV_HEADS * GROUP;
const TEAMS = WORKGROUP / LANES;
const SCALE = 1.0 / sqrt(f32(8u * EXACT_LANES));

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
    sum: array<Eight, ROWS>,
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
fn weigh(state: ptr<function, State>, products: array<array<f32, ROWS>, KEYS>, seen: array<bool, KEYS>) -> array<array<f32, ROWS>, KEYS> {
    var p: array<array<f32, ROWS>, KEYS>;
    for (var r = 0u; r < ROWS; r++) {
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
        (*state).sum[r].a *= before;
        (*state).sum[r].b *= before;
    }
    return p;
}

fn add(state: ptr<function, State>, p: array<f32, ROWS>, v: Eight) {
    for (var r = 0u; r < ROWS; r++) {
        (*state).sum[r].a = fma(vec4<f32>(p[r]), v.a, (*state).sum[r].a);
        (*state).sum[r].b = fma(vec4<f32>(p[r]), v.b, (*state).sum[r].b);
    }
}

fn multiply(k: Eight, q: array<Eight, ROWS>, onto: array<f32, ROWS>) -> array<f32, ROWS> {
    var sums = onto;
    for (var r = 0u; r < ROWS; r++) {
        sums[r] = dot_add(k.b, q[r].b, dot_add(k.a, q[r].a, sums[r]));
    }
    return sums;
}

// The vector of queries at which the lane's part of each of the heads begins, whose parts take
// `stride` vectors.
fn load_queries(at: u32, stride: u32, count: u32, there: bool) -> array<Eight, ROWS> {
    var q: array<Eight, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        if there && r < count {
            q[r] = Eight(queries[at + r * stride], queries[at + r * stride + 1u]);
        }
    }
    return q;
}

// Plain columns `begin`, … `end` for the query heads of a key/value head from `first` on.
fn walk_plain(state: ptr<function, State>, kv: u32, heads: vec2<u32>, range: vec2<u32>, team: u32, part: u32) {
    let plain = Plain(params.fixed, params.plain, params.base);
    let there = part < EXACT_LANES;
    let own = min(part, EXACT_LANES - 1u);
    let q = load_queries(2u * (heads.x * EXACT_LANES + own), 2u * EXACT_LANES, heads.y, there);
    for (var begin = range.x; begin < range.y; begin += TEAMS * KEYS) {
        var k: array<vec4<u32>, KEYS>;
        var v: array<vec4<u32>, KEYS>;
        var seen: array<bool, KEYS>;
        for (var j = 0u; j < KEYS; j++) {
            // Past the last column it is read again, and not seen.
            let column = min(begin + j * TEAMS + team, range.y - 1u);
            let at = (plain_slot(plain, column) * KV_HEADS + kv) * EXACT_LANES + own;
            k[j] = keys[at];
            v[j] = values[at];
            let key = select(params.near + column - params.fixed, column, column < params.fixed);
            seen[j] = begin + j * TEAMS + team < range.y && reads(params.position, key, false);
        }
        var products: array<array<f32, ROWS>, KEYS>;
        for (var j = 0u; j < KEYS; j++) {
            products[j] = multiply(eight(k[j]), q, products[j]);
        }
        let p = weigh(state, products, seen);
        for (var j = 0u; j < KEYS; j++) {
            add(state, p[j], eight(v[j]));
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

fn walk_coded(state: ptr<function, State>, kv: u32, heads: vec2<u32>, range: vec2<u32>, team: u32, part: u32) {
    let info = table[BOOKS + 2u * kv];
    let more = table[BOOKS + 2u * kv + 1u];
    let pair_vectors = (more.z + 1u) / 2u;
    let stride = 4u * info.z + pair_vectors;
    let absorbed = info.w + (heads.x - kv * GROUP) * stride;
    let there = part / 2u < info.z;
    let q = load_queries(absorbed + 2u * min(part, 2u * info.z - 1u), stride, heads.y, there);
    let run = table[info.y + min(part / 2u, info.z - 1u)];
    let group = groups[EXACT_ENTRIES + kv];
    let value_run = value_table[group[7] + min(part / 2u, group[1] / 4u - 1u)];
    let half = part % 2u;
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
                if r < heads.y {
                    turned[r][i] = queries[absorbed + r * stride + 4u * info.z + v];
                }
            }
        }
    }
    for (var begin = range.x; begin < range.y; begin += TEAMS * KEYS) {
        var k: array<Half, KEYS>;
        var v: array<Half, KEYS>;
        var scales: array<vec2<u32>, KEYS>;
        var seen: array<bool, KEYS>;
        for (var j = 0u; j < KEYS; j++) {
            let column = min(begin + j * TEAMS + team, range.y - 1u);
            let key = params.start + column;
            let key_row = key * KEY_WORDS + info.x;
            let value_row = key * VALUE_WORDS + group[0];
            k[j] = fetch_key(key_row, run, half);
            v[j] = fetch_value(value_row, value_run, half);
            if SCALED {
                scales[j] = vec2<u32>(key_rows[key_row], value_rows[value_row]);
            }
            seen[j] = begin + j * TEAMS + team < range.y && reads(params.position, key, true);
        }
        var products: array<array<f32, ROWS>, KEYS>;
        for (var j = 0u; j < KEYS; j++) {
            for (var i = 0u; i < TURNS; i++) {
                for (var r = 0u; r < ROWS; r++) {
                    products[j][r] = dot_add(turns[i], turned[r][i], products[j][r]);
                }
                turns[i] = vec4<f32>(add_angles(turns[i].xy, steps[i].xy), add_angles(turns[i].zw, steps[i].zw));
            }
            products[j] = multiply(decode_half(k[j], scales[j].x, run, half), q, products[j]);
        }
        let p = weigh(state, products, seen);
        for (var j = 0u; j < KEYS; j++) {
            add(state, p[j], decode_half(v[j], scales[j].y, value_run, half));
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
    let kv = id.y;
    let first = kv * GROUP + id.z * ROWS;
    let heads = vec2<u32>(first, min(ROWS, (kv + 1u) * GROUP - first));
    var state: State;
    for (var r = 0u; r < ROWS; r++) {
        state.largest[r] = LOWEST;
    }
    let splits = (params.plain + max(params.length, 1u) - 1u) / max(params.length, 1u);
    // Where a split's sums of the first head begin, and vectors of one.
    var place = vec2<u32>(first * 2u * EXACT_LANES, 2u * EXACT_LANES);
#if CODED
    if TOGETHER {
        load_book(local);
        workgroupBarrier();
    }
    if id.x >= splits {
        let begin = (id.x - splits) * params.along;
        walk_coded(&state, kv, heads, vec2<u32>(begin, min(begin + params.along, params.coded)), team, part);
        let group = groups[EXACT_ENTRIES + kv];
        place = vec2<u32>(group[4] + (first - kv * GROUP) * group[1], group[1]);
    } else {
#endif
        let begin = id.x * params.length;
        walk_plain(&state, kv, heads, vec2<u32>(begin, min(begin + params.length, params.plain)), team, part);
#if CODED
    }
#endif

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
        state.sum[r].a *= share;
        state.sum[r].b *= share;
    }
    if part == 0u {
        team_total[team] = state.total;
    }
    for (var r = 0u; r < ROWS; r++) {
        workgroupBarrier();
        ends[2u * me] = state.sum[r].a;
        ends[2u * me + 1u] = state.sum[r].b;
        workgroupBarrier();
        if r < heads.y {
            for (var i = local; i < place.y; i += WORKGROUP) {
                var sum = vec4<f32>();
                for (var t = 0u; t < TEAMS; t++) {
                    sum += ends[t * 2u * LANES + i];
                }
                sums[id.x * params.sums + place.x + r * place.y + i] = sum;
            }
            if local == 0u {
                var total = 0.0;
                for (var t = 0u; t < TEAMS; t++) {
                    total += team_total[t][r];
                }
                weights[id.x * HEADS + first + r] = vec2<f32>(state.largest[r], total);
            }
        }
    }
}
