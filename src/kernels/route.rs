//! `route.wgsl`: which experts each token goes through, and what they count for.

use super::spec;
use crate::Result;
use crate::gpu::{Access, Device, ElementType, Kernel, Pass, Spec, Tensor, Work, pad};

/// Lanes of a workgroup, which is all that a token has.
const LANES: u32 = 256;
/// Lanes that take a row together.
const TEAM: u32 = 16;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    width: u32,
}

/// How tokens choose among experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Routing {
    /// Experts that they choose among.
    pub count: usize,
    /// How many they choose.
    pub chosen: usize,
    /// Whether what those count for sums to one.
    pub normalised: bool,
    /// Experts behind them that every token goes through, which have one gate.
    pub shared: usize,
}

impl Routing {
    /// Experts that a token goes through.
    pub fn slots(&self) -> usize {
        self.chosen + self.shared
    }

    /// All that there are.
    pub fn experts(&self) -> usize {
        self.count + self.shared
    }

    /// Rows of the router.
    pub fn rows(&self) -> usize {
        self.count + self.shared.min(1)
    }
}

/// Routes tokens.
pub struct Route {
    kernel: Kernel,
    params: Params,
    work: Work,
}

fn variant(routing: &Routing, biased: bool) -> Spec {
    let Routing { count, chosen, normalised, shared } = *routing;
    let flags: Vec<_> = [(normalised, "NORMALISED"), (biased, "BIAS")].into_iter().filter_map(|(on, flag)| on.then_some(flag)).collect();
    let constants = [("WORKGROUP", LANES), ("TEAM", TEAM), ("EXPERTS", count as u32), ("SLOTS", chosen as u32), ("SHARED", shared as u32)];
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Write)];
    bindings.extend(biased.then_some((3, Access::Read)));
    spec("route.wgsl", &flags, &constants, &bindings)
}

impl Route {
    /// `router`: `[rows][width]`, and its `bias` `[rows]`; `x`: `[n][width]`, all f32; `routes`:
    /// u32 `[n][2·slots]`, an expert and the bits of its share, each.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, routing: Routing, [router, x]: [&Tensor; 2], bias: Option<&Tensor>, routes: &Tensor) -> Result<Route> {
        let width = x.shape.cols;
        [router, x].into_iter().for_each(|tensor| tensor.expect_padded("route", ElementType::F32, width));
        routes.expect("route", ElementType::U32, 2 * routing.slots());
        assert!(router.shape.rows == routing.rows() && routing.chosen <= routing.count, "route: {routing:?} by {router}");
        let buffers: Vec<&wgpu::Buffer> = [&**router, x, routes].into_iter().chain(bias.map(|bias| &**bias)).collect();
        let numbers = (routing.rows() * pad(width)) as u64;
        Ok(Route {
            kernel: device.kernel(variant(&routing, bias.is_some()), &buffers)?,
            params: Params { width: (pad(width) / 4) as u32 },
            work: Work { bytes: 4 * numbers, flops: 2 * numbers },
        })
    }

    /// One workgroup per token.
    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        let work = Work { bytes: self.work.bytes, flops: u64::from(tokens) * self.work.flops };
        self.kernel.record(pass, &self.params, [tokens, 1, 1], work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Shape;
    use crate::kernels::oracle::{devices, numbers, run};

    /// By the definitions, in f64: experts and shares of each token.
    fn expected(routing: &Routing, logits: &[f64]) -> Vec<(u32, f64)> {
        let mut order: Vec<usize> = (0..routing.count).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        let counted = if routing.normalised { routing.chosen } else { routing.count };
        let sum: f64 = order[..counted].iter().map(|expert| logits[*expert].exp()).sum();
        let chosen = order[..routing.chosen].iter().map(|expert| (*expert as u32, logits[*expert].exp() / sum));
        let gate = 1.0 / (1.0 + (-logits[logits.len() - 1]).exp());
        chosen.chain((routing.count..routing.experts()).map(|expert| (expert as u32, gate))).collect()
    }

    #[test]
    fn tokens_go_to_the_largest_logits() {
        for device in devices(None) {
            for (count, chosen, normalised, shared, biased, width) in
                [(5, 2, true, 0, true, 70), (300, 8, false, 3, false, 33), (1, 1, false, 1, true, 4), (17, 17, true, 0, false, 301)]
            {
                let routing = Routing { count, chosen, normalised, shared };
                let (tokens, stride) = (3, pad(width));
                let padded = |seed, rows: usize| {
                    numbers(seed, rows * stride).into_iter().enumerate().map(|(i, x)| if i % stride < width { x } else { 0.0 }).collect::<Vec<f32>>()
                };
                let (weights, x, bias) = (padded(1, routing.rows()), padded(2, tokens), numbers(3, routing.rows()));
                let [router, from] =
                    [&weights, &x].map(|v| Tensor::vector(&device, "numbers", v).unwrap().view(Shape::padded(v.len() / stride, width)));
                let bias_tensor = Tensor::vector(&device, "bias", &bias).unwrap();
                let routes = Tensor::zeroed(&device, "routes", ElementType::U32, Shape::dense(tokens, 2 * routing.slots())).unwrap();
                let route = Route::plan(&device, routing, [&router, &from], biased.then_some(&bias_tensor), &routes).unwrap();
                let got = run::<[u32; 2]>(&device, &routes, tokens * routing.slots(), |pass| route.record(pass, tokens as u32));
                for (x, got) in x.chunks_exact(stride).zip(got.chunks_exact(routing.slots())) {
                    let dot = |row: &[f32]| row.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                    let logit = |(row, weights): (usize, &[f32])| dot(weights) + if biased { f64::from(bias[row]) } else { 0.0 };
                    let logits: Vec<f64> = weights.chunks_exact(stride).enumerate().map(logit).collect();
                    for ([expert, share], (other, expected)) in got.iter().zip(expected(&routing, &logits)) {
                        assert_eq!(*expert, other, "{routing:?}, {:?}", device.tier());
                        let share = f64::from(f32::from_bits(*share));
                        assert!((share - expected).abs() < 1e-5 * expected, "{routing:?}, {:?}: {share} for {expected}", device.tier());
                    }
                }
            }
        }
    }

    #[test]
    fn equals_go_to_the_first_and_no_number_stays_none() {
        for device in devices(None) {
            let routing = Routing { count: 4, chosen: 2, normalised: true, shared: 0 };
            let router = Tensor::upload(&device, "router", &[1f32, 2.0, 2.0, 2.0], Shape::padded(4, 1)).unwrap();
            let x = Tensor::upload(&device, "x", &[1f32, f32::NAN], Shape::padded(2, 1)).unwrap();
            let routes = Tensor::zeroed(&device, "routes", ElementType::U32, Shape::dense(2, 4)).unwrap();
            let route = Route::plan(&device, routing, [&router, &x], None, &routes).unwrap();
            let got = run::<[u32; 2]>(&device, &routes, 4, |pass| route.record(pass, 2));
            assert_eq!(got[..2], [[1, 0.5f32.to_bits()], [2, 0.5f32.to_bits()]], "{:?}", device.tier());
            assert!(got[2..].iter().all(|[expert, share]| *expert < 4 && f32::from_bits(*share).is_nan()), "{got:?}, {:?}", device.tier());
        }
    }
}
