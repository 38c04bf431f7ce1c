// The weighted sum of cached value rows, over one split of the columns: with m the split's largest
// score and p = exp(score − m), writes Σ p · row, m and Σ p.
//
// Grid: x = splits, those of coded columns last; y = entries of the table of groups, either the
// exact ones or the coded ones; z = blocks of ROWS rows. A row is one query head of one token; the
// query heads of a group sum the same slice of the value rows, and an entry is up to WORKGROUP
// vectors of it. Rows are summed as they are stored: a head's exact values, or coordinates that
// several heads share. Lanes: vectors of the entry × the keys; the latter are added up at the end.
// A lane loads IN_FLIGHT of its keys before it adds the first: KEYS is a multiple of as many for
// all lanes.
//
// Plain columns, of rows in f16, come first, then coded ones (lib/columns.wgsl); a split is of
// either kind.
//
// CODED     there are coded columns
// LISTED    they are those of a list; where each key/value head has its own, a group is of one
//           head's queries
// COUNTED   the last COUNTED_COLUMNS of the plain columns are rows of their own
#include "lib/half.wgsl"
#include "lib/lowest.wgsl"
#include "lib/columns.wgsl"
#if CODED
#include "lib/rows.wgsl"
#endif

struct Params {
    plain: u32,   // plain columns
    coded: u32,   // (CODED) coded columns
    tokens: u32,
    stride: u32,  // columns of scores
    length: u32,  // plain columns in a split, a multiple of KEYS
    along: u32,   // (CODED) coded columns in a split, a multiple of KEYS
    sums: u32,    // vectors of sums in a split
    entries: u32, // entries of plain columns; the coded ones follow
    all: u32,     // all entries
    start: u32,   // (CODED) as in lib/columns.wgsl
    words: u32,   // (CODED) words of a token in rows
    fixed: u32,   // three as in lib/columns.wgsl's Plain
    exact: u32,
    base: u32,
    sinks: u32,
    ring: u32,
}
var<immediate> params: Params;

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
#if COUNTED
@group(0) @binding(7) var<storage, read> counted: array<half4>;            // [COUNTED_COLUMNS][EXACT_ROW / 4]
#endif

const PER_ROW = WORKGROUP / ROWS; // lanes that look after one row's weights
const PASSES = (KEYS + PER_ROW - 1u) / PER_ROW;
const SLAB = min(ROWS, ENDS); // rows that are added up at a time

const FOURS = (ROWS + 3u) / 4u; // vectors of one key's weights

var<workgroup> p: array<vec4<f32>, KEYS * FOURS>; // [KEYS][FOURS]: by row
var<workgroup> row_max: array<f32, ROWS>;
var<workgroup> scratch: array<f32, WORKGROUP>;
var<workgroup> ends: array<vec4<f32>, SLAB * WORKGROUP>;

// A vector of the value of a plain column.
fn plain_value(plain: Plain, column: u32, vector: u32) -> half4 {
#if COUNTED
    if column + COUNTED_COLUMNS >= params.plain {
        return counted[(column + COUNTED_COLUMNS - params.plain) * (EXACT_ROW / 4u) + vector];
    }
#endif
    return values[plain_slot(plain, column) * (EXACT_ROW / 4u) + vector];
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    var entry = id.y;
    var begin = id.x * params.length;
    var end = min(begin + params.length, params.plain);
    var entries_end = params.entries;
#if CODED
    if TOGETHER {
        load_book(local);
    }
    let splits = (params.plain + max(params.length, 1u) - 1u) / max(params.length, 1u);
    let coded = id.x >= splits;
    if coded {
        entry += params.entries;
        entries_end = params.all;
        begin = params.plain + (id.x - splits) * params.along;
        end = min(begin + params.along, params.plain + params.coded);
    }
#endif
    if entry >= entries_end {
        return; // the whole workgroup: before any barrier
    }
    let group = groups[entry];
    let plain = Plain(params.fixed, params.exact, params.base);
    let lines = params.tokens * group.heads;
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
    let line = (token * HEADS + head) * params.stride;

    var largest = LOWEST;
    if weighs {
        for (var tile = begin; tile < end; tile += KEYS) {
            for (var i = 0u; i < PASSES; i++) {
                largest = max(largest, scores[line + min(tile + lane + i * PER_ROW, end - 1u)]);
            }
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
            for (var i = 0u; i < PASSES; i++) {
                let k = lane + i * PER_ROW;
                let e = exp(scores[line + tile + min(k, count - 1u)] - largest);
                if k < KEYS {
                    let weight = select(0.0, e, weighs && k < count);
                    p[k * FOURS + row / 4u][row % 4u] = weight;
                    total += weight;
                }
            }
        }
        workgroupBarrier();
        if vector < group.width {
#if CODED
            if coded {
                let first = tile - params.plain;
                for (var k = share; k < count; k += sharing * IN_FLIGHT) {
                    var words: array<Fetched, IN_FLIGHT>;
                    var row_scales: array<u32, IN_FLIGHT>;
                    for (var j = 0u; j < IN_FLIGHT; j++) {
                        let key = coded_row(group.first / GROUP, first + min(k + j * sharing, count - 1u));
                        words[j] = fetch(key, group.at, run, vector % 4u);
                        row_scales[j] = scales(key, group.at);
                    }
                    for (var j = 0u; j < IN_FLIGHT; j++) {
                        let v = decode(words[j], row_scales[j], run, vector % 4u);
                        for (var r = 0u; r < ROWS; r++) {
                            acc[r] += p[(k + j * sharing) * FOURS + r / 4u][r % 4u] * v;
                        }
                    }
                }
            } else {
#endif
                for (var k = share; k < count; k += sharing * IN_FLIGHT) {
                    // Past the last key it is read again, and weighs nothing.
                    var v: array<vec4<f32>, IN_FLIGHT>;
                    for (var j = 0u; j < IN_FLIGHT; j++) {
                        v[j] = widen(plain_value(plain, tile + min(k + j * sharing, count - 1u), group.at + vector));
                    }
                    for (var j = 0u; j < IN_FLIGHT; j++) {
                        for (var r = 0u; r < ROWS; r++) {
                            acc[r] += p[(k + j * sharing) * FOURS + r / 4u][r % 4u] * v[j];
                        }
                    }
                }
#if CODED
            }
#endif
        }
        workgroupBarrier();
    }

    scratch[local] = total;
    workgroupBarrier();
    if weighs && lane == 0u && group.begin == 0u {
        for (var i = 1u; i < PER_ROW; i++) {
            total += scratch[local + i];
        }
        weights[(token * grid.x + id.x) * HEADS + head] = vec2<f32>(largest, total);
    }
    for (var slab = 0u; slab < ROWS; slab += SLAB) {
        for (var r = 0u; r < SLAB; r++) {
            ends[r * WORKGROUP + local] = acc[min(slab + r, ROWS - 1u)];
        }
        workgroupBarrier();
        for (var i = local; i < min(SLAB, ROWS - slab) * group.dims; i += WORKGROUP) {
            let q = first_row + slab + i / group.dims;
            let v = group.begin + i % group.dims;
            if v < group.width && q < lines {
                var sum = vec4<f32>();
                for (var a = 0u; a < sharing; a++) {
                    sum += ends[(i / group.dims) * WORKGROUP + a * group.dims + i % group.dims];
                }
                sums[((q / group.heads) * grid.x + id.x) * params.sums + group.sums + (q % group.heads) * group.width + v] = sum;
            }
        }
        workgroupBarrier();
    }
}
