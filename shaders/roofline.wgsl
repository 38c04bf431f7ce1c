// What the device can do at best, measured with the plainest kernels: the ceiling that speeds are
// held against.
//
// COPY   grid x: blocks of WORKGROUP vectors; to[i] = from[i]
// F32, HALVES   grid x: any; every lane runs `rounds` of 8 independent multiply-adds on
//               four-vectors
struct Params {
    rounds: u32,
    count: u32, // vectors to copy (COPY)
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> source: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> sink: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
#if COPY
    for (var i = id.x; i < params.count; i += groups.x * WORKGROUP) {
        sink[i] = source[i];
    }
#else
#if HALVES
    let a = vec4<f16>(source[0]);
    let b = vec4<f16>(source[1]);
#else
    let a = source[0];
    let b = source[1];
#endif
    // By name: an array is not in registers everywhere.
    var s0 = a;
    var s1 = b;
    var s2 = a + b;
    var s3 = a - b;
    var s4 = -a;
    var s5 = -b;
    var s6 = a * b;
    var s7 = -a * b;
    for (var r = 0u; r < params.rounds; r++) {
        s0 = fma(s0, a, b);
        s1 = fma(s1, a, b);
        s2 = fma(s2, a, b);
        s3 = fma(s3, a, b);
        s4 = fma(s4, a, b);
        s5 = fma(s5, a, b);
        s6 = fma(s6, a, b);
        s7 = fma(s7, a, b);
    }
    let total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7));
    // Never true, which the compiler cannot know: keeps the loop.
    if total.x == 123.25 {
        sink[id.x] = vec4<f32>(total);
    }
#endif
}
