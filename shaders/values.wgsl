// The weighted sum of cached value rows, over one split of the keys: with m the split's largest score and p = exp(score − m), writes Σ p · row, m and Σ p.
//
// Grid: x = splits, y = value groups · BLOCKS, z = blocks of ROWS rows. A row is one query head of one token; the query heads of a group sum the same slice of the
// value rows. Rows are summed as they are stored: nothing is rebuilt, whatever they are (a head's values, or latent rows that several heads share).
// Lanes: DIMS vectors of the slice × the keys; the latter are added up at the end.
#include "lib/half.wgsl"
#include "lib/lowest.wgsl"

struct Step {
    keys: u32,      // keys scored: columns of scores in use
    tokens: u32,
    start: u32,     // the key of column 0
    stride: u32,    // columns of scores
    length: u32,    // keys per split, a multiple of KEYS
}
var<immediate> step: Step;

struct Group {
    at: u32,    // vector at which the slice begins
    width: u32, // its vectors
    first: u32, // its first query head
    heads: u32, // its query heads
    sums: u32,  // vector of sums at which its first head begins; the others follow
}

@group(0) @binding(0) var<storage, read> scores: array<f32>;               // [tokens][HEADS][stride]
@group(0) @binding(1) var<storage, read> values: array<half4>;             // [capacity][VALUE_ROW / 4]
@group(0) @binding(2) var<storage, read> groups: array<Group>;
@group(0) @binding(3) var<storage, read_write> sums: array<vec4<f32>>;     // [tokens][splits][SUMS / 4]
@group(0) @binding(4) var<storage, read_write> weights: array<vec2<f32>>;  // [tokens][splits][HEADS]: m, Σ p

const PER_ROW = WORKGROUP / ROWS;   // lanes that look after one row's weights
const ALONG = WORKGROUP / DIMS;     // lanes that share a dimension

var<workgroup> p: array<f32, ROWS * KEYS>;
var<workgroup> row_max: array<f32, ROWS>;
var<workgroup> scratch: array<f32, WORKGROUP>;
var<workgroup> ends: array<vec4<f32>, ROWS * WORKGROUP>;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let group = groups[id.y / BLOCKS];
    let vector = (id.y % BLOCKS) * DIMS + local % DIMS;
    let along = local / DIMS;
    let begin = id.x * step.length;
    let end = min(begin + step.length, step.keys);
    let rows = step.tokens * group.heads;
    let first_row = id.z * ROWS;
    if first_row >= rows || (id.y % BLOCKS) * DIMS >= group.width {
        return; // the whole workgroup: before any barrier
    }

    // The row that this lane weighs, and its scores.
    let row = local / PER_ROW;
    let lane = local % PER_ROW;
    let weighs = row < ROWS && first_row + row < rows;
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
            for (var k = along; k < count; k += ALONG) {
                let v = widen(values[(step.start + tile + k) * (VALUE_ROW / 4u) + group.at + vector]);
                for (var r = 0u; r < ROWS; r++) {
                    acc[r] += p[r * KEYS + k] * v;
                }
            }
        }
        workgroupBarrier();
    }

    scratch[local] = total;
    for (var r = 0u; r < ROWS; r++) {
        ends[r * WORKGROUP + local] = acc[r];
    }
    workgroupBarrier();
    if weighs && lane == 0u && id.y % BLOCKS == 0u {
        for (var i = 1u; i < PER_ROW; i++) {
            total += scratch[local + i];
        }
        weights[(token * grid.x + id.x) * HEADS + head] = vec2<f32>(largest, total);
    }
    for (var i = local; i < ROWS * DIMS; i += WORKGROUP) {
        let q = first_row + i / DIMS;
        let v = (id.y % BLOCKS) * DIMS + i % DIMS;
        if v < group.width && q < rows {
            var sum = vec4<f32>();
            for (var a = 0u; a < ALONG; a++) {
                sum += ends[(i / DIMS) * WORKGROUP + a * DIMS + i % DIMS];
            }
            sums[((q / group.heads) * grid.x + id.x) * (SUMS / 4u) + group.sums + (q % group.heads) * group.width + v] = sum;
        }
    }
}
