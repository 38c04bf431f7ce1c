// One token, or a few, through one weight matrix: out[t][row] = Σ_k weights[row][k] · x[t][k], in
// f32.
//
// Grid: x·y = blocks of ROWS rows. Each team of lanes takes UNROLL rows at a time, its lanes
// striding along k, so that neighbouring lanes read neighbouring weights and a vector of x is read
// once for UNROLL rows. A team is a subgroup, of whatever size the device forms; without subgroups
// it is TEAM lanes that meet in workgroup memory. A lane loads AHEAD times from each of its rows
// before it multiplies. Weights are read once for up to COLUMNS tokens.
//
// lib/weights.wgsl says how weights are stored, and lib/product.wgsl what becomes of sums.
//
// RAGGED  the last loads of a row reach beyond x, which counts as zeros there
#include "lib/weights.wgsl"
#include "lib/product.wgsl"

#if !SUBGROUPS
var<workgroup> partial: array<array<f32, UNROLL>, WORKGROUP>;
#if NORM
var<workgroup> squares_of: array<f32, WORKGROUP>;
#endif
#endif

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
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
    let block = (group.y * groups.x + group.x) * ROWS;
    let loads_of_row = row_loads(params.width);

    // Every team passes through the loop equally often: without subgroups there are barriers in it.
    for (var pass_row = 0u; pass_row < ROWS; pass_row += teams * UNROLL) {
        let offset = pass_row + subgroup * UNROLL;
        let row = block + offset;
        var sums: array<array<f32, UNROLL>, COLUMNS>;
        var squares: array<f32, COLUMNS>;
        if offset < ROWS && row < params.rows {
            var base: array<u32, UNROLL>;
            for (var u = 0u; u < UNROLL; u++) {
                base[u] = min(row + u, params.rows - 1u) * loads_of_row;
            }
            for (var k = lane; k < loads_of_row; k += lanes * AHEAD) {
                // Past the row's end its last load is read again, and counts for nothing.
                var loads: array<array<Load, UNROLL>, AHEAD>;
                for (var a = 0u; a < AHEAD; a++) {
                    let at = select(min(k + a * lanes, loads_of_row - 1u), k, a == 0u);
                    for (var u = 0u; u < UNROLL; u++) {
                        loads[a][u] = fetch(base[u] + at);
                    }
                }
                for (var a = 0u; a < AHEAD; a++) {
                    let there = a == 0u || k + a * lanes < loads_of_row;
                    let at = select(0u, k + a * lanes, there);
                    if a > 0u {
                        for (var u = 0u; u < UNROLL; u++) {
                            loads[a][u] = only_if(there, loads[a][u]);
                        }
                    }
                    for (var p = 0u; p < PIECES; p++) {
                        for (var c = 0u; c < COLUMNS; c++) {
                            // Past the last token it is read again, and what comes of it is not
                            // written.
                            let token = select(0u, min(c, params.tokens - 1u) * params.width, COLUMNS > 1u);
                            var v: array<vec4<f32>, QUADS>;
                            var totals: array<f32, QUADS>;
                            for (var q = 0u; q < QUADS; q++) {
                                var i = place(at, p, q);
#if RAGGED
                                let inside = i < params.width;
                                i = min(i, params.width - 1u);
                                v[q] = select(vec4<f32>(), x[token + i], inside);
#else
                                v[q] = x[token + i];
#endif
#if NORM
                                squares[c] = select(squares[c], dot_add(v[q], v[q], squares[c]), there);
                                v[q] *= gain[i];
#endif
                                totals[q] = v[q].x + v[q].y + v[q].z + v[q].w;
                            }
                            for (var u = 0u; u < UNROLL; u++) {
                                sums[c][u] = multiply_add(loads[a][u], p, v, totals, sums[c][u]);
                            }
                        }
                    }
                }
            }
        }
        for (var c = 0u; c < COLUMNS; c++) {
#if SUBGROUPS
            for (var u = 0u; u < UNROLL; u++) {
                sums[c][u] = subgroupAdd(sums[c][u]);
            }
            squares[c] = subgroupAdd(squares[c]);
            if lane == 0u && offset < ROWS && c < params.tokens {
#else
            // One lane adds up its team's: a tree would take a barrier for every level, and those
            // are what costs here.
            partial[local] = sums[c];
#if NORM
            squares_of[local] = squares[c];
#endif
            workgroupBarrier();
            if lane == 0u {
                for (var i = 1u; i < TEAM; i++) {
                    for (var u = 0u; u < UNROLL; u++) {
                        sums[c][u] += partial[local + i][u];
                    }
#if NORM
                    squares[c] += squares_of[local + i];
#endif
                }
            }
            workgroupBarrier();
            if lane == 0u && offset < ROWS && c < params.tokens {
#endif
#if NORM
                let scale = inverseSqrt(squares[c] / f32(params.count) + params.epsilon);
#else
                let scale = 1.0;
#endif
                finish(row, c, sums[c], scale);
            }
        }
    }
}
