// The weighted sum of cached value rows, over one split of the columns: with m the split's largest score and p = exp(score − m), writes Σ p · row, m and Σ p.
//
// Grid: x = splits, those of coded columns last; y = entries of the table of groups, either the exact ones or the coded ones; z = blocks of ROWS rows. A row is one
// query head of one token; the query heads of a group sum the same slice of the value rows, and an entry is up to WORKGROUP vectors of it. Rows are summed as they are
// stored: a head's exact values, or coordinates that several heads share.
// Lanes: vectors of the entry × the keys; the latter are added up at the end.
//
// RING      few keys are exact; CODED or SIDE
// SIDE      the sequence forgets: the last columns that are not coded are those of lib/side.wgsl
// CODED     there are coded columns after the exact ones
// CHOSEN    (CODED) those of chosen chunks; a group is of one key/value head's queries
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

struct Step {
    plain: u32,   // columns that are not coded
    coded: u32,   // (CODED) coded columns
    tokens: u32,
    near: u32,    // the first exact key, beside the sinks
    stride: u32,  // columns of scores
    length: u32,  // columns per split of these, a multiple of KEYS
    sums: u32,    // vectors of sums in a split
    entries: u32, // entries of these; the coded ones follow
    all: u32,     // all entries
    along: u32,   // (CODED) columns per coded split, a multiple of KEYS
    start: u32,   // (CODED) the first coded key; (CHOSEN) the last
    words: u32,   // (CODED) words of a token in rows
    fixed: u32,   // (RING) columns of sinks
    sinks: u32,   // (RING)
    ring: u32,    // (RING)
    side: u32,    // (SIDE) the last of these, which every query sees
}
var<immediate> step: Step;

struct Group {
    at: u32,    // exact: vector at which the slice begins; coded: word at which its row begins
    width: u32, // its vectors
    first: u32, // its first query head
    heads: u32, // its query heads
    sums: u32,  // vector of sums at which its first head begins; the others follow
    begin: u32, // the entry's first vector in the slice
    dims: u32,  // lanes along the vectors, a power of two
    runs: u32,  // coded: its first run in table
}

@group(0) @binding(0) var<storage, read> scores: array<f32>;               // [tokens][HEADS][stride]
@group(0) @binding(1) var<storage, read> values: array<half4>;             // [slots][EXACT_ROW / 4]
@group(0) @binding(2) var<storage, read> groups: array<Group>;
@group(0) @binding(3) var<storage, read_write> sums: array<vec4<f32>>;     // [tokens][splits][sums]
@group(0) @binding(4) var<storage, read_write> weights: array<vec2<f32>>;  // [tokens][splits][HEADS]: m, Σ p
#if CODED
@group(0) @binding(5) var<storage, read> rows: array<u32>;                 // [capacity][words]
@group(0) @binding(6) var<storage, read> table: array<vec4<u32>>;          // codebooks, runs
#endif
#if CHOSEN
@group(0) @binding(7) var<storage, read> chosen: array<u32>;               // [KV_HEADS][MOST]
#endif

const PER_ROW = WORKGROUP / ROWS; // lanes that look after one row's weights

var<workgroup> p: array<f32, ROWS * KEYS>;
var<workgroup> row_max: array<f32, ROWS>;
var<workgroup> scratch: array<f32, WORKGROUP>;
var<workgroup> ends: array<vec4<f32>, ROWS * WORKGROUP>;

