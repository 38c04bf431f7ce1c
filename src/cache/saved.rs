//! A cache's content taken off the device, and put on one: by position, and without the padding of
//! rows ([`Saved`]).

use super::Cache;
use crate::Result;
use crate::gpu::{Device, pad};
use crate::kernels::eviction::EvictionStore;
use crate::kernels::exact::ExactRows;
use crate::kv::{Evicted, LatentSpec, Layout, Saved, SavedEviction, SavedLayer, SavedSketch, Selection, Standing, Stores, Stretch};
use half::f16;
use std::ops::Range;

/// Where latents stand, and what they are.
type Latents<'a> = Option<(&'a Layout, &'a [LatentSpec])>;

/// Heads of `head_dim` numbers without their padding.
fn narrow<T: Copy>(padded: &[T], head_dim: usize) -> Vec<T> {
    padded.chunks_exact(pad(head_dim)).flat_map(|head| &head[..head_dim]).copied().collect()
}

/// The same with it.
fn widen<T: Copy + Default>(numbers: &[T], head_dim: usize) -> Vec<T> {
    let mut padded = Vec::with_capacity(numbers.len() / head_dim * pad(head_dim));
    for head in numbers.chunks_exact(head_dim) {
        padded.extend_from_slice(head);
        padded.resize(padded.len() + pad(head_dim) - head_dim, T::default());
    }
    padded
}

/// The bytes of so many elements of `each` bytes.
fn bytes(elements: Range<usize>, each: usize) -> Range<u64> {
    (elements.start * each) as u64..(elements.end * each) as u64
}

/// Has the device take what was written, so that no more than one store is ever in memory twice.
fn flush(device: &Device) -> Result<()> {
    device.submit(device.encode("restore", |_| (), |_| ())?.0)?;
    device.wait()
}

impl Cache {
    /// All that it holds of a sequence that stands there: by layer, and the latents.
    ///
    /// # Errors
    /// [`OutOfMemory`](crate::Error::OutOfMemory), and the device's.
    pub(crate) fn save(&self, device: &Device, standing: &Standing, latents: Latents) -> Result<(Vec<SavedLayer>, Vec<Vec<u32>>)> {
        // Where tokens stand in sketches follows from how many buckets there are.
        let Cache { layers, stores, select: _, landmarks, sketched: _, slots, shape } = self;
        let (head_dim, row) = (shape.attention.head_dim, 2 * shape.attention.kv_row());
        let stretches = standing.stretches(slots);
        let mut saved = Vec::new();
        for (index, ExactRows { keys, values, slots: _, eviction }) in layers.iter().enumerate() {
            let rows = |what: &str, buffer: &wgpu::Buffer| -> Result<Vec<f16>> {
                let part = |(_, stretch): &(usize, Stretch)| (buffer, bytes(stretch.slot..stretch.slot + stretch.count, row));
                let found = device.download(&format!("layer {index}'s {what} to be saved"), &stretches.iter().map(part).collect::<Vec<_>>())?;
                Ok(narrow(&found, head_dim))
            };
            let landmarks = match landmarks.get(index) {
                Some(landmarks) => {
                    let words = 4 * landmarks.words.shape.cols;
                    device.download("landmarks to be saved", &[(&*landmarks.words, bytes(0..standing.coded.div_ceil(Selection::CHUNK), words))])?
                }
                None => Vec::new(),
            };
            let eviction = match eviction {
                Some(eviction) => Some(self.save_evicted(device, eviction, [keys, values], standing)?),
                None => None,
            };
            saved.push(SavedLayer { keys: rows("keys", keys)?, values: rows("values", values)?, landmarks, eviction });
        }
        let Some((layout, specs)) = latents else { return Ok((saved, Vec::new())) };
        let mut rows: Vec<Vec<u32>> = specs.iter().map(|spec| Vec::with_capacity(standing.coded * spec.format.words())).collect();
        for (index, store) in stores.iter().enumerate() {
            let words = layout.stores[index];
            let found: Vec<u32> = device.download(&format!("coded rows {index} to be saved"), &[(&**store, bytes(0..standing.coded, 4 * words))])?;
            let here = layout.places.iter().zip(specs).zip(&mut rows).filter(|((place, _), _)| place.store == index);
            for ((place, spec), row) in here {
                found.chunks_exact(words).for_each(|token| row.extend_from_slice(&token[place.word..place.word + spec.format.words()]));
            }
        }
        Ok((saved, rows))
    }

