//! Rows whose scales run along tokens: as many tokens as a block has are coded together, in equal
//! steps, and share numbers.
//!
//! What a block's tokens share is striped over their headers, so that all rows are of one size. A
//! header is numbers in f16, two to a word: first the token's own, then its part of what is shared,
//! in order. With `n` coordinates of `h` heads, and where `step` comes before `least`:
//!
//! | | a code means | a token's own | shared |
//! |---|---|---|---|
//! | [`Steps::Channels`] | `least_c + step_c·code` | | `[n][2]`: steps and least values |
//! | [`Steps::BalancedChannels`] | `f_t·(least_c + step_c·code)` | `[h]`: `f_t` | `[n][2]`: steps and least values |
//! | [`Steps::BalancedTokens`] | `f_c·(least_t + step_t·code)` | `[h][2]`: steps and least values | `[n]`: `f_c` |
//!
//! Blocks begin after the sinks, which are exact, and are coded when they are whole
//! ([`Schedule`](super::Schedule)).

use super::balance::balance;
use super::run::{Run, step_code};
use half::f16;
use serde::{Deserialize, Serialize};

/// Rows that are coded in blocks of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocks {
    /// Tokens of a block: 2 to [`Blocks::MOST`], a power of two.
    pub tokens: usize,
    /// Heads of a row, each of which has as many coordinates.
    pub heads: usize,
    /// What has a step of its own.
    pub steps: Steps,
}

/// What has a least value and a step of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Steps {
    /// Each channel of a block, between its least and its largest number: keys as KIVI (arXiv
    /// 2402.02750) codes them.
    Channels,
    /// The same after tokens and channels have been [balanced](super::balance()): keys as KVarN
    /// (arXiv 2606.03458) codes them.
    BalancedChannels,
    /// Each token and head, after that: values as KVarN codes them.
    BalancedTokens,
}

/// The numbers that scale a block's codes, as f16 holds them.
struct Numbers {
    /// `[tokens][own]`.
    own: Vec<f32>,
    shared: Vec<f32>,
}

impl Blocks {
    /// The most tokens of a block.
    pub const MOST: usize = 128;

    /// Numbers that a token has for itself.
    pub fn own(&self) -> usize {
        match self.steps {
            Steps::Channels => 0,
            Steps::BalancedChannels => self.heads,
            Steps::BalancedTokens => 2 * self.heads,
        }
    }

    /// Numbers that the tokens of a block share, of `rank` coordinates.
    pub fn shared(&self, rank: usize) -> usize {
        if self.steps == Steps::BalancedTokens { rank } else { 2 * rank }
    }

    /// Words of a row's header.
    pub fn header(&self, rank: usize) -> usize {
        (self.own() + self.shared(rank).div_ceil(self.tokens)).div_ceil(2)
    }

    /// Shared numbers that a header has room for.
    pub fn stripe(&self, rank: usize) -> usize {
        2 * self.header(rank) - self.own()
    }

    /// Packs a block's coordinates `z: [tokens][rank]` into its rows, `words: [tokens][words]`,
    /// which are zero; `runs` are a row's.
    pub(super) fn encode(&self, z: &[f32], runs: &[Run], words: &mut [u32]) {
        let (rank, each) = (z.len() / self.tokens, words.len() / self.tokens);
        let numbers = self.numbers(z, runs[0].bits, rank);
        let (own, stripe) = (self.own(), self.stripe(rank));
        for (t, (words, z)) in words.chunks_exact_mut(each).zip(z.chunks_exact(rank)).enumerate() {
            let shared = numbers.shared.iter().skip(t * stripe).take(stripe);
            for (i, number) in numbers.own[t * own..(t + 1) * own].iter().chain(shared).enumerate() {
                words[i / 2] |= u32::from(f16::from_f32(*number).to_bits()) << (16 * (i % 2));
            }
            for (c, z) in z.iter().enumerate() {
                let [factor, least, step] = self.scales(&numbers, t, c, rank);
                let run = &runs[c / super::RUN];
                run.put(words, c % super::RUN, step_code(z / factor, least, step, run.bits));
            }
        }
    }

