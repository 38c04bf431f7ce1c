// A matrix of weights, as its rows are stored: f16, f32, or of a few bits.
//
// A load is what a lane reads of a row at once: PIECES pieces of QUADS vectors of four weights.
// Quantised weights stand as src/gpu/quantised.rs says: a piece is eight weights of one group of
// 32, and load `at` of a row has pieces of all groups of its set, so that neighbouring lanes
// multiply neighbouring vectors of x.
//
// FULL      f32
// PAIRED    a load of f16 is two vectors of a row, which has an even number of them
// QUANTISED codes and scales; codes of 4 bits, or of 5 (FIVE), 6 (SIX), 8 (BYTES)
// INT8      codes are multiplied by codes, in integers
// SINGLE    a group has a scale; else a scale and a minimum, or (SIX) a scale for each half
#include "lib/half.wgsl"

#if QUANTISED
@group(0) @binding(0) var<storage, read> weights: array<vec4<u32>>; // [rows][loads] of codes

const QUADS = 2u;
#if BYTES
const PIECES = 2u;
alias Scales = u32;
#else
const PIECES = 4u;
#if SINGLE
alias Scales = vec2<u32>;
#else
alias Scales = vec4<u32>;
#endif
#endif
@group(0) @binding(4) var<storage, read> scales: array<Scales>;     // [rows][loads / 4]

#if FIVE
@group(0) @binding(5) var<storage, read> upper: array<u32>;         // [rows][loads]
#endif
#if SIX
@group(0) @binding(5) var<storage, read> upper: array<vec2<u32>>;   // [rows][loads]
#endif

struct Load {
    codes: vec4<u32>,
    scales: Scales,
#if FIVE
    upper: u32,
#endif
#if SIX
    upper: vec2<u32>,
#endif
}

// Loads of a row of so many vectors.
fn row_loads(width: u32) -> u32 {
    return (width + 8u * PIECES - 1u) / (8u * PIECES) * 4u;
}

fn fetch(i: u32) -> Load {
    var load: Load;
    load.codes = weights[i];
    load.scales = scales[i / 4u];
#if FIVE
    load.upper = upper[i];
#endif
#if SIX
    load.upper = upper[i];
#endif
    return load;
}

// A load, or one that multiplies to nothing.
fn only_if(there: bool, load: Load) -> Load {
    var kept = load;
    kept.scales = select(Scales(), load.scales, there);
    return kept;
}

// The vector of a row that is quad q of piece p of load `at`.
fn place(at: u32, p: u32, q: u32) -> u32 {
    return (at / 4u * PIECES + p) * 8u + q * 4u + at % 4u;
}

// The codes of a quad, a byte each.
fn quad_bytes(load: Load, p: u32, q: u32) -> u32 {
#if BYTES
    return load.codes[2u * p + q];
#else
    var above = 0u;
#if FIVE
    above = load.upper >> (2u * p + q);
#endif
#if SIX
    above = load.upper[p / 2u] >> (4u * (p % 2u) + 2u * q);
#endif
    return bytes(load.codes[p], above, q);
#endif
}

#if !BYTES
// Of a word with the lowest bits of two quads and one with upper bits.
fn bytes(word: u32, above: u32, q: u32) -> u32 {
    var all = (word >> (4u * q)) & 0x0f0f0f0fu;
#if FIVE
    all |= (above & 0x01010101u) << 4u;
#endif
#if SIX
    all |= (above & 0x03030303u) << 4u;
#endif
    return all;
}
#endif

fn quad(load: Load, p: u32, q: u32) -> vec4<f32> {
    return vec4<f32>(unpack4xU8(quad_bytes(load, p, q)));
}

// The numbers of a piece's group.
fn numbers(words: Scales, p: u32) -> vec2<f32> {
#if SINGLE
#if BYTES
    let pair = unpack2x16float(words);
#else
    let pair = unpack2x16float(words[p / 2u]);
#endif
    return vec2<f32>(select(pair.x, pair.y, p % 2u == 1u), 0.0);
#else
    return unpack2x16float(words[p]);
#endif
}

// c and the products of a piece with its part of x, whose vectors' sums are `totals`.
//
// What all codes have in common is multiplied by the sum, which is the same for all rows.
fn multiply_add(load: Load, p: u32, x: array<vec4<f32>, QUADS>, totals: array<f32, QUADS>, c: f32) -> f32 {
    let group = numbers(load.scales, p);
#if SINGLE
    let before = -f32(OFFSET) * (totals[0] + totals[1]);
    return fma(group.x, dot_add(quad(load, p, 1u), x[1], dot_add(quad(load, p, 0u), x[0], before)), c);
#else
#if SIX
    let first = dot_add(quad(load, p, 0u), x[0], -f32(OFFSET) * totals[0]);
    return fma(group.y, dot_add(quad(load, p, 1u), x[1], -f32(OFFSET) * totals[1]), fma(group.x, first, c));
#else
    let product = dot_add(quad(load, p, 1u), x[1], dot_add(quad(load, p, 0u), x[0], 0.0));
    return fma(group.x, product, fma(group.y, totals[0] + totals[1], c));
#endif
#endif
}

