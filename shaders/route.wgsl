// The router of a mixture of experts: which of them each token goes through, and what they count
// for. In f32, since a logit that is rounded is another expert.
//
// Grid: x = tokens. Teams of TEAM lanes take a row of the router each.
//
// Of equal logits the first is taken. A token's line has SLOTS chosen experts, the largest logit
// first, and then SHARED more: of one that all tokens share, which counts for as much as the
// sigmoid of the router's last row says.
//
// NORMALISED  what the chosen ones count for sums to one; else all experts' would
// BIAS        logits have one
struct Params {
    width: u32, // vectors of a row
}
var<immediate> params: Params;

@group(0) @binding(0) var<storage, read> weights: array<vec4<f32>>;           // [ROWS][width]
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;                 // [tokens][width]
@group(0) @binding(2) var<storage, read_write> routes: array<vec2<u32>>;      // [tokens][SLOTS + SHARED]: expert, and its share, an f32
#if BIAS
@group(0) @binding(3) var<storage, read> bias: array<f32>;                    // [ROWS]
#endif

const ROWS = EXPERTS + min(SHARED, 1u);

var<workgroup> partial: array<f32, WORKGROUP>;
var<workgroup> logits: array<f32, ROWS>;
var<workgroup> chosen: array<u32, SLOTS>;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let lane = local % TEAM;
    for (var first = 0u; first < ROWS; first += WORKGROUP / TEAM) {
        let row = first + local / TEAM;
        var sum = 0.0;
        if row < ROWS {
            for (var k = lane; k < params.width; k += TEAM) {
                sum += dot(weights[row * params.width + k], x[id.x * params.width + k]);
            }
        }
        partial[local] = sum;
        workgroupBarrier();
        if lane == 0u && row < ROWS {
            for (var i = 1u; i < TEAM; i++) {
                sum += partial[local + i];
            }
#if BIAS
            sum += bias[row];
#endif
            logits[row] = sum;
        }
        workgroupBarrier();
    }
    // An expert's place is the number of those before it.
    for (var expert = local; expert < EXPERTS; expert += WORKGROUP) {
        var before = 0u;
        for (var other = 0u; other < EXPERTS; other++) {
            before += u32(logits[other] > logits[expert] || (logits[other] == logits[expert] && other < expert));
        }
        if before < SLOTS {
            chosen[before] = expert;
        }
    }
    workgroupBarrier();
    if local < SLOTS + SHARED {
        let highest = logits[chosen[0]];
        var sum = 0.0;
#if NORMALISED
        for (var slot = 0u; slot < SLOTS; slot++) {
            sum += exp(logits[chosen[slot]] - highest);
        }
#else
        for (var expert = 0u; expert < EXPERTS; expert++) {
            sum += exp(logits[expert] - highest);
        }
#endif
        for (var slot = local; slot < SLOTS + SHARED; slot += WORKGROUP) {
            var expert = EXPERTS + slot - SLOTS;
            var share = 1.0 / (1.0 + exp(-logits[ROWS - 1u]));
            if slot < SLOTS {
                expert = chosen[slot];
                share = exp(logits[expert] - highest) / sum;
            }
            routes[id.x * (SLOTS + SHARED) + slot] = vec2<u32>(expert, bitcast<u32>(share));
        }
    }
}
