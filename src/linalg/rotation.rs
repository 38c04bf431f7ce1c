//! Rotations that even out the entries of a vector, so that one scale fits them all when they are
//! rounded.
//!
//! A Hadamard matrix (entries ±1, orthogonal columns) spreads each entry equally over all.
//! Sylvester's construction doubles one (`[[H, H], [H, −H]]`); Paley's (*On orthogonal
//! matrices*, 1933) makes one of order `q + 1` for a prime `q ≡ 3 (mod 4)` and of order `2(q + 1)`
//! for a prime `q ≡ 1 (mod 4)` from the squares modulo `q`. Together they reach all multiples of 16
//! up to 672, and most beyond. Random signs in front make it a rotation that no pattern in the data
//! is aligned with.

use crate::linalg::Random;
use nalgebra::DMatrix;

/// An orthogonal matrix `O: [n, n]` to rotate row vectors by, `y·O`.
///
/// A Hadamard matrix over `√n` with random signs of its rows where one of this order is known,
/// otherwise a random rotation or reflection, uniform among all. The same for equal `seed`.
pub fn rotation(n: usize, seed: u64) -> DMatrix<f64> {
    let mut random = Random::new(seed);
    match hadamard(n) {
        Some(mut matrix) => {
            let length = 1.0 / (n as f64).sqrt();
            matrix.row_iter_mut().for_each(|mut row| row *= if random.bits() >> 63 == 0 { length } else { -length });
            matrix
        }
        None => {
            let qr = DMatrix::from_fn(n, n, |_, _| random.gaussian()).qr();
            let (mut q, r) = (qr.q(), qr.r());
            // Householder's signs are not random; with the diagonal of R positive, Q is uniform
            // (Mezzadri, math-ph/0609050).
            q.column_iter_mut().zip(r.diagonal().iter()).for_each(|(mut column, &r)| column *= r.signum());
            q
        }
    }
}

/// A Hadamard matrix of order `n`, entries ±1; `None` where none is made here.
fn hadamard(n: usize) -> Option<DMatrix<f64>> {
    if n <= 1 {
        return Some(DMatrix::identity(n, n));
    }
    if !n.is_multiple_of(2) {
        return None;
    }
    let half = hadamard(n / 2).map(|h| DMatrix::from_row_slice(2, 2, &[1.0, 1.0, 1.0, -1.0]).kronecker(&h));
    half.or_else(|| skew(n)).or_else(|| symmetric(n))
}

/// Paley's first construction: `I + S`, where `S` is −1 below and 1 beside a corner of zero, and
/// holds the symbols of differences.
fn skew(n: usize) -> Option<DMatrix<f64>> {
    let q = n - 1;
    let symbols = symbols(q).filter(|_| q % 4 == 3)?;
    Some(DMatrix::from_fn(n, n, |i, j| match (i, j) {
        _ if i == j => 1.0,
        (0, _) => 1.0,
        (_, 0) => -1.0,
        _ => symbols[(q + i - j) % q],
    }))
}

/// Paley's second: `[[C + I, C − I], [C − I, −C − I]]`, where `C` is 1 below and beside a corner of
/// zero, and holds the symbols of differences.
fn symmetric(n: usize) -> Option<DMatrix<f64>> {
    let order = n / 2;
    let q = order.checked_sub(1)?;
    let symbols = symbols(q).filter(|_| q % 4 == 1)?;
    Some(DMatrix::from_fn(n, n, |i, j| {
        let (bottom, right) = (i >= order, j >= order);
        let (i, j) = (i % order, j % order);
        let c = match (i, j) {
            (0, 0) => 0.0,
            (0, _) | (_, 0) => 1.0,
            _ => symbols[(q + i - j) % q],
        };
        let unit = if i == j { 1.0 } else { 0.0 };
        match (bottom, right) {
            (false, false) => c + unit,
            (true, true) => -c - unit,
            _ => c - unit,
        }
    }))
}

/// For an odd prime `q`: 1 for the squares modulo `q`, −1 for what is none, 0 for 0.
fn symbols(q: usize) -> Option<Vec<f64>> {
    let prime = q > 2 && (2..q).take_while(|p| p * p <= q).all(|p| !q.is_multiple_of(p));
    prime.then(|| {
        let mut symbols = vec![-1.0; q];
        (1..q).for_each(|x| symbols[x * x % q] = 1.0);
        symbols[0] = 0.0;
        symbols
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotations_keep_lengths_and_even_out_where_they_can() {
        for n in (0..65).chain([80, 92, 112, 144, 176, 257, 576]) {
            let rotation = rotation(n, 7);
            assert!((&rotation * rotation.transpose() - DMatrix::identity(n, n)).norm() < 1e-12 * (1.0 + n as f64), "{n}");
            if n % 8 == 0 {
                assert!(rotation.iter().all(|x| (x.abs() - 1.0 / (n as f64).sqrt()).abs() < 1e-15), "{n}");
            }
        }
    }

    #[test]
    fn every_multiple_of_sixteen_up_to_672_has_a_hadamard_matrix() {
        for n in (16..=672).step_by(16) {
            assert!(hadamard(n).is_some(), "{n}");
        }
        // Orders that have one, but not by these constructions; and orders that have none.
        assert!([92, 688, 3, 6, 10, 18].into_iter().all(|n| hadamard(n).is_none()));
        let walsh = hadamard(8).unwrap();
        let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
        assert_eq!(walsh, DMatrix::from_fn(8, 8, sign));
    }

    #[test]
    fn a_seed_decides_and_another_differs() {
        for n in [32, 33] {
            assert_eq!(rotation(n, 5), rotation(n, 5));
            assert_ne!(rotation(n, 5), rotation(n, 6));
        }
    }

    /// An outlier is shared out: the largest entry of a rotated unit vector is `1/√n`.
    #[test]
    fn one_large_entry_becomes_many_small_ones() {
        let mut y = nalgebra::RowDVector::zeros(96);
        y[17] = 3.0;
        let z = y * rotation(96, 1);
        assert!(z.iter().all(|z| (z.abs() - 3.0 / 96f64.sqrt()).abs() < 1e-14));
    }
}
