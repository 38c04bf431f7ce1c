//! From a budget to the rank of every row: the published rules, and the one that looks at the
//! spectrum.
//!
//! A [`Part`] is a row to be (keys of a group of heads in one layer, say); parts of the same
//! projection belong to one module. Ranks are multiples of [`RUN`], at least one run and at most as
//! many as hold the part's width. The budget counts coordinates over all parts; it is met to within
//! one run (of every part of a module where these share a rank), or as closely as the bounds allow.
//!
//! - **Uniform**: every part the same share of its width.
//! - **Fisher** (Palu, arXiv 2407.21118; ReCalKV, 2505.24357): shares in proportion to the Fisher
//!   information of the part's projection, `rank_m = total·F_m/ΣF` split equally between the groups
//!   of a projection. What a full module cannot take goes to the others in proportion; the released
//!   loop hands it out one by one, never ends where all are full, and lets what rounding to 32
//!   takes drift.
//! - **Spectrum** (ours): the next run goes where it saves most: `γ·Σ λ_i` over its coordinates,
//!   with `λ` what leaving them out costs and `γ` what a module's error does to the loss. Runs cost
//!   alike and savings fall along a part, so taking the largest first is optimal.
//! - **Energy** (KQ-SVD, 2512.05916): all parts of a module share the smallest rank that discards
//!   at most a share `ε` of their energy, averaged over them; here `ε` is the least that the budget
//!   allows, the same everywhere. (The paper's text takes the share, its code the square of `ε`;
//!   and it takes the spectra of keys and values for all methods that it compares, where here each
//!   has its own.)

use crate::kv::RUN;
use crate::{Error, Result};

/// A rule to deal ranks by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ranks {
    /// The same share for all.
    #[default]
    Uniform,
    /// In proportion to the Fisher information of the projection.
    Fisher,
    /// To where they save most.
    Spectrum,
    /// The same discarded share of energy in every module.
    Energy,
}

/// A row that needs a rank.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Numbers that it codes, `w`.
    pub width: usize,
    /// Which projection it belongs to; parts of one stand side by side.
    pub module: usize,
    /// [`Ranks::Fisher`]: the projection's information.
    ///
    /// [`Ranks::Spectrum`]: what `loss` is multiplied by. No other rule asks.
    pub weight: f64,
    /// What leaving out each coordinate costs, descending, `[w]`.
    ///
    /// [`Ranks::Uniform`] and [`Ranks::Fisher`] do not ask.
    pub loss: Vec<f64>,
}

impl Part {
    /// The rank that loses nothing: its width in full runs.
    fn full(&self) -> usize {
        self.width.next_multiple_of(RUN)
    }
}

