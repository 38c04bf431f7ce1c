// What a projection makes of a sum before it is written, where that is not the sum itself.
//
// ACTIVATED  the MLP's activation, of an MLP without a gate
// SCALED     it is multiplied by params.scale
// CAPPED     then y becomes c·tanh(y / c), with params.cap for c
//
// Wants params.
#include "lib/activation.wgsl"

fn finished(sum: f32) -> f32 {
    var y = sum;
#if ACTIVATED
    y = activate(y);
#endif
#if SCALED
    y *= params.scale;
#endif
#if CAPPED
    y = params.cap * tanh_of(y / params.cap);
#endif
    return y;
}
