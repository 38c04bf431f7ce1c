//! What the device could do at best, measured in the same run as everything that is compared with
//! it. Here the processor; GPUs in [`crate::gpu::roofline`].

use crate::gpu::Roofline;
use nalgebra::DMatrix;
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

/// Measures this machine's processor, all cores at once, in about a second.
///
/// The copy on 64 MiB blocks, far beyond the caches, and multiplications and additions as products
/// of matrices that stay inside them. The best of several passes counts: everything else is
/// disturbance.
pub fn processor_roofline() -> Roofline {
    Roofline { copy_gbps: copy_gbps(), f32_gflops: f32_gflops(), f16_gflops: None }
}

impl Roofline {
    /// The least time, in seconds, that a step with this traffic and these operations can take.
    pub fn least_seconds(&self, bytes: u64, flops: u64) -> f64 {
        (bytes as f64 / (self.copy_gbps * 1e9)).max(flops as f64 / (self.f32_gflops * 1e9))
    }
}

fn best_rate(passes: usize, work: f64, mut pass: impl FnMut()) -> f64 {
    pass();
    (0..passes)
        .map(|_| {
            let start = Instant::now();
            pass();
            work / start.elapsed().as_secs_f64().max(1e-9) / 1e9
        })
        .fold(0.0, f64::max)
}

fn copy_gbps() -> f64 {
    const NUMBERS: usize = 16 << 20;
    const PIECE: usize = 256 << 10;
    let source = vec![1f32; NUMBERS];
    let mut target = vec![0f32; NUMBERS];
    best_rate(8, (NUMBERS * 2 * size_of::<f32>()) as f64, || {
        target.par_chunks_mut(PIECE).zip(source.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
        black_box(&mut target);
    })
}

fn f32_gflops() -> f64 {
    const SIZE: usize = 192;
    const PRODUCTS: usize = 16;
    let threads = rayon::current_num_threads();
    let factor = DMatrix::from_fn(SIZE, SIZE, |i, j| ((i * 31 + j * 17) % 13) as f32 / 13.0);
    let mut products = vec![DMatrix::<f32>::zeros(SIZE, SIZE); threads];
    best_rate(8, (2 * SIZE * SIZE * SIZE * PRODUCTS * threads) as f64, || {
        products.par_iter_mut().for_each(|product| (0..PRODUCTS).for_each(|_| product.gemm(1.0, &factor, &factor, 0.5)));
        black_box(&mut products);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_has_finite_ceilings() {
        let roofline = processor_roofline();
        // Any machine that can run the tests is within these.
        assert!((0.1..100_000.0).contains(&roofline.copy_gbps), "{roofline:?}");
        assert!((0.1..1_000_000.0).contains(&roofline.f32_gflops), "{roofline:?}");
    }

    #[test]
    fn the_tighter_ceiling_decides() {
        let roofline = Roofline { copy_gbps: 10.0, f32_gflops: 100.0, f16_gflops: None };
        assert_eq!(roofline.least_seconds(10_000_000_000, 1), 1.0);
        assert_eq!(roofline.least_seconds(1, 200_000_000_000), 2.0);
    }
}
