// Many tokens through one weight matrix: out[t][row] = Σ_k x[t][k] · weights[row][k], in f32.
//
// Grid: x = blocks of BN rows, y = blocks of BM tokens. A workgroup walks along k in steps of BK,
// staging both operands in workgroup memory as f32; each of its (BM / TM)·(BN / TN) lanes keeps TM
// × TN sums in registers.
//
// GATED     rows come in pairs (gate, up): out[t][row / 2] = silu(gate) · up, or another
//           activation's
// RESIDUAL  out[t][row] += …, and BIAS adds bias[row]
// MORE      something of lib/finish.wgsl
//
// lib/weights.wgsl says how weights are stored.
#include "lib/weights.wgsl"

struct Params {
    first: u32,  // row of the whole matrix at which this part begins
    rows: u32,   // rows of this part
    width: u32,  // K / 4
    tokens: u32,
    stride: u32, // numbers from one token to the next in out
#if MORE
    scale: f32,
    cap: f32,
#endif
}
var<immediate> params: Params;
#if MORE
#include "lib/finish.wgsl"
#endif

@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;    // [tokens][width]
@group(0) @binding(2) var<storage, read_write> out: array<f32>;  // [tokens][stride]
#if BIAS
@group(0) @binding(3) var<storage, read> bias: array<f32>;       // [all rows]
#endif

const ACROSS = BN / TN;  // lanes along rows
const DOWN = BM / TM;    // lanes along tokens
const VECTORS = BK / 4u; // vectors of one row in a step

// [vector][row], so that neighbouring lanes read neighbouring vectors
var<workgroup> xs: array<vec4<f32>, VECTORS * BM>;
var<workgroup> ws: array<vec4<f32>, VECTORS * BN>;

// The row, within the block, of a lane's j-th sum. Pairs stay in one lane.
fn row_of(across: u32, j: u32) -> u32 {
#if GATED
    return (across + (j / 2u) * ACROSS) * 2u + j % 2u;
#else
    return across + j * ACROSS;
#endif
}

@compute @workgroup_size(ACROSS * DOWN)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let block_row = group.x * BN;
    let block_token = group.y * BM;
    let across = local % ACROSS;
    let down = local / ACROSS;
    let loads_of_row = row_loads(params.width);
    var sums: array<array<f32, TN>, TM>;

    for (var k = 0u; k < params.width; k += VECTORS) {
        for (var i = local; i < VECTORS * BM; i += ACROSS * DOWN) {
            let v = i % VECTORS;
            let t = block_token + i / VECTORS;
            var value = vec4<f32>();
            if t < params.tokens && k + v < params.width {
                value = x[t * params.width + k + v];
            }
            xs[v * BM + i / VECTORS] = value;
        }
        for (var i = local; i < VECTORS * BN; i += ACROSS * DOWN) {
            let v = i % VECTORS;
            let row = block_row + i / VECTORS;
            var value = vec4<f32>();
            if row < params.rows && k + v < params.width {
                value = weights_at(row, loads_of_row, k + v);
            }
            ws[v * BN + i / VECTORS] = value;
        }
        workgroupBarrier();
        for (var v = 0u; v < VECTORS; v++) {
            var w: array<vec4<f32>, TN>;
            for (var j = 0u; j < TN; j++) {
                w[j] = ws[v * BN + row_of(across, j)];
            }
            for (var i = 0u; i < TM; i++) {
                let a = xs[v * BM + down + i * DOWN];
                for (var j = 0u; j < TN; j++) {
                    sums[i][j] = dot_add(a, w[j], sums[i][j]);
                }
            }
        }
        workgroupBarrier();
    }

    for (var i = 0u; i < TM; i++) {
        let t = block_token + down + i * DOWN;
        if t >= params.tokens {
            continue;
        }
#if GATED
        for (var j = 0u; j < TN; j += 2u) {
            let row = block_row + row_of(across, j);
            if row < params.rows {
#if MORE
                var pair = vec2<f32>(sums[i][j], sums[i][j + 1u]);
#if BIAS
                pair += vec2<f32>(bias[params.first + row], bias[params.first + row + 1u]);
#endif
                out[t * params.stride + (params.first + row) / 2u] = activate(pair.x) * pair.y;
#else
                let gate = sums[i][j];
                out[t * params.stride + (params.first + row) / 2u] = gate / (1.0 + exp(-gate)) * sums[i][j + 1u];
#endif
            }
        }
#else
        for (var j = 0u; j < TN; j++) {
            let row = block_row + row_of(across, j);
            if row < params.rows {
                let at = t * params.stride + params.first + row;
                var y = sums[i][j];
#if BIAS
                y += bias[params.first + row];
#endif
#if MORE
                y = finished(y);
#endif
#if RESIDUAL
                y += out[at];
#endif
                out[at] = y;
            }
        }
#endif
    }
}
