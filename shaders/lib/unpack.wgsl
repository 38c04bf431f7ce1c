// A tile of coded columns, unpacked a few runs at a time into workgroup memory.
//
// Wants lib/rows.wgsl and lib/columns.wgsl; `params.coded`: coded columns; TILE of them in a tile;
// ROOM: vectors of `stage` that are wanted besides.

const STAGE = 2u; // runs unpacked at a time
const ACROSS = TILE + 1u;
const UNPACKED = (STAGE * 4u * TILE + WORKGROUP - 1u) / WORKGROUP; // vectors of them that a lane brings in

var<workgroup> stage: array<vec4<f32>, max(STAGE * 4u * ACROSS, ROOM)>; // [STAGE · 4][ACROSS]

// The token that a lane brings in for a coded column; past the last column, the last's.
fn column_row(kv: u32, column: u32) -> u32 {
    return coded_row(kv, min(column, params.coded - 1u));
}

// Brings runs first, … of the tile that begins with coded column `begin` into `stage`. `info`: of
// the row, as in score.wgsl's table.
fn unpack_stage(info: vec4<u32>, first: u32, kv: u32, begin: u32, local: u32) {
    let runs = min(STAGE, info.z - first);
    // All is read before the first is used.
    var run: array<vec4<u32>, UNPACKED>;
    var words: array<Fetched, UNPACKED>;
    var row_scales: array<u32, UNPACKED>;
    for (var i = 0u; i < UNPACKED; i++) {
        let v = (local + i * WORKGROUP) % (4u * STAGE);
        let t = min((local + i * WORKGROUP) / (4u * STAGE), TILE - 1u);
        run[i] = table[info.y + first + min(v / 4u, runs - 1u)];
        let row = column_row(kv, begin + t);
        words[i] = fetch(row, info.x, run[i], v % 4u);
        row_scales[i] = scales(row, info.x);
    }
    workgroupBarrier();
    for (var i = 0u; i < UNPACKED; i++) {
        let v = (local + i * WORKGROUP) % (4u * STAGE);
        let t = (local + i * WORKGROUP) / (4u * STAGE);
        if v < 4u * runs && t < TILE {
            stage[v * ACROSS + t] = decode(words[i], row_scales[i], run[i], v % 4u);
        }
    }
    workgroupBarrier();
}
