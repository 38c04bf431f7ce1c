// Four 16-bit numbers: stored as the tier can, computed with in f32.

#if F16
alias half4 = vec4<f16>;

fn widen(h: half4) -> vec4<f32> {
    return vec4<f32>(h);
}

fn narrow(v: vec4<f32>) -> half4 {
    return half4(v);
}
#else
alias half4 = vec2<u32>;

fn widen(h: half4) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(h.x), unpack2x16float(h.y));
}

fn narrow(v: vec4<f32>) -> half4 {
    return half4(pack2x16float(v.xy), pack2x16float(v.zw));
}
#endif

// c + a · b as a chain of fused multiply-adds, which `dot` is not everywhere.
fn dot_add(a: vec4<f32>, b: vec4<f32>, c: f32) -> f32 {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, c))));
}
