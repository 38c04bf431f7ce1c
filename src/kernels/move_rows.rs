//! `move_rows.wgsl`: moves rows between window, slots and sketch as [`super::evict`] has decided.

use super::evict::Moves;
use super::{AttentionShape, WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work, pad};
use crate::kernels::exact::ExactRows;
use crate::kv::Evicted;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    promoted: u32,
    stash: u32,
    evicted: u32,
}

/// Moves one layer's rows.
pub struct MoveRows {
    kernel: Kernel,
    vectors: u32,
    params: Params,
}

fn exact_row(attention: &AttentionShape) -> u32 {
    (attention.kv_heads * pad(attention.head_dim)) as u32
}

fn variant(attention: &AttentionShape, evicted_as: Evicted) -> Spec {
    let there = [
        ("SUMS", evicted_as.is_sketched() || evicted_as.has_mean(), None),
        ("SKETCH", evicted_as.is_sketched(), Some(3)),
        ("MEAN", evicted_as.has_mean(), Some(4)),
    ];
    let there: Vec<_> = there.into_iter().filter(|(_, is, _)| *is).collect();
    let flags: Vec<_> = there.iter().map(|(flag, ..)| *flag).collect();
    let bindings: Vec<_> =
        [0, 1, 2].into_iter().chain(there.iter().filter_map(|(.., binding)| *binding)).map(|binding| (binding, Access::Write)).collect();
    spec("move_rows.wgsl", &flags, &[("WORKGROUP", WORKGROUP), ("EXACT_ROW", exact_row(attention))], &bindings)
}

impl MoveRows {
    /// Of a layer that has something beside, `None` for others.
    pub(crate) fn plan(device: &Device, attention: &AttentionShape, cache: &ExactRows, moves: &Moves) -> Result<Option<MoveRows>> {
        let Some(eviction) = &cache.eviction else { return Ok(None) };
        // Rows that tokens leave are coded elsewhere: the kernel is that of nothing left.
        let mut buffers = vec![&cache.keys, &cache.values, &moves.buffer];
        buffers.extend(eviction.sums.iter().chain(&eviction.totals));
        Ok(Some(MoveRows {
            kernel: device.kernel(variant(attention, eviction.stores.evicted_as), &buffers)?,
            vectors: exact_row(attention) / 2,
            params: Params { promoted: moves.promoted as u32, stash: moves.stash as u32, evicted: 0 },
        }))
    }

