//! Candidates and what is left of evicted tokens, beside the exact rows of a sequence that evicts
//! ([`Reviver`](crate::kv::Reviver)).

use super::RowType;
use super::columns::EvictionColumns;
use super::rows::Rows;
use crate::Result;
use crate::kv::{Evicted, SavedEviction, Sketch, Slots, Standing, Stores, fade};
use nalgebra::{DMatrix, DVector};
use std::sync::Arc;

/// Of all layers.
pub(super) struct Eviction {
    stores: Stores,
    /// Where the sketches of all layers have tokens.
    sketched: Arc<[u32]>,
    layers: Vec<Layer>,
}

struct Layer {
    /// Candidates by slot.
    keys: Rows,
    values: Rows,
    places: Vec<Place>,
    sketch: Option<Sketch>,
    /// Attention that exact rows have received, by their slot.
    received: Vec<f32>,
}

/// A candidate.
#[derive(Clone, Copy)]
struct Place {
    position: u32,
    received: f32,
}

/// A token that may become a candidate: where it stands, what it has received, its key and value.
pub(super) struct Leaving {
    pub(super) position: usize,
    /// The slot of its exact row.
    pub(super) slot: usize,
    pub(super) key: DVector<f32>,
    pub(super) value: DVector<f32>,
}

/// What competes for the slots.
enum Contender {
    Candidate(usize),
    Leaving(usize),
    Alone,
}

impl Eviction {
    /// In each of `layers` layers as `stores` say, beside exact rows of `width` numbers a side in
    /// `slots` slots.
    pub(super) fn new(stores: Stores, layers: usize, width: usize, slots: usize, row_type: RowType) -> Eviction {
        let rows = || Rows::new(width, stores.candidates, row_type);
        let sketched = stores.places();
        let layer = |_: usize| Layer {
            keys: rows(),
            values: rows(),
            places: Vec::with_capacity(stores.candidates),
            sketch: stores.sketch(2 * width, &sketched),
            received: vec![0.0; slots],
        };
        Eviction { layers: (0..layers).map(layer).collect(), stores, sketched }
    }

    /// Drops everything.
    pub(super) fn clear(&mut self) {
        for layer in &mut self.layers {
            layer.places.clear();
            layer.sketch = self.stores.sketch(2 * layer.keys.width(), &self.sketched);
        }
    }

    /// Another token's row is in the exact `slot`.
    pub(super) fn begin(&mut self, layer: usize, slot: usize) {
        self.layers[layer].received[slot] = 0.0;
    }

    /// The positions of the candidates, ascending.
    pub(super) fn positions(&self, layer: usize) -> Vec<usize> {
        let mut positions: Vec<usize> = self.layers[layer].places.iter().map(|place| place.position as usize).collect();
        positions.sort_unstable();
        positions
    }

    /// What queries see.
    pub(super) fn columns(&self, layer: usize) -> EvictionColumns {
        let Layer { keys, values, places, sketch, .. } = &self.layers[layer];
        let mut evicted = sketch.as_ref().map(Sketch::columns).unwrap_or_default();
        keys.round(&mut evicted.vectors);
        let (width, first, count) = (keys.width(), places.len(), places.len() + evicted.counts.len());
        let [mut all_keys, mut all_values] = [(); 2].map(|()| DMatrix::zeros(width, count));
        keys.read(0, &mut all_keys.as_mut_slice()[..first * width]);
        values.read(0, &mut all_values.as_mut_slice()[..first * width]);
        for (index, vector) in evicted.vectors.chunks_exact(2 * width).enumerate() {
            all_keys.column_mut(first + index).copy_from_slice(&vector[..width]);
            all_values.column_mut(first + index).copy_from_slice(&vector[width..]);
        }
        let counts = [vec![1; first], evicted.counts].concat();
        EvictionColumns { keys: all_keys, values: all_values, counts }
    }

    /// Every column has received so much attention from `tokens` queries; `slots` are those of the
    /// exact rows, and the side's columns begin at `first`.
    pub(super) fn accumulate(&mut self, layer: usize, tokens: usize, attention: &[f32], slots: impl Iterator<Item = usize>, first: usize) {
        let Layer { places, sketch, received, .. } = &mut self.layers[layer];
        let fade = fade(tokens);
        received.iter_mut().for_each(|received| *received *= fade);
        places.iter_mut().for_each(|place| place.received *= fade);
        slots.zip(attention).for_each(|(slot, mass)| received[slot] += mass);
        let (candidates, evicted) = attention[first..].split_at(places.len());
        places.iter_mut().zip(candidates).for_each(|(place, mass)| place.received += mass);
        if let Some(sketch) = sketch {
            sketch.fade(fade);
            let buckets = sketch.columns().buckets;
            buckets.into_iter().zip(evicted).for_each(|(bucket, mass)| sketch.weigh(bucket, *mass));
        }
    }

