//! A count-sketch of vectors (Charikar, Chen and Farach-Colton, *Finding frequent items in data
//! streams*, 2002): far fewer sums than vectors, each vector in one of them.
//!
//! A hash gives the vector `x` of every position `i` a bucket `h(i)` of `w` and a sign `s(i)`:
//! `S[h(i)] += s(i)·x`. Its estimate is `s(i)·S[h(i)]`: right on average over seeds, and as wrong
//! as the others in its bucket are large. Two of one bucket and sign have the same estimate, so
//! attention over all vectors is attention over two columns for each bucket, as many times as it
//! has vectors of either sign: nothing is ever rebuilt one by one.
//!
//! Positions `j·w..(j+1)·w` are spread by a permutation: as long as there are no more than `w`
//! consecutive ones, none share a bucket. Sketches of several layers share the table of it.
//!
//! Beside the sums there can be the sum of everything, for its mean `μ`. Then the estimate is
//! `μ ± (S − c·μ)/n`, with `n` vectors in the bucket and `c` the sum of their signs: of all
//! multiples of a centred sum the one that is closest in the mean square, when vectors vary alike;
//! exact for one that is alone. A mean that moves later spoils nothing, as `c` is kept.
//!
//! Sums are whole numbers of 1/65536: to take out what was put in leaves the very bits that were
//! there before.

use super::saved::SavedSketch;
use crate::linalg::Random;
use std::sync::Arc;

/// `1/UNIT` is what sums count in.
const UNIT: f32 = 65536.0;

/// The sums of what was put in.
#[derive(Debug, Clone, PartialEq)]
pub struct Sketch {
    /// Bucket and sign of every position: twice the bucket, and one more for a minus.
    places: Arc<[u32]>,
    width: usize,
    /// `[buckets][width]`.
    sums: Vec<i32>,
    buckets: Vec<Bucket>,
    /// Of all vectors; empty where no mean is taken.
    total: Vec<i64>,
    count: u32,
}

/// What is known of those in one bucket.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Bucket {
    plus: u32,
    minus: u32,
    /// The last position that came, and its weight: what a vector that is alone is known by.
    position: u32,
    weight: f32,
}

/// What stands for all vectors: `[columns][width]`, and how many vectors each column is.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SketchColumns {
    /// One after the other.
    pub vectors: Vec<f32>,
    /// Above zero.
    pub counts: Vec<u32>,
    /// The bucket of each; one beyond the last for the mean alone.
    pub buckets: Vec<usize>,
}

impl Sketch {
    /// A sketch of vectors of `width` numbers in `buckets` buckets.
    ///
    /// [`places`](Self::places) says which; without buckets only the mean is known.
    pub fn new(width: usize, buckets: usize, mean: bool, places: Arc<[u32]>) -> Sketch {
        let total = vec![0; if mean { width } else { 0 }];
        Sketch { places, width, sums: vec![0; buckets * width], buckets: vec![Bucket::default(); buckets], total, count: 0 }
    }

    /// Words of what is known of those in one bucket.
    pub(crate) const BUCKET_WORDS: usize = size_of::<Bucket>() / size_of::<u32>();

    /// What one bucket takes.
    pub const fn bucket_bytes(width: usize) -> usize {
        width * size_of::<i32>() + size_of::<Bucket>()
    }

    /// What the mean takes in a budget.
    ///
    /// The sum of all vectors, and the mean itself, which a device keeps and the processor takes
    /// anew.
    pub const fn mean_bytes(width: usize) -> usize {
        width * (size_of::<i64>() + size_of::<f32>())
    }

    /// Bytes allocated, the table of places apart.
    pub fn bytes(&self) -> usize {
        self.sums.capacity() * size_of::<i32>() + self.total.capacity() * size_of::<i64>() + self.buckets.capacity() * size_of::<Bucket>()
    }

    /// Vectors in it.
    pub fn count(&self) -> usize {
        self.count as usize
    }

    /// The bucket and the sign of each of `positions` positions, by a hash from `seed`.
    ///
    /// Twice the bucket, and one more for a minus.
    pub fn places(buckets: usize, positions: usize, seed: u64) -> Arc<[u32]> {
        let mut places = Vec::with_capacity(positions);
        for block in 0..if buckets == 0 { 0 } else { positions.div_ceil(buckets) } {
            let mut random = Random::new(seed ^ Random::new(block as u64).bits());
            // Any factor that has no divisor in common with the number of buckets permutes.
            let mut factor = 1 + random.below(buckets);
            while common_divisor(factor, buckets) != 1 {
                factor = factor % buckets + 1;
            }
            let first = random.below(buckets);
            for position in block * buckets..positions.min((block + 1) * buckets) {
                let bucket = ((factor as u128 * (position % buckets) as u128 + first as u128) % buckets as u128) as u32;
                let minus = Random::new(!seed ^ Random::new(position as u64).bits()).bits() >> 63;
                places.push(2 * bucket + minus as u32);
            }
        }
        places.into()
    }

