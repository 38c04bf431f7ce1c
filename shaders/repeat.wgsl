// Fills a buffer with a pattern, over and over: to[i] = from[i mod period].
//
// Grid x: any; lanes stride along the vectors.
struct Params {
    count: u32,  // vectors of `to`
    period: u32, // vectors of `from`
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> source: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> to: array<vec4<u32>>;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < params.count; i += groups.x * WORKGROUP) {
        to[i] = source[i % params.period];
    }
}
