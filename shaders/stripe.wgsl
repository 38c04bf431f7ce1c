// Blocks of tokens into packed rows, as src/kv/blocks.rs has them: the numbers that scale them
// (blocks.wgsl) into headers, and codes.
//
// Grid: x = tokens · EACH words, WORKGROUP at a time. A lane makes a word. The first token stands
// at position first, where a block begins.
//
// TOKEN_FACTORS, CHANNEL_FACTORS  as in lib/rows.wgsl

struct Params {
    first: u32,  // position of the first token
    tokens: u32,
    at: u32,     // word of a token at which the row begins
    words: u32,  // words of a token
    bits: u32,
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> coordinates: array<f32>;    // [tokens][HEADS · WIDTH]
@group(0) @binding(1) var<storage, read> numbers: array<f32>;        // by block: [TOKENS][OWN], then what its tokens share, [SHARED], as f16 holds them
@group(0) @binding(2) var<storage, read_write> rows: array<u32>;     // [capacity][words]

const BLOCK = TOKENS * OWN + SHARED;

// Number `i` of a token's header.
fn header(token: u32, i: u32) -> f32 {
    let block = token / TOKENS * BLOCK;
    let t = token % TOKENS;
    if i < OWN {
        return numbers[block + t * OWN + i];
    }
    let shared_number = t * STRIPE + i - OWN;
    return select(0.0, numbers[block + TOKENS * OWN + min(shared_number, SHARED - 1u)], shared_number < SHARED);
}

fn code(token: u32, c: u32) -> u32 {
    let block = token / TOKENS * BLOCK;
    let own = block + token % TOKENS * OWN;
    let beyond = block + TOKENS * OWN;
    let head = c / WIDTH;
    var z = coordinates[token * HEADS * WIDTH + c];
#if CHANNEL_FACTORS
    let pair = own + 2u * head;
    z /= numbers[beyond + c];
#else
    let pair = beyond + 2u * c;
#if TOKEN_FACTORS
    z /= numbers[own + head];
#endif
#endif
    return u32(clamp(round((z - numbers[pair + 1u]) / numbers[pair]), 0.0, f32((1u << params.bits) - 1u)));
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let i = group.x * WORKGROUP + local;
    let token = i / EACH;
    let word = i % EACH;
    if token >= params.tokens {
        return;
    }
    var made = 0u;
    if word < HEADER {
        made = pack2x16float(vec2<f32>(header(token, 2u * word), header(token, 2u * word + 1u)));
    } else {
        let count = 32u / params.bits;
        for (var k = 0u; k < count; k++) {
            made |= code(token, (word - HEADER) * count + k) << (k * params.bits);
        }
    }
    rows[(params.first + token) * params.words + params.at + word] = made;
}
