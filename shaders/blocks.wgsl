// The numbers that scale blocks of tokens, as src/kv/blocks.rs has them: a least value and a step
// for each line, and where lines and what crosses them are balanced first (src/kv/balance.rs),
// factors.
//
// Grid: x = blocks of TOKENS tokens, y = heads. A line is a channel over the tokens of the block,
// or a token over the channels of the head.
//
// BALANCED         both are balanced
// CHANNEL_FACTORS  (BALANCED) lines are tokens, and channels have factors; else lines are channels,
//                  and tokens have them
#include "lib/reduce.wgsl"

struct Params {
    bits: u32,
    least: f32, // standard deviation that one is taken for at the least; at the most one over it
    low: f32,   // the least and the largest logarithm of a factor
    high: f32,
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> coordinates: array<f32>;    // [tokens][HEADS · WIDTH]
@group(0) @binding(1) var<storage, read_write> numbers: array<f32>;  // by block: [TOKENS][OWN], then what its tokens share, [SHARED]

const BLOCK = TOKENS * OWN + SHARED;
const LARGEST = 65504.0;    // of f16
const LEAST = 6.103515625e-5;

#if CHANNEL_FACTORS
const LINES = TOKENS;
const LENGTH = WIDTH;
#else
const LINES = WIDTH;
const LENGTH = TOKENS;
#endif

fn entry(id: vec2<u32>, line: u32, i: u32) -> f32 {
#if CHANNEL_FACTORS
    return coordinates[(id.x * TOKENS + line) * HEADS * WIDTH + id.y * WIDTH + i];
#else
    return coordinates[(id.x * TOKENS + i) * HEADS * WIDTH + id.y * WIDTH + line];
#endif
}

// Where a line's step stands, and behind it its least value.
fn pair_at(id: vec2<u32>, line: u32) -> u32 {
#if CHANNEL_FACTORS
    return id.x * BLOCK + 2u * (line * HEADS + id.y);
#else
    return id.x * BLOCK + TOKENS * OWN + 2u * (id.y * WIDTH + line);
#endif
}

#if BALANCED
// Lines, then what crosses them.
var<workgroup> logarithms: array<f32, LINES + LENGTH>;
var<workgroup> inverses: array<f32, LINES + LENGTH>;
var<workgroup> deviations: array<f32, LINES + LENGTH>;
var<workgroup> best: array<f32, LINES + LENGTH>;

fn factor_at(id: vec2<u32>, i: u32) -> u32 {
#if CHANNEL_FACTORS
    return id.x * BLOCK + TOKENS * OWN + id.y * WIDTH + i;
#else
    return id.x * BLOCK + i * HEADS + id.y;
#endif
}

// The standard deviations of lines, or of what crosses them, of what the block is after division.
fn measure(id: vec2<u32>, lines: bool, local: u32) {
    workgroupBarrier();
    let count = select(LENGTH, LINES, lines);
    let along = select(LINES, LENGTH, lines);
    for (var a = local; a < count; a += WORKGROUP) {
        var sum = 0.0;
        for (var b = 0u; b < along; b++) {
            sum += divided(id, select(b, a, lines), select(a, b, lines));
        }
        let mean = sum / f32(along);
        var squares = 0.0;
        for (var b = 0u; b < along; b++) {
            let off = divided(id, select(b, a, lines), select(a, b, lines)) - mean;
            squares += off * off;
        }
        deviations[select(LINES, 0u, lines) + a] = sqrt(squares / f32(along - 1u));
    }
    workgroupBarrier();
}

fn divided(id: vec2<u32>, line: u32, i: u32) -> f32 {
    return entry(id, line, i) * inverses[line] * inverses[LINES + i];
}

fn divide(begin: u32, count: u32, local: u32) {
    for (var i = begin + local; i < begin + count; i += WORKGROUP) {
        logarithms[i] = clamp(logarithms[i] + log(clamp(deviations[i], params.least, 1.0 / params.least)), params.low, params.high);
        inverses[i] = exp(-logarithms[i]);
    }
}

// How many times larger the largest of some deviations is than the smallest.
fn spread(begin: u32, count: u32, local: u32) -> f32 {
    var low = -3.4e38;
    var high = 0.0;
    for (var i = begin + local; i < begin + count; i += WORKGROUP) {
        low = max(low, -deviations[i]);
        high = max(high, deviations[i]);
    }
    low = -workgroup_max(low, local);
    high = workgroup_max(high, local);
    return high / max(low, 1e-8);
}

fn balance(id: vec2<u32>, local: u32) {
    for (var i = local; i < LINES + LENGTH; i += WORKGROUP) {
        logarithms[i] = 0.0;
        inverses[i] = 1.0;
        best[i] = 0.0;
    }
    measure(id, false, local);
    var least = 3.4e38;
    for (var round = 0u; round <= ROUNDS; round++) {
        if round > 0u {
            divide(LINES, LENGTH, local);
            measure(id, true, local);
            divide(0u, LINES, local);
        }
        measure(id, true, local);
        measure(id, false, local);
        let apart = spread(0u, LINES, local) + spread(LINES, LENGTH, local);
        if apart <= least {
            least = apart;
            for (var i = local; i < LINES + LENGTH; i += WORKGROUP) {
                best[i] = logarithms[i];
            }
        }
        // Another lane may be the next to change them.
        workgroupBarrier();
    }
    for (var i = local; i < LINES + LENGTH; i += WORKGROUP) {
        inverses[i] = exp(-best[i]);
    }
    workgroupBarrier();
}
#endif

// The number of f16 that is nearest, of those that are not subnormal: devices may round to either
// beside, and a shift of a grid by as much changes many codes.
fn nearest_half(x: f32) -> f32 {
    let bits = bitcast<u32>(clamp(x, -LARGEST, LARGEST));
    return bitcast<f32>((bits + 0xfffu + ((bits >> 13u) & 1u)) & 0xffffe000u);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let id = group.xy;
#if BALANCED
    balance(id, local);
    for (var i = local; i < LENGTH; i += WORKGROUP) {
        numbers[factor_at(id, i)] = nearest_half(exp(best[LINES + i]));
    }
#endif
    for (var line = local; line < LINES; line += WORKGROUP) {
        var low = 3.4e38;
        var high = -3.4e38;
        for (var i = 0u; i < LENGTH; i++) {
#if BALANCED
            let z = divided(id, line, i);
#else
            let z = entry(id, line, i);
#endif
            low = min(low, z);
            high = max(high, z);
        }
#if BALANCED
        let factor = exp(best[line]);
#else
        let factor = 1.0;
#endif
        let at = pair_at(id, line);
        numbers[at] = max(nearest_half((high - low) / f32((1u << params.bits) - 1u) * factor), LEAST);
        numbers[at + 1u] = nearest_half(low * factor);
    }
}
