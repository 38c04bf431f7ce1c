//! How numbers are stored: plain floats. One block is the smallest run that can be decoded alone.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// The encodings that lowkey reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    F32,
    F16,
    BF16,
}

impl Encoding {
    /// For error messages.
    pub const NAMES: &str = "F32, F16, BF16";

    /// Numbers and bytes of one block.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Encoding::F32 => (1, 4),
            Encoding::F16 | Encoding::BF16 => (1, 2),
        }
    }

    /// Whether decoding yields numbers that are *defined* by their rounding to f16.
    pub const fn is_quantised(self) -> bool {
        self.block().0 > 1
    }

    /// Numbers in so many bytes.
    pub const fn numbers(self, bytes: usize) -> usize {
        bytes / self.block().1 * self.block().0
    }

    /// Bytes of so many numbers.
    pub const fn bytes(self, numbers: usize) -> usize {
        numbers / self.block().0 * self.block().1
    }

    /// Decodes whole blocks; `out` has [`numbers`](Self::numbers)`(bytes.len())` places.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Encoding::F32 => {
                for (x, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *x = f32::from_le_bytes(*b);
                }
            }
            Encoding::F16 => {
                let halves: Vec<f16> = bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b)).collect();
                halves.convert_to_f32_slice(out);
            }
            Encoding::BF16 => {
                for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *x = bf16::from_le_bytes(*b).to_f32();
                }
            }
        }
    }
}
