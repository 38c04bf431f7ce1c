// One token, or a few, through one matrix of quantised weights, multiplied in integers: out[t][row]
// = Σ_k weights[row][k] · x[t][k], where x is quantised too, in 8 bits with a step for each group
// of 32. Four products take one instruction where a device has it.
//
// Grid: x = tokens, so that those run side by side that read the same weights; y·z = blocks of ROWS
// rows. A workgroup first quantises its token's x into workgroup memory. Then each subgroup takes
// UNROLL rows at a time, its lanes striding along k. A lane loads AHEAD times from each of its rows
// before it multiplies.
//
// A sum of eight products fits in an integer, and is exact. What is lost is what x loses.
//
// lib/weights.wgsl says how weights are stored, and lib/product.wgsl what becomes of sums. The last
// loads of a row may reach beyond x, which counts as zeros there.
#include "lib/weights.wgsl"
#include "lib/product.wgsl"

const HALVES = PIECES / 2u; // of a load, each two pieces: of two groups

// By half of a load and load, the codes of what it is multiplied with; by set and half, the steps
// of its two groups.
var<workgroup> x_codes: array<vec4<u32>, HALVES * LOADS>;
var<workgroup> x_steps: array<vec2<f32>, HALVES * LOADS / 4u>;
#if NORM
var<workgroup> squares_of: array<f32, WORKGROUP>;
#endif

// Of the magnitudes of two vectors' numbers the bits of the largest: as integers they are in the
// order of the numbers, and what is no number is above all.
fn largest(a: vec4<f32>, b: vec4<f32>) -> u32 {
    let all = max(bitcast<vec4<u32>>(a) & vec4<u32>(0x7fffffffu), bitcast<vec4<u32>>(b) & vec4<u32>(0x7fffffffu));
    return max(max(all.x, all.y), max(all.z, all.w));
}

// Quantises the token, and gives the lane's part of the sum of squares. Four lanes have the same
// two groups.
fn quantise(token: u32, me: u32) -> f32 {
    var squares = 0.0;
    for (var begin = 0u; begin < HALVES * LOADS; begin += WORKGROUP) {
        let i = begin + me;
        let half = i / 4u % HALVES;
        let at = i / (4u * HALVES) * 4u + i % 4u;
        var v: array<vec4<f32>, 4>;
        for (var j = 0u; j < 4u; j++) {
            let k = place(at, 2u * half + j / 2u, j % 2u);
            if i < HALVES * LOADS && k < params.width {
                v[j] = x[token * params.width + k];
#if NORM
                squares = dot_add(v[j], v[j], squares);
                v[j] *= gain[k];
#endif
            }
        }
        var most = vec2<u32>(largest(v[0], v[1]), largest(v[2], v[3]));
        most = max(most, subgroupShuffleXor(most, 1u));
        most = max(most, subgroupShuffleXor(most, 2u));
        let step = bitcast<vec2<f32>>(most) / 127.0;
        let inverse = select(1.0 / step, vec2<f32>(), most == vec2<u32>());
        if i < HALVES * LOADS {
            x_codes[half * LOADS + at] = vec4<u32>(code(v[0] * inverse.x), code(v[1] * inverse.x), code(v[2] * inverse.y), code(v[3] * inverse.y));
            if i % 4u == 0u {
                x_steps[i / 4u] = step;
            }
        }
    }
    return squares;
}

fn code(v: vec4<f32>) -> u32 {
    return pack4xI8(vec4<i32>(round(v)));
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
    @builtin(num_subgroups) teams: u32,
) {
    // A subgroup may be wider than the workgroup; the lanes beyond it do not run.
    let lanes = min(size, WORKGROUP);
    let token = group.x;
    let block = (group.z * groups.y + group.y) * ROWS;
    let squares = quantise(token, subgroup * lanes + lane);
    var scale = 1.0 / f32(CODE_SCALE);
#if NORM
    let all = subgroupAdd(squares);
    if lane == 0u {
        squares_of[subgroup] = all;
    }
    workgroupBarrier();
    var total = 0.0;
    for (var i = 0u; i < teams; i++) {
        total += squares_of[i];
    }
    scale *= inverseSqrt(total / f32(params.count) + params.epsilon);
#else
    workgroupBarrier();
#endif

    for (var offset = subgroup * UNROLL; offset < ROWS; offset += teams * UNROLL) {
        let row = block + offset;
        if row >= params.rows {
            break; // the whole subgroup
        }
        var sums: array<f32, UNROLL>;
        var base: array<u32, UNROLL>;
        for (var u = 0u; u < UNROLL; u++) {
            base[u] = min(row + u, params.rows - 1u) * LOADS;
        }
        for (var k = lane; k < LOADS; k += lanes * AHEAD) {
            var loads: array<array<Load, UNROLL>, AHEAD>;
            for (var a = 0u; a < AHEAD; a++) {
                let at = select(min(k + a * lanes, LOADS - 1u), k, a == 0u);
                for (var u = 0u; u < UNROLL; u++) {
                    loads[a][u] = fetch(base[u] + at);
                }
            }
            for (var a = 0u; a < AHEAD; a++) {
                // Past the row's end its last load is read again, and counts for nothing.
                let there = a == 0u || k + a * lanes < LOADS;
                let at = select(0u, k + a * lanes, there);
                if a > 0u {
                    for (var u = 0u; u < UNROLL; u++) {
                        loads[a][u] = only_if(there, loads[a][u]);
                    }
                }
                for (var half = 0u; half < HALVES; half++) {
                    let codes = x_codes[half * LOADS + at];
                    let steps = x_steps[at / 4u * HALVES + half];
                    for (var p = 0u; p < 2u; p++) {
                        let these = vec2<u32>(codes[2u * p], codes[2u * p + 1u]);
                        for (var u = 0u; u < UNROLL; u++) {
                            sums[u] = fma(steps[p], multiply_codes(loads[a][u], 2u * half + p, these), sums[u]);
                        }
                    }
                }
            }
        }
        for (var u = 0u; u < UNROLL; u++) {
            sums[u] = subgroupAdd(sums[u]);
        }
        if lane == 0u {
            finish(row, token, sums, scale);
        }
    }
}