// A vector of the value of a column that is not coded.
fn plain_value(c: u32, vector: u32) -> vec4<f32> {
#if RING
    var at = slot(select(step.near + c - step.fixed, c, c < step.fixed));
#else
    let at = step.near + c;
#endif
#if SIDE
    let exact = step.plain - step.side;
    if c >= exact {
#if VAGUE
        if is_vague(c - exact) {
            return vague(c - exact, EXACT_ROW / 4u + vector);
        }
#endif
        at = side_slot(c - exact);
    }
#endif
    return widen(values[at * (EXACT_ROW / 4u) + vector]);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    var entry = id.y;
    var begin = id.x * step.length;
    var end = min(begin + step.length, step.plain);
    var entries_end = step.entries;
#if CODED
    load_book(local);
    let splits = (step.plain + max(step.length, 1u) - 1u) / max(step.length, 1u);
    let coded = id.x >= splits;
    if coded {
        entry += step.entries;
        entries_end = step.all;
        begin = step.plain + (id.x - splits) * step.along;
        end = min(begin + step.along, step.plain + step.coded);
    }
#endif
    if entry >= entries_end {
        return; // the whole workgroup: before any barrier
    }
    let group = groups[entry];
    let lines = step.tokens * group.heads;
    let first_row = id.z * ROWS;
    if first_row >= lines {
        return;
    }
    let vector = group.begin + local % group.dims;
    let sharing = WORKGROUP / group.dims; // lanes that share a dimension
    let share = local / group.dims;

    // The row that this lane weighs, and its scores.
    let row = local / PER_ROW;
    let lane = local % PER_ROW;
    let weighs = row < ROWS && first_row + row < lines;
    var token = 0u;
    var head = 0u;
    if weighs {
        token = (first_row + row) / group.heads;
        head = group.first + (first_row + row) % group.heads;
    }
    let line = (token * HEADS + head) * step.stride;

    var largest = LOWEST;
    if weighs {
        for (var k = begin + lane; k < end; k += PER_ROW) {
            largest = max(largest, scores[line + k]);
        }
    }
    scratch[local] = largest;
    workgroupBarrier();
    if weighs && lane == 0u {
        for (var i = 1u; i < PER_ROW; i++) {
            largest = max(largest, scratch[local + i]);
        }
        row_max[row] = largest;
    }
    workgroupBarrier();
    if weighs {
        largest = row_max[row];
    }
#if CODED
    var run = vec4<u32>();
    if coded && vector < group.width {
        run = table[group.runs + vector / 4u];
    }
#endif

    var total = 0.0;
    var acc: array<vec4<f32>, ROWS>;
    for (var tile = begin; tile < end; tile += KEYS) {
        let count = min(KEYS, end - tile);
        if row < ROWS {
            for (var k = lane; k < KEYS; k += PER_ROW) {
                var e = 0.0;
                if weighs && k < count {
                    e = exp(scores[line + tile + k] - largest);
                }
                p[row * KEYS + k] = e;
                total += e;
            }
        }
        workgroupBarrier();
        if vector < group.width {
#if CODED
            if coded {
                let first = tile - step.plain;
                for (var k = share; k < count; k += sharing) {
                    let v = unpack(row_key(group.first / GROUP, first + k) * step.words + group.at, run, vector % 4u);
                    for (var r = 0u; r < ROWS; r++) {
                        acc[r] += p[r * KEYS + k] * v;
                    }
                }
            } else {
#endif
                for (var k = share; k < count; k += sharing) {
                    let v = plain_value(tile + k, group.at + vector);
                    for (var r = 0u; r < ROWS; r++) {
                        acc[r] += p[r * KEYS + k] * v;
                    }
                }
#if CODED
            }
#endif
        }
        workgroupBarrier();
    }

    scratch[local] = total;
    for (var r = 0u; r < ROWS; r++) {
        ends[r * WORKGROUP + local] = acc[r];
    }
    workgroupBarrier();
    if weighs && lane == 0u && group.begin == 0u {
        for (var i = 1u; i < PER_ROW; i++) {
            total += scratch[local + i];
        }
        weights[(token * grid.x + id.x) * HEADS + head] = vec2<f32>(largest, total);
    }
    for (var i = local; i < ROWS * group.dims; i += WORKGROUP) {
        let q = first_row + i / group.dims;
        let v = group.begin + i % group.dims;
        if v < group.width && q < lines {
            var sum = vec4<f32>();
            for (var a = 0u; a < sharing; a++) {
                sum += ends[(i / group.dims) * WORKGROUP + a * group.dims + i % group.dims];
            }
            sums[((q / group.heads) * grid.x + id.x) * step.sums + group.sums + (q % group.heads) * group.width + v] = sum;
        }
    }
}
