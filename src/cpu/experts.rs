//! A mixture of experts: a router sends each token through a few of many MLPs, and what these make
//! of it is weighed and summed (Shazeer et al., arXiv 1701.06538).

use super::linear::{Linear, Source};
use super::mlp::Mlp;
use crate::Result;
use crate::checkpoint::{self, WeightStorage};
use nalgebra::{DMatrix, DVector};

/// `Σ_e w_e · MLP_e(x)` over the experts that are chosen, and besides `σ(gate(x)) · MLP(x)` of one
/// that all tokens share.
pub(super) struct Experts {
    router: Linear,
    all: Vec<Mlp>,
    chosen: usize,
    normalised: bool,
    shared: Option<(Mlp, Linear)>,
}

/// A token's way.
struct Route {
    /// Experts, and what each counts for.
    chosen: Vec<(usize, f32)>,
    /// The softmax of all logits, or of those that are chosen, by expert; zero for the others.
    shares: DVector<f32>,
}

impl Experts {
    pub(super) fn load(source: Source, name: &str, spec: &checkpoint::Experts) -> Result<Experts> {
        let config = source.checkpoint.config();
        let (hidden, bias) = (config.hidden_size, config.design.mlp.bias);
        // A logit that is rounded may be another expert.
        let exact = Source { storage: WeightStorage::F32, ..source };
        let shared = |width| {
            let gate = Linear::load(exact, &format!("{name}.shared_expert_gate"), [1, hidden], false)?;
            Ok::<_, crate::Error>((Mlp::load(source, &format!("{name}.shared_expert"), width)?, gate))
        };
        Ok(Experts {
            router: Linear::load(exact, &format!("{name}.router"), [spec.count, hidden], bias)?,
            all: (0..spec.count).map(|expert| Mlp::load(source, &format!("{name}.experts.{expert}"), spec.width)).collect::<Result<_>>()?,
            chosen: spec.chosen,
            normalised: spec.normalised,
            shared: spec.shared.map(shared).transpose()?,
        })
    }

