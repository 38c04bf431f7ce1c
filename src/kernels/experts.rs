//! `experts.wgsl`: tokens through the matrices of the experts that they go through.

use super::fusion::{Activation, bindings};
use super::matvec::{TEAM, block};
use super::{WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, ElementType, Kernel, Matrix, Pass, Spec, Tensor, Tier, Tuning, WeightType, Work, pad};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    first: u32,
    count: u32,
    rows: u32,
    width: u32,
    stride: u32,
    scale: f32,
    alpha: f32,
    limit: f32,
}

/// What gate and up become.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Gated {
    /// The activation of one times the other.
    By(Activation),
    /// `(up + 1) · gate / (1 + exp(−alpha · gate))`, both clamped by `limit`.
    Clamped { alpha: f32, limit: f32 },
}

/// What becomes of products.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Ends {
    /// Rows in pairs are gated, for each expert that a token goes through.
    Gated(Gated),
    /// They are weighed, summed over experts, multiplied by this and added to what is there.
    Summed(f32),
}

/// The weights of all experts.
#[derive(Clone, Copy)]
pub(crate) struct ExpertRows<'a> {
    /// Rows of each expert, one expert behind the other; parts are whole experts.
    pub matrix: &'a Matrix,
    /// `[experts · rows]` f32.
    pub bias: Option<&'a Tensor>,
    /// How many experts there are.
    pub count: usize,
}

/// Of every token its experts' products alone.
pub struct Experts {
    /// With the work of one token, and the bytes of all experts.
    parts: Vec<(Kernel, Params, Work, u64)>,
    block: u32,
    slots: u32,
    summed: bool,
}

fn variant(weights: WeightType, cols: usize, slots: usize, (ends, biased): (Ends, bool), (block, tuning): (u32, &Tuning)) -> Spec {
    let mut constants = weights.constants();
    constants.extend([("WORKGROUP", WORKGROUP), ("UNROLL", tuning.team_rows), ("TEAM", TEAM), ("ROWS", block), ("SLOTS", slots as u32)]);
    let mut flags = match ends {
        Ends::Gated(Gated::By(activation)) => vec!["ACTIVATED", activation.flag()],
        Ends::Gated(Gated::Clamped { .. }) => vec!["CLAMPED"],
        Ends::Summed(_) => vec!["SUMMED"],
    };
    flags.extend(weights.flags());
    let ragged = matches!(weights, WeightType::Quantised(kind) if !cols.is_multiple_of(kind.set()));
    flags.extend([(biased, "BIAS"), (ragged, "RAGGED")].into_iter().filter_map(|(on, flag)| on.then_some(flag)));
    let mut all = bindings(weights, &flags);
    all.push((6, Access::Read));
    spec("experts.wgsl", &flags, &constants, &all)
}