    /// Unpacks a block's rows.
    pub(super) fn decode(&self, words: &[u32], runs: &[Run], z: &mut [f32]) {
        let (rank, each) = (z.len() / self.tokens, words.len() / self.tokens);
        let (own, stripe) = (self.own(), self.stripe(rank));
        let mut numbers = Numbers { own: Vec::new(), shared: Vec::new() };
        for words in words.chunks_exact(each) {
            let number = |i: usize| f16::from_bits((words[i / 2] >> (16 * (i % 2))) as u16).to_f32();
            numbers.own.extend((0..own).map(number));
            numbers.shared.extend((own..own + stripe).map(number));
        }
        for (t, (words, z)) in words.chunks_exact(each).zip(z.chunks_exact_mut(rank)).enumerate() {
            for (c, z) in z.iter_mut().enumerate() {
                let [factor, least, step] = self.scales(&numbers, t, c, rank);
                *z = factor * (least + step * runs[c / super::RUN].take(words, c % super::RUN) as f32);
            }
        }
    }

    /// What a coordinate of a token is scaled by: the factor, the least value and the step.
    fn scales(&self, Numbers { own, shared }: &Numbers, token: usize, coordinate: usize, rank: usize) -> [f32; 3] {
        let head = coordinate * self.heads / rank;
        match self.steps {
            Steps::Channels => [1.0, shared[2 * coordinate + 1], shared[2 * coordinate]],
            Steps::BalancedChannels => [own[token * self.heads + head], shared[2 * coordinate + 1], shared[2 * coordinate]],
            Steps::BalancedTokens => {
                let at = 2 * (token * self.heads + head);
                [shared[coordinate], own[at + 1], own[at]]
            }
        }
    }

    fn numbers(&self, z: &[f32], bits: u8, rank: usize) -> Numbers {
        let Blocks { tokens, heads, steps } = *self;
        let width = rank / heads;
        let mut numbers = Numbers { own: vec![0.0; tokens * self.own()], shared: vec![0.0; self.shared(rank)] };
        for head in 0..heads {
            let at = |token: usize, channel: usize| z[token * rank + head * width + channel];
            match steps {
                Steps::Channels => {
                    for c in 0..width {
                        let pair = uniform((0..tokens).map(|t| at(t, c)), bits, 1.0);
                        numbers.shared[2 * (head * width + c)..][..2].copy_from_slice(&pair);
                    }
                }
                Steps::BalancedChannels => {
                    let found = balance(width, tokens, |c, t| at(t, c));
                    for (c, factor) in found.rows.iter().enumerate() {
                        let pair = uniform((0..tokens).map(|t| at(t, c) / factor / found.columns[t]), bits, *factor);
                        numbers.shared[2 * (head * width + c)..][..2].copy_from_slice(&pair);
                    }
                    found.columns.iter().enumerate().for_each(|(t, factor)| numbers.own[t * heads + head] = half(*factor));
                }
                Steps::BalancedTokens => {
                    let found = balance(tokens, width, at);
                    for (t, factor) in found.rows.iter().enumerate() {
                        let pair = uniform((0..width).map(|c| at(t, c) / factor / found.columns[c]), bits, *factor);
                        numbers.own[2 * (t * heads + head)..][..2].copy_from_slice(&pair);
                    }
                    found.columns.iter().enumerate().for_each(|(c, factor)| numbers.shared[head * width + c] = half(*factor));
                }
            }
        }
        numbers
    }
}

/// The step between the least and the largest of some numbers, and the least, times `factor`.
fn uniform(numbers: impl Iterator<Item = f32>, bits: u8, factor: f32) -> [f32; 2] {
    let (low, high) = numbers.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
    [half((high - low) / ((1u32 << bits) - 1) as f32 * factor).max(f16::MIN_POSITIVE.to_f32()), half(low * factor)]
}

