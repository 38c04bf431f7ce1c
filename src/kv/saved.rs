//! What a sequence's cache holds, from which another one of the same model can go on, on any
//! device.
//!
//! Everything stands by position, in no device's order, and without its padding. Whoever keeps a
//! cache takes it apart store by store and leaves none out: where a store is added the patterns
//! that do so no longer compile. Before anything is taken over [`Saved::check`] holds it against
//! the sequence that is to go on.

use super::{Coder, Coding, Energy, Evicted, Exact, Geometry, LatentKind, LatentSet, LatentSpec, Selection, Slots, Stores, Stretch};
use crate::{Error, Result};
use half::f16;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;

/// A cache's content.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Saved {
    /// The sequence's tokens; the cache may hold fewer. Empty where only the cache is known.
    pub tokens: Vec<u32>,
    /// Where the sequence stands.
    pub standing: Standing,
    /// By layer; none where nothing is cached.
    pub layers: Vec<SavedLayer>,
    /// By latent, the words of the first `standing.coded` tokens: `[coded][words]`.
    pub rows: Vec<Vec<u32>>,
    /// Where bases are a prompt's own.
    pub prompt: Option<SavedPrompt>,
}

/// Where a sequence stands, and which exact rows there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Standing {
    /// Tokens in the cache.
    pub position: usize,
    /// Tokens whose rows are coded, or that have left the exact window of a sequence that evicts.
    pub coded: usize,
    /// Exact rows are there from here on, and those of sinks.
    pub exact_from: usize,
    /// How rows are coded; `None` where every row is exact.
    pub kept: Option<Kept>,
}

/// Which rows are exact and which are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// What stays exact.
    pub exact: Exact,
    /// Tokens that are coded together.
    pub block: usize,
    /// Whether tokens are evicted.
    pub evicts: bool,
}

/// What one layer holds beside latents.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SavedLayer {
    /// Exact rows of the positions that [`Standing::held`] says, keys after RoPE:
    /// `[tokens][H_kv][d]`.
    pub keys: Vec<f16>,
    /// Values, the same.
    pub values: Vec<f16>,
    /// Landmarks of coded tokens, `[chunks][H_kv][words]`; empty where no token chooses.
    pub landmarks: Vec<u32>,
    /// Where tokens are evicted.
    pub eviction: Option<SavedEviction>,
}

/// Candidates, and what is left of evicted tokens.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SavedEviction {
    /// Attention that each exact row has received, in their order.
    pub received: Vec<f32>,
    /// Positions of the candidates, by slot.
    pub positions: Vec<u32>,
    /// Attention that they have received.
    pub masses: Vec<f32>,
    /// Their rows, `[candidates][H_kv][d]`.
    pub keys: Vec<f16>,
    /// See [`keys`](Self::keys).
    pub values: Vec<f16>,
    /// Tokens that are read from their latents, in the order in which they are.
    pub listed: Vec<u32>,
    /// The sketch or the mean of the others, where there is one.
    pub sketch: Option<SavedSketch>,
}

/// What is in a [`Sketch`](super::Sketch).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SavedSketch {
    /// Vectors in it.
    pub count: u32,
    /// By bucket: vectors of either sign, the last one's position, the bits of its weight.
    pub buckets: Vec<[u32; 4]>,
    /// `[buckets][2][H_kv][d]`.
    pub sums: Vec<i32>,
    /// The sum of all, `[2][H_kv][d]`; empty where no mean is taken.
    pub totals: Vec<i64>,
    /// Their mean, as the device has it.
    pub mean: Vec<f32>,
}

/// What is a prompt's own.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedPrompt {
    /// Tokens of the prompt.
    pub tokens: usize,
    /// At how many tokens it is looked next whether its bases still hold.
    pub check_at: usize,
    /// Its bases; `None` where it was too short for any.
    pub bases: Option<SavedBases>,
}