impl Ranks {
    /// All of them, by the name that `--ranks` takes.
    pub const ALL: [(&'static str, Ranks); 4] =
        [("uniform", Ranks::Uniform), ("fisher", Ranks::Fisher), ("spectrum", Ranks::Spectrum), ("energy", Ranks::Energy)];

    /// The rule called `name`.
    ///
    /// # Errors
    /// [`Error::Argument`] with the names that there are.
    pub fn named(name: &str) -> Result<Ranks> {
        Ranks::ALL.iter().find(|(known, _)| *known == name).map(|(_, rule)| *rule).ok_or_else(|| {
            let known: Vec<_> = Ranks::ALL.iter().map(|(known, _)| *known).collect();
            Error::Argument { name: "ranks".into(), message: format!("there is no `{name}`; choose one of {}", known.join(", ")) }
        })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Ranks::ALL.iter().find(|(_, rule)| *rule == self).map_or("", |(name, _)| name)
    }

    /// Deals about `budget` coordinates out to `parts`: a rank for each.
    ///
    /// # Errors
    /// [`Error::Numeric`] where a weight or loss that the rule asks for is negative or not finite.
    pub fn deal(self, parts: &[Part], budget: usize) -> Result<Vec<usize>> {
        let fail = |part: usize, what: &str, x: f64| Error::Numeric { what: format!("the ranks, row {part}"), message: format!("its {what} is {x}") };
        for (index, part) in parts.iter().enumerate() {
            if matches!(self, Ranks::Fisher | Ranks::Spectrum) && !(part.weight >= 0.0 && part.weight.is_finite()) {
                return Err(fail(index, "weight", part.weight));
            }
            let asked = if matches!(self, Ranks::Spectrum | Ranks::Energy) { part.loss.as_slice() } else { &[] };
            if let Some(&loss) = asked.iter().find(|loss| !(**loss >= 0.0 && loss.is_finite())) {
                return Err(fail(index, "loss", loss));
            }
        }
        Ok(match self {
            Ranks::Uniform => rounded(parts, &shares(parts, budget, |_| 1.0)),
            Ranks::Fisher => rounded(parts, &shares(parts, budget, |part| part.weight)),
            Ranks::Spectrum => by_savings(parts, budget),
            Ranks::Energy => by_energy(parts, budget),
        })
    }
}

/// Ranks before rounding: in proportion to `weight` and width, none below a run or above full,
/// together `budget` where these bounds allow it.
fn shares(parts: &[Part], budget: usize, weight: impl Fn(&Part) -> f64) -> Vec<f64> {
    // Without any information all count alike; with none of its own a part still counts for
    // something, so that a large budget finds a place.
    let largest = parts.iter().map(&weight).fold(0.0, f64::max);
    let wanted = |part: &Part| part.width as f64 * if largest > 0.0 { (weight(part) / largest).max(1e-9) } else { 1.0 };
    let at = |scale: f64| -> Vec<f64> { parts.iter().map(|part| (scale * wanted(part)).clamp(RUN as f64, part.full() as f64)).collect() };
    // The sum rises with the scale: bisect its logarithm. At the upper end everything is full, at
    // the lower end nothing has more than a run.
    let (mut low, mut high) = (-40.0, 40.0);
    for _ in 0..100 {
        let middle = (low + high) / 2.0;
        if at(f64::exp(middle)).iter().sum::<f64>() < budget as f64 { low = middle } else { high = middle }
    }
    at(f64::exp(high))
}

/// Rounds to runs. What rounding takes from one part or adds to it is carried to the next, so that
/// the total keeps to the sum.
fn rounded(parts: &[Part], shares: &[f64]) -> Vec<usize> {
    let mut carried = 0.0;
    let round = |(part, share): (&Part, &f64)| {
        let wanted = share + carried;
        let rank = ((wanted / RUN as f64).round() as usize * RUN).clamp(RUN, part.full());
        carried = wanted - rank as f64;
        rank
    };
    parts.iter().zip(shares).map(round).collect()
}

fn by_savings(parts: &[Part], budget: usize) -> Vec<usize> {
    let mut ranks = vec![RUN; parts.len()];
    let mut runs: Vec<(f64, usize)> = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        let saved = |run: usize| part.weight * part.loss.iter().skip(run * RUN).take(RUN).sum::<f64>();
        runs.extend((1..part.full() / RUN).map(|run| (saved(run), index)));
    }
    runs.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (_, index) in runs.iter().take((budget / RUN).saturating_sub(parts.len())) {
        ranks[*index] += RUN;
    }
    ranks
}

fn by_energy(parts: &[Part], budget: usize) -> Vec<usize> {
    let modules: Vec<&[Part]> = parts.chunk_by(|a, b| a.module == b.module).collect();
    // Where parts of a module differ in width, the narrower are full first.
    let taken = |module: usize, rank: usize| -> usize { modules[module].iter().map(|part| rank.min(part.full())).sum() };
    let discarded = |module: usize, rank: usize| -> f64 {
        let shares = modules[module].iter().map(|part| {
            let all: f64 = part.loss.iter().sum();
            if all > 0.0 { part.loss.iter().skip(rank).sum::<f64>() / all } else { 0.0 }
        });
        shares.sum::<f64>() / modules[module].len() as f64
    };
    let full: Vec<usize> = modules.iter().map(|module| module.iter().map(Part::full).max().unwrap_or(RUN)).collect();
    let mut ranks = vec![RUN; modules.len()];
    let mut left = budget.saturating_sub((0..modules.len()).map(|module| taken(module, RUN)).sum());
    loop {
        // The next run to the module that discards most, as long as it can be paid.
        let open = (0..modules.len()).filter(|&m| ranks[m] < full[m] && taken(m, ranks[m] + RUN) - taken(m, ranks[m]) <= left);
        let Some(worst) = open.max_by(|&a, &b| discarded(a, ranks[a]).total_cmp(&discarded(b, ranks[b])).then(b.cmp(&a))) else { break };
        left -= taken(worst, ranks[worst] + RUN) - taken(worst, ranks[worst]);
        ranks[worst] += RUN;
    }
    modules.iter().zip(ranks).flat_map(|(module, rank)| module.iter().map(move |part| rank.min(part.full()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parts of 64 whose losses fall by `decay` each, of one module each.
    fn parts(weights: &[f64], decay: f64) -> Vec<Part> {
        let loss: Vec<f64> = (0..64).map(|i| decay.powi(i)).collect();
        weights.iter().enumerate().map(|(module, &weight)| Part { width: 64, module, weight, loss: loss.clone() }).collect()
    }

    const RULES: [Ranks; 4] = [Ranks::Uniform, Ranks::Fisher, Ranks::Spectrum, Ranks::Energy];

    #[test]
    fn every_rule_meets_every_budget_and_ends() {
        let uneven: Vec<Part> = (0..30)
            .map(|i| {
                let width = [192, 64, 10, 100][i % 4];
                Part {
                    width,
                    module: i / 2,
                    weight: (i as f64).exp() / 1e3,
                    loss: (0..width).map(|j| (1 + i) as f64 * 0.9f64.powi(j as i32)).collect(),
                }
            })
            .collect();
        let full: usize = uneven.iter().map(Part::full).sum();
        for rule in RULES {
            for budget in (0..full + 500).step_by(37) {
                let ranks = rule.deal(&uneven, budget).unwrap();
                let within = ranks.iter().zip(&uneven).all(|(rank, part)| rank.is_multiple_of(RUN) && (RUN..=part.full()).contains(rank));
                assert!(within, "{rule:?} {budget}: {ranks:?}");
                let dealt: usize = ranks.iter().sum();
                let meant = budget.clamp(RUN * uneven.len(), full);
                // Energy deals a run to both parts of a module at a time.
                let slack = if rule == Ranks::Energy { 2 * RUN } else { RUN };
                assert!(dealt.abs_diff(meant) <= slack, "{rule:?} {budget}: {dealt}");
            }
            assert!(rule.deal(&[], 100).unwrap().is_empty());
        }
    }

    #[test]
    fn fisher_is_palus_formula_and_what_the_full_leave_goes_to_the_others_in_proportion() {
        // 160 coordinates by 1 : 3 : 4 are 20, 60, 80; there are 64. The 96 of the others are 24
        // and 72: full as well.
        assert_eq!(Ranks::Fisher.deal(&parts(&[1.0, 3.0, 4.0], 0.9), 160).unwrap(), [32, 64, 64]);
        assert_eq!(Ranks::Fisher.deal(&parts(&[1.0, 2.0, 1.0], 0.9), 64).unwrap(), [16, 32, 16]);
        assert_eq!(Ranks::Fisher.deal(&parts(&[1.0, 100.0, 2.0], 0.9), 64 + 48).unwrap(), [16, 64, 32]);
        assert_eq!(Ranks::Fisher.deal(&parts(&[0.0, 0.0], 0.9), 64).unwrap(), [32, 32]);
        assert_eq!(Ranks::Fisher.deal(&parts(&[0.0, 1.0], 0.9), 128).unwrap(), [64, 64]);
    }

    #[test]
    fn rounding_is_carried_on() {
        // 24 each is one run and two in turn.
        assert_eq!(Ranks::Uniform.deal(&parts(&[1.0; 4], 0.9), 96).unwrap(), [32, 16, 32, 16]);
    }

    #[test]
    fn the_spectrum_rule_leaves_the_least_weighted_loss_of_all_deals() {
        let mut some = parts(&[1.0, 5.0, 0.2], 0.93);
        some[1].loss = (0..64).map(|i| 0.8f64.powi(i)).collect();
        some[2].loss = (0..64).map(|i| 2.0 * 0.99f64.powi(i)).collect();
        let left = |ranks: &[usize]| -> f64 { some.iter().zip(ranks).map(|(part, &rank)| part.weight * part.loss[rank..].iter().sum::<f64>()).sum() };
        for budget in (48..=192).step_by(16) {
            let dealt = left(&Ranks::Spectrum.deal(&some, budget).unwrap());
            let all = (0..64).map(|i| [16 * (1 + i % 4), 16 * (1 + i / 4 % 4), 16 * (1 + i / 16)]);
            let least = all.filter(|ranks| ranks.iter().sum::<usize>() <= budget).map(|ranks| left(&ranks)).fold(f64::INFINITY, f64::min);
            assert!(dealt <= least * (1.0 + 1e-12), "{budget}: {dealt} against {least}");
        }
    }

    #[test]
    fn the_energy_rule_is_the_smallest_rank_under_one_threshold_for_all() {
        let mut some = parts(&[1.0; 4], 0.95);
        some[2].loss = (0..64).map(|i| 1e6 * 0.7f64.powi(i)).collect();
        some[3].loss = (0..64).map(|_| 3.0).collect();
        some[1].module = 0;
        let ranks = Ranks::Energy.deal(&some, 144).unwrap();
        assert_eq!(ranks[0], ranks[1], "parts of a module share a rank");
        let discarded = |part: &Part, rank: usize| part.loss[rank..].iter().sum::<f64>() / part.loss.iter().sum::<f64>();
        let threshold = some.iter().zip(&ranks).map(|(part, &rank)| discarded(part, rank)).fold(0.0, f64::max);
        for (part, &rank) in some.iter().zip(&ranks) {
            assert!(rank == RUN || discarded(part, rank - RUN) > threshold, "{ranks:?}: a run less would do");
        }
        // Scales do not count.
        some.iter_mut().for_each(|part| part.loss.iter_mut().for_each(|loss| *loss *= 1e-9 * (1.0 + part.module as f64)));
        assert_eq!(Ranks::Energy.deal(&some, 144).unwrap(), ranks);
    }

    #[test]
    fn what_is_no_number_is_refused() {
        let mut some = parts(&[1.0, f64::NAN], 0.9);
        assert!(Ranks::Fisher.deal(&some, 64).unwrap_err().to_string().contains("row 1"));
        assert!(Ranks::Uniform.deal(&some, 64).is_ok());
        some[1].weight = 1.0;
        some[0].loss[3] = f64::INFINITY;
        assert!(Ranks::Spectrum.deal(&some, 64).is_err() && Ranks::Energy.deal(&some, 64).is_err());
        assert!(Ranks::named("best").unwrap_err().to_string().contains("fisher"));
        assert_eq!(Ranks::named("energy").unwrap(), Ranks::Energy);
    }
}