    /// Tokens that leave the exact window compete for the slots with the candidates and with
    /// evicted tokens that are still known.
    pub(super) fn evict(&mut self, layer: usize, leaving: &[Leaving]) {
        let Layer { keys, values, places, sketch, received } = &mut self.layers[layer];
        let width = keys.width();
        let mut who = Vec::new();
        let mut contenders = Vec::new();
        let mut add = |contender, position, mass| {
            who.push(contender);
            contenders.push((position, mass));
        };
        places.iter().enumerate().for_each(|(slot, place)| add(Contender::Candidate(slot), place.position as usize, place.received));
        leaving.iter().enumerate().for_each(|(index, token)| add(Contender::Leaving(index), token.position, received[token.slot]));
        sketch.iter().flat_map(Sketch::alone).for_each(|(position, mass)| add(Contender::Alone, position, mass));
        let stays = self.stores.keep(&contenders);

        let mut free: Vec<usize> = (places.len()..self.stores.candidates).rev().collect();
        // Out of the slots and the sketch first, and then in.
        let (mut demoted, mut promoted) = (Vec::new(), Vec::new());
        for ((who, (position, mass)), stays) in who.iter().zip(contenders).zip(stays) {
            let mut vector = vec![0.0; 2 * width];
            match who {
                Contender::Candidate(slot) if !stays => {
                    keys.read(*slot, &mut vector[..width]);
                    values.read(*slot, &mut vector[width..]);
                    free.push(*slot);
                    demoted.push((position, vector, mass));
                }
                Contender::Leaving(index) => {
                    vector[..width].copy_from_slice(leaving[*index].key.as_slice());
                    vector[width..].copy_from_slice(leaving[*index].value.as_slice());
                    if stays { &mut promoted } else { &mut demoted }.push((position, vector, mass));
                }
                Contender::Alone if stays => {
                    if let Some(sketch) = sketch {
                        let vector = sketch.exactly(position);
                        sketch.remove(position, &vector);
                        promoted.push((position, vector, mass));
                    }
                }
                _ => {}
            }
        }
        for (position, vector, received) in promoted {
            let Some(slot) = free.pop() else { break };
            keys.write(slot, &vector[..width]);
            values.write(slot, &vector[width..]);
            let place = Place { position: position as u32, received };
            if slot < places.len() { places[slot] = place } else { places.push(place) }
        }
        if let Some(sketch) = sketch {
            demoted.iter().for_each(|(position, vector, mass)| sketch.insert(*position, vector, *mass));
        }
    }

    /// What there is room for.
    pub(super) fn stores(&self) -> &Stores {
        &self.stores
    }

    /// What a layer holds, where exact rows stand in `slots` as `standing` says.
    pub(super) fn save(&self, layer: usize, standing: &Standing, slots: &Slots) -> Result<SavedEviction> {
        let Eviction { stores, sketched: _, layers } = self;
        let Layer { keys, values, places, sketch, received } = &layers[layer];
        let mut saved = SavedEviction { sketch: sketch.as_ref().map(Sketch::save), ..SavedEviction::default() };
        for place in places {
            let Place { position, received } = *place;
            saved.positions.push(position);
            saved.masses.push(received);
        }
        keys.save(0, places.len(), &mut saved.keys)?;
        values.save(0, places.len(), &mut saved.values)?;
        for (_, stretch) in standing.stretches(slots) {
            saved.received.extend_from_slice(&received[stretch.slot..stretch.slot + stretch.count]);
        }
        if stores.evicted_as == Evicted::Rows {
            let candidates = self.positions(layer);
            let left = (standing.coded - standing.left())..standing.coded;
            saved.listed = left.filter(|position| candidates.binary_search(position).is_err()).map(|position| position as u32).collect();
        }
        Ok(saved)
    }

    /// Takes it over.
    pub(super) fn restore(&mut self, layer: usize, saved: &SavedEviction, standing: &Standing, slots: &Slots) {
        // Which tokens are listed follows from the candidates.
        let SavedEviction { received: masses_of_exact, positions, masses, keys: saved_keys, values: saved_values, listed: _, sketch: saved_sketch } =
            saved;
        let Layer { keys, values, places, sketch, received } = &mut self.layers[layer];
        places.clear();
        places.extend(positions.iter().zip(masses).map(|(&position, &received)| Place { position, received }));
        keys.restore(0, saved_keys);
        values.restore(0, saved_values);
        for (index, stretch) in standing.stretches(slots) {
            received[stretch.slot..stretch.slot + stretch.count].copy_from_slice(&masses_of_exact[index..index + stretch.count]);
        }
        if let (Some(sketch), Some(saved)) = (sketch, saved_sketch) {
            sketch.restore(saved);
        }
    }

    /// Whether candidates are read beside latents that they have as well.
    pub(super) fn beside_rows(&self) -> bool {
        self.stores.evicted_as == Evicted::Rows
    }

