//! `matvec.wgsl`: one token, or a few, through a weight matrix.

use super::fusion::{Fusion, bindings};
use super::{WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Device, Kernel, Matrix, Pass, Quantised, Spec, Tensor, Tier, Tuning, WeightType, Work, pad};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    first: u32,
    rows: u32,
    width: u32,
    count: u32,
    epsilon: f32,
    tokens: u32,
    stride: u32,
    scale: f32,
    cap: f32,
}

/// Lanes of a team where there are no subgroups.
pub(super) const TEAM: u32 = 16;

/// `out[t][row] = Σ_k weights[row][k] · x[t][k]`, and what is fused with it.
pub struct Matvec {
    parts: Vec<Product>,
}

/// Of one part of a matrix.
struct Product {
    kernel: Kernel,
    params: Params,
    /// Workgroups of a token, or of all.
    blocks: u32,
    /// Whether tokens have workgroups of their own.
    by_token: bool,
    work: Work,
}

/// As many rows as the teams of a workgroup take in one go, where a device says that its subgroups
/// have so many lanes, or without subgroups.
pub(super) fn block(subgroups: Option<[u32; 2]>, tuning: &Tuning) -> u32 {
    (WORKGROUP / subgroups.map_or(TEAM, |[min, max]| subgroup(min, max))).max(1) * tuning.team_rows
}

/// Whether a load is two vectors of a row.
fn paired(cols: usize, tuning: &Tuning) -> bool {
    tuning.paired && pad(cols).is_multiple_of(8)
}

/// Whether the last loads of quantised rows reach beyond what they are multiplied with.
fn ragged(weights: WeightType, cols: usize) -> bool {
    matches!(weights, WeightType::Quantised(kind) if !cols.is_multiple_of(kind.set()))
}

/// For rows of so many weights and up to `columns` tokens; `flags` are [`Fusion::flags`], `block`
/// is [`block`]'s.
pub(super) fn variant((weights, cols): (WeightType, usize), flags: &[&'static str], [block, columns]: [u32; 2], tuning: &Tuning) -> Spec {
    let mut constants = weights.constants();
    constants.extend([
        ("WORKGROUP", WORKGROUP),
        ("UNROLL", tuning.team_rows),
        ("TEAM", TEAM),
        ("ROWS", block),
        ("AHEAD", tuning.ahead),
        ("COLUMNS", columns),
    ]);
    let layout = [(weights == WeightType::F16 && paired(cols, tuning), "PAIRED"), (ragged(weights, cols), "RAGGED")];
    let layout: Vec<_> = layout.into_iter().filter_map(|(on, flag)| on.then_some(flag)).collect();
    let flags = [flags, weights.flags(), &layout].concat();
    spec("matvec.wgsl", &flags, &constants, &bindings(weights, &flags))
}

/// The same in integers: for quantised rows of so many weights, and `block` rows a workgroup.
pub(super) fn int8_variant((kind, cols): (Quantised, usize), flags: &[&'static str], block: u32, tuning: &Tuning) -> Spec {
    let weights = WeightType::Quantised(kind);
    let mut constants = weights.constants();
    let loads = kind.loads(cols) as u32;
    constants.extend([("WORKGROUP", WORKGROUP), ("UNROLL", tuning.team_rows), ("ROWS", block), ("AHEAD", tuning.ahead), ("LOADS", loads)]);
    let flags = [flags, weights.flags(), &["INT8"]].concat();
    spec("matvec_int8.wgsl", &flags, &constants, &bindings(weights, &flags))
}

/// Bytes in which a workgroup has a token in 8 bits, with a step for 32 and a sum for each lane.
fn int8_bytes(kind: Quantised, cols: usize) -> u32 {
    let weights = cols.next_multiple_of(kind.set()) as u32;
    weights + weights / 8 + 4 * WORKGROUP
}

/// Lanes of the subgroups that a device is likely to form for a kernel that does not ask for a
/// size, of those that it says it may: Metal says 4 to 64 and forms 32, Intel 8 to 32 and forms 16
/// or 32, AMD 32 to 64 and forms either. The shader reads what they really are; a workgroup has as
/// many rows as it then takes at once, or takes them in several goes.
fn subgroup(min: u32, max: u32) -> u32 {
    (max / 2).max(min).max(1)
}

impl Matvec {
    /// For the first tokens of `x` and `out`, up to `columns` of them.
    ///
    /// `x`: `[n][cols]`; `out`: `[n][rows]`, or half of that where gated. All f32.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, weights: &Matrix, x: &Tensor, out: &Tensor, fusion: Fusion, columns: u32) -> Result<Matvec> {
        fusion.check("matvec", weights, x, out);
        let (tuning, cols) = (device.tuning(), pad(weights.cols));
        let subgroups = (device.tier() == Tier::F16Subgroups).then(|| device.subgroups());
        let block = block(subgroups, &tuning);
        let parts = weights.parts.iter().map(|part| {
            assert!(part.kind != WeightType::F32, "matvec: {} where weights are F16 or quantised", part.weights);
            let int8 = match part.kind {
                WeightType::Quantised(kind) if tuning.int8 && subgroups.is_some() && int8_bytes(kind, cols) <= device.workgroup_memory() => {
                    Some(kind)
                }
                _ => None,
            };
            let (spec, block) = match int8 {
                Some(kind) => (int8_variant((kind, cols), &fusion.flags(), block * tuning.passes, &tuning), block * tuning.passes),
                None => (variant((part.kind, cols), &fusion.flags(), [block, columns], &tuning), block),
            };
            let kernel = device.kernel(spec, &fusion.buffers(part, x, out))?.called(format_args!("{}×{cols}", part.rows()));
            let rows = part.rows() as u32;
            let epsilon = fusion.norm.map_or(0.0, |norm| norm.epsilon);
            let [first, width, count, stride] = [part.first, cols / 4, weights.cols, out.shape.stride].map(|n| n as u32);
            let [scale, cap] = fusion.numbers();
            let params = Params { first, rows, width, count, epsilon, tokens: 1, stride, scale, cap };
            let work = Work { bytes: part.bytes() + 4 * (part.rows() + cols) as u64, flops: 2 * (part.rows() * cols) as u64 };
            Ok(Product { kernel, params, blocks: rows.div_ceil(block), by_token: int8.is_some(), work })
        });
        Ok(Matvec { parts: parts.collect::<Result<_>>()? })
    }

    /// One dispatch per part of the matrix, of up to as many tokens as were planned.
    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        for part in &self.parts {
            let across = part.blocks.min(32768);
            let down = part.blocks.div_ceil(across);
            let grid = if part.by_token { [tokens, across, down] } else { [across, down, 1] };
            part.kernel.record(pass, &Params { tokens, ..part.params }, grid, part.work);
        }
    }
}

