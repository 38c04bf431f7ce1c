// Who stays when tokens leave the exact window (src/rows/reviver.rs): of candidates, of those who leave, and of vague tokens that are alone in their bucket, as many as there are slots, those
// that have received the most attention; among equals the earlier ones. Writes who moves where, for exchange.wgsl, and keeps the books.
//
// Grid: one workgroup.
//
// CODED     who loses its slot, or gets none, is read from its coded row: appends it to the list of those
// SKETCH    buckets
// MEAN      without buckets: the number of the vague
#include "lib/nth.wgsl"
#include "lib/ring.wgsl"

struct Params {
    begin: u32,      // position of the first token that leaves
    leaving: u32,    // at least one
    held: u32,       // candidates so far
    candidates: u32, // slots
    buckets: u32,
    sinks: u32,
    ring: u32,
    places: u32,     // word of marks at which candidates begin
    received: u32,   // and what exact rows have received
    promoted: u32,   // word of moves at which those who take a slot begin
    listed: u32,     // (CODED) tokens in list so far
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read_write> marks: array<u32>;  // as src/kernels/eviction.rs has them
// How many become vague, and how many take a slot; at word 4, four each, of those who become vague: slot (a candidate's, or the ring's of one who leaves), place in the sketch, position, attention
// received; and from `promoted` on, of those who take one: source (a slot, or ALONE and its place in the sketch), slot, position, attention received.
@group(0) @binding(1) var<storage, read_write> moves: array<u32>;
#if CODED
@group(0) @binding(3) var<storage, read_write> list: array<u32>;   // as in lib/columns.wgsl
#endif
#if SKETCH
@group(0) @binding(2) var<storage, read> sketched: array<u32>;     // [capacity]: twice the bucket, and one more for a minus
#endif

const ALONE = 0x80000000u;
const BY_MASS = 0u;
const BY_POSITION = 1u; // among those of one mass

var<workgroup> alone: atomic<u32>;

struct Contender {
    there: bool,
    position: u32,
    mass: u32,   // its bits: no mass is negative
    source: u32, // as in moves
}

fn contender(i: u32) -> Contender {
    if i < params.held {
        let at = params.places + 2u * i;
        return Contender(true, marks[at], marks[at + 1u], params.sinks + params.ring + i);
    }
    if i < params.held + params.leaving {
        let position = params.begin + i - params.held;
        let at = slot(position);
        return Contender(true, position, marks[params.received + at], at);
    }
#if SKETCH
    let bucket = i - params.held - params.leaving;
    if bucket < params.buckets {
        let at = 4u * bucket;
        return Contender(marks[at] + marks[at + 1u] == 1u, marks[at + 2u], marks[at + 3u], ALONE | (2u * bucket + marks[at + 1u]));
    }
#endif
    return Contender(false, 0u, 0u, 0u);
}

fn key(mass: u32, i: u32, by: u32) -> u32 {
    let c = contender(i);
    if !c.there {
        return 0u;
    }
    if by == BY_MASS {
        return c.mass + 1u;
    }
    return select(0u, ~c.position, c.mass + 1u == mass);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(local_invocation_index) local: u32) {
    let own = params.held + params.leaving;
    let count = own + params.buckets;
    if local == 0u {
        atomicStore(&alone, 0u);
    }
    workgroupBarrier();
    for (var i = own + local; i < count; i += WORKGROUP) {
        if contender(i).there {
            atomicAdd(&alone, 1u);
        }
    }
    workgroupBarrier();
    let stay = min(params.candidates, own + atomicLoad(&alone));
    let last = nth(0u, count, stay, BY_MASS, local);
    let latest = nth(last.x, count, last.y, BY_POSITION, local);

    var freed = 0u; // slots of candidates that lose them: they come first
    var demoted = 0u;
    var promoted = 0u;
    for (var begin = 0u; begin < count; begin += WORKGROUP) {
        let i = begin + local;
        let c = contender(i);
        let stays = c.there && (c.mass + 1u > last.x || (c.mass + 1u == last.x && ~c.position >= latest.x));
        let goes = i < own && !stays;
        freed += place(u32(goes && i < params.held), local).y;
        let down = place(u32(goes), local);
        if goes {
            let at = 4u + 4u * (demoted + down.x);
            moves[at] = c.source;
#if SKETCH
            moves[at + 1u] = sketched[c.position];
#endif
            moves[at + 2u] = c.position;
            moves[at + 3u] = c.mass;
        }
        demoted += down.y;
        let comes = i >= params.held && stays;
        let up = place(u32(comes), local);
        if comes {
            let at = params.promoted + 4u * (promoted + up.x);
            moves[at] = c.source;
            moves[at + 2u] = c.position;
            moves[at + 3u] = c.mass;
        }
        promoted += up.y;
    }
    storageBarrier();
    workgroupBarrier();
    let base = params.sinks + params.ring;
    for (var j = local; j < promoted; j += WORKGROUP) {
        let at = params.promoted + 4u * j;
        let to = select(base + params.held + j - freed, moves[4u + 4u * j], j < freed);
        moves[at + 1u] = to;
        marks[params.places + 2u * (to - base)] = moves[at + 2u];
        marks[params.places + 2u * (to - base) + 1u] = moves[at + 3u];
#if SKETCH
        if moves[at] >= ALONE {
            let bucket = (moves[at] - ALONE) / 2u;
            for (var k = 0u; k < 4u; k++) {
                marks[4u * bucket + k] = 0u;
            }
        }
#endif
    }
    storageBarrier();
    workgroupBarrier();
    if local > 0u {
        return;
    }
    moves[0] = demoted;
    moves[1] = promoted;
#if SKETCH
    for (var j = 0u; j < demoted; j++) {
        let at = 4u + 4u * j;
        let bucket = 4u * (moves[at + 1u] / 2u);
        marks[bucket + moves[at + 1u] % 2u] += 1u;
        marks[bucket + 2u] = moves[at + 2u];
        marks[bucket + 3u] = moves[at + 3u];
    }
#else
#if MEAN
    marks[0] += demoted;
#endif
#endif
#if CODED
    for (var j = 0u; j < demoted; j++) {
        list[params.listed + j] = moves[4u + 4u * j + 2u];
    }
#endif
}
