// RoPE's rotation of pair i at a position, from two small tables made in f64: the angle of position
// NEAR·a + b is the sum of theirs. A sine of a large angle computed here would be wrong by up to
// 1e-2, and one table for all positions would cost more reading than the keys it rotates.
//
// Wants `@group(0) @binding(..) var<storage, read> rope_table: array<vec2<f32>>`: (cos, sin) of the
// positions below NEAR as [NEAR][PAIRS] and as [PAIRS][NEAR], then of its multiples, [..][PAIRS].

fn add_angles(small: vec2<f32>, large: vec2<f32>) -> vec2<f32> {
    return vec2<f32>(large.x * small.x - large.y * small.y, large.y * small.x + large.x * small.y);
}

fn multiple(position: u32, pair: u32) -> vec2<f32> {
    return rope_table[(2u * NEAR + position / NEAR) * PAIRS + pair];
}

// Where neighbouring lanes have neighbouring pairs.
fn rope(position: u32, pair: u32) -> vec2<f32> {
    return add_angles(rope_table[(position % NEAR) * PAIRS + pair], multiple(position, pair));
}

// Where they have neighbouring positions.
fn rope_by_pair(position: u32, pair: u32) -> vec2<f32> {
    return add_angles(rope_table[NEAR * PAIRS + pair * NEAR + position % NEAR], multiple(position, pair));
}
