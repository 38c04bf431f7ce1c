//! Trains the levels of the trellis that codes of 2 to 4 bits stand for, and prints them as
//! src/kv/trellis_levels.rs has them.
//!
//! Lloyd's iteration: code runs of 16 Gaussian numbers with the levels that there are, move each
//! level to the mean of what was coded as it, and begin again. It begins at quantiles of the
//! Gaussian, dealt out to the edges of the trellis in a random order; of four orders, which were
//! the best of more, the best is kept.
//!
//! ```sh
//! # 40 rounds of 6,000 runs, the last eight of five times as many, as the tables were made
//! cargo run --release --example trellis
//! # 6 rounds of 300 runs from one order: a second
//! cargo run --release --example trellis -- 6 300 1
//! ```

use lowkey::kv::trellis::{EDGES, encode_with, indices};
use lowkey::kv::{RUN, distortion};
use lowkey::linalg::Random;

/// Rounds at the end that see more numbers, and how many times as many.
const LAST: (usize, usize) = (8, 5);

/// How long to train.
#[derive(Clone, Copy)]
struct Training {
    rounds: usize,
    /// Runs of 16 numbers in a round.
    runs: usize,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let given = std::env::args().skip(1).map(|number| number.parse()).collect::<Result<Vec<usize>, _>>()?;
    let number = |index: usize, default: usize| given.get(index).copied().unwrap_or(default);
    let training = Training { rounds: number(0, 40), runs: number(1, 6000) };
    for (bits, name, seeds) in [(2, "TWO", [0, 3, 5, 6]), (3, "THREE", [2, 3, 5, 6]), (4, "FOUR", [2, 3, 5, 6])] {
        let Some((levels, miss)) = seeds.into_iter().take(number(2, 4)).map(|seed| train(bits, seed, training)).min_by(|a, b| a.1.total_cmp(&b.1))
        else {
            continue;
        };
        eprintln!("{bits} bits miss {miss:.5} of a unit Gaussian in the mean square; those in use {:.5}", distortion(bits));
        print!("{}", table(bits, name, &levels));
    }
    Ok(())
}

/// Levels of so many bits, and what they miss in the last round, in the mean square.
fn train(bits: u8, seed: u64, training: Training) -> (Vec<f32>, f64) {
    let mut random = Random::new(seed * 7919 + 12345);
    let (mut levels, mut miss) = (quantiles(1 << (bits - 2), &mut random), 0.0);
    for round in 0..training.rounds {
        let runs = training.runs * if round + LAST.0 >= training.rounds { LAST.1 } else { 1 };
        let (mut sums, mut counts, mut squares) = (vec![0f64; levels.len()], vec![0f64; levels.len()], 0.0);
        for _ in 0..runs {
            let x: [f32; RUN] = std::array::from_fn(|_| random.gaussian() as f32);
            for (index, x) in indices(&encode_with(&levels, &x)).into_iter().zip(x) {
                sums[index] += f64::from(x);
                counts[index] += 1.0;
                squares += f64::from(x - levels[index]).powi(2);
            }
        }
        miss = squares / (RUN * runs) as f64;
        for ((level, sum), count) in levels.iter_mut().zip(sums).zip(counts).filter(|(_, count)| *count > 0.0) {
            *level = (sum / count) as f32;
        }
    }
    (levels, miss)
}

/// As many quantiles of a Gaussian as there are levels, `[64·high]`: each value of the upper bits
/// has a stretch of its own, whose quantiles the edges share in a random order.
fn quantiles(high: usize, random: &mut Random) -> Vec<f32> {
    let mut sorted: Vec<f64> = (0..200_000).map(|_| random.gaussian()).collect();
    sorted.sort_by(f64::total_cmp);
    let mut order: Vec<usize> = (0..EDGES).collect();
    for i in (1..EDGES).rev() {
        order.swap(i, (random.unit() * (i + 1) as f64) as usize);
    }
    let share = |h: usize, edge: usize| (h as f64 + (order[edge] as f64 + 0.5) / EDGES as f64) / high as f64;
    (0..high)
        .flat_map(|h| (0..EDGES).map(move |edge| (h, edge)))
        .map(|(h, edge)| sorted[(share(h, edge) * sorted.len() as f64) as usize] as f32)
        .collect()
}

/// The levels as a table of the program, sixteen to a line.
fn table(bits: u8, name: &str, levels: &[f32]) -> String {
    let line = |some: &[f32]| format!("    {},\n", some.iter().map(|level| format!("{level:.4}")).collect::<Vec<_>>().join(", "));
    let lines: String = levels.chunks(16).map(line).collect();
    let (count, high) = (levels.len(), levels.len() / EDGES);
    format!("\n/// {bits} bits: `[64·{high}]`.\n#[rustfmt::skip]\npub(super) static {name}: [f32; {count}] = [\n{lines}];\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A few rounds come near what the tables in use miss, and a table is one of the program's.
    #[test]
    fn a_few_rounds_make_good_levels() {
        let (levels, miss) = train(2, 0, Training { rounds: 12, runs: 500 });
        assert!(levels.len() == EDGES && miss < 1.1 * distortion(2), "{miss}");
        let text = table(2, "TWO", &levels);
        assert!(text.contains("static TWO: [f32; 64] = [\n    ") && text.lines().count() == 9, "{text}");
    }
}
