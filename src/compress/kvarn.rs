//! KVarN (arXiv 2606.03458; released as huawei-csl/KVarN): rotated blocks of 128 tokens, whose
//! tokens and channels are brought to equal variance before they are rounded. No calibration.
//!
//! A Hadamard rotation over the width of a head evens out channels; some sixteen rounds of dividing
//! tokens and channels by their standard deviations ([`balance`](crate::kv::balance())) do the
//! rest. Then keys are rounded in steps of their channel, values in steps of their token, between
//! the least and the largest number of the block; the factors of the lines that have steps go into
//! these, the others are kept beside. At 4 and 2 bits, `k4v2`, a head of 128 takes 4.38 and 2.38
//! bits a number.
//!
//! The first tokens and the newest are exact, as in the paper; of those that are due, up to 127
//! wait until their block is whole.

use super::coder::by_head;
use crate::checkpoint::Config;
use crate::kv::{Band, Blocks, Exact, Format, LatentKind, LatentSet, LatentSpec, RUN, Scale, Steps};
use crate::linalg::rotation;

/// Tokens of a block.
const BLOCK: usize = 128;
/// Every program makes the same rotations.
const ROTATION_SEED: u64 = 1;

/// The rows of any model of this shape, with so many bits for keys and for values.
pub fn rows(config: &Config, [key_bits, value_bits]: [u8; 2], exact: Exact) -> LatentSet {
    let (d, width) = (config.head_dim, config.head_dim.next_multiple_of(RUN));
    let basis = rotation(width, ROTATION_SEED).rows(0, d).into_owned();
    let mut set = LatentSet { specs: Vec::new(), coders: Vec::new(), exact };
    for first_layer in 0..config.num_hidden_layers {
        for (kind, steps, bits) in
            [(LatentKind::PostRopeKeys, Steps::BalancedChannels, key_bits), (LatentKind::Values, Steps::BalancedTokens, value_bits)]
        {
            let format = smallest(config.num_key_value_heads, width, steps, bits);
            let kv_heads = format.rank() / width;
            for first_head in (0..config.num_key_value_heads).step_by(kv_heads) {
                set.specs.push(LatentSpec { first_layer, layers: 1, kind, first_head, kv_heads, format: format.clone() });
                set.coders.push(by_head(&basis, kv_heads, format.clone()));
            }
        }
    }
    set
}

/// A header is whole words: of rows of so many heads each, alike for all, those that take the
/// fewest; among equal ones the narrowest.
fn smallest(heads: usize, width: usize, steps: Steps, bits: u8) -> Format {
    let format =
        |heads: usize| Format { bands: vec![Band { bits, runs: heads * width / RUN }], scale: Scale::Blocks(Blocks { tokens: BLOCK, heads, steps }) };
    // More than eight do not gain a word.
    let together =
        (1..=heads.min(8)).filter(|together| heads.is_multiple_of(*together)).min_by_key(|together| format(*together).words() * heads / together);
    format(together.unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words of all heads of a layer's side, against bits that the paper's tile takes: codes, two
    /// f16 for a line and one across.
    #[test]
    fn rows_are_as_wide_as_saves_bytes() {
        for (heads, width, steps, bits, together, words) in [
            (3, 64, Steps::BalancedChannels, 4, 1, 3 * (8 + 1)),
            (3, 64, Steps::BalancedTokens, 2, 3, 3 * 4 + 4),
            (8, 128, Steps::BalancedChannels, 4, 2, 8 * 16 + 12),
            (8, 128, Steps::BalancedTokens, 2, 2, 8 * 8 + 12),
            (4, 64, Steps::BalancedTokens, 4, 4, 4 * 8 + 5),
        ] {
            let format = smallest(heads, width, steps, bits);
            assert_eq!(format.rank() / width, together, "{heads}, {width}, {steps:?}");
            assert_eq!(format.words() * heads / together, words);
            format.check().unwrap();
        }
    }
}
