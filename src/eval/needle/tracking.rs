//! Variable tracking, as RULER has it: a number is assigned to one variable, and from there to
//! another, by statements that are scattered over the text.
//!
//! RULER writes `VAR X2 = VAR X1` and asks for all variables that have a value. Here variables are
//! things, statements are sentences, and the last one's value is asked for: that needs every
//! statement of the chain as well, small chat models understand it better, and one number is scored
//! as in every other kind. A second chain, with a number of its own, stands over the whole text:
//! who tells either of the numbers is right every other time.

use super::riddle::{Hidden, Riddle};
use super::things::{Fact, ask, facts};
use crate::linalg::Random;

/// Things in a chain: one that has a number, and those that it is handed on to.
const LINKS: usize = 2;

/// The number that is asked for stands at the given depth, what hands it on between there and the
/// end of the text.
pub fn tracking(depth: f64, random: &mut Random) -> Riddle {
    let facts = facts(2 * LINKS, random);
    let (asked, other) = facts.split_at(LINKS);
    let step = 100.0 / (LINKS + 1) as f64;
    let hidden = chain(asked, depth, (100.0 - depth) / LINKS as f64).into_iter().chain(chain(other, step, step));
    Riddle { hidden: hidden.collect(), turns: vec![ask(&asked[LINKS - 1].thing(), &asked[0].number)] }
}

/// The first thing's number, and each further thing as the one before it.
fn chain(facts: &[Fact], from: f64, step: f64) -> Vec<Hidden> {
    let hand_on = |pair: &[Fact]| format!("The {} has the same secret number as the {}.", pair[1].thing(), pair[0].thing());
    let links = facts.windows(2).zip(1..).map(|(pair, link)| Hidden { sentence: hand_on(pair), percent: from + f64::from(link) * step });
    [facts[0].at(from)].into_iter().chain(links).collect()
}