    /// What the places of a position take.
    pub const fn place_bytes() -> usize {
        size_of::<u32>()
    }

    /// The bucket and the sign of a position.
    fn place(&self, position: usize) -> (usize, i32) {
        let place = self.places[position];
        (place as usize / 2, 1 - 2 * (place as i32 & 1))
    }

    /// Puts the vector of `position` in, which weighs `weight`.
    pub fn insert(&mut self, position: usize, vector: &[f32], weight: f32) {
        self.add(position, vector, 1);
        if !self.buckets.is_empty() {
            let bucket = self.place(position).0;
            (self.buckets[bucket].position, self.buckets[bucket].weight) = (position as u32, weight);
        }
    }

    /// Takes it out again.
    pub fn remove(&mut self, position: usize, vector: &[f32]) {
        self.add(position, vector, -1);
    }

    fn add(&mut self, position: usize, vector: &[f32], times: i32) {
        self.count = self.count.wrapping_add_signed(times);
        // What is larger is clipped: no more units fit into a sum.
        let fixed = |x: &f32| (x.clamp(-32767.0, 32767.0) * UNIT) as i32;
        self.total.iter_mut().zip(vector).for_each(|(sum, x)| *sum += i64::from(times * fixed(x)));
        if self.buckets.is_empty() {
            return;
        }
        let (bucket, sign) = self.place(position);
        // Wrapping, so that also a sum that has no room is undone exactly.
        let sums = &mut self.sums[bucket * self.width..][..self.width];
        sums.iter_mut().zip(vector).for_each(|(sum, x)| *sum = sum.wrapping_add((times * sign).wrapping_mul(fixed(x))));
        let bucket = &mut self.buckets[bucket];
        let members = if sign > 0 { &mut bucket.plus } else { &mut bucket.minus };
        *members = members.wrapping_add_signed(times);
        if bucket.plus + bucket.minus == 0 {
            *bucket = Bucket::default();
        }
    }

    /// Adds to the weight of the vector in `bucket`, if it is one.
    pub fn weigh(&mut self, bucket: usize, weight: f32) {
        if let Some(bucket) = self.buckets.get_mut(bucket) {
            bucket.weight += weight;
        }
    }

    /// Multiplies all weights.
    pub fn fade(&mut self, factor: f32) {
        self.buckets.iter_mut().for_each(|bucket| bucket.weight *= factor);
    }

    /// Position and weight of every vector that is alone in its bucket, and so is known exactly.
    pub fn alone(&self) -> impl Iterator<Item = (usize, f32)> {
        self.buckets.iter().filter(|bucket| bucket.plus + bucket.minus == 1).map(|bucket| (bucket.position as usize, bucket.weight))
    }

    /// The vector of `position`, if it is alone in its bucket.
    pub fn exactly(&self, position: usize) -> Vec<f32> {
        let (bucket, sign) = self.place(position);
        self.sums[bucket * self.width..][..self.width].iter().map(|&sum| sum.wrapping_mul(sign) as f32 / UNIT).collect()
    }

    /// Sums by bucket, and that of all.
    #[cfg(test)]
    pub(crate) fn sums(&self) -> (&[i32], &[i64]) {
        (&self.sums, &self.total)
    }

    /// Vectors of either sign in a bucket.
    #[cfg(test)]
    pub(crate) fn members(&self, bucket: usize) -> [u32; 2] {
        [self.buckets[bucket].plus, self.buckets[bucket].minus]
    }

    /// Of all vectors; empty where none is taken.
    fn mean(&self) -> Vec<f32> {
        self.total.iter().map(|&sum| (sum as f64 / f64::from(self.count.max(1)) / f64::from(UNIT)) as f32).collect()
    }

    /// All that is in it. Where positions stand follows from how many buckets there are.
    pub fn save(&self) -> SavedSketch {
        let Sketch { places: _, width: _, sums, buckets, total, count } = self;
        let word = |bucket: &Bucket| {
            let Bucket { plus, minus, position, weight } = *bucket;
            [plus, minus, position, weight.to_bits()]
        };
        let buckets = buckets.iter().map(word).collect();
        SavedSketch { count: *count, buckets, sums: sums.clone(), totals: total.clone(), mean: self.mean() }
    }