#if INT8
// Without a minimum codes are signed, in the upper bits of a byte each: so many times as large.
#if BYTES
const CODE_SCALE = 1u;
#else
#if SINGLE
#if FIVE
const CODE_SCALE = 8u;
#else
const CODE_SCALE = 16u;
#endif
#else
#if SIX
const CODE_SCALE = 4u;
#else
const CODE_SCALE = 1u;
#endif
#endif
#endif

fn signed_bytes(load: Load, p: u32, q: u32) -> u32 {
    return (quad_bytes(load, p, q) * CODE_SCALE) ^ 0x80808080u;
}

// The product of a piece with its part of x in codes: CODE_SCALE times as much, in steps of x.
fn multiply_codes(load: Load, p: u32, x: vec2<u32>) -> f32 {
    let group = numbers(load.scales, p);
#if SINGLE
    return group.x * f32(dot4I8Packed(signed_bytes(load, p, 0u), x.x) + dot4I8Packed(signed_bytes(load, p, 1u), x.y));
#else
#if SIX
    return fma(group.x, f32(dot4I8Packed(signed_bytes(load, p, 0u), x.x)), group.y * f32(dot4I8Packed(signed_bytes(load, p, 1u), x.y)));
#else
    let product = dot4I8Packed(quad_bytes(load, p, 0u), x.x) + dot4I8Packed(quad_bytes(load, p, 1u), x.y);
    let total = dot4I8Packed(0x01010101u, x.x) + dot4I8Packed(0x01010101u, x.y);
    return fma(group.x, f32(product), group.y * f32(total));
#endif
#endif
}
#endif

// Vector k of a row of so many loads.
fn weights_at(row: u32, loads: u32, k: u32) -> vec4<f32> {
    let p = k / 8u % PIECES;
    let q = k / 4u % 2u;
    let i = row * loads + k / (8u * PIECES) * 4u + k % 4u;
    let group = numbers(scales[i / 4u], p);
#if BYTES
    let all = vec4<f32>(unpack4xU8(weights[i][2u * p + q]));
#else
    var above = 0u;
#if FIVE
    above = upper[i] >> (2u * p + q);
#endif
#if SIX
    above = upper[i][p / 2u] >> (4u * (p % 2u) + 2u * q);
#endif
    let all = vec4<f32>(unpack4xU8(bytes(weights[i][p], above, q)));
#endif
#if SINGLE
    return group.x * (all - f32(OFFSET));
#else
#if SIX
    return select(group.x, group.y, q == 1u) * (all - f32(OFFSET));
#else
    return group.x * all + group.y;
#endif
#endif
}
#else

#if FULL
@group(0) @binding(0) var<storage, read> weights: array<vec4<f32>>; // [rows][loads]

fn row_loads(width: u32) -> u32 {
    return width;
}

fn weights_at(row: u32, loads: u32, k: u32) -> vec4<f32> {
    return weights[row * loads + k];
}
#else
const PIECES = 1u;
#if PAIRED
alias Load = vec4<u32>;
const QUADS = 2u;

fn quad(load: Load, q: u32) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(load[2u * q]), unpack2x16float(load[2u * q + 1u]));
}
#else
alias Load = half4;
const QUADS = 1u;

fn quad(load: Load, q: u32) -> vec4<f32> {
    return widen(load);
}
#endif
@group(0) @binding(0) var<storage, read> weights: array<Load>;      // [rows][loads]

fn row_loads(width: u32) -> u32 {
    return width / QUADS;
}

fn fetch(i: u32) -> Load {
    return weights[i];
}

fn only_if(there: bool, load: Load) -> Load {
    return select(Load(), load, there);
}

fn place(at: u32, p: u32, q: u32) -> u32 {
    return at * QUADS + q;
}

fn multiply_add(load: Load, p: u32, x: array<vec4<f32>, QUADS>, totals: array<f32, QUADS>, c: f32) -> f32 {
    var all = x;
    var sum = c;
    for (var q = 0u; q < QUADS; q++) {
        sum = dot_add(quad(load, q), all[q], sum);
    }
    return sum;
}

fn weights_at(row: u32, loads: u32, k: u32) -> vec4<f32> {
    return quad(weights[row * loads + k / QUADS], k % QUADS);
}
#endif
#endif
