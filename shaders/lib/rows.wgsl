// Four coordinates of a packed row, as src/kv/format.rs lays them out.
//
// Wants `rows: array<u32>` and `params.words`, words of a token there, and `table:
// array<vec4<u32>>` that begins with the levels of 2, 3 and 4 bits, two to a word in f16, then the
// first level and the step of 8 bits. A run is (its word within the row, its bits, where the upper
// bits of its codes stand if they are apart, what scales it).
//
// Wants CODES, a bit for each kind of run that there is. There is code for no other: some devices
// go through all of a branch's sides.
//
// FLASH     rows are those of keys and of values, which flash.wgsl reads itself
// BLOCKS    tokens are coded in blocks of TOKENS, as src/kv/blocks.rs has it, from `params.sinks`
//           on; wants `params.words`, words of a token in rows. A run is (its word within the row,
//           its bits, its first coordinate, its head). A header has OWN numbers of the token and
//           STRIPE of the block. Steps are by channel; TOKEN_FACTORS: and each token and head has a
//           factor; CHANNEL_FACTORS: steps are by token and head, and each channel has a factor

const AFFINE = 5u; // a run's scale: none, one of the header's first four bytes, or from here on the two halves of one of its words

const TOGETHER = (CODES & 1u) > 0u; // 2 to 4 bits, chosen together
const EIGHT = (CODES & 2u) > 0u;
const SIXTEEN = (CODES & 4u) > 0u;
const STEPS = (CODES & 8u) > 0u;    // equal steps, of any width
const SCALED = (CODES & 16u) > 0u;  // by a byte of the header
const LEVELS = 448u; // of 2, 3 and 4 bits together

var<workgroup> book: array<f32, LEVELS>;

fn load_book(local: u32) {
    for (var i = local; i < LEVELS / 2u; i += WORKGROUP) {
        let pair = unpack2x16float(table[i / 4u][i % 4u]);
        book[2u * i] = pair.x;
        book[2u * i + 1u] = pair.y;
    }
}

// Whether a run's codes are chosen together, as src/kv/trellis.rs has it: their lower two bits are
// in a word, the upper ones in another.
fn trellis(run: vec4<u32>) -> bool {
    return TOGETHER && (!(EIGHT || SIXTEEN || STEPS) || (run.y < 8u && run.w < AFFINE));
}

// Whether what is fetched for one quarter of a run holds all of it.
fn together(run: vec4<u32>) -> bool {
#if BLOCKS
    return false;
#else
    return trellis(run);
#endif
}

#if !FLASH
// Four. Compilers do not know where each quarter takes much code: some take minutes over four times
// as much.
fn quarters() -> u32 {
    if TOGETHER {
        return 4u;
    }
    return min(4u, params.words + 3u);
}
#endif

// Where the levels of 2, 3 or 4 bits begin: 64 for each way to choose the upper bits.
fn book_of(bits: u32) -> u32 {
    return 64u * ((1u << (bits - 2u)) - 1u);
}

// The least level of 8 bits, and their step.
fn eight_bits() -> vec2<f32> {
    return bitcast<vec2<f32>>(table[LEVELS / 8u].xy);
}

fn scale_value(code: u32) -> f32 {
    return exp2((f32(code) - 128.0) / 8.0);
}

#if BLOCKS
// The coordinates themselves.
alias Fetched = vec4<f32>;

// A number of the header of the row that begins at a word.
fn number(row: u32, i: u32) -> f32 {
    return unpack2x16float(rows[row + i / 2u])[i % 2u];
}

// A number that the tokens of a key's block share.
fn shared_number(key: u32, at: u32, i: u32) -> f32 {
    let first = key - (key - params.sinks) % TOKENS;
    return number((first + i / STRIPE) * params.words + at, OWN + i % STRIPE);
}

