// RoPE's rotation of pair i at a position, from two small tables made in f64: the angle of position 64·a + b is the sum of theirs. A sine of a large angle
// computed here would be wrong by up to 1e-2, and one table for all positions would cost more reading than the keys it turns.
//
// Wants `@group(0) @binding(..) var<storage, read> turns: array<vec2<f32>>`: (cos, sin) as [64 + ceil(capacity / 64)][PAIRS]: positions 0 to 63, then multiples of 64.

fn turn(position: u32, pair: u32) -> vec2<f32> {
    let small = turns[(position % 64u) * PAIRS + pair];
    let large = turns[(64u + position / 64u) * PAIRS + pair];
    return vec2<f32>(large.x * small.x - large.y * small.y, large.y * small.x + large.x * small.y);
}
