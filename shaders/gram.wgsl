// Sums over tokens of products of their numbers: out[i][j] += Σ_t x[t][i] · x[t][j], and in a line
// after the last, out[width][j] += Σ_t x[t][j].
//
// Grid: x = tiles of j, y = tiles of i. A lane has SIDE × SIDE of a tile's sums; tokens are brought
// into workgroup memory some at a time.
struct Params {
    tokens: u32,
    width: u32,
    stride: u32, // numbers from one token to the next in x
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> x: array<f32>;            // [tokens][stride]
@group(0) @binding(1) var<storage, read_write> out: array<f32>;    // [width + 1][width]

const SIDE = 4u;
const LANES = 8u;            // along either side of a tile
const TILE = SIDE * LANES;
const TOKENS = 16u;

var<workgroup> left: array<f32, TOKENS * TILE>;
var<workgroup> right: array<f32, TOKENS * TILE>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let i0 = group.y * TILE;
    let j0 = group.x * TILE;
    var sums: array<array<f32, SIDE>, SIDE>;
    for (var begin = 0u; begin < params.tokens; begin += TOKENS) {
        workgroupBarrier();
        for (var n = local; n < TOKENS * TILE; n += 64u) {
            let t = begin + n / TILE;
            let i = i0 + n % TILE;
            let j = j0 + n % TILE;
            let there = t < params.tokens;
            left[n] = 0.0;
            right[n] = 0.0;
            if there && i < params.width {
                left[n] = x[t * params.stride + i];
            }
            if there && i == params.width {
                left[n] = 1.0;
            }
            if there && j < params.width {
                right[n] = x[t * params.stride + j];
            }
        }
        workgroupBarrier();
        for (var t = 0u; t < TOKENS; t++) {
            for (var a = 0u; a < SIDE; a++) {
                let l = left[t * TILE + (local / LANES) * SIDE + a];
                for (var b = 0u; b < SIDE; b++) {
                    sums[a][b] = fma(l, right[t * TILE + (local % LANES) * SIDE + b], sums[a][b]);
                }
            }
        }
    }
    for (var a = 0u; a < SIDE; a++) {
        for (var b = 0u; b < SIDE; b++) {
            let i = i0 + (local / LANES) * SIDE + a;
            let j = j0 + (local % LANES) * SIDE + b;
            if i <= params.width && j < params.width {
                out[i * params.width + j] += sums[a][b];
            }
        }
    }
}
