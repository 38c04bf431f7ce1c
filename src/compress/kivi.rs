//! KIVI (arXiv 2402.02750, ICML 2024; released as jy-yuan/KIVI): keys rounded by channel, values by
//! token, without any calibration.
//!
//! Some channels of keys are large in every token, and those of values are not. So keys, as they
//! are cached, after RoPE, are rounded in steps of their channel, between its least and its largest
//! number of 32 consecutive tokens; values in steps of their token, for every 32 channels. All
//! steps and least values are f16: `b` bits take `b + 1`.
//!
//! A key waits exactly until all 32 tokens of its group are due. The release waits for 128 at a
//! time, codes four groups of them, and keeps the newest 128 values exact besides; here as many
//! newest tokens are exact as a session says, for both alike. First tokens are exact as with every
//! method of ours, which the paper's are not.

use super::coder::by_head;
use crate::checkpoint::Config;
use crate::kv::{Band, Blocks, Exact, Format, LatentKind, LatentSet, LatentSpec, RUN, Scale, Steps};
use nalgebra::DMatrix;

/// Tokens of a channel of keys, and channels of a token's values, that share a step.
const GROUP: usize = 32;

/// The rows of any model of this shape, by head.
pub fn rows(config: &Config, bits: u8, exact: Exact) -> LatentSet {
    let (d, runs) = (config.head_dim, config.head_dim.div_ceil(RUN));
    let format = |scale| Format { bands: vec![Band { bits, runs }], scale };
    let keys = format(Scale::Blocks(Blocks { tokens: GROUP, heads: 1, steps: Steps::Channels }));
    let values = format(Scale::Groups { runs: GROUP / RUN, clip: 100 });
    let channels = DMatrix::identity(d, runs * RUN);
    let mut set = LatentSet { specs: Vec::new(), coders: Vec::new(), exact };
    for first_layer in 0..config.num_hidden_layers {
        for (kind, format) in [(LatentKind::PostRopeKeys, &keys), (LatentKind::Values, &values)] {
            for first_head in 0..config.num_key_value_heads {
                set.specs.push(LatentSpec { first_layer, layers: 1, kind, first_head, kv_heads: 1, format: format.clone() });
                set.coders.push(by_head(&channels, 1, format.clone()));
            }
        }
    }
    set
}