/// Bases that were made of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedBases {
    /// Specs and coders.
    pub set: Arc<LatentSet>,
    /// What they hold of the prompt.
    pub prompt: Energy,
    /// And of what was coded after it.
    pub since: Energy,
}

impl SavedPrompt {
    /// Of which no more is known than its bases.
    pub fn of(bases: SavedBases) -> SavedPrompt {
        SavedPrompt { tokens: 0, check_at: 0, bases: Some(bases) }
    }
}

impl SavedBases {
    /// Whether they are of a model like this.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub fn check(&self, geometry: &Geometry) -> Result<()> {
        let LatentSet { specs, coders, exact: _ } = &*self.set;
        if let Err(message) = LatentSet::check(specs, geometry) {
            return refuse(format!("has bases of another model: {message}"));
        }
        // Keys and values of whole layers, as a prompt's bases are made.
        let fits = |(spec, coder): (&LatentSpec, &Coder)| {
            let (width, rank) = (spec.width(geometry.head_dim), spec.format.rank());
            let whole = spec.kv_heads == geometry.kv_heads && [LatentKind::PreRopeKeys, LatentKind::Values].contains(&spec.kind);
            let down = coder.down.as_ref().is_none_or(|down| down.shape() == (width, rank));
            coder.format == spec.format && coder.mean.len() == width && coder.up.shape() == (rank, width) && down && whole && !spec.format.by_head()
        };
        match specs.len() == coders.len() && specs.iter().zip(coders).all(fits) {
            true => Ok(()),
            false => refuse("has bases that its rows do not fit".into()),
        }
    }
}

/// Of what kind a sequence is that is to go on.
#[derive(Debug, Clone, Copy)]
pub struct Room<'a> {
    /// The model's.
    pub geometry: Geometry,
    /// Tokens that it has room for.
    pub capacity: usize,
    /// How its rows are coded.
    pub coding: Option<&'a Coding>,
    /// Its latents.
    pub rows: &'a [LatentSpec],
    /// Whether a token chooses what it reads.
    pub selects: bool,
    /// What it has room for beside exact rows, where it evicts.
    pub stores: Option<&'a Stores>,
}

impl Standing {
    /// That of a cache in which every row is exact.
    pub fn exact(position: usize) -> Standing {
        Standing { position, ..Standing::default() }
    }

    /// The positions whose exact rows are there, sinks first.
    pub fn held(&self) -> [Range<usize>; 2] {
        let sinks = self.sinks();
        [0..sinks, self.exact_from.clamp(sinks, self.position)..self.position]
    }

    /// Where they stand in `slots`, each with which of them its first is; those that have no slot
    /// are left out.
    pub fn stretches(&self, slots: &Slots) -> Vec<(usize, Stretch)> {
        let [sinks, recent] = self.held();
        let from = recent.start.max(self.position.saturating_sub(slots.ring as usize));
        let mut index = sinks.len() + from - recent.start;
        let of = |range| slots.stretches(range);
        let mut stretches: Vec<(usize, Stretch)> = of(sinks).map(|stretch| (stretch.position, stretch)).collect();
        for stretch in of(from.min(recent.end)..recent.end) {
            stretches.push((index, stretch));
            index += stretch.count;
        }
        stretches
    }

    /// How many they are.
    pub fn held_tokens(&self) -> usize {
        self.held().iter().map(Range::len).sum()
    }

    /// Tokens that have left the exact window, sinks apart.
    pub fn left(&self) -> usize {
        self.coded.saturating_sub(self.sinks())
    }

    fn sinks(&self) -> usize {
        self.kept.map_or(0, |kept| kept.exact.sinks).min(self.position)
    }
}

fn refuse<T>(message: String) -> Result<T> {
    Err(Error::Argument { name: "session".into(), message })
}