    /// Bytes allocated: of candidates and evicted tokens, and of what the exact rows have received.
    pub(super) fn bytes(&self) -> (usize, usize) {
        let layer = |layer: &Layer| {
            let places = layer.places.capacity() * size_of::<Place>();
            layer.keys.bytes() + layer.values.bytes() + places + layer.sketch.as_ref().map_or(0, Sketch::bytes)
        };
        let received = |layer: &Layer| layer.received.capacity() * size_of::<f32>();
        (size_of_val(&*self.sketched) + self.layers.iter().map(layer).sum::<usize>(), self.layers.iter().map(received).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::Budget;
    use crate::kv::{Exact, Reviver};
    use crate::linalg::Random;

    const WIDTH: usize = 8;

    /// A layer of one head, and room for 24 candidates, or fewer and a sketch.
    fn eviction(evicted_as: Evicted) -> Eviction {
        let geometry = crate::kv::Geometry { layers: 1, heads: 1, kv_heads: 1, head_dim: WIDTH };
        let reviver = Reviver::new(Budget::Bytes(15), Some(evicted_as));
        let stores = reviver.stores(&geometry, &[], Exact { sinks: 0, recent: 0 }, 96).unwrap();
        Eviction::new(stores, 1, WIDTH, 32, RowType::F32)
    }

    fn vector(position: usize) -> DVector<f32> {
        let mut random = Random::new(position as u64);
        DVector::from_fn(WIDTH, |_, _| (random.gaussian() * 64.0).round() as f32 / 64.0)
    }

    fn evict(eviction: &mut Eviction, tokens: std::ops::Range<usize>) {
        tokens.clone().for_each(|position| eviction.begin(0, position % 32));
        let leaving: Vec<Leaving> =
            tokens.map(|position| Leaving { position, slot: position % 32, key: vector(position), value: vector(1000 + position) }).collect();
        // The newer and the odder, the more attention.
        leaving.iter().for_each(|token| eviction.layers[0].received[token.slot] = token.position as f32 + 1000.0 * (token.position % 2) as f32);
        eviction.evict(0, &leaving);
    }

    /// Every token is a candidate or evicted: the sum of all keys and values is still there, each
    /// once.
    #[test]
    fn nothing_is_lost_and_nothing_is_twice() {
        for evicted_as in [Evicted::Mean, Evicted::Shrunk, Evicted::Sketch] {
            let mut eviction = eviction(evicted_as);
            let most = eviction.stores.candidates;
            for block in 0..3 {
                evict(&mut eviction, 32 * block..32 * block + 32);
                let end = 32 * block + 32;
                let mut positions = eviction.positions(0);
                assert_eq!(positions.len(), most.min(end));
                positions.dedup();
                assert_eq!(positions.len(), most.min(end));
                let sketch = eviction.layers[0].sketch.as_ref().unwrap();
                assert_eq!(sketch.count() + positions.len(), end, "{evicted_as:?}");
                assert!(sketch.alone().all(|(position, _)| !positions.contains(&position)));
                let columns = eviction.columns(0);
                for (slot, place) in eviction.layers[0].places.iter().enumerate() {
                    assert_eq!(columns.keys.column(slot), vector(place.position as usize));
                    assert_eq!(columns.values.column(slot), vector(1000 + place.position as usize));
                }
                if evicted_as != Evicted::Sketch {
                    let all: DVector<f32> = (0..end).map(|position| vector(1000 + position)).sum();
                    let counted = columns.values.column_iter().zip(&columns.counts).map(|(value, &count)| value * count as f32);
                    // A shrunk estimate is not what it stands for, but for tokens alone: only the
                    // mean is exact.
                    let found: DVector<f32> = counted.sum();
                    assert!(evicted_as == Evicted::Shrunk || (found - all).norm() < 1e-3);
                }
            }
            // Odd positions have received more, and of these the newest.
            let best: Vec<usize> = (0..96).filter(|position| position % 2 == 1).rev().take(most).collect();
            assert!(eviction.positions(0).iter().all(|position| best.contains(position) || most > 48), "{:?}", eviction.positions(0));
            eviction.clear();
            assert!(eviction.positions(0).is_empty() && eviction.columns(0).counts.is_empty());
        }
    }

    /// An evicted token that is alone in its bucket and receives more than a candidate takes its
    /// place, as it was.
    #[test]
    fn what_is_known_is_revived() {
        let mut eviction = eviction(Evicted::Shrunk);
        let most = eviction.stores.candidates;
        // Four are evicted, in five buckets.
        assert_eq!((most, eviction.stores.buckets), (11, 5));
        evict(&mut eviction, 0..15);
        let (evicted, _) = eviction.layers[0].sketch.as_ref().unwrap().alone().next().unwrap();
        let columns = eviction.columns(0);
        let at = (most..columns.counts.len()).find(|&at| (columns.keys.column(at) - vector(evicted)).norm() < 1e-3).unwrap();
        let mut attention = vec![0.0; columns.counts.len()];
        attention[at] = 1e6;
        eviction.accumulate(0, 1, &attention, std::iter::empty(), 0);
        eviction.evict(0, &[]);
        assert!(eviction.positions(0).contains(&evicted));
        let slot = eviction.layers[0].places.iter().position(|place| place.position as usize == evicted).unwrap();
        assert!((eviction.columns(0).keys.column(slot) - vector(evicted)).norm() < 1e-4);
        assert_eq!(eviction.positions(0).len() + eviction.layers[0].sketch.as_ref().unwrap().count(), 15);
    }
}
