// Codes of a run that are chosen together, as src/kv/trellis.rs has it. Wants lib/rows.wgsl.
//
// Sixteen lanes to a run, each with a state that the register begins in, and ends in.

const LANES = 16u;
const EDGES = 64u;

var<workgroup> fell: array<array<u32, LANES>, WORKGROUP>; // by lane and coordinate: what fell out of the register, two bits for each state
var<workgroup> ends: array<f32, WORKGROUP>;               // what the best path of each lane misses
var<workgroup> misses: array<f32, EDGES * WORKGROUP / LANES>; // by run and edge, of one coordinate

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

// Goes through the run of 16 coordinates at z, each divided by `scale`, from this lane's state:
// fills fell and ends. Called by all lanes in uniform control flow.
fn search(z: u32, bits: u32, scale: f32, local: u32) {
    var cost: array<f32, LANES>;
    for (var state = 0u; state < LANES; state++) {
        cost[state] = select(3e38, 0.0, state == local % LANES);
    }
    for (var i = 0u; i < LANES; i++) {
        // What an edge misses is the same for all paths over it: a run's lanes find it together.
        let x = coordinates[z + i] / scale;
        let shared_by = local / LANES * EDGES;
        workgroupBarrier();
        for (var edge = local % LANES; edge < EDGES; edge += LANES) {
            misses[shared_by + edge] = nearest(x, bits, edge).miss;
        }
        workgroupBarrier();
        var next: array<f32, LANES>;
        var all = 0u;
        for (var state = 0u; state < LANES; state++) {
            var least = 3e38;
            var oldest = 0u;
            for (var old = 0u; old < 4u; old++) {
                let edge = old + 4u * state;
                let total = cost[edge % LANES] + misses[shared_by + edge];
                oldest = select(oldest, old, total < least);
                least = min(least, total);
            }
            next[state] = least;
            all |= oldest << (2u * state);
        }
        cost = next;
        fell[local][i] = all;
    }
    var end = 3e38;
    for (var state = 0u; state < LANES; state++) {
        end = select(end, cost[state], state == local % LANES);
    }
    ends[local] = end;
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
