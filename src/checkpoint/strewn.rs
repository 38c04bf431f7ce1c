//! Matrices whose numbers stand apart in their tensor: gpt-oss' files have rows of gate and up in
//! turns, floats by input first, and MXFP4's codes and scales in two tensors. They are gathered
//! when they are asked for, row by row, as all others are stored.

use crate::Result;
use std::ops::Range;

/// Numbers that share a scale, and the bytes of their codes.
const BLOCK: (usize, usize) = (32, 16);

/// How numbers stand in the range of a matrix.
#[derive(Debug, Clone)]
pub(super) enum Strewn {
    /// Numbers of two or four bytes, `rows·row + columns·column` of them after the first.
    Steps { bytes: usize, rows: usize, columns: usize },
    /// Codes of MXFP4, neighbours in a byte, whose rows are so many rows apart; their scales stand
    /// likewise from a byte of a file on.
    Mxfp4 { apart: usize, scales: (usize, usize) },
}

impl Strewn {
    /// Bytes from the first number of a matrix to the end of its last.
    pub fn span(&self, [rows, cols]: [usize; 2]) -> usize {
        match self {
            Strewn::Steps { bytes, rows: row, columns } => bytes * ((rows - 1) * row + (cols - 1) * columns + 1),
            Strewn::Mxfp4 { apart, .. } => ((rows - 1) * apart + 1) * cols / 2,
        }
    }

    /// The bytes of `[rows][cols]` numbers in a range of a file, as they are stored elsewhere;
    /// MXFP4 as ggml has it. `read` gets bytes of a file.
    pub fn gather(
        &self,
        [rows, cols]: [usize; 2],
        (file, range): (usize, Range<usize>),
        read: &dyn Fn(usize, Range<usize>) -> Result<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        let from = read(file, range)?;
        match self {
            Strewn::Steps { bytes, rows: row, columns } => {
                let places = (0..rows).flat_map(|r| (0..cols).map(move |c| bytes * (r * row + c * columns)));
                Ok(places.flat_map(|at| &from[at..at + bytes]).copied().collect())
            }
            Strewn::Mxfp4 { apart, scales: (file, start) } => {
                let (blocks, (_, codes)) = (cols / BLOCK.0, BLOCK);
                let scales = read(*file, *start..start + ((rows - 1) * apart + 1) * blocks)?;
                let places = (0..rows).flat_map(|row| (0..blocks).map(move |block| row * apart * blocks + block));
                Ok(places.flat_map(|at| ggml_block(scales[at], &from[at * codes..][..codes])).collect())
            }
        }
    }
}

/// A scale and codes: neighbours there are half a block apart here.
fn ggml_block(scale: u8, codes: &[u8]) -> impl Iterator<Item = u8> {
    let code = |i: usize| codes[i / 2] >> (4 * (i % 2)) & 15;
    std::iter::once(scale).chain((0..BLOCK.1).map(move |i| code(i) | code(i + BLOCK.1) << 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_other_row_is_gathered_from_columns() {
        // Of [3 inputs][2 pairs] the second of each.
        let strewn = Strewn::Steps { bytes: 2, rows: 2, columns: 4 };
        let file: Vec<u8> = (0..12u16).flat_map(u16::to_le_bytes).collect();
        let range = 2..2 + strewn.span([2, 3]);
        assert_eq!(range.end, file.len());
        let bytes = strewn.gather([2, 3], (0, range), &|_, range| Ok(file[range].to_vec())).unwrap();
        let numbers: Vec<u16> = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes(pair.try_into().unwrap())).collect();
        assert_eq!(numbers, [1, 5, 9, 3, 7, 11]);
    }

    #[test]
    fn codes_and_scales_come_together() {
        let strewn = Strewn::Mxfp4 { apart: 2, scales: (1, 5) };
        // Three rows of a block, of which the first and the last are meant.
        let codes: Vec<u8> = (0..48).collect();
        let scales = [0, 0, 0, 0, 0, 7, 8, 9];
        let read = |file: usize, range: Range<usize>| Ok(if file == 0 { codes[range].to_vec() } else { scales[range].to_vec() });
        let bytes = strewn.gather([2, 32], (0, 0..strewn.span([2, 32])), &read).unwrap();
        assert_eq!((bytes.len(), bytes[0], bytes[17]), (34, 7, 9));
        // Numbers 0 and 16, then 1 and 17, of bytes 0 and 8.
        assert_eq!((bytes[1], bytes[2]), (codes[0] & 15 | (codes[8] & 15) << 4, codes[0] >> 4 | codes[8] >> 4 << 4));
        assert_eq!(bytes[17 + 1], codes[32] & 15 | (codes[40] & 15) << 4);
    }
}