    /// Takes over what was in another one of as many buckets.
    pub fn restore(&mut self, saved: &SavedSketch) {
        let SavedSketch { count, buckets, sums, totals, mean: _ } = saved;
        let bucket = |[plus, minus, position, weight]: [u32; 4]| Bucket { plus, minus, position, weight: f32::from_bits(weight) };
        self.buckets = buckets.iter().copied().map(bucket).collect();
        (self.sums, self.total, self.count) = (sums.clone(), totals.clone(), *count);
    }

    /// What all vectors are read as.
    pub fn columns(&self) -> SketchColumns {
        let mut columns = SketchColumns::default();
        let mean = self.mean();
        if self.buckets.is_empty() && self.count > 0 {
            return SketchColumns { vectors: mean, counts: vec![self.count], buckets: vec![0] };
        }
        for (index, bucket) in self.buckets.iter().enumerate() {
            let sums = self.sums[index * self.width..][..self.width].iter().map(|&sum| sum as f32 / UNIT);
            let (n, signs) = ((bucket.plus + bucket.minus) as f32, bucket.plus as f32 - bucket.minus as f32);
            for (count, sign) in [(bucket.plus, 1.0), (bucket.minus, -1.0)].into_iter().filter(|(count, _)| *count > 0) {
                columns.counts.push(count);
                columns.buckets.push(index);
                match mean.is_empty() {
                    true => columns.vectors.extend(sums.clone().map(|sum| sign * sum)),
                    false => columns.vectors.extend(sums.clone().zip(&mean).map(|(sum, mean)| mean + sign * (sum - signs * mean) / n)),
                }
            }
        }
        columns
    }
}