    /// Its linear maps.
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        let shared = self.shared.iter().flat_map(|(mlp, gate)| mlp.linears().chain([gate]));
        self.all.iter().flat_map(Mlp::linears).chain([&self.router]).chain(shared)
    }

    /// Bytes of those experts that a token does not go through.
    pub(super) fn unread_bytes(&self) -> usize {
        let all: usize = self.all.iter().flat_map(Mlp::linears).map(|linear| linear.weight.bytes()).sum();
        all / self.all.len().max(1) * (self.all.len() - self.chosen)
    }

    /// Of every token of `x`.
    fn routes(&self, x: &DMatrix<f32>) -> Vec<Route> {
        let logits = self.router.apply(x);
        logits.column_iter().map(|logits| route(logits.iter().copied().collect(), self.chosen, self.normalised)).collect()
    }

    /// The tokens that go through `expert`, and what it counts for with each.
    fn tokens(routes: &[Route], expert: usize) -> (Vec<usize>, Vec<f32>) {
        let of_token = |(token, route): (usize, &Route)| route.chosen.iter().find(|(chosen, _)| *chosen == expert).map(|(_, share)| (token, *share));
        routes.iter().enumerate().filter_map(of_token).unzip()
    }

    /// `x: [hidden, tokens]`.
    pub(super) fn apply(&self, x: &DMatrix<f32>) -> DMatrix<f32> {
        let (routes, mut y) = (self.routes(x), DMatrix::zeros(x.nrows(), x.ncols()));
        for (expert, mlp) in self.all.iter().enumerate() {
            let (tokens, shares) = Self::tokens(&routes, expert);
            if tokens.is_empty() {
                continue;
            }
            let made = mlp.apply(&x.select_columns(&tokens));
            for ((token, share), made) in tokens.iter().zip(&shares).zip(made.column_iter()) {
                y.column_mut(*token).axpy(*share, &made, 1.0);
            }
        }
        if let Some((mlp, gate)) = &self.shared {
            let (made, gates) = (mlp.apply(x), gate.apply(x));
            for ((mut y, made), gate) in y.column_iter_mut().zip(made.column_iter()).zip(gates.iter()) {
                y.axpy(sigmoid(*gate), &made, 1.0);
            }
        }
        y
    }

    /// The gradient with respect to `x`, from `upstream`, that with respect to what
    /// [`apply`](Self::apply) makes of it. Which experts are chosen does not move.
    pub(super) fn backward(&self, x: &DMatrix<f32>, upstream: &DMatrix<f32>) -> DMatrix<f32> {
        let (routes, mut gradient) = (self.routes(x), DMatrix::zeros(x.nrows(), x.ncols()));
        // With respect to what each expert counts for.
        let mut counted = DMatrix::zeros(self.all.len(), x.ncols());
        for (expert, mlp) in self.all.iter().enumerate() {
            let (tokens, shares) = Self::tokens(&routes, expert);
            if tokens.is_empty() {
                continue;
            }
            let (here, mut upstream) = (x.select_columns(&tokens), upstream.select_columns(&tokens));
            for ((token, made), upstream) in tokens.iter().zip(mlp.apply(&here).column_iter()).zip(upstream.column_iter()) {
                counted[(expert, *token)] = made.dot(&upstream);
            }
            upstream.column_iter_mut().zip(&shares).for_each(|(mut column, share)| column *= *share);
            for (token, made) in tokens.iter().zip(mlp.backward(&here, &upstream).column_iter()) {
                let mut column = gradient.column_mut(*token);
                column += made;
            }
        }
        // Through the softmax: dl = p∘(dp − ⟨dp, p⟩).
        for (mut counted, route) in counted.column_iter_mut().zip(&routes) {
            let mean = counted.dot(&route.shares);
            counted.zip_apply(&route.shares, |slope, share| *slope = share * (*slope - mean));
        }
        gradient += self.router.backward(&counted);
        if let Some((mlp, gate)) = &self.shared {
            let (made, mut gates, mut upstream) = (mlp.apply(x), gate.apply(x), upstream.clone());
            for ((gate, mut upstream), made) in gates.iter_mut().zip(upstream.column_iter_mut()).zip(made.column_iter()) {
                let open = sigmoid(*gate);
                *gate = made.dot(&upstream) * open * (1.0 - open);
                upstream *= open;
            }
            gradient += gate.backward(&gates) + mlp.backward(x, &upstream);
        }
        gradient
    }
}

/// Where a token goes whose router says `logits`; of equals to the first.
fn route(logits: Vec<f32>, count: usize, normalised: bool) -> Route {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    let counted = if normalised { &order[..count] } else { &order[..] };
    let highest = counted.iter().map(|expert| logits[*expert]).fold(f32::NEG_INFINITY, f32::max);
    let mut shares = DVector::zeros(logits.len());
    counted.iter().for_each(|expert| shares[*expert] = (logits[*expert] - highest).exp());
    shares /= shares.sum();
    Route { chosen: order[..count].iter().map(|expert| (*expert, shares[*expert])).collect(), shares }
}

/// `1 / (1 + exp(−x))`.
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_a_softmax_of_those_chosen_or_of_all() {
        let logits = vec![1f32.ln(), 5f32.ln(), 3f32.ln(), 5f32.ln(), 2f32.ln()];
        let chosen = |normalised| route(logits.clone(), 3, normalised).chosen;
        let near = |found: Vec<(usize, f32)>, expected: [(usize, f32); 3]| {
            found.iter().zip(expected).all(|((expert, share), (other, expected))| *expert == other && (share - expected).abs() < 1e-6)
        };
        assert!(near(chosen(true), [(1, 5.0 / 13.0), (3, 5.0 / 13.0), (2, 3.0 / 13.0)]), "{:?}", chosen(true));
        assert!(near(chosen(false), [(1, 5.0 / 16.0), (3, 5.0 / 16.0), (2, 3.0 / 16.0)]), "{:?}", chosen(false));
    }

    #[test]
    fn no_number_stays_none() {
        let found = route(vec![0.0, f32::NAN, 1.0], 2, true);
        assert!(found.chosen.iter().all(|(_, share)| share.is_nan()), "{:?}", found.chosen);
    }
}