    /// After an eviction that leaves `evicted` tokens without a slot.
    pub fn record(&self, pass: &mut Pass, evicted: usize) {
        // How many move is decided on the device.
        self.kernel.record(pass, &Params { evicted: evicted as u32, ..self.params }, [self.vectors.div_ceil(WORKGROUP), 1, 1], Work::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::evict::Evict;
    use crate::kernels::oracle::{devices, halves, numbers, run, stores};
    use crate::kv::Sketch;
    use crate::kv::Slots;
    use half::f16;
    use std::collections::BTreeMap;

    const ROW: usize = 2 * 16;

    /// The key and the value of a token, padded.
    fn row(position: usize) -> [Vec<f16>; 2] {
        [0, 1].map(|side| {
            let mut row = halves((2 * position + side) as u64 + 1, ROW);
            row.iter_mut().enumerate().filter(|(i, _)| i % 16 >= 14).for_each(|(_, x)| *x = f16::ZERO);
            row
        })
    }

    /// What a token has received by a round: many ties.
    fn mass(position: usize, round: usize) -> f32 {
        (numbers((position * 31 + round) as u64, 1)[0] * 4.0).round() + 4.0
    }

    /// Several rounds of tokens that leave: which have a slot, what stands in it, and what is in
    /// the sketch, to the bit, is what the specification says, whether something comes out of the
    /// sketch or not.
    #[test]
    fn rows_and_books_are_those_of_the_specification() {
        let c = AttentionShape::of(false, None, 4, 2, 14);
        let slots = Slots { sinks: 3, ring: 100 };
        for evicted_as in [Evicted::None, Evicted::Mean, Evicted::Sketch, Evicted::Shrunk, Evicted::Rows] {
            let stores = stores(&c, evicted_as);
            for device in devices(None) {
                let cache = ExactRows::beside(&device, &c, "test", slots, stores).unwrap();
                let eviction = cache.eviction.as_ref().unwrap();
                let places = stores.places();
                let table = evicted_as.is_sketched().then(|| device.upload("places", &places).unwrap());
                let moves = Moves::new(&device, &stores, 2 * ROW).unwrap();
                let evict = Evict::plan(&device, eviction, slots, table.as_ref(), &moves).unwrap();
                let move_rows = MoveRows::plan(&device, &c, &cache, &moves).unwrap().unwrap();
                let mut sketch = Sketch::new(2 * ROW, stores.buckets, evicted_as.has_mean(), places.clone());
                let mut candidates: BTreeMap<usize, f32> = BTreeMap::new();
                let (mut evicted, mut revived) = (0, 0);
                for (round, count) in [5, 17, 8, 1, 32, 64].into_iter().enumerate() {
                    let what = format!("{evicted_as:?}, round {round}, {:?}", device.tier());
                    let leaving = evicted + 3..evicted + 3 + count;
                    for position in leaving.clone() {
                        let slot = slots.of(position);
                        for (buffer, row) in [&cache.keys, &cache.values].into_iter().zip(row(position)) {
                            device.queue.write_buffer(buffer, (slot * 2 * ROW) as u64, bytemuck::cast_slice(&row));
                        }
                        device.queue.write_buffer(&eviction.marks, 4 * (eviction.received + slot) as u64, bytemuck::bytes_of(&mass(position, round)));
                    }
                    // As specified.
                    let known: Vec<(usize, f32)> = sketch.alone().collect();
                    let contenders: Vec<(usize, f32)> = candidates
                        .iter()
                        .map(|(position, mass)| (*position, *mass))
                        .chain(leaving.clone().map(|position| (position, mass(position, round))))
                        .chain(known.clone())
                        .collect();
                    let stays = stores.keep(&contenders);
                    let full = |position: usize| row(position).concat().into_iter().map(f32::from).collect::<Vec<_>>();
                    for &(position, _) in
                        known.iter().filter(|(position, _)| contenders.iter().zip(&stays).any(|(c, stays)| c.0 == *position && *stays))
                    {
                        sketch.remove(position, &full(position));
                        revived += 1;
                    }
                    for (&(position, mass), stays) in contenders.iter().zip(&stays) {
                        if !stays && !known.iter().any(|(known, _)| *known == position) {
                            sketch.insert(position, &full(position), mass);
                        }
                    }
                    let next = contenders.iter().zip(&stays).filter(|(_, stays)| **stays).map(|(c, _)| *c);
                    candidates = next.collect();
                    let before = evicted;
                    evicted += count;
                    assert_eq!(candidates.len(), stores.held(evicted));
                    // As done.
                    let words = (eviction.received + slots.count()).next_multiple_of(4);
                    let mut marks = run::<u32>(&device, &eviction.marks, words, |pass| {
                        evict.record(pass, &leaving, before);
                        move_rows.record(pass, evicted - candidates.len());
                    });
                    let held: Vec<(usize, f32)> = (0..candidates.len())
                        .map(|i| (marks[eviction.places + 2 * i] as usize, f32::from_bits(marks[eviction.places + 2 * i + 1])))
                        .collect();
                    let mut sorted = held.clone();
                    sorted.sort_by_key(|(position, _)| *position);
                    assert_eq!(sorted, candidates.iter().map(|(a, b)| (*a, *b)).collect::<Vec<_>>(), "{what}");
                    let all = slots.count() + stores.candidates;
                    for (side, buffer) in [&cache.keys, &cache.values].into_iter().enumerate() {
                        let got = run::<f16>(&device, buffer, all * ROW, |_| ());
                        for (i, (position, _)) in held.iter().enumerate() {
                            let got = &got[(slots.count() + i) * ROW..][..ROW];
                            // What has been in a sketch has lost what is below 1/65536.
                            let close = got.iter().zip(&row(*position)[side]).all(|(a, b)| (a.to_f32() - b.to_f32()).abs() <= 2.0 / 65536.0);
                            assert!(close, "{what}, {position}");
                        }
                    }
                    if let Some(list) = &eviction.listed {
                        let mut listed = run::<u32>(&device, list, evicted - candidates.len(), |_| ());
                        listed.sort_unstable();
                        let left = (3..3 + evicted).filter(|position| !candidates.contains_key(position)).map(|position| position as u32);
                        assert_eq!(listed, Vec::from_iter(left), "{what}");
                    }
                    if evicted_as == Evicted::Mean {
                        assert_eq!(marks[0] as usize, sketch.count(), "{what}");
                    }
                    let (sums, totals) = {
                        let (sums, totals) = sketch.sums();
                        (sums.to_vec(), totals.to_vec())
                    };
                    if let Some(buffer) = &eviction.sums {
                        assert_eq!(run::<i32>(&device, buffer, sums.len(), |_| ()), sums, "{what}");
                        let mut of_one: Vec<(usize, f32)> = Vec::new();
                        for bucket in 0..stores.buckets {
                            let [plus, minus, position, weight] = [0, 1, 2, 3].map(|k| marks[4 * bucket + k]);
                            assert_eq!([plus, minus], sketch.members(bucket), "{what}");
                            of_one.extend((plus + minus == 1).then_some((position as usize, f32::from_bits(weight))));
                        }
                        assert_eq!(of_one, sketch.alone().collect::<Vec<_>>(), "{what}");
                        // Some of them receive much.
                        for bucket in (0..stores.buckets).step_by(2) {
                            if let Some((_, weight)) = of_one
                                .iter()
                                .find(|(position, _)| sketch.members(bucket).iter().sum::<u32>() == 1 && *position == marks[4 * bucket + 2] as usize)
                            {
                                marks[4 * bucket + 3] = 9f32.to_bits();
                                sketch.weigh(bucket, 9.0 - weight);
                            }
                        }
                    }
                    if let Some(buffer) = &eviction.totals {
                        let got = run::<u32>(&device, buffer, 3 * 2 * ROW, |_| ());
                        for (i, total) in totals.iter().enumerate() {
                            let found = (u64::from(got[4 * ROW + i]) << 32 | u64::from(got[2 * ROW + i])) as i64;
                            assert_eq!(found, *total, "{what}");
                            let mean = *total as f64 / 65536.0 / sketch.count().max(1) as f64;
                            assert!((f64::from(f32::from_bits(got[i])) - mean).abs() < 1e-6, "{what}");
                        }
                    }
                    // Candidates receive another share each round.
                    for (i, (position, _)) in held.iter().enumerate() {
                        let mass = mass(*position, round + 100);
                        candidates.insert(*position, mass);
                        marks[eviction.places + 2 * i + 1] = mass.to_bits();
                    }
                    for (word, mark) in marks[..eviction.received].iter().enumerate() {
                        device.queue.write_buffer(&eviction.marks, 4 * word as u64, bytemuck::bytes_of(mark));
                    }
                }
                assert!(revived > 0 || !evicted_as.is_sketched(), "{evicted_as:?}: something has been revived");
            }
        }
    }
}