impl Saved {
    /// The least position, besides 0, that a sequence which goes on from it can go back to.
    pub fn kept_from(&self) -> usize {
        let coded = match self.standing.kept {
            Some(kept) if kept.evicts || kept.block > 1 && self.standing.left() > 0 => self.standing.coded,
            _ => 0,
        };
        self.prompt.as_ref().map_or(coded, |prompt| prompt.tokens)
    }

    /// Whether its bases are the model's and not a prompt's.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub fn check_shared(&self) -> Result<()> {
        match &self.prompt {
            Some(SavedPrompt { bases: Some(_), .. }) => refuse("was saved with --method xkv; open it with that".into()),
            _ => Ok(()),
        }
    }

    /// The bases of its own.
    ///
    /// # Errors
    /// [`Error::Argument`] where it has none.
    pub fn bases(&self) -> Result<&SavedBases> {
        let bases = self.prompt.as_ref().and_then(|prompt| prompt.bases.as_ref());
        bases.ok_or_else(|| Error::Argument { name: "session".into(), message: "was saved without bases of its own".into() })
    }

    /// Whether a sequence of this kind can go on from it.
    ///
    /// # Errors
    /// [`Error::Context`] where it has no room for so many tokens, [`Error::Argument`] where it
    /// keeps its rows in another way, or where parts of this contradict each other.
    pub fn check(&self, room: &Room) -> Result<()> {
        let Saved { tokens, standing, layers, rows, prompt: _ } = self;
        let Room { geometry, capacity, coding, .. } = room;
        let needed = tokens.len().max(standing.position);
        if needed > *capacity {
            return Err(Error::Context { needed, capacity: *capacity });
        }
        if standing.position == 0 {
            return Ok(());
        }
        let evicts = |kept: Option<Kept>| kept.map(|kept| kept.evicts);
        let own = coding.map(|coding| Kept { exact: coding.schedule.exact, block: coding.schedule.block, evicts: coding.evicts });
        if evicts(standing.kept) != evicts(own) {
            let kind = |evicts| match evicts {
                None => "keeps every row exactly",
                Some(false) => "codes rows",
                Some(true) => "evicts tokens",
            };
            return refuse(format!(
                "was saved of a cache that {}, and this one {}; open it with the same --method",
                kind(evicts(standing.kept)),
                kind(evicts(own))
            ));
        }
        if let (Some(saved), Some(own)) = (standing.kept, own)
            && saved != own
        {
            let windows = |kept: Kept| format!("{} sinks, {} recent tokens and blocks of {}", kept.exact.sinks, kept.exact.recent, kept.block);
            return refuse(format!("was saved with {}, and this cache has {}", windows(saved), windows(own)));
        }
        self.check_standing(room)?;
        if layers.len() != geometry.layers {
            return refuse(format!("has {} layers of a model of {}", layers.len(), geometry.layers));
        }
        let words = |spec: &LatentSpec| standing.coded.checked_mul(spec.format.words());
        if rows.len() != room.rows.len() || rows.iter().zip(room.rows).any(|(row, spec)| words(spec) != Some(row.len())) {
            return refuse("has coded rows of another layout; open it with the adapter and the --method that it was saved with".into());
        }
        layers.iter().enumerate().try_for_each(|(index, layer)| self.check_layer(room, index, layer))
    }

    fn check_standing(&self, room: &Room) -> Result<()> {
        let Standing { position, coded, exact_from, kept } = self.standing;
        let ring = room.coding.map_or(usize::MAX, |coding| coding.slots.ring as usize);
        let sound = match kept {
            None => coded == 0 && exact_from == 0,
            Some(Kept { exact, block, .. }) => {
                let [_, recent] = self.standing.held();
                let whole = block <= 1 || coded <= exact.sinks || (coded - exact.sinks).is_multiple_of(block);
                // What is not coded is there exactly, and has slots.
                let end = coded.max(self.standing.sinks());
                coded <= position && exact_from <= position && whole && recent.start <= end && position.saturating_sub(end) <= ring
            }
        };
        if sound { Ok(()) } else { refuse(format!("stands at {position} with {coded} coded and exact rows from {exact_from}, which cannot be")) }
    }

    fn check_layer(&self, room: &Room, index: usize, layer: &SavedLayer) -> Result<()> {
        let (standing, width) = (&self.standing, room.geometry.kv_width());
        let SavedLayer { keys, values, landmarks, eviction } = layer;
        let exact = standing.held_tokens() * width;
        if keys.len() != exact || values.len() != exact {
            return refuse(format!("has {} and {} exact numbers in layer {index}, where {exact} belong", keys.len(), values.len()));
        }
        let chunk = room.geometry.kv_heads * Selection::format(room.geometry.head_dim).words();
        if room.selects && landmarks.len() != standing.coded.div_ceil(Selection::CHUNK) * chunk {
            return refuse("has no landmarks, by which --select chooses; open it without --select".into());
        }
        match (eviction, room.stores) {
            (None, None) => Ok(()),
            (Some(eviction), Some(stores)) => eviction.check(standing, stores, width, index),
            _ => refuse(format!("has nothing of evicted tokens in layer {index}, or something where nothing is evicted")),
        }
    }
}

