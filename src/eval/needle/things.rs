//! Facts about things: one to be found alone, among others, or after another.

use super::riddle::{Hidden, Riddle, Turn};
use crate::linalg::Random;

const FACTS: [&str; 4] = [
    "The secret number of the THING is NUMBER.",
    "Remember this: the secret number of the THING is NUMBER.",
    "Nobody was meant to know, but the secret number of the THING is NUMBER.",
    "On the back of the card somebody had written that the secret number of the THING is NUMBER.",
];
const QUALITIES: [&str; 8] = ["blue", "old", "quiet", "northern", "narrow", "wooden", "hidden", "white"];
const PLACES: [&str; 8] = ["harbour", "library", "station", "garden", "bridge", "mill", "tower", "orchard"];

/// No more things have nothing in common.
pub const MOST: usize = 8;
/// Facts of a text with several, at the least: who tells any of the numbers is right once in five
/// times.
const SEVERAL: usize = 5;
/// Where those stand that are not asked for, clear of the usual depths.
const OTHERS: [f64; SEVERAL - 1] = [12.5, 37.5, 62.5, 87.5];

pub fn single(depth: f64, random: &mut Random) -> Riddle {
    let fact = &facts(1, random)[0];
    Riddle { hidden: vec![fact.at(depth)], turns: vec![fact.asked()] }
}

/// A fact at each of `depths`, so that one after another can be asked for in the same text.
pub fn multi_key(depths: &[f64], random: &mut Random) -> Vec<Riddle> {
    let facts = facts(depths.len().max(SEVERAL), random);
    let places = depths.iter().copied().chain(OTHERS);
    let hidden = || facts.iter().zip(places.clone()).map(|(fact, percent)| fact.at(percent)).collect();
    facts[..depths.len()].iter().map(|fact| Riddle { hidden: hidden(), turns: vec![fact.asked()] }).collect()
}

/// The other fact, which is asked for first, stands half a text away, so that each question needs
/// another part of it.
pub fn multi_turn(depth: f64, random: &mut Random) -> Riddle {
    let facts = facts(2, random);
    Riddle { hidden: vec![facts[0].at(depth), facts[1].at((depth + 50.0) % 100.0)], turns: vec![facts[1].asked(), facts[0].asked()] }
}

/// A thing, and its number.
pub struct Fact {
    wording: &'static str,
    quality: &'static str,
    place: &'static str,
    pub number: String,
}

/// Facts in the same words, which have nothing else in common.
pub fn facts(count: usize, random: &mut Random) -> Vec<Fact> {
    let wording = pick(random, &FACTS);
    let mut facts: Vec<Fact> = Vec::new();
    while facts.len() < count {
        let (quality, place) = (pick(random, &QUALITIES), pick(random, &PLACES));
        let fact = Fact { wording, quality, place, number: (10_000 + random.below(90_000)).to_string() };
        if facts.iter().all(|other| other.quality != fact.quality && other.place != fact.place && other.number != fact.number) {
            facts.push(fact);
        }
    }
    facts
}

fn pick(random: &mut Random, choices: &[&'static str]) -> &'static str {
    choices[random.below(choices.len())]
}

impl Fact {
    pub fn thing(&self) -> String {
        format!("{} {}", self.quality, self.place)
    }

    /// As a sentence of the text.
    pub fn at(&self, percent: f64) -> Hidden {
        Hidden { sentence: self.wording.replace("THING", &self.thing()).replace("NUMBER", &self.number), percent }
    }

    fn asked(&self) -> Turn {
        ask(&self.thing(), &self.number)
    }
}

/// A question about the number of `thing`.
pub fn ask(thing: &str, number: &str) -> Turn {
    Turn {
        question: format!("What is the secret number of the {thing}?"),
        begun: format!("The secret number of the {thing} is"),
        number: number.into(),
    }
}