impl Experts {
    /// For what `ends` says.
    ///
    /// `x`: `[n][cols]`, and where sums are made `[n·slots][cols]`; `out`: `[n·slots][rows / 2]`,
    /// or `[n][rows]`, all f32. `routes`: u32 `[n][2·slots]`, as [`super::route`] makes them.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, weights: ExpertRows, [x, routes, out]: [&Tensor; 3], ends: Ends) -> Result<Experts> {
        let ExpertRows { matrix, bias, count } = weights;
        let (rows, cols, slots) = (matrix.rows / count, pad(matrix.cols), routes.shape.cols / 2);
        let summed = matches!(ends, Ends::Summed(_));
        x.expect_padded("experts", ElementType::F32, matrix.cols);
        out.expect("experts", ElementType::F32, if summed { rows } else { rows / 2 });
        routes.expect("experts", ElementType::U32, 2 * slots);
        let tuning = device.tuning();
        let block = block((device.tier() == Tier::F16Subgroups).then(|| device.subgroups()), &tuning);
        let (scale, [alpha, limit]) = match ends {
            Ends::Gated(Gated::By(_)) => (1.0, [0.0; 2]),
            Ends::Gated(Gated::Clamped { alpha, limit }) => (1.0, [alpha, limit]),
            Ends::Summed(scale) => (scale, [0.0; 2]),
        };
        let parts = matrix.parts.iter().map(|part| {
            let experts = part.rows() / rows;
            assert!(part.kind != WeightType::F32 && experts * rows == part.rows(), "experts: {} in parts of {rows} rows", part.weights);
            let spec = variant(part.kind, matrix.cols, slots, (ends, bias.is_some()), (block, &tuning));
            let mut buffers: Vec<&wgpu::Buffer> = vec![&part.weights, x, out];
            buffers.extend(bias.map(|bias| &**bias));
            buffers.extend(part.beside.iter().map(|plane| &**plane));
            buffers.push(routes);
            let kernel = device.kernel(spec, &buffers)?.called(format_args!("{slots} of {count} {rows}×{cols}"));
            let [first, count, rows, width, stride] = [part.first / rows, experts, rows, cols / 4, out.shape.stride].map(|n| n as u32);
            // Of one token, and as if all parts had as many of its experts as they have of all.
            let share = |all: u64| all * slots as u64 / weights.count as u64;
            let work = Work { bytes: share(part.bytes()), flops: share(2 * (part.rows() * cols) as u64) };
            Ok((kernel, Params { first, count, rows, width, stride, scale, alpha, limit }, work, part.bytes()))
        });
        Ok(Experts { parts: parts.collect::<Result<_>>()?, block, slots: slots as u32, summed })
    }

    /// One dispatch per part of the matrix.
    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        for (kernel, params, work, all) in &self.parts {
            let bytes = (u64::from(tokens) * work.bytes).min(*all);
            let work = Work { bytes, flops: u64::from(tokens) * work.flops };
            let lines = if self.summed { tokens } else { tokens * self.slots };
            kernel.record(pass, params, [lines, params.rows.div_ceil(self.block), 1], work);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Quantised, Shape};
    use crate::kernels::matvec::tests::{activated, random_rows};
    use crate::kernels::oracle::{assert_close, numbers, run, tuned_devices};

    /// Both kinds of matrix against the sum over experts, with parts of several types.
    #[test]
    fn products_are_those_of_the_experts_that_tokens_go_through() {
        let (count, tokens, slots) = (5, 3, 2);
        let chosen = [[4u32, 0], [1, 2], [2, 3]];
        let shares = numbers(9, tokens * slots);
        for (device, tuning) in tuned_devices(None) {
            let q = WeightType::Quantised;
            for (index, (types, cols, biased)) in [
                ([WeightType::F16; 2], 70, true),
                ([q(Quantised::Q5), q(Quantised::Q6)], 96, true),
                ([q(Quantised::Q4), WeightType::F16], 160, false),
                ([q(Quantised::Q8), q(Quantised::Q4Minimum)], 64, false),
            ]
            .into_iter()
            .enumerate()
            {
                let rows = 38;
                // Three experts, and two of another type.
                let (first, mut weights) = random_rows(types[0], 1, [3 * rows, cols]);
                let (second, more) = random_rows(types[1], 2, [2 * rows, cols]);
                weights.extend(more);
                let matrix = Matrix::of(&device, "experts", &[first, second], cols).unwrap();
                let bias = numbers(4, count * rows);
                let bias_tensor = Tensor::vector(&device, "bias", &bias).unwrap();
                let lines: Vec<u32> = (0..tokens * slots).flat_map(|i| [chosen[i / slots][i % slots], shares[i].to_bits()]).collect();
                let routes = Tensor::upload(&device, "routes", &lines, Shape::dense(tokens, 2 * slots)).unwrap();
                let all = ExpertRows { matrix: &matrix, bias: biased.then_some(&bias_tensor), count };
                let product = |expert: u32, row: usize, x: &[f32]| {
                    let at = expert as usize * rows + row;
                    let dot: f64 = weights[at * cols..][..cols].iter().zip(x).map(|(w, x)| w * f64::from(*x)).sum();
                    dot + if biased { f64::from(bias[at]) } else { 0.0 }
                };
                let what = format!("{types:?}, {:?}, {tuning:?}", device.tier());
                let upload = |seed, lines: usize| {
                    let x = numbers(seed, lines * cols);
                    (Tensor::upload(&device, "x", &x, Shape::padded(lines, cols)).unwrap(), x)
                };

                let (x_tensor, x) = upload(5, tokens);
                let out = Tensor::zeroed(&device, "out", ElementType::F32, Shape::padded(tokens * slots, rows / 2)).unwrap();
                let gated = match index {
                    1 => Gated::Clamped { alpha: 1.7, limit: 0.8 },
                    2 => Gated::By(Activation::Gelu),
                    _ => Gated::By(Activation::Silu),
                };
                let pair = |gate: f64, up: f64| match gated {
                    Gated::By(activation) => activated(activation, gate) * up,
                    Gated::Clamped { .. } => {
                        let (gate, up) = (gate.min(f64::from(0.8f32)), up.clamp(-f64::from(0.8f32), f64::from(0.8f32)));
                        (up + 1.0) * gate / (1.0 + (-f64::from(1.7f32) * gate).exp())
                    }
                };
                let line = |i: usize, row: usize| {
                    let (expert, x) = (chosen[i / slots][i % slots], &x[i / slots * cols..][..cols]);
                    pair(product(expert, 2 * row, x), product(expert, 2 * row + 1, x))
                };
                let half = pad(rows / 2);
                let expected: Vec<f64> = (0..tokens * slots)
                    .flat_map(|i| (0..half).map(move |row| (i, row)))
                    .map(|(i, row)| if row < rows / 2 { line(i, row) } else { 0.0 })
                    .collect();
                let experts = Experts::plan(&device, all, [&x_tensor, &routes, &out], Ends::Gated(gated)).unwrap();
                let got = run::<f32>(&device, &out, expected.len(), |pass| experts.record(pass, tokens as u32));
                assert_close(got.into_iter().map(f64::from), &expected, 1e-10, &format!("gated {what}"));

                let (x_tensor, x) = upload(6, tokens * slots);
                let before = numbers(7, tokens * rows);
                let out = Tensor::upload(&device, "out", &before, Shape::dense(tokens, rows)).unwrap();
                let sum = |t: usize, row: usize| {
                    let of_slot = |s: usize| f64::from(shares[t * slots + s]) * product(chosen[t][s], row, &x[(t * slots + s) * cols..][..cols]);
                    f64::from(before[t * rows + row]) + 0.5 * (0..slots).map(of_slot).sum::<f64>()
                };
                let expected: Vec<f64> = (0..tokens).flat_map(|t| (0..rows).map(move |row| (t, row))).map(|(t, row)| sum(t, row)).collect();
                let experts = Experts::plan(&device, all, [&x_tensor, &routes, &out], Ends::Summed(0.5)).unwrap();
                let got = run::<f32>(&device, &out, expected.len(), |pass| experts.record(pass, tokens as u32));
                assert_close(got.into_iter().map(f64::from), &expected, 1e-10, &format!("summed {what}"));
            }
        }
    }
}