impl SavedEviction {
    fn check(&self, standing: &Standing, stores: &Stores, width: usize, layer: usize) -> Result<()> {
        let SavedEviction { received, positions, masses, keys, values, listed, sketch } = self;
        let damaged = |what: &str| refuse(format!("has {what} in layer {layer}, which cannot be"));
        let (left, held) = (standing.left(), stores.held(standing.left()));
        if positions.len() != held || sketch.as_ref().map_or(0, |sketch| sketch.buckets.len()) != stores.buckets {
            let message =
                format!("keeps {} candidates in layer {layer}, where this cache has {held}; open it with the same --context", positions.len());
            return refuse(message + " and the same budget");
        }
        if masses.len() != held || keys.len() != held * width || values.len() != held * width || received.len() != standing.held_tokens() {
            return damaged("candidates without rows");
        }
        let is_mass = |mass: &f32| mass.is_finite() && *mass >= 0.0;
        if !masses.iter().chain(received).all(is_mass) {
            return damaged("attention that is no number");
        }
        // Every token that has left is a candidate, or is read from its latent where there are any.
        let mut all: Vec<u32> = positions.iter().chain(listed).copied().collect();
        all.sort_unstable();
        let expected = if stores.evicted_as == Evicted::Rows { left } else { held };
        let first = (standing.coded - left) as u32;
        let range = first..standing.coded as u32;
        if all.len() != expected || !all.is_sorted_by(|a, b| a < b) || all.iter().any(|position| !range.contains(position)) {
            return damaged("tokens twice, or not at all");
        }
        match sketch {
            None => {
                if stores.evicted_as.has_mean() || stores.evicted_as.is_sketched() {
                    return damaged("nothing of evicted tokens");
                }
                Ok(())
            }
            Some(SavedSketch { count, buckets, sums, totals, mean }) => {
                let mean_width = if stores.evicted_as.has_mean() { 2 * width } else { 0 };
                let members: u64 = buckets.iter().map(|[plus, minus, ..]| u64::from(*plus) + u64::from(*minus)).sum();
                let inside = |[plus, minus, position, weight]: &[u32; 4]| {
                    [plus, minus] == [&0, &0] || range.contains(position) && is_mass(&f32::from_bits(*weight))
                };
                let sound = (left - held) as u64 == u64::from(*count)
                    && (buckets.is_empty() || members == u64::from(*count) && buckets.iter().all(inside))
                    && sums.len() == stores.buckets * 2 * width
                    && [totals.len(), mean.len()] == [mean_width; 2];
                if sound { Ok(()) } else { damaged("a sketch of other tokens") }
            }
        }
    }
}
