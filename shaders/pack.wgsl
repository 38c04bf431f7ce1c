// Coordinates into packed rows, as src/kv/format.rs lays them out.
//
// Grid: x = tokens, at positions first, first + 1, …; y = lots of a token's runs, each of one band,
// or of one group where these have scales of their own. A workgroup finds the scale of its band,
// the first of a token those of all; then a lane packs a run of sixteen coordinates, or sixteen
// lanes do whose codes are chosen together.
#include "lib/reduce.wgsl"
#include "lib/rows.wgsl"
#include "lib/trellis.wgsl"

struct Params {
    first: u32, // position of the first token
    at: u32,    // word of a token at which the row begins
    words: u32, // words of a token
    bands: u32,
    runs: u32,
    header: u32, // words of the header
    lot: u32,    // runs of a lot
    clip: u32,   // in percent: groups are cut to the magnitude that so many of their coordinates are below
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> coordinates: array<f32>;    // [tokens][runs][16]
@group(0) @binding(1) var<storage, read> table: array<vec4<u32>>;    // codebooks, [bands] or groups of (first run, runs, bits, scale), [runs]
@group(0) @binding(2) var<storage, read_write> rows: array<u32>;     // [capacity][words]

var<workgroup> bound: f32;

const LARGEST = 65504.0; // of f16

fn code(z: f32, run: vec4<u32>, scale: vec2<f32>) -> u32 {
    let x = (z - scale.x) / scale.y;
    if run.w >= AFFINE {
        return u32(clamp(round(x), 0.0, f32((1u << run.y) - 1u)));
    }
    return u32(clamp(round((x - eight_bits().x) / eight_bits().y), 0.0, 255.0));
}

// The magnitude that the coordinates begin.. of a group are cut to: that with `clip` percent of
// them below, where equal ones count in their order.
fn find_bound(begin: u32, end: u32, local: u32) -> f32 {
    if params.clip >= 100u {
        return LARGEST;
    }
    let wanted = params.clip * (end - begin) / 100u;
    for (var i = begin + local; i < end; i += WORKGROUP) {
        let own = abs(coordinates[i]);
        var below = 0u;
        for (var j = begin; j < end; j++) {
            let other = abs(coordinates[j]);
            below += u32(other < own || (other == own && j < i));
        }
        if below == wanted {
            bound = own;
        }
    }
    workgroupBarrier();
    let result = bound;
    workgroupBarrier();
    return result;
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let token = group.x;
    let row = (params.first + token) * params.words + params.at;
    var own = 0u;
    var before = group.y; // lots of its band before this one
    for (; own + 1u < params.bands; own++) {
        let lots = (table[BOOKS + own].y + params.lot - 1u) / params.lot;
        if before < lots {
            break;
        }
        before -= lots;
    }
    let first = table[BOOKS + own].x + before * params.lot;
    let runs_end = min(first + params.lot, table[BOOKS + own].x + table[BOOKS + own].y);
    load_book(local);
    var header = 0u;
    var scale = vec2<f32>(0.0, 1.0); // what is taken off the band's coordinates, and what they are divided by
    for (var b = 0u; b < params.bands; b++) {
        if b != own && group.y > 0u {
            continue;
        }
        let band = table[BOOKS + b];
        let begin = (token * params.runs + band.x) * 16u;
        let end = begin + band.y * 16u;
        var of_band = vec2<f32>(0.0, 1.0);
        if band.w >= AFFINE {
            if b == own {
                let cut = find_bound(begin, end, local);
                var low = -clamp(coordinates[begin], -cut, cut);
                var high = -low;
                for (var i = begin + local; i < end; i += WORKGROUP) {
                    let z = clamp(coordinates[i], -cut, cut);
                    low = max(low, -z);
                    high = max(high, z);
                }
                low = -workgroup_max(low, local);
                high = workgroup_max(high, local);
                // As f16 holds them: what codes are read with.
                let least = unpack2x16float(pack2x16float(vec2<f32>(clamp(low, -LARGEST, LARGEST), 0.0))).x;
                let step_size = max((high - least) / f32((1u << band.z) - 1u), 6.103515625e-5);
                let word = pack2x16float(vec2<f32>(min(step_size, LARGEST), least));
                of_band = unpack2x16float(word).yx;
                if local == 0u && before == 0u {
                    rows[row + band.w - AFFINE] = word;
                }
            }
        } else if band.w > 0u {
            var squares = 0.0;
            for (var i = begin + local; i < end; i += WORKGROUP) {
                squares += coordinates[i] * coordinates[i];
            }
            squares = workgroup_sum(squares, local) / f32(band.y * 16u);
            let eighths = u32(clamp(128.0 + round(4.0 * log2(max(squares, 1e-12))), 1.0, 255.0));
            header |= eighths << (8u * (band.w - 1u));
            of_band.y = scale_value(eighths);
        }
        if b == own {
            scale = of_band;
        }
    }
    if local == 0u && group.y == 0u && params.header != 0u && table[BOOKS].w < AFFINE {
        rows[row] = header;
    }
    workgroupBarrier();
    if trellis(table[BOOKS + params.bands + first]) {
        // All runs of a band are so.
        for (var base = first; base < runs_end; base += WORKGROUP / LANES) {
            let index = min(base + local / LANES, runs_end - 1u);
            let run = table[BOOKS + params.bands + index];
            let z = (token * params.runs + index) * 16u;
            search(z, run.y, scale.y, local);
            workgroupBarrier();
            // One lane writes for the sixteen.
            let writes = local % LANES == 0u && index == base + local / LANES;
            var words = vec2<u32>(0u, 0u);
            if writes {
                words = choose(z, run.y, scale.y, local);
                rows[row + run.x] = words.x;
                if run.y > 2u && run.z % 2u == 0u {
                    rows[row + run.z / 2u] = words.y;
                }
            }
            // Two runs of three bits share a word of upper ones: neighbours, and so of one lot, and
            // of one turn.
            storageBarrier();
            workgroupBarrier();
            if writes && run.z % 2u == 1u {
                rows[row + run.z / 2u] |= words.y << 16u;
            }
        }
        return;
    }
    for (var index = first + local; index < runs_end; index += WORKGROUP) {
        let run = table[BOOKS + params.bands + index];
        let z = (token * params.runs + index) * 16u;
        if run.y == 16u {
            for (var i = 0u; i < 8u; i++) {
                let pair = vec2<f32>(coordinates[z + 2u * i], coordinates[z + 2u * i + 1u]);
                rows[row + run.x + i] = pack2x16float(clamp(pair, vec2<f32>(-LARGEST), vec2<f32>(LARGEST)));
            }
            continue;
        }
        for (var w = 0u; w < run.y / 2u; w++) {
            let count = 32u / run.y;
            var word = 0u;
            for (var i = 0u; i < count; i++) {
                word |= code(coordinates[z + w * count + i], run, scale) << (i * run.y);
            }
            rows[row + run.x + w] = word;
        }
    }
}
