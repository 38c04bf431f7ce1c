// RoPE's rotation of pair i at a position, from two small tables made in f64: the angle of position
// NEAR·a + b is the sum of theirs. A sine of a large angle computed here would be wrong by up to
// 1e-2, and one table for all positions would cost more reading than the keys it rotates.
//
// Wants `@group(0) @binding(..) var<storage, read> rope_table: array<vec2<f32>>`: (cos, sin) as
// [NEAR + ceil(capacity / NEAR)][PAIRS]: the positions below NEAR, then its multiples.

fn rope(position: u32, pair: u32) -> vec2<f32> {
    let small = rope_table[(position % NEAR) * PAIRS + pair];
    let large = rope_table[(NEAR + position / NEAR) * PAIRS + pair];
    return vec2<f32>(large.x * small.x - large.y * small.y, large.y * small.x + large.x * small.y);
}