// `at`: the word of a token at which the row begins. Quarter: which four of the run's sixteen.
fn fetch(key: u32, at: u32, run: vec4<u32>, quarter: u32) -> Fetched {
    let row = key * params.words + at;
    let width = run.y;
    let word = rows[row + run.x + quarter * width / 8u] >> (quarter * width * 4u % 32u);
    let code = vec4<f32>((vec4<u32>(word) >> (vec4<u32>(0u, 1u, 2u, 3u) * width)) & vec4<u32>((1u << width) - 1u));
    let first = run.z + 4u * quarter;
#if CHANNEL_FACTORS
    let z = number(row, 2u * run.w + 1u) + number(row, 2u * run.w) * code;
    var factor: vec4<f32>;
    for (var i = 0u; i < 4u; i++) {
        factor[i] = shared_number(key, at, first + i);
    }
    return factor * z;
#else
    var scale: vec4<f32>;
    var least: vec4<f32>;
    for (var i = 0u; i < 4u; i++) {
        scale[i] = shared_number(key, at, 2u * (first + i));
        least[i] = shared_number(key, at, 2u * (first + i) + 1u);
    }
    let z = least + scale * code;
#if TOKEN_FACTORS
    return number(row, run.w) * z;
#else
    return z;
#endif
#endif
}

fn scales(key: u32, at: u32) -> u32 {
    return 0u;
}

fn decode(fetched: Fetched, row_scales: u32, run: vec4<u32>, quarter: u32) -> vec4<f32> {
    return fetched;
}
#else
alias Fetched = vec3<u32>;

#if !FLASH
// The bytes that scale a row's runs, where there are any.
fn scales(key: u32, at: u32) -> u32 {
    if SCALED {
        return rows[key * params.words + at];
    }
    return 0u;
}

// The words that four coordinates are in, and the header's that has their steps. `at`: the word of
// a token at which the row begins. Quarter: which four of the run's sixteen. All are read whether
// they are needed or not: a lane can have several such reads under way.
fn fetch(key: u32, at: u32, run: vec4<u32>, quarter: u32) -> Fetched {
    let row = key * params.words + at;
    let whole = trellis(run);
    let first = run.x + select(quarter * run.y / 8u, 0u, whole);
    let second = select(select(first, first + 1u, SIXTEEN && run.y == 16u), run.z / 2u, whole);
    var steps = 0u;
    if STEPS {
        steps = rows[row + max(run.w, AFFINE) - AFFINE];
    }
    return vec3<u32>(rows[row + first], rows[row + second], steps);
}
#endif

fn decode(words: Fetched, row_scales: u32, run: vec4<u32>, quarter: u32) -> vec4<f32> {
    let bits = run.y;
    if SIXTEEN && bits == 16u {
        return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
    }
    let each = vec4<u32>(0u, 1u, 2u, 3u);
    var value: vec4<f32>;
    if trellis(run) {
        // From the lower bits of the code two before, round the end of the run.
        let back = (8u * quarter + 28u) % 32u;
        let low = (words.x >> back) | (words.x << (32u - back));
        let more = bits - 2u;
        let high = words.y >> (16u * (run.z % 2u) + 4u * more * quarter);
        let code = ((vec4<u32>(low) >> (2u * each)) & vec4<u32>(63u)) | (((vec4<u32>(high) >> (more * each)) & vec4<u32>((1u << more) - 1u)) << vec4<u32>(6u));
        let at = code + book_of(bits);
        value = vec4<f32>(book[at.x], book[at.y], book[at.z], book[at.w]);
    } else if EIGHT || STEPS {
        let word = words.x >> (quarter * bits * 4u % 32u);
        let code = vec4<f32>((vec4<u32>(word) >> (each * bits)) & vec4<u32>((1u << bits) - 1u));
        if STEPS && (!EIGHT || run.w >= AFFINE) {
            let header = unpack2x16float(words.z);
            return header.y + header.x * code;
        }
        value = eight_bits().x + eight_bits().y * code;
    }
    if SCALED && run.w > 0u {
        value *= scale_value((row_scales >> (8u * (run.w - 1u))) & 0xffu);
    }
    return value;
}
#endif
