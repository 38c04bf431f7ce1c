// Which rows of a layer move when tokens leave the window: evict.wgsl decides, and
// move_rows.wgsl does it.

struct Move {
    source: u32,   // slot of the row that moves; or ALONE and the place in the sketch that it comes out of
    to: u32,       // slot that it takes; of an evicted token, its place in the sketch
    position: u32,
    mass: u32,     // attention received, as bits
}

struct Moves {
    evicted: u32,  // tokens that lose their slot or get none: list from 0 on
    promoted: u32, // tokens that take a slot: list from params.promoted on
    padding: vec2<u32>,
    list: array<Move>,
}
