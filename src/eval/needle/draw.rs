//! Draws the riddles of each kind.

use super::riddle::Riddle;
use super::{Kind, things, tracking};
use crate::linalg::Random;

/// A riddle for each depth at which what is asked for stands; all else is the same.
///
/// Those that hide the same are together.
pub fn draw(kind: Kind, depth_percents: &[u32], random: &mut Random) -> Vec<Vec<Riddle>> {
    let depths: Vec<f64> = depth_percents.iter().map(|&percent| f64::from(percent)).collect();
    let before = random.clone();
    let mut each = |draw: fn(f64, &mut Random) -> Riddle| {
        let again = |&depth: &f64| {
            *random = before.clone();
            vec![draw(depth, random)]
        };
        depths.iter().map(again).collect()
    };
    match kind {
        Kind::Single => each(things::single),
        Kind::MultiKey => vec![things::multi_key(&depths, random)],
        Kind::Tracking => each(tracking::tracking),
        Kind::MultiTurn => each(things::multi_turn),
    }
}
