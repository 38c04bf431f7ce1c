//! How numbers are packed in a file: by their place in a row, and deflated.
//!
//! A place in a row is a channel: its bytes over all tokens are alike, those of other places are
//! not. So each place's bytes stand together, and every block of the entropy coder has statistics
//! of its own.

use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use std::io::{Read, Write};

/// The numbers' bytes by their place in a row, deflated; `None` where that gains next to nothing.
pub(super) fn pack(bytes: &[u8], rows: usize) -> Option<Vec<u8>> {
    let row = bytes.len() / rows.max(1);
    let mut shuffled = vec![0; bytes.len()];
    for (place, column) in shuffled.chunks_exact_mut(rows.max(1)).enumerate() {
        column.iter_mut().zip(bytes[place..].iter().step_by(row.max(1))).for_each(|(to, from)| *to = *from);
    }
    let mut encoder = DeflateEncoder::new(Vec::with_capacity(bytes.len()), Compression::fast());
    encoder.write_all(&shuffled).ok()?;
    let packed = encoder.finish().ok()?;
    (packed.len() < bytes.len() / 50 * 49).then_some(packed)
}

/// What [`pack`] made `bytes` of, in rows of `row` bytes.
pub(super) fn unpack(packed: &[u8], bytes: usize, row: usize) -> Option<Vec<u8>> {
    let mut shuffled = Vec::new();
    DeflateDecoder::new(packed).take(bytes as u64 + 1).read_to_end(&mut shuffled).ok()?;
    if shuffled.len() != bytes || row == 0 {
        return None;
    }
    let (mut found, rows) = (vec![0; bytes], bytes / row);
    for (place, column) in shuffled.chunks_exact(rows).enumerate() {
        found[place..].iter_mut().step_by(row).zip(column).for_each(|(to, from)| *to = *from);
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_unpacks() {
        for (rows, row) in [(1, 1), (1, 1000), (1000, 1), (321, 7), (64, 200)] {
            let bytes: Vec<u8> = (0..rows * row).map(|at| (at % row % 5 + at / row % 3) as u8).collect();
            let Some(packed) = pack(&bytes, rows) else {
                assert_eq!((rows, row), (1, 1));
                continue;
            };
            assert_eq!(unpack(&packed, bytes.len(), row).as_ref(), Some(&bytes));
            assert!([bytes.len() - 1, bytes.len() + 1].into_iter().all(|other| unpack(&packed, other, row).is_none()));
            assert_eq!(unpack(&packed[..packed.len() / 2], bytes.len(), row), None);
        }
        // Nothing is gained on noise, or on nothing.
        let noise: Vec<u8> = (0..4000u32).map(|i| (i.wrapping_mul(0x9e37_79b9).rotate_left(i % 32) >> 13) as u8).collect();
        assert!(pack(&noise, 100).is_none() && pack(&[], 0).is_none());
    }
}
