// Codes of a run that are chosen together, as src/kv/trellis.rs has it. Wants lib/rows.wgsl.
//
// Sixteen lanes to a run, each with a state that the register begins in, and ends in. What paths
// cost is four vectors by state, a register's older code in each: compilers know where everything
// stands.

const LANES = 16u;
const TURN = 2u; // coordinates between two barriers
const RUNS = WORKGROUP / LANES;

var<workgroup> fell: array<array<u32, LANES>, WORKGROUP>; // by lane and coordinate: what fell out of the register, two bits for each state
var<workgroup> ends: array<f32, WORKGROUP>;               // what the best path of each lane misses
var<workgroup> misses: array<vec4<f32>, TURN * WORKGROUP>; // [runs][TURN][states], of one coordinate: by what falls out

// The first place of a run in these.
fn place_of(local: u32) -> u32 {
    if RUNS == 1u {
        return 0u;
    }
    return local / LANES * LANES;
}

// How much the nearest of an edge's levels misses x, less x², and the upper bits that choose it.
struct Nearest {
    miss: f32,
    high: u32,
}

fn nearest(x: f32, bits: u32, edge: u32) -> Nearest {
    let begin = book_of(bits) + edge;
    let first = book[begin];
    var best = Nearest(first * (first - 2.0 * x), 0u);
    for (var high = 1u; high < (1u << (bits - 2u)); high++) {
        let other = book[begin + 64u * high];
        let miss = other * (other - 2.0 * x);
        if miss < best.miss {
            best = Nearest(miss, high);
        }
    }
    return best;
}

// How much the nearest levels miss x of the edges into a state, less x².
fn misses_into(state: u32, x: f32, bits: u32) -> vec4<f32> {
    var least = vec4<f32>(3e38);
    let begin = book_of(bits) + 4u * state;
    for (var high = 0u; high < (1u << (bits - 2u)); high++) {
        let at = begin + 64u * high;
        let levels = vec4<f32>(book[at], book[at + 1u], book[at + 2u], book[at + 3u]);
        least = min(least, levels * (levels - 2.0 * x));
    }
    return least;
}

// The paths that survive (Viterbi's word) into four states: what they cost, and what falls out of
// the register there, in eight bits.
struct Survivors {
    cost: vec4<f32>,
    fell: u32,
}

// Into the states whose misses begin at a place, from those whose paths cost so much.
fn survivors(at: u32, a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>) -> Survivors {
    let totals = transpose(mat4x4<f32>(a + misses[at], b + misses[at + 1u], c + misses[at + 2u], d + misses[at + 3u]));
    var it = Survivors(totals[0], 0u);
    var oldest = vec4<u32>();
    oldest = select(oldest, vec4<u32>(1u), totals[1] < it.cost);
    it.cost = min(it.cost, totals[1]);
    oldest = select(oldest, vec4<u32>(2u), totals[2] < it.cost);
    it.cost = min(it.cost, totals[2]);
    oldest = select(oldest, vec4<u32>(3u), totals[3] < it.cost);
    it.cost = min(it.cost, totals[3]);
    it.fell = oldest.x | (oldest.y << 2u) | (oldest.z << 4u) | (oldest.w << 6u);
    return it;
}

// Goes through the run of 16 coordinates at z, each divided by `scale`, from this lane's state:
// fills fell and ends. Called by all lanes in uniform control flow.
fn search(z: u32, bits: u32, scale: f32, local: u32) {
    let own = local % LANES;
    let each = vec4<u32>(0u, 1u, 2u, 3u);
    var a = select(vec4<f32>(3e38), vec4<f32>(0.0), each == vec4<u32>(own));
    var b = select(vec4<f32>(3e38), vec4<f32>(0.0), each + 4u == vec4<u32>(own));
    var c = select(vec4<f32>(3e38), vec4<f32>(0.0), each + 8u == vec4<u32>(own));
    var d = select(vec4<f32>(3e38), vec4<f32>(0.0), each + 12u == vec4<u32>(own));
    let place = TURN * place_of(local);
    for (var first = 0u; first < LANES; first += TURN) {
        // What an edge misses is the same for all paths over it: a run's lanes find it together.
        workgroupBarrier();
        for (var i = 0u; i < TURN; i++) {
            misses[place + i * LANES + own] = misses_into(own, coordinates[z + first + i] / scale, bits);
        }
        workgroupBarrier();
        for (var i = 0u; i < TURN; i++) {
            let at = place + i * LANES;
            let into_a = survivors(at, a, b, c, d);
            let into_b = survivors(at + 4u, a, b, c, d);
            let into_c = survivors(at + 8u, a, b, c, d);
            let into_d = survivors(at + 12u, a, b, c, d);
            a = into_a.cost;
            b = into_b.cost;
            c = into_c.cost;
            d = into_d.cost;
            fell[local][first + i] = into_a.fell | (into_b.fell << 8u) | (into_c.fell << 16u) | (into_d.fell << 24u);
        }
    }
    let row = select(select(a, b, own >= 4u), select(c, d, own >= 12u), own >= 8u);
    let pair = select(row.xy, row.zw, own % 4u >= 2u);
    ends[local] = select(pair.x, pair.y, own % 2u == 1u);
}

// Lower bits of the codes, and upper ones, of the best of the sixteen lanes from `first` on.
fn choose(z: u32, bits: u32, scale: f32, first: u32) -> vec2<u32> {
    var begin = 0u;
    for (var lane = 1u; lane < LANES; lane++) {
        if ends[first + lane] < ends[first + begin] {
            begin = lane;
        }
    }
    var state = begin;
    var words = vec2<u32>(0u, 0u);
    for (var back = 0u; back < LANES; back++) {
        let i = 15u - back;
        let edge = ((fell[first + begin][i] >> (2u * state)) & 3u) + 4u * state;
        let high = nearest(coordinates[z + i] / scale, bits, edge).high;
        words |= vec2<u32>((state / 4u) << (2u * i), high << ((bits - 2u) * i));
        state = edge % LANES;
    }
    return words;
}
