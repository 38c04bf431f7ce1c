// Which tokens stay exact when some leave the exact window (src/kv/reviver.rs): of candidates, of
// leaving tokens and of evicted ones that are alone in their bucket, those that have received the
// most attention; among equals the earlier ones. Lists the rows that move, for move_rows.wgsl.
//
// Grid: one workgroup.
//
// CODED     a token that loses its slot, or gets none, is read from its latent: appends it to the
//           list of those
// SKETCH    buckets
// MEAN      without buckets: the number of evicted tokens
#include "lib/moves.wgsl"
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
    promoted: u32,   // where in the list of moves the tokens that take a slot begin
    listed: u32,     // (CODED) tokens in list so far
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read_write> marks: array<u32>;  // as src/kernels/eviction.rs has them
@group(0) @binding(1) var<storage, read_write> moves: Moves;        // for move_rows.wgsl
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
    var evicted = 0u;
    var promoted = 0u;
    for (var begin = 0u; begin < count; begin += WORKGROUP) {
        let i = begin + local;
        let c = contender(i);
        let stays = c.there && (c.mass + 1u > last.x || (c.mass + 1u == last.x && ~c.position >= latest.x));
        let goes = i < own && !stays;
        freed += place(u32(goes && i < params.held), local).y;
        let down = place(u32(goes), local);
        if goes {
#if SKETCH
            let place = sketched[c.position];
#else
            let place = 0u;
#endif
            moves.list[evicted + down.x] = Move(c.source, place, c.position, c.mass);
        }
        evicted += down.y;
        let comes = i >= params.held && stays;
        let up = place(u32(comes), local);
        if comes {
            moves.list[params.promoted + promoted + up.x] = Move(c.source, 0u, c.position, c.mass);
        }
        promoted += up.y;
    }
    storageBarrier();
    workgroupBarrier();
    let base = params.sinks + params.ring;
    for (var j = local; j < promoted; j += WORKGROUP) {
        let to = select(base + params.held + j - freed, moves.list[j].source, j < freed);
        moves.list[params.promoted + j].to = to;
        let taken = moves.list[params.promoted + j];
        marks[params.places + 2u * (to - base)] = taken.position;
        marks[params.places + 2u * (to - base) + 1u] = taken.mass;
#if SKETCH
        if taken.source >= ALONE {
            let bucket = (taken.source - ALONE) / 2u;
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
    moves.evicted = evicted;
    moves.promoted = promoted;
#if SKETCH
    for (var j = 0u; j < evicted; j++) {
        let token = moves.list[j];
        let bucket = 4u * (token.to / 2u);
        marks[bucket + token.to % 2u] += 1u;
        marks[bucket + 2u] = token.position;
        marks[bucket + 3u] = token.mass;
    }
#else
#if MEAN
    marks[0] += evicted;
#endif
#endif
#if CODED
    for (var j = 0u; j < evicted; j++) {
        list[params.listed + j] = moves.list[j].position;
    }
#endif
}