    fn save_evicted(&self, device: &Device, eviction: &EvictionStore, rows: [&wgpu::Buffer; 2], standing: &Standing) -> Result<SavedEviction> {
        let EvictionStore { stores, marks, sums, totals, listed, places, received, slots } = eviction;
        let (head_dim, kv_row) = (self.shape.attention.head_dim, self.shape.attention.kv_row());
        let (left, held) = (standing.left(), stores.held(standing.left()));
        let marks: Vec<u32> = device.download("marks of candidates to be saved", &[(marks, bytes(0..received + slots, 4))])?;
        let side = |buffer: &wgpu::Buffer| -> Result<Vec<f16>> {
            let candidates = self.slots.count()..self.slots.count() + held;
            Ok(narrow(&device.download("candidates to be saved", &[(buffer, bytes(candidates, 2 * kv_row))])?, head_dim))
        };
        let mass = |word: usize| f32::from_bits(marks[word]);
        let listed = match listed {
            Some(listed) => device.download("evicted tokens to be saved", &[(listed, bytes(0..left - held, 4))])?,
            None => Vec::new(),
        };
        let sketch = match stores.evicted_as {
            Evicted::None | Evicted::Rows => None,
            Evicted::Mean | Evicted::Sketch | Evicted::Shrunk => {
                let sums = match sums {
                    Some(sums) => device.download::<i32>("a sketch to be saved", &[(sums, bytes(0..stores.buckets, 8 * kv_row))])?,
                    None => Vec::new(),
                };
                // The mean, and the two halves of the sum.
                let totals = match totals {
                    Some(totals) => device.download::<u32>("a mean to be saved", &[(totals, bytes(0..3, 8 * kv_row))])?,
                    None => Vec::new(),
                };
                let [mean, low, high] = [0, 1, 2].map(|part| narrow(totals.chunks_exact(2 * kv_row).nth(part).unwrap_or(&[]), head_dim));
                Some(SavedSketch {
                    count: (left - held) as u32,
                    buckets: if stores.buckets > 0 { marks[..*places].as_chunks::<4>().0.to_vec() } else { Vec::new() },
                    sums: narrow(&sums, head_dim),
                    totals: low.iter().zip(&high).map(|(low, high)| i64::from(*high as i32) << 32 | i64::from(*low)).collect(),
                    mean: mean.into_iter().map(f32::from_bits).collect(),
                })
            }
        };
        Ok(SavedEviction {
            received: standing
                .stretches(&self.slots)
                .iter()
                .flat_map(|(_, at)| at.slot..at.slot + at.count)
                .map(|slot| mass(received + slot))
                .collect(),
            positions: (0..held).map(|slot| marks[places + 2 * slot]).collect(),
            masses: (0..held).map(|slot| mass(places + 2 * slot + 1)).collect(),
            keys: side(rows[0])?,
            values: side(rows[1])?,
            listed,
            sketch,
        })
    }

