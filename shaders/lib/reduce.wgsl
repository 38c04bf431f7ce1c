// Sum and maximum over a workgroup of WORKGROUP lanes, a power of two. Called by all lanes in
// uniform control flow; every lane gets the result.

var<workgroup> reduced: array<f32, WORKGROUP>;

fn workgroup_sum(value: f32, local: u32) -> f32 {
    reduced[local] = value;
    for (var width = WORKGROUP / 2u; width > 0u; width /= 2u) {
        workgroupBarrier();
        if local < width {
            reduced[local] += reduced[local + width];
        }
    }
    workgroupBarrier();
    let result = reduced[0];
    workgroupBarrier();
    return result;
}

fn workgroup_max(value: f32, local: u32) -> f32 {
    reduced[local] = value;
    for (var width = WORKGROUP / 2u; width > 0u; width /= 2u) {
        workgroupBarrier();
        if local < width {
            reduced[local] = max(reduced[local], reduced[local + width]);
        }
    }
    workgroupBarrier();
    let result = reduced[0];
    workgroupBarrier();
    return result;
}
