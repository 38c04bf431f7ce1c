// What the device can do at best, measured with the plainest kernels: the ceiling that speeds are held against.
//
// COPY   grid x: blocks of WORKGROUP vectors; to[i] = from[i]
// F32, HALVES   grid x: any; every lane runs `rounds` of 8 independent multiply-adds on four-vectors
struct Step {
    rounds: u32,
    count: u32, // vectors to copy (COPY)
}
var<immediate> step: Step;

@group(0) @binding(0) var<storage, read> source: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> sink: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
#if COPY
    for (var i = id.x; i < step.count; i += groups.x * WORKGROUP) {
        sink[i] = source[i];
    }
#else
#if HALVES
    let a = vec4<f16>(source[0]);
    let b = vec4<f16>(source[1]);
    var sums: array<vec4<f16>, 8>;
#else
    let a = source[0];
    let b = source[1];
    var sums: array<vec4<f32>, 8>;
#endif
    for (var r = 0u; r < step.rounds; r++) {
        for (var u = 0u; u < 8u; u++) {
            sums[u] = fma(sums[u], a, b);
        }
    }
    var total = sums[0];
    for (var u = 1u; u < 8u; u++) {
        total += sums[u];
    }
    // Never true, which the compiler cannot know: keeps the loop.
    if total.x == 123.25 {
        sink[id.x] = vec4<f32>(total);
    }
#endif
}