/// As f16 holds it; no more than it can.
fn half(x: f32) -> f32 {
    f16::from_f32(x.clamp(-f16::MAX.to_f32(), f16::MAX.to_f32())).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::{Band, Format, RUN, Scale};
    use crate::linalg::Random;

    fn format(steps: Steps, tokens: usize, heads: usize, width: usize, bits: u8) -> Format {
        Format { bands: vec![Band { bits, runs: heads * width / RUN }], scale: Scale::Blocks(Blocks { tokens, heads, steps }) }
    }

    /// `tokens` rows of `rank` numbers, some channels and some tokens much larger than others, all
    /// about a mean of their own.
    fn numbers(tokens: usize, rank: usize) -> Vec<f32> {
        let mut random = Random::new(9);
        let mut number = |i: usize| {
            let (t, c) = (i / rank, i % rank);
            (random.gaussian() as f32 + (c % 3) as f32) * if c % 7 == 0 { 10.0 } else { 1.0 } * if t % 11 == 0 { 4.0 } else { 1.0 }
        };
        (0..tokens * rank).map(&mut number).collect()
    }

    fn round_trip(format: &Format, z: &[f32]) -> Vec<f32> {
        let (mut words, mut back) = (vec![0; format.block() * format.words()], vec![0.0; z.len()]);
        format.encode(z, &mut words);
        format.decode(&words, &mut back);
        back
    }

    /// KIVI's formulas, channel by channel: `round((x − min)/step)·step + min`, with
    /// `step = (max − min)/(2^b − 1)`.
    #[test]
    fn channels_are_rounded_between_their_extremes() {
        for (bits, heads) in [(2, 1), (4, 3), (8, 2)] {
            let (tokens, rank) = (32, heads * 32);
            let z = numbers(tokens, rank);
            let back = round_trip(&format(Steps::Channels, tokens, heads, 32, bits), &z);
            for c in 0..rank {
                let column: Vec<f32> = (0..tokens).map(|t| z[t * rank + c]).collect();
                let (low, high) = (column.iter().copied().fold(f32::MAX, f32::min), column.iter().copied().fold(f32::MIN, f32::max));
                let [low, step] = [low, (high - low) / ((1 << bits) - 1) as f32].map(|x| f16::from_f32(x).to_f32());
                for (t, x) in column.iter().enumerate() {
                    let expected = low + step * ((x - low) / step).round().clamp(0.0, ((1 << bits) - 1) as f32);
                    assert!((back[t * rank + c] - expected).abs() < 1e-5, "{bits} bits, {t}, {c}: {} for {expected}", back[t * rank + c]);
                }
            }
        }
    }

    /// KVarN's formulas, written out: balance, round between the extremes of a line, and multiply
    /// back.
    #[test]
    fn balanced_blocks_are_rounded_line_by_line() {
        let (tokens, heads, width, bits) = (128, 3, 64, 4);
        let rank = heads * width;
        let z = numbers(tokens, rank);
        for steps in [Steps::BalancedChannels, Steps::BalancedTokens] {
            let back = round_trip(&format(steps, tokens, heads, width, bits), &z);
            for head in 0..heads {
                let by_channel = steps == Steps::BalancedChannels;
                let at = |line: usize, i: usize| {
                    let (t, c) = if by_channel { (i, line) } else { (line, i) };
                    t * rank + head * width + c
                };
                let (lines, length) = if by_channel { (width, tokens) } else { (tokens, width) };
                let found = balance(lines, length, |line, i| z[at(line, i)]);
                for line in 0..lines {
                    let even: Vec<f32> = (0..length).map(|i| z[at(line, i)] / found.rows[line] / found.columns[i]).collect();
                    let (low, high) = (even.iter().copied().fold(f32::MAX, f32::min), even.iter().copied().fold(f32::MIN, f32::max));
                    let step = (high - low) / 15.0;
                    for (i, x) in even.iter().enumerate() {
                        let off = (back[at(line, i)] / found.rows[line] / found.columns[i] - x).abs();
                        // Half a step, and what f16 makes of the factors.
                        assert!(off < 0.5 * step + 2e-3 * (high.abs().max(low.abs())), "{steps:?}, {line}, {i}: {off} of {step}");
                    }
                }
            }
        }
    }

    /// Balanced, outlying channels and tokens cost the others less.
    #[test]
    fn balance_pays() {
        let (tokens, width) = (128, 64);
        let z = numbers(tokens, width);
        let error = |format: &Format| round_trip(format, &z).iter().zip(&z).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        let plain = error(&format(Steps::Channels, tokens, 1, width, 4));
        assert!(error(&format(Steps::BalancedChannels, tokens, 1, width, 4)) < 0.7 * plain);
    }

    /// Codes, and the numbers of the papers in f16: a pair for each channel of a block of 32; a
    /// pair and a factor beside for each line of a block of 128.
    #[test]
    fn a_row_takes_its_share_of_the_blocks_numbers() {
        for (steps, tokens, heads, width, bits, expected) in [
            (Steps::Channels, 32, 1, 64, 2, 4.0 + 2.0),
            (Steps::Channels, 32, 8, 128, 2, 64.0 + 32.0),
            (Steps::BalancedChannels, 128, 8, 128, 4, 128.0 + 8.0 + 4.0),
            (Steps::BalancedTokens, 128, 8, 128, 2, 64.0 + 8.0 + 4.0),
            // Half a word and a quarter are left.
            (Steps::BalancedChannels, 128, 3, 64, 4, 24.0 + 1.5 + 1.5),
            (Steps::BalancedTokens, 128, 3, 64, 2, 12.0 + 3.0 + 0.75),
        ] {
            let words = format(steps, tokens, heads, width, bits).words();
            assert!((0.0..1.0).contains(&(words as f64 - expected)), "{steps:?}: {words} for {expected}");
        }
    }
}
