// Four coordinates of a packed row, as src/rows/format.rs lays them out.
//
// Wants `rows: array<u32>`, and `table: array<vec4<u32>>` that begins with BOOKS vectors: the levels of 2, 3 and 4 bits, then the first level and the step of 8 bits. A run is
// (its word within the row, its bits, where its highest bits stand, what scales it).

const AFFINE = 5u; // a run's scale: none, one of the header's first four bytes, or from here on the two halves of one of its words

var<workgroup> book: array<f32, BOOKS * 4u>;

fn load_book(local: u32) {
    for (var i = local; i < BOOKS * 4u; i += WORKGROUP) {
        book[i] = bitcast<f32>(table[i / 4u][i % 4u]);
    }
}

// Where the levels of 2, 3 or 4 bits begin.
fn book_of(bits: u32) -> u32 {
    return (1u << bits) - 4u;
}

// The least level of 8 bits, and their step.
fn eight_bits() -> vec2<f32> {
    return vec2<f32>(book[28], book[29]);
}

fn scale_value(code: u32) -> f32 {
    return exp2((f32(code) - 128.0) / 8.0);
}

// `row`: the word at which the row begins. Quarter: which four of the run's sixteen.
fn unpack(row: u32, run: vec4<u32>, quarter: u32) -> vec4<f32> {
    return decode(fetch(row, run, quarter), run, quarter);
}

// Bits of a coordinate in the words of its run; the third of three stands elsewhere.
fn narrow_bits(bits: u32) -> u32 {
    return select(bits, 2u, bits == 3u);
}

// The words that four coordinates are in, and the header's that scales them. All are read whether they are needed or not: a lane can have several such reads under way.
fn fetch(row: u32, run: vec4<u32>, quarter: u32) -> vec3<u32> {
    let first = run.x + quarter * narrow_bits(run.y) / 8u;
    let second = select(select(first, run.z / 2u, run.y == 3u), first + 1u, run.y == 16u);
    return vec3<u32>(rows[row + first], rows[row + second], rows[row + max(run.w, AFFINE) - AFFINE]);
}

fn decode(words: vec3<u32>, run: vec4<u32>, quarter: u32) -> vec4<f32> {
    let bits = run.y;
    if bits == 16u {
        return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
    }
    let width = narrow_bits(bits);
    let each = vec4<u32>(0u, 1u, 2u, 3u);
    let word = words.x >> (quarter * width * 4u % 32u);
    var code = (vec4<u32>(word) >> (each * width)) & vec4<u32>((1u << width) - 1u);
    if bits == 3u {
        let high = words.y >> (16u * (run.z % 2u) + 4u * quarter);
        code |= ((vec4<u32>(high) >> each) & vec4<u32>(1u)) << vec4<u32>(2u);
    }
    if run.w >= AFFINE {
        let header = unpack2x16float(words.z);
        return header.y + header.x * vec4<f32>(code);
    }
    var value: vec4<f32>;
    if bits == 8u {
        value = eight_bits().x + eight_bits().y * vec4<f32>(code);
    } else {
        code += vec4<u32>(book_of(bits));
        value = vec4<f32>(book[code.x], book[code.y], book[code.z], book[code.w]);
    }
    if run.w > 0u {
        value *= scale_value((words.z >> (8u * (run.w - 1u))) & 0xffu);
    }
    return value;
}