fn common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vectors(count: usize, width: usize) -> Vec<Vec<f32>> {
        let mut random = Random::new(5);
        (0..count).map(|_| (0..width).map(|at| at as f32 + random.gaussian() as f32).collect()).collect()
    }

    fn filled(buckets: usize, mean: bool, seed: u64, vectors: &[Vec<f32>]) -> Sketch {
        let mut sketch = Sketch::new(vectors[0].len(), buckets, mean, Sketch::places(buckets, vectors.len().max(90), seed));
        vectors.iter().enumerate().for_each(|(position, x)| sketch.insert(position, x, 1.0));
        sketch
    }

    /// What `position` is read as.
    fn estimate(sketch: &Sketch, position: usize) -> Vec<f32> {
        let (bucket, sign) = sketch.place(position);
        let columns = sketch.columns();
        // A bucket's plus comes before its minus.
        let of_bucket: Vec<usize> = (0..columns.counts.len()).filter(|&at| columns.buckets[at] == bucket).collect();
        let at = if sign > 0 { of_bucket[0] } else { of_bucket[of_bucket.len() - 1] };
        columns.vectors[at * sketch.width..][..sketch.width].to_vec()
    }

    fn error(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    #[test]
    fn no_two_share_a_bucket_where_there_are_enough() {
        let some = vectors(48, 7);
        for buckets in [48, 49, 53, 60, 64] {
            for mean in [false, true] {
                let sketch = filled(buckets, mean, 3, &some);
                assert_eq!(sketch.alone().count(), 48, "{buckets}");
                for (position, x) in some.iter().enumerate() {
                    assert!(error(&estimate(&sketch, position), x) < 1e-8, "{buckets} {position}");
                    assert!(error(&sketch.exactly(position), x) < 1e-8);
                }
            }
        }
    }

    #[test]
    fn undone_is_as_it_was_to_the_bit() {
        let mut some = vectors(90, 7);
        // Beyond what a sum has room for.
        some[70][..4].copy_from_slice(&[-40_000.0, 65_504.0, f32::NEG_INFINITY, f32::NAN]);
        for (buckets, mean) in [(0, true), (16, false), (16, true)] {
            let before = filled(buckets, mean, 3, &some[..60]);
            let mut sketch = before.clone();
            some[60..].iter().enumerate().for_each(|(at, x)| sketch.insert(60 + at, x, 2.0));
            assert_ne!(sketch, before);
            some[60..].iter().enumerate().rev().for_each(|(at, x)| sketch.remove(60 + at, x));
            assert_eq!((&sketch.sums, &sketch.total, sketch.count), (&before.sums, &before.total, before.count));
            some[..60].iter().enumerate().for_each(|(at, x)| sketch.remove(at, x));
            assert_eq!(sketch, Sketch::new(7, buckets, mean, Sketch::places(buckets, 90, 3)));
        }
    }

    /// The mean of the estimates over seeds is the vector, to within a few standard errors; the
    /// published one's noise is what the others in its bucket amount to.
    #[test]
    fn estimates_are_right_on_average() {
        let some = vectors(64, 5);
        const SEEDS: u64 = 4000;
        let mut sums = [0.0; 5];
        let mut noise = 0.0;
        for seed in 0..SEEDS {
            let found = estimate(&filled(16, false, seed, &some), 9);
            sums.iter_mut().zip(&found).for_each(|(sum, &x)| *sum += f64::from(x));
            noise += error(&found, &some[9]) / SEEDS as f64;
        }
        // Three of the 63 others share the bucket, one from each of the other runs of 16.
        let others: f64 = some.iter().skip(16).map(|x| error(x, &[0.0; 5])).sum::<f64>() / 16.0;
        assert!((noise / others - 1.0).abs() < 0.1, "{noise}, {others}");
        let mean: Vec<f32> = sums.iter().map(|sum| (sum / SEEDS as f64) as f32).collect();
        assert!(error(&mean, &some[9]) < 5.0 * noise / SEEDS as f64, "{mean:?}, {:?}", some[9]);
    }

    /// Around the mean and shrunk, an estimate is closer than the mean alone, and that closer than
    /// the sketch as published.
    #[test]
    fn shrunk_estimates_are_closest() {
        let some = vectors(64, 9);
        let mut errors = [0.0; 3];
        for seed in 0..20 {
            let sketches = [filled(16, true, seed, &some), filled(0, true, seed, &some), filled(16, false, seed, &some)];
            for (position, x) in some.iter().enumerate() {
                errors[0] += error(&estimate(&sketches[0], position), x);
                errors[1] += error(&sketches[1].columns().vectors, x);
                errors[2] += error(&estimate(&sketches[2], position), x);
            }
        }
        // Four share a bucket: a fourth of what varies is kept.
        assert!((errors[0] / errors[1] - 0.75).abs() < 0.03, "{errors:?}");
        assert!(errors[2] > 3.0 * errors[1], "{errors:?}");
    }

    /// Attention over a column for each bucket and sign, as often as it has vectors, is attention
    /// over every vector's own estimate.
    #[test]
    fn columns_are_read_as_all_vectors_would_be() {
        let some = vectors(100, 8);
        let query = [0.3, -0.2, 0.5, 0.1];
        let attend = |keys_and_values: &[(&[f32], f64)]| {
            let weight = |(x, count): &(&[f32], f64)| count * f64::from(x.iter().zip(query).map(|(x, q)| x * q).sum::<f32>()).exp();
            let all: f64 = keys_and_values.iter().map(weight).sum();
            (4..8).map(|at| keys_and_values.iter().map(|pair| weight(pair) / all * f64::from(pair.0[at])).sum()).collect::<Vec<f64>>()
        };
        for mean in [false, true] {
            let sketch = filled(24, mean, 2, &some);
            let columns = sketch.columns();
            assert!(columns.counts.len() <= 48);
            let counted: Vec<_> = columns.vectors.chunks(8).zip(columns.counts.iter().map(|&count| f64::from(count))).collect();
            let estimates: Vec<_> = (0..100).map(|position| estimate(&sketch, position)).collect();
            let single: Vec<_> = estimates.iter().map(|x| (&x[..], 1.0)).collect();
            for (a, b) in attend(&counted).into_iter().zip(attend(&single)) {
                assert!((a - b).abs() < 1e-6 * b.abs().max(1.0), "{a} {b}");
            }
        }
    }

    #[test]
    fn every_vector_is_in_one_column() {
        let some = vectors(100, 3);
        for (buckets, mean) in [(0, true), (1, false), (7, true), (64, false)] {
            let columns = filled(buckets, mean, 1, &some).columns();
            assert_eq!(columns.counts.iter().sum::<u32>(), 100);
            assert_eq!(columns.vectors.len(), 3 * columns.counts.len());
        }
        assert_eq!(Sketch::new(3, 4, true, Sketch::places(4, 9, 1)).columns(), SketchColumns::default());
        assert_eq!(Sketch::new(3, 0, true, [].into()).columns(), SketchColumns::default());
    }
}
