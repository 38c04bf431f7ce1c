//! How numbers are packed in a file: by their place in a row, and entropy-coded.
//!
//! A place in a row is a channel: its bytes over all tokens are alike, and those of other places
//! are not. So each place's bytes stand together, first the lowest byte of every number, then the
//! next of every number. They are a deflate stream of Huffman codes alone, since nothing repeats
//! itself there, with a block and a table for every few thousand bytes: sign, exponent and upper
//! bits of a channel have a distribution, lower bits have none and are copied.

use miniz_oxide::deflate::core::{CompressionStrategy, CompressorOxide, TDEFLFlush, TDEFLStatus, compress, create_comp_flags_from_zip_params};
use miniz_oxide::inflate::decompress_to_vec_with_limit;

/// The least bytes that have a table of their own.
const BLOCK: usize = 2048;

/// A raw stream, without zlib's header.
const RAW: i32 = -15;

/// The bytes of a row of `row` bytes, whose numbers have `each`, in the order in which they are
/// packed.
fn places(row: usize, each: usize) -> impl Iterator<Item = usize> {
    (0..each).flat_map(move |byte| (byte..row).step_by(each))
}

/// Packs numbers of `each` bytes in `rows` rows; `None` where that gains next to nothing.
pub(super) fn pack(bytes: &[u8], rows: usize, each: usize) -> Option<Vec<u8>> {
    let row = bytes.len().checked_div(rows)?;
    let mut by_place = Vec::with_capacity(bytes.len());
    places(row, each).for_each(|place| by_place.extend(bytes[place..].iter().step_by(row)));
    // Whole places, unless one alone is much.
    let block = rows * BLOCK.div_ceil(rows);
    let mut coder = CompressorOxide::new(create_comp_flags_from_zip_params(1, RAW, CompressionStrategy::HuffmanOnly as i32));
    let (mut packed, mut at) = (vec![0; bytes.len() + 1024], 0);
    let mut blocks = by_place.chunks(block).peekable();
    while let Some(mut rest) = blocks.next() {
        let flush = if blocks.peek().is_some() { TDEFLFlush::Sync } else { TDEFLFlush::Finish };
        loop {
            let (status, read, written) = compress(&mut coder, rest, &mut packed[at..], flush);
            (rest, at) = (&rest[read..], at + written);
            match status {
                TDEFLStatus::Done => break,
                // Where there is no room left nothing is gained.
                TDEFLStatus::Okay if at < packed.len() && rest.is_empty() => break,
                TDEFLStatus::Okay if at < packed.len() => {}
                _ => return None,
            }
        }
    }
    packed.truncate(at);
    (at < bytes.len() / 50 * 49).then_some(packed)
}

/// What [`pack`] made of `bytes` bytes, in rows of `row` bytes.
pub(super) fn unpack(packed: &[u8], bytes: usize, row: usize, each: usize) -> Option<Vec<u8>> {
    let by_place = decompress_to_vec_with_limit(packed, bytes).ok().filter(|found| found.len() == bytes)?;
    let (mut found, rows) = (vec![0; bytes], bytes.checked_div(row).filter(|rows| *rows > 0)?);
    for (place, column) in places(row, each).zip(by_place.chunks_exact(rows)) {
        found[place..].iter_mut().step_by(row).zip(column).for_each(|(to, from)| *to = *from);
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_unpacks() {
        for (rows, row, each) in [(1, 4000, 4), (4000, 2, 2), (321, 8, 4), (64, 200, 8), (5000, 12, 4)] {
            let bytes: Vec<u8> = (0..rows * row).map(|at| (at % row % 5 + at / row % 3) as u8).collect();
            let packed = pack(&bytes, rows, each).unwrap();
            assert_eq!(unpack(&packed, bytes.len(), row, each).as_ref(), Some(&bytes), "{rows} {row} {each}");
            assert!([bytes.len() - each, bytes.len() + each].into_iter().all(|other| unpack(&packed, other, row, each).is_none()));
            assert_eq!(unpack(&packed[..packed.len() / 2], bytes.len(), row, each), None);
        }
        // Nothing is gained on noise, or on nothing.
        let noise: Vec<u8> = (0..4000u32).map(|i| (i.wrapping_mul(0x9e37_79b9).rotate_left(i % 32) >> 13) as u8).collect();
        assert!(pack(&noise, 100, 4).is_none() && pack(&[], 0, 4).is_none() && pack(&[1; 4], 1, 4).is_none());
    }
}