/// The oracle of both projection kernels, in f64 and in the order of the definition.
#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::gpu::{Packed, Rows, Shape};
    use crate::kernels::fusion::Activation;
    use crate::kernels::norm::RmsNorm;
    use crate::kernels::oracle::{assert_close, halves, numbers, run, tuned_devices};
    use half::f16;

    /// A product and what is fused with it, on plain numbers.
    #[derive(Clone, Copy)]
    pub struct Case {
        pub name: &'static str,
        pub rows: usize,
        pub cols: usize,
        pub norm: bool,
        pub gated: bool,
        pub residual: bool,
        pub bias: bool,
        /// And a scale of a half, and a cap of three, where it is not gated.
        pub activation: Option<Activation>,
    }

    /// What a case multiplies: `x` is `[tokens][pad(cols)]` with zero padding, `before` what `out`
    /// holds.
    pub struct Numbers {
        /// What is uploaded, and the numbers that it holds.
        pub rows: Vec<Rows>,
        pub weights: Vec<f64>,
        pub x: Vec<f32>,
        pub gain: Vec<f32>,
        pub bias: Vec<f32>,
        pub before: Vec<f32>,
    }

    /// Rows of a type at random, and the numbers they hold.
    pub fn random_rows(weights: WeightType, seed: u64, [rows, cols]: [usize; 2]) -> (Rows, Vec<f64>) {
        let WeightType::Quantised(kind) = weights else {
            let halves = halves(seed, rows * cols);
            return (Rows::F16(halves.clone()), halves.into_iter().map(f16::to_f64).collect());
        };
        let most = f32::from(1u16 << kind.bits()) - 1.0;
        let codes: Vec<u8> = numbers(seed, rows * cols).into_iter().map(|x| ((x + 1.0) / 2.0 * most).round() as u8).collect();
        let scales: Vec<[f16; 2]> = halves(seed + 9, rows * cols / 16).chunks_exact(2).map(|pair| [pair[0], pair[1]]).collect();
        let decoded = codes.iter().enumerate().map(|(i, code)| kind.number(*code, scales[i / 32], i % 32 / 16)).collect();
        (Rows::Quantised(Packed::pack(kind, &codes, &scales, cols)), decoded)
    }

    impl Case {
        /// Scale and cap.
        pub fn more<'a>(&self) -> Fusion<'a> {
            let any = self.activation.is_some() && !self.gated;
            Fusion { scale: any.then_some(0.5), cap: any.then_some(3.0), ..Default::default() }
        }

        /// Numbers to one token's output.
        pub fn stride(&self) -> usize {
            if self.gated { self.rows / 2 } else { self.rows }
        }

        /// With the first 128 rows in one type, and what is left in another.
        pub fn numbers(&self, tokens: usize, types: [WeightType; 2]) -> Numbers {
            let stride = pad(self.cols);
            let padded = |seed, rows: usize| {
                numbers(seed, rows * stride).into_iter().enumerate().map(|(i, x)| if i % stride < self.cols { x } else { 0.0 }).collect::<Vec<_>>()
            };
            let (mut rows, mut weights) = (Vec::new(), Vec::new());
            for (part, kind) in [self.rows.min(128), self.rows.saturating_sub(128)].into_iter().zip(types).filter(|(part, _)| *part > 0) {
                let (packed, numbers) = random_rows(kind, rows.len() as u64 + 1, [part, self.cols]);
                rows.push(packed);
                weights.extend(numbers);
            }
            let (x, gain) = (padded(2, tokens), padded(3, 1));
            Numbers { rows, weights, x, gain, bias: numbers(4, self.rows), before: numbers(5, tokens * self.stride()) }
        }

        /// By the definition; `int8`: with activations as they are in 8 bits.
        pub fn expected(&self, n: &Numbers, int8: bool) -> Vec<f64> {
            let token = |(t, x): (usize, &[f32])| {
                let square: f64 = x.iter().map(|x| (*x as f64).powi(2)).sum();
                let scale = if self.norm { 1.0 / (square / self.cols as f64 + 1e-3f32 as f64).sqrt() } else { 1.0 };
                let mut input: Vec<f32> = (0..self.cols).map(|k| x[k] * if self.norm { n.gain[k] } else { 1.0 }).collect();
                if int8 {
                    input.chunks_mut(32).for_each(in_eight_bits);
                }
                let input = |k: usize| f64::from(input[k]) * scale;
                let product = |r: usize| (0..self.cols).map(|k| n.weights[r * self.cols + k] * input(k)).sum::<f64>();
                let product = |r: usize| product(r) + if self.bias { n.bias[r] as f64 } else { 0.0 };
                let out = |i: usize| match (self.gated, self.activation) {
                    (true, activation) => activated(activation.unwrap_or(Activation::Silu), product(2 * i)) * product(2 * i + 1),
                    (false, None) => product(i),
                    (false, Some(activation)) => 3.0 * (activated(activation, product(i)) * 0.5 / 3.0).tanh(),
                };
                let before = |i: usize| if self.residual { n.before[t * self.stride() + i] as f64 } else { 0.0 };
                (0..self.stride()).map(|i| out(i) + before(i)).collect::<Vec<_>>()
            };
            n.x.chunks_exact(pad(self.cols)).enumerate().flat_map(token).collect()
        }
    }

    fn in_eight_bits(group: &mut [f32]) {
        let step = group.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0;
        group.iter_mut().for_each(|x| *x = (*x / step).round_ties_even() * step);
    }

    /// By the definitions; `Φ` by Simpson's rule.
    pub fn activated(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Gelu => {
                let density = |t: f64| (-0.5 * t * t).exp() / (2.0 * std::f64::consts::PI).sqrt();
                let step = x / 400.0;
                let weight = |i: usize| if i == 0 || i == 400 { 1.0 } else { [2.0, 4.0][i % 2] };
                x * (0.5 + (0..=400).map(|i| weight(i) * density(i as f64 * step)).sum::<f64>() * step / 3.0)
            }
            Activation::GeluTanh => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
            Activation::Relu2 => x.max(0.0).powi(2),
        }
    }

    /// Two parts and an odd number of rows, and smaller than anything.
    const CASES: [Case; 9] = [
        Case { name: "plain", rows: 139, cols: 301, norm: false, gated: false, residual: false, bias: false, activation: None },
        Case { name: "norm", rows: 139, cols: 301, norm: true, gated: false, residual: false, bias: false, activation: None },
        Case { name: "norm, gated", rows: 142, cols: 301, norm: true, gated: true, residual: false, bias: false, activation: None },
        Case { name: "residual", rows: 139, cols: 297, norm: false, gated: false, residual: true, bias: false, activation: None },
        Case { name: "residual, bias", rows: 139, cols: 301, norm: false, gated: false, residual: true, bias: true, activation: None },
        Case { name: "GELU, bias", rows: 142, cols: 301, norm: false, gated: true, residual: false, bias: true, activation: Some(Activation::Gelu) },
        Case {
            name: "GELU, capped",
            rows: 139,
            cols: 301,
            norm: false,
            gated: false,
            residual: true,
            bias: true,
            activation: Some(Activation::GeluTanh),
        },
        Case {
            name: "squared ReLU",
            rows: 139,
            cols: 301,
            norm: true,
            gated: false,
            residual: false,
            bias: false,
            activation: Some(Activation::Relu2),
        },
        Case { name: "small", rows: 5, cols: 3, norm: false, gated: false, residual: false, bias: false, activation: None },
    ];

    /// Every case in f16; some in every quantised type, each of which takes its time to compile.
    pub fn cases() -> Vec<(Case, [WeightType; 2])> {
        let mut all: Vec<_> = CASES.iter().map(|case| (*case, [WeightType::F16; 2])).collect();
        for (index, kind) in Quantised::ALL.into_iter().enumerate() {
            let types = [kind, Quantised::ALL[(index + 2) % 6]].map(WeightType::Quantised);
            // Rows of whole sets and not, and less than a set.
            match index % 2 {
                0 => all.push((Case { cols: 288, ..CASES[2] }, types)),
                _ => all.extend([Case { cols: 256, ..CASES[4] }, Case { cols: 32, ..CASES[8] }].map(|case| (case, types))),
            }
        }
        all
    }

    /// Of two bytes, 128 rows of the cases' columns and no more.
    pub const BINDING: u64 = 160 << 10;

    #[test]
    fn one_token_by_every_variant_and_a_few() {
        for (device, tuning) in tuned_devices(Some(BINDING)) {
            for (index, (case, types)) in cases().into_iter().enumerate() {
                // Several by some, divided as for a GPU: each variant takes its time to compile.
                for (tokens, columns) in [(1, 1), (1, 4), (3, 4)].into_iter().take(if [2, 4, 5, 9].contains(&index) { 3 } else { 1 }) {
                    let n = case.numbers(tokens, types);
                    let weights = Matrix::of(&device, "weights", &n.rows, case.cols).unwrap();
                    assert_eq!(weights.parts.len(), if case.rows > 128 { 2 } else { 1 });
                    let x = Tensor::vector(&device, "x", &n.x).unwrap().view(Shape::padded(tokens, case.cols));
                    let gain = Tensor::vector(&device, "gain", &n.gain).unwrap().view(Shape::padded(1, case.cols));
                    let bias = Tensor::vector(&device, "bias", &n.bias).unwrap();
                    let out = Tensor::upload(&device, "out", &n.before, Shape::dense(tokens, case.stride())).unwrap();
                    let fusion = Fusion {
                        norm: case.norm.then_some(RmsNorm { gain: &gain, epsilon: 1e-3 }),
                        gated: case.gated,
                        residual: case.residual,
                        bias: case.bias.then_some(&bias),
                        activation: case.activation,
                        ..case.more()
                    };
                    let matvec = Matvec::plan(&device, &weights, &x, &out, fusion, columns).unwrap();
                    let got = run::<f32>(&device, &out, tokens * case.stride(), |pass| matvec.record(pass, tokens as u32));
                    let what = format!("{} for {tokens} of {columns}, {types:?}, {:?}, {tuning:?}", case.name, device.tier());
                    let int8 = tuning.int8 && device.tier() == Tier::F16Subgroups && matches!(types[0], WeightType::Quantised(_));
                    assert_close(got.into_iter().map(f64::from), &case.expected(&n, int8), 1e-10, &what);
                }
            }
        }
    }

    #[test]
    fn subgroups_are_guessed_from_what_adapters_say() {
        // Metal, Intel, AMD, NVIDIA, Adreno, llvmpipe, SwiftShader.
        let said = [(4, 64), (8, 32), (32, 64), (32, 32), (64, 128), (8, 8), (4, 4), (0, 0)];
        assert_eq!(said.map(|(min, max)| subgroup(min, max)), [32, 16, 32, 32, 64, 8, 4, 1]);
    }
}
