// Tokens through the matrices of those experts that they go through; of no others is anything read.
//
// Grid: x = tokens, or where not SUMMED their slots; y = blocks of ROWS rows of an expert. So many
// tokens that go through the same expert follow each other, and find its block where the first has
// brought it.
//
// Each team of lanes takes UNROLL rows at a time, its lanes striding along k. A team is a subgroup,
// of whatever size the device forms; without subgroups it is TEAM lanes that meet in workgroup
// memory.
//
// lib/weights.wgsl says how weights are stored: all rows of an expert, then those of the next.
//
// SUMMED   the last matrices: out[t][row] += scale · Σ_slot share · W[expert][row] · x[t][slot]
// else     the first, rows in pairs (gate, up): out[t][slot][row / 2] = σ(gate) · up
// CLAMPED  gate and up become (up + 1) · gate / (1 + exp(−alpha · gate)), clamped by limit
// BIAS     products have one, before they are weighed
// RAGGED   the last loads of a row reach beyond x, which counts as zeros there
#include "lib/weights.wgsl"
#if ACTIVATED
#include "lib/activation.wgsl"
#endif

struct Params {
    first: u32,  // expert at which this part begins
    count: u32,  // experts of this part
    rows: u32,   // rows of an expert
    width: u32,  // K / 4
    stride: u32, // numbers from one line of out to the next
    scale: f32,  // (SUMMED)
    alpha: f32,  // (CLAMPED)
    limit: f32,  // (CLAMPED)
}
var<immediate> params: Params;

@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;        // [tokens][width], of each slot where SUMMED
@group(0) @binding(2) var<storage, read_write> out: array<f32>;      // [tokens][stride], of each slot where not
#if BIAS
@group(0) @binding(3) var<storage, read> bias: array<f32>;           // [all experts][rows]
#endif
@group(0) @binding(6) var<storage, read> routes: array<vec2<u32>>;   // [tokens][SLOTS]: expert, and its share, an f32

#if !SUBGROUPS
var<workgroup> partial: array<array<f32, UNROLL>, WORKGROUP>;
#endif

#if CLAMPED
fn gated(gate: f32, up: f32) -> f32 {
    // min and max would lose what is no number.
    let g = select(gate, params.limit, gate > params.limit);
    let u = select(select(up, params.limit, up > params.limit), -params.limit, up < -params.limit);
    return (u + 1.0) * g / (1.0 + exp(-params.alpha * g));
}
#endif
#if ACTIVATED
fn gated(gate: f32, up: f32) -> f32 {
    return activate(gate) * up;
}
#endif

// A lane's part of the products of UNROLL rows, which begin at these loads, with x from a vector
// on.
fn multiply(base: array<u32, UNROLL>, first: u32, lane: u32, lanes: u32, loads_of_row: u32) -> array<f32, UNROLL> {
    let begin = base;
    var sums: array<f32, UNROLL>;
    for (var at = lane; at < loads_of_row; at += lanes) {
        var loads: array<Load, UNROLL>;
        for (var u = 0u; u < UNROLL; u++) {
            loads[u] = fetch(begin[u] + at);
        }
        for (var p = 0u; p < PIECES; p++) {
            var v: array<vec4<f32>, QUADS>;
            var totals: array<f32, QUADS>;
            for (var q = 0u; q < QUADS; q++) {
                let i = place(at, p, q);
#if RAGGED
                v[q] = select(vec4<f32>(), x[first + min(i, params.width - 1u)], i < params.width);
#else
                v[q] = x[first + i];
#endif
                totals[q] = v[q].x + v[q].y + v[q].z + v[q].w;
            }
            for (var u = 0u; u < UNROLL; u++) {
                sums[u] = multiply_add(loads[u], p, v, totals, sums[u]);
            }
        }
    }
    return sums;
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
#if SUBGROUPS
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
    @builtin(num_subgroups) teams: u32,
#endif
) {
#if SUBGROUPS
    // A subgroup may be wider than the workgroup; the lanes beyond it do not run.
    let lanes = min(size, WORKGROUP);
#else
    let lanes = TEAM;
    let lane = local % TEAM;
    let subgroup = local / TEAM;
    let teams = WORKGROUP / TEAM;
#endif
#if SUMMED
    let token = group.x;
    let slot = 0u;
    let end = SLOTS;
#else
    let token = group.x / SLOTS;
    let slot = group.x % SLOTS;
    let end = slot + 1u;
#endif
    let loads_of_row = row_loads(params.width);

    // Every team passes through the loop equally often: without subgroups there are barriers in it.
    for (var pass_row = 0u; pass_row < ROWS; pass_row += teams * UNROLL) {
        let offset = pass_row + subgroup * UNROLL;
        let row = group.y * ROWS + offset;
        let inside = offset < ROWS && row < params.rows;
        var sums: array<f32, UNROLL>;
        for (var s = slot; s < end; s++) {
            let route = routes[token * SLOTS + s];
            // One of another part is beyond this one's, whatever side of it.
            let expert = route.x - params.first;
            if inside && expert < params.count {
                var base: array<u32, UNROLL>;
                for (var u = 0u; u < UNROLL; u++) {
                    base[u] = (expert * params.rows + min(row + u, params.rows - 1u)) * loads_of_row;
                }
#if SUMMED
                var products = multiply(base, (token * SLOTS + s) * params.width, lane, lanes, loads_of_row);
                let share = bitcast<f32>(route.y);
                for (var u = 0u; u < UNROLL; u++) {
#if BIAS
                    if lane == 0u {
                        products[u] += bias[route.x * params.rows + min(row + u, params.rows - 1u)];
                    }
#endif
                    sums[u] += share * products[u];
                }
#else
                sums = multiply(base, token * params.width, lane, lanes, loads_of_row);
#endif
            }
        }
#if SUBGROUPS
        for (var u = 0u; u < UNROLL; u++) {
            sums[u] = subgroupAdd(sums[u]);
        }
#else
        partial[local] = sums;
        workgroupBarrier();
        if lane == 0u {
            for (var i = 1u; i < TEAM; i++) {
                for (var u = 0u; u < UNROLL; u++) {
                    sums[u] += partial[local + i][u];
                }
            }
        }
        workgroupBarrier();
#endif
        if lane == 0u && inside {
#if SUMMED
            for (var u = 0u; u < UNROLL; u++) {
                if row + u < params.rows {
                    out[token * params.stride + row + u] += params.scale * sums[u];
                }
            }
#else
            let route = routes[token * SLOTS + slot];
            if route.x - params.first < params.count {
                for (var u = 0u; u < UNROLL; u += 2u) {
                    if row + u < params.rows {
                        var pair = vec2<f32>(sums[u], sums[u + 1u]);
#if BIAS
                        let at = route.x * params.rows + row + u;
                        pair += vec2<f32>(bias[at], bias[at + 1u]);
#endif
                        out[(token * SLOTS + slot) * params.stride + (row + u) / 2u] = gated(pair.x, pair.y);
                    }
                }
            }
#endif
        }
    }
}