    /// Takes over what was saved, which fits, where nothing is left of evicted tokens.
    ///
    /// # Errors
    /// The device's.
    pub(crate) fn restore(&self, device: &Device, saved: &Saved, latents: Latents) -> Result<()> {
        let Saved { tokens: _, standing, layers, rows, prompt: _ } = saved;
        let (head_dim, width, row) =
            (self.shape.attention.head_dim, self.shape.attention.kv_heads * self.shape.attention.head_dim, 2 * self.shape.attention.kv_row());
        for (index, SavedLayer { keys, values, landmarks, eviction }) in layers.iter().enumerate() {
            let to = &self.layers[index];
            for (first, stretch) in standing.stretches(&self.slots) {
                for (buffer, numbers) in [(&to.keys, keys), (&to.values, values)] {
                    device.write(buffer, (stretch.slot * row) as u64, &widen(&numbers[first * width..(first + stretch.count) * width], head_dim))?;
                }
            }
            if let Some(own) = self.landmarks.get(index) {
                device.write(&own.words, 0, landmarks)?;
            }
            if let (Some(own), Some(saved)) = (&to.eviction, eviction) {
                self.restore_evicted(device, own, [&to.keys, &to.values], (saved, standing))?;
            }
            flush(device)?;
        }
        let Some((layout, specs)) = latents else { return Ok(()) };
        for (index, store) in self.stores.iter().enumerate() {
            let words = layout.stores[index];
            let mut all = vec![0u32; standing.coded * words];
            let here = layout.places.iter().zip(specs).zip(rows).filter(|((place, _), _)| place.store == index);
            for ((place, spec), row) in here {
                let own = spec.format.words();
                let tokens = all.chunks_exact_mut(words).zip(row.chunks_exact(own));
                tokens.for_each(|(token, row)| token[place.word..place.word + own].copy_from_slice(row));
            }
            device.write(store, 0, &all)?;
            flush(device)?;
        }
        Ok(())
    }

    fn restore_evicted(
        &self,
        device: &Device,
        own: &EvictionStore,
        rows: [&wgpu::Buffer; 2],
        (saved, standing): (&SavedEviction, &Standing),
    ) -> Result<()> {
        let SavedEviction { received, positions, masses, keys, values, listed, sketch } = saved;
        let (head_dim, kv_row) = (self.shape.attention.head_dim, self.shape.attention.kv_row());
        let mut marks = vec![0u32; own.received + self.slots.count()];
        for (slot, (position, mass)) in positions.iter().zip(masses).enumerate() {
            marks[own.places + 2 * slot..][..2].copy_from_slice(&[*position, mass.to_bits()]);
        }
        for (first, stretch) in standing.stretches(&self.slots) {
            let to = &mut marks[own.received + stretch.slot..][..stretch.count];
            to.iter_mut().zip(&received[first..]).for_each(|(mark, mass)| *mark = mass.to_bits());
        }
        if let Some(SavedSketch { count, buckets, sums, totals, mean }) = sketch {
            match own.sums {
                Some(_) => marks[..own.places].copy_from_slice(buckets.as_flattened()),
                None => marks[0] = *count,
            }
            if let Some(to) = &own.sums {
                device.write(to, 0, &widen(sums, head_dim))?;
            }
            if let Some(to) = &own.totals {
                let words = |word: &dyn Fn(&i64) -> u32| totals.iter().map(word).collect::<Vec<u32>>();
                let mean: Vec<u32> = mean.iter().map(|x| x.to_bits()).collect();
                let parts = [mean, words(&|sum| *sum as u32), words(&|sum| (*sum >> 32) as u32)];
                device.write(to, 0, &widen(&parts.concat(), head_dim))?;
            }
        }
        device.write(&own.marks, 0, &marks)?;
        let candidates = (self.slots.count() * 2 * kv_row) as u64;
        for (buffer, numbers) in rows.into_iter().zip([keys, values]) {
            device.write(buffer, candidates, &widen(numbers, head_dim))?;
        }
        match &own.listed {
            Some(to) => device.write(to, 0, listed),
            None => Ok(()),
        }
    }

    /// What it has room for beside exact rows, where tokens are evicted.
    pub(crate) fn stores(&self) -> Option<&Stores> {
        self.layers.first()?.eviction.as_ref().map(|eviction| &eviction.stores)
    }
}
