// What an MLP makes of a number: SiLU, or GELU, GELU by a tanh (GELU_TANH), or squared ReLU
// (RELU2).

// tanh(10) is one in f32; of larger numbers some drivers make what is no number.
fn tanh_of(x: f32) -> f32 {
    return tanh(clamp(x, -10.0, 10.0));
}

#if GELU
// The complementary error function, to 1.2e-7 of its value (Press et al., Numerical Recipes in C,
// section 6.2); src/cpu/activation.rs has the same coefficients.
fn erfc(x: f32) -> f32 {
    let z = abs(x);
    let t = 1.0 / (1.0 + 0.5 * z);
    var sum = 0.17087277;
    sum = sum * t - 0.82215223;
    sum = sum * t + 1.48851587;
    sum = sum * t - 1.13520398;
    sum = sum * t + 0.27886807;
    sum = sum * t - 0.18628806;
    sum = sum * t + 0.09678418;
    sum = sum * t + 0.37409196;
    sum = sum * t + 1.00002368;
    sum = sum * t - 1.26551223;
    let tail = t * exp(sum - z * z);
    return select(2.0 - tail, tail, x >= 0.0);
}

fn activate(x: f32) -> f32 {
    return 0.5 * x * erfc(-0.70710678 * x);
}
#endif
#if GELU_TANH
fn activate(x: f32) -> f32 {
    return 0.5 * x * (1.0 + tanh_of(0.7978846 * (x + 0.044715 * x * x * x)));
}
#endif
#if RELU2
fn activate(x: f32) -> f32 {
    return max(x, 0.0) * max(x, 0.0);
}
#endif
#if SILU
fn activate(x: f32) -> f32 {
    return x / (1.0 + exp(-x));
}
#endif
