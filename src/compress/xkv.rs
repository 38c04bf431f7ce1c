//! xKV (Chang et al., *xKV: Cross-Layer SVD for KV-Cache Compression*, arXiv 2503.18893): for each prompt, bases of its own that consecutive layers share.
//!
//! Neighbouring layers' keys (or values) differ token by token, but the subspaces over tokens that they span are nearly the same. So for each group of `G` layers, and for keys before RoPE and
//! values apart, with `X = [X_1 | … | X_G]`, `[T, G·n]`,
//!
//! `X ≈ Z·B`, `Z = X·V_r`, `B = V_rᵀ`,
//!
//! `V_r` being the leading eigenvectors of `XᵀX`: the truncated SVD of `X`, without an SVD of `T` rows. A token leaves one row of `r_k` and one of `r_v` coordinates for all `G` layers. With
//! `L` layers that is `⌈L/G⌉·(r_k + r_v)` numbers for a token, and `L·n·(r_k + r_v)` for the bases, whatever the length: below some length they cost more than they save ([`Xkv::pays_from`]).
//!
//! Otherwise than there: the budget is for rows and bases together, so that a short prompt has fewer coordinates of more bits than a long one; the mean over tokens is taken out first (one
//! vector more, and what it explains needs no rank); 4-bit rows are rotated and quantised by row; instead of fixed ranks the bits can follow the spectrum, water-filled within a group's
//! share; and tokens that come later join by projection, `z = (x − μ)·Bᵀ`, when they leave the exact window
//! (published, they stay exact for ever).

use super::bands::water_fill;
use super::basis::{Basis, about};
use super::coder::coder;
use super::plan::Budget;
use crate::calibrate::Moments;
use crate::checkpoint::Config;
use crate::rows::{Band, Coder, Format, Holds, RUN, RowSpec, Scale, distortion};
use crate::{Error, Result};
use nalgebra::{DMatrix, DVector};
use std::ops::Range;

/// How a prompt is compressed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Xkv {
    /// Consecutive layers that share a basis; the last group may have fewer.
    pub layers: usize,
    /// What a token of the prompt may take, over the whole model, its part of the bases included.
    pub budget: Budget,
    /// Bits of a coordinate, 16, 8 or 4, at ranks in the published proportion; `None` to let the spectrum say which coordinates get how many.
    pub bits: Option<u8>,
}

/// Ranks of keys and values stand to each other as one to this: 384 and 576 in the paper.
const VALUES_TO_KEYS: f64 = 1.5;

impl Xkv {
    /// Whether this can be done to a model of this shape.
    ///
    /// # Errors
    /// [`Error::Argument`] with what can be.
    pub fn check(&self, config: &Config) -> Result<()> {
        let refuse = |name: &str, message: String| Err(Error::Argument { name: name.into(), message });
        if self.layers == 0 {
            return refuse("group-layers", "groups of no layers; choose at least 1".into());
        }
        if self.bits.is_some_and(|bits| ![4, 8, 16].contains(&bits)) {
            return refuse("bits", format!("rows of {} bits; choose 4, 8 or 16, or leave it to the spectrum", self.bits.unwrap_or(0)));
        }
        if config.num_key_value_heads * config.head_dim < RUN {
            return refuse("method", "keys and values are too narrow for xkv".into());
        }
        for group in self.groups(config) {
            let bytes = self.share(config, &group)?;
            if bytes <= least(self.bits) {
                return refuse("kv-bytes", format!("{bytes} bytes for layers {} to {} hold no row; allow more", group.start, group.end - 1));
            }
        }
        Ok(())
    }

    /// Whether a prompt of `tokens` tokens can be read so, into a sequence of `capacity`.
    ///
    /// # Errors
    /// As [`check`](Self::check), [`Error::Argument`] for an empty prompt and [`Error::Context`] for one that does not fit.
    pub fn check_prompt(&self, config: &Config, tokens: usize, capacity: usize) -> Result<()> {
        self.check(config)?;
        match tokens {
            0 => Err(Error::Argument { name: "prompt".into(), message: "it has no tokens".into() }),
            _ if tokens > capacity => Err(Error::Context { needed: tokens, capacity }),
            _ => Ok(()),
        }
    }

    /// In words.
    pub fn options(&self) -> String {
        let bits = self.bits.map_or("bits by spectrum".into(), |bits| format!("{bits} bits"));
        format!("groups of {}, {bits}", self.layers)
    }

    /// The layers of each group.
    pub fn groups(&self, config: &Config) -> Vec<Range<usize>> {
        let layers = config.num_hidden_layers;
        (0..layers).step_by(self.layers).map(|first| first..(first + self.layers).min(layers)).collect()
    }

    /// The prompt length from which it is worth it, as far as that can be known beforehand: the bases that go with the budget's rows take less than exact keys and values would beside
    /// these, and every row has room for some coordinates. With bits by the spectrum, for coordinates of three bits.
    ///
    /// # Errors
    /// [`Error::Argument`] where the budget is none.
    pub fn pays_from(&self, config: &Config) -> Result<usize> {
        let dense = config.dense_kv_bytes_per_token();
        let rows = self.budget.bytes(dense)?;
        let (mut bases, mut room) = (0, 0);
        for group in self.groups(config) {
            let (bytes, width) = (self.share(config, &group)?, width(config, &group));
            let rank = match self.fixed(config, &group, bytes, usize::MAX) {
                Some(formats) => formats.iter().map(Format::rank).sum(),
                None => (8 * bytes as usize / 3).min(2 * width),
            };
            bases += basis_bytes(width, rank);
            room = room.max((basis_bytes(width, 2 * RUN) as u64).div_ceil(bytes.saturating_sub(least(self.bits)).max(1)));
        }
        Ok((bases as u64).div_ceil(dense.saturating_sub(rows).max(1)).max(room) as usize)
    }

    /// A group's part of the budget, bytes.
    fn share(&self, config: &Config, group: &Range<usize>) -> Result<u64> {
        Ok(self.budget.bytes(config.dense_kv_bytes_per_token())? * group.len() as u64 / config.num_hidden_layers as u64)
    }

    /// Formats of keys and values at fixed bits, as many coordinates as `bytes` have room for with their part of the bases of a prompt of `tokens`; `None` where bits are not fixed.
    fn fixed(&self, config: &Config, group: &Range<usize>, bytes: u64, tokens: usize) -> Option<[Format; 2]> {
        let bits = self.bits?;
        let (width, tokens) = (width(config, group), tokens as f64);
        let scale = if bits < 16 { Scale::Affine } else { Scale::Fixed };
        let headers = if bits < 16 { 8.0 } else { 0.0 };
        let run = 2.0 * f64::from(bits) + basis_bytes(width, RUN) as f64 / tokens - basis_bytes(width, 0) as f64 / tokens;
        let most = width / RUN;
        let all = (((bytes as f64 - headers - basis_bytes(width, 0) as f64 / tokens) / run) as usize).clamp(2, 2 * most);
        let keys = ((all as f64 / (1.0 + VALUES_TO_KEYS)).round() as usize).clamp(all.saturating_sub(most).max(1), most.min(all - 1));
        Some([keys, all - keys].map(|runs| Format { bands: vec![Band { bits, runs }], scale }))
    }

    /// Formats whose bits follow the spectrum: for every number of coordinates the rest of `bytes`, when their part of the bases of a prompt of `tokens` is taken off, is water-filled over the most
    /// important ones, and the number that loses least is taken.
    fn by_spectrum(bases: [&Basis; 2], bytes: u64, tokens: usize) -> [Format; 2] {
        let width = bases[0].loss.len();
        let part = |rank: usize| basis_bytes(width, rank) as f64 / tokens as f64;
        let mut runs: Vec<f64> = bases.iter().flat_map(|basis| basis.loss.as_slice().chunks_exact(RUN).map(|run| run.iter().sum::<f64>())).collect();
        runs.sort_by(|a, b| b.total_cmp(a));
        let formats = |count: usize| -> Option<(f64, [Format; 2])> {
            let left = bytes as f64 - part(RUN * count);
            let floor = runs[count - 1];
            // All that is asked of a basis here is what its coordinates are worth.
            let cut = |basis: &Basis| {
                let kept = basis.loss.as_slice().chunks_exact(RUN).filter(|run| run.iter().sum::<f64>() >= floor).count().max(1);
                let mut loss = basis.loss.clone();
                loss.rows_range_mut(kept * RUN..).fill(0.0);
                Basis { mean: DVector::zeros(0), down: DMatrix::zeros(0, 0), up: DMatrix::zeros(0, 0), variance: DVector::zeros(0), loss }
            };
            let cut = bases.map(cut);
            let mut formats = water_fill(&[&cut[0], &cut[1]], &[Scale::Band; 2], left.max(0.0) as u64).formats.into_iter();
            let formats = [formats.next()?, formats.next()?];
            let taken: usize = formats.iter().map(|format| 4 * format.words()).sum();
            let loss = bases.iter().zip(&formats).map(|(basis, format)| {
                let bits = format.bands.iter().flat_map(|band| std::iter::repeat_n(band.bits, RUN * band.runs)).chain(std::iter::repeat(0));
                basis.loss.iter().zip(bits).map(|(loss, bits)| loss * distortion(bits)).sum::<f64>()
            });
            let loss = loss.sum();
            // The least rows there are may take more than there is.
            (count <= 2 || taken as f64 <= left).then_some((loss, formats))
        };
        let best = (2..=runs.len()).filter_map(formats).min_by(|a, b| a.0.total_cmp(&b.0));
        best.map_or([Format::half(1), Format::half(1)], |(_, formats)| formats)
    }

    /// Keys' row and values' row of a group of layers, from the `moments` of either over a prompt of `tokens`.
    ///
    /// # Errors
    /// [`Error::Numeric`] where a prompt's keys or values are not finite.
    pub fn rows(&self, config: &Config, group: &Range<usize>, moments: [&Moments; 2], tokens: usize) -> Result<[(RowSpec, Coder); 2]> {
        let basis = |(what, moments): (&str, &Moments)| {
            let what = format!("the prompt's {what} in layers {} to {}", group.start, group.end - 1);
            let mean = moments.mean.map(f64::from);
            let mut basis = Basis::components(&what, mean.clone(), about(moments, &mean), None)?;
            // Keys and values are weighed by what they lose of their own.
            let all = basis.tail(0).max(f64::MIN_POSITIVE);
            basis.loss.unscale_mut(all);
            // What has no whole run of its own.
            let whole = basis.loss.len() / RUN * RUN;
            basis.loss.rows_range_mut(whole..).fill(0.0);
            Ok(basis)
        };
        let [keys, values] = [basis(("keys", moments[0]))?, basis(("values", moments[1]))?];
        let bytes = self.share(config, group)?;
        let formats = self.fixed(config, group, bytes, tokens).unwrap_or_else(|| Xkv::by_spectrum([&keys, &values], bytes, tokens));
        let row = |(basis, holds, format): (Basis, Holds, Format)| {
            let (first_layer, layers) = (group.start, group.len());
            let coder = orthonormal(basis, &format);
            (RowSpec { first_layer, layers, holds, first_head: 0, kv_heads: config.num_key_value_heads, format }, coder)
        };
        let [key_format, value_format] = formats;
        Ok([row((keys, Holds::Keys, key_format)), row((values, Holds::Values, value_format))])
    }
}

/// Bytes that the rows of a group take at the least: a run and a header each.
fn least(bits: Option<u8>) -> u64 {
    2 * (2 * u64::from(bits.unwrap_or(2)) + 4)
}

/// Numbers of one side of a group's layers.
fn width(config: &Config, group: &Range<usize>) -> usize {
    group.len() * config.num_key_value_heads * config.head_dim
}

/// Bytes of bases with so many coordinates in all, in f16, and the two means in f32.
fn basis_bytes(width: usize, rank: usize) -> usize {
    2 * width * rank + 2 * 4 * width
}

/// The coder whose projection is its up-projection transposed, so that it need not be stored: coordinates are rotated within a band, but not scaled.
fn orthonormal(basis: Basis, format: &Format) -> Coder {
    let one = DVector::repeat(basis.loss.len(), 1.0);
    let Coder { format, mean, up, .. } = coder(&Basis { variance: one.clone(), loss: one, ..basis }, format);
    // As 16 bits hold it: both directions use the same numbers.
    let up: DMatrix<f32> = up.map(|x| half::f16::from_f32(x).to_f32());
    Coder { format, mean, down: None, up }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Architecture, RopeScaling};
    use crate::compress::basis::tests::{moment, rows};

    fn moments(x: &DMatrix<f64>) -> Moments {
        Moments { mean: x.row_mean().transpose().map(|x| x as f32), second: moment(x).map(|x| x as f32) }
    }

    /// Five layers of three heads, 16 wide.
    fn config() -> Config {
        Config {
            architecture: Architecture::Llama,
            hidden_size: 96,
            intermediate_size: 64,
            num_hidden_layers: 5,
            num_attention_heads: 6,
            num_key_value_heads: 3,
            head_dim: 16,
            vocab_size: 100,
            max_position_embeddings: 512,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            tie_word_embeddings: true,
            attention_bias: false,
            qk_norm: false,
            sliding_window: None,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        }
    }

    /// At ranks in the published proportion a group loses what the eigenvalues beyond the rank say, centred, and its bytes are those asked for.
    #[test]
    fn a_group_keeps_the_leading_components_of_its_prompt() {
        let (config, group) = (config(), 0..2);
        let (keys, values) = (rows(300, 96, 1), rows(300, 96, 2));
        let tokens = 4000;
        for (budget, ranks) in [(Budget::Times(2.0), [32, 48]), (Budget::Bytes(1 << 20), [96, 96])] {
            let xkv = Xkv { layers: 2, budget, bits: Some(16) };
            xkv.check(&config).unwrap();
            let made = xkv.rows(&config, &group, [&moments(&keys), &moments(&values)], tokens).unwrap();
            for ((x, (spec, coder)), rank) in [&keys, &values].into_iter().zip(&made).zip(ranks) {
                assert_eq!((spec.format.rank(), spec.layers, spec.first_layer), (rank, 2, 0));
                let single = x.transpose().map(|x| x as f32);
                let mut back = coder.up.transpose() * coder.coordinates(&coder.encode(&single));
                back.column_iter_mut().for_each(|mut column| column += &coder.mean);
                let mean = x.row_mean();
                let centred = DMatrix::from_fn(x.nrows(), x.ncols(), |i, j| x[(i, j)] - mean[j]);
                let values = crate::linalg::Eigen::of("test", &moment(&centred)).unwrap().values;
                let lost: f64 = values.iter().skip(rank).sum();
                let error = (back - &single).norm_squared() as f64 / x.nrows() as f64;
                assert!((error - lost).abs() < 1e-4 * values.sum(), "{rank}: {error}, {lost}");
            }
            let bytes: u64 = made.iter().map(|(spec, _)| 4 * spec.format.words() as u64).sum();
            let share = budget.bytes(config.dense_kv_bytes_per_token()).unwrap() * 2 / 5;
            let bases = made.iter().map(|(spec, _)| 2 * 96 * spec.format.rank()).sum::<usize>() as u64 + 8 * 96;
            let run = 32 + 2 * 96 * 16 / tokens as u64;
            let taken = bytes + bases / tokens as u64;
            assert!(ranks == [96, 96] || taken <= share && taken + run + 2 > share, "{taken} of {share}");
        }
    }

    /// Rows and bases together keep the budget, and the shorter the prompt the fewer the coordinates.
    #[test]
    fn bits_follow_the_spectrum_and_the_length_within_the_budget() {
        let (config, group) = (config(), 0..2);
        let xkv = Xkv { layers: 2, budget: Budget::Times(3.0), bits: None };
        let share = xkv.share(&config, &group).unwrap() as usize;
        let mut ranks = Vec::new();
        for tokens in [300, 1000, 100_000] {
            let made = xkv.rows(&config, &group, [&moments(&rows(300, 96, 1)), &moments(&rows(300, 96, 2))], tokens).unwrap();
            let bytes: usize = made.iter().map(|(spec, _)| 4 * spec.format.words()).sum();
            let rank: usize = made.iter().map(|(spec, _)| spec.format.rank()).sum();
            let taken = bytes + basis_bytes(96, rank) / tokens;
            assert!(taken <= share && taken + 40 > share, "{tokens}: {taken} of {share}");
            ranks.push(rank);
        }
        assert!(ranks[0] < ranks[1] && ranks[1] < ranks[2], "{ranks:?}");
    }

    /// The last group is what is left, and where bases begin to pay is where the formula says: `2·w·r + 8·w` bytes of bases a group against what a token saves.
    #[test]
    fn bases_pay_from_the_length_that_the_formula_says() {
        let config = config();
        let xkv = Xkv { layers: 2, budget: Budget::Times(2.0), bits: Some(16) };
        assert_eq!(xkv.groups(&config), [0..2, 2..4, 4..5]);
        let dense = config.dense_kv_bytes_per_token() as usize;
        let bases: usize = 2 * (2 * 96 * 96 + 8 * 96) + 2 * 48 * 48 + 8 * 48;
        // The last group's rows take 72 of its 96 bytes at the least, and the bases of two runs must fit into the rest.
        let room: usize = (2 * 48 * 32 + 8 * 48) / (96 - 72);
        assert_eq!(xkv.pays_from(&config).unwrap(), bases.div_ceil(dense / 2).max(room));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let config = config();
        let xkv = Xkv { layers: 2, budget: Budget::Times(2.0), bits: Some(16) };
        for (xkv, option) in [
            (Xkv { layers: 0, ..xkv }, "group-layers"),
            (Xkv { bits: Some(5), ..xkv }, "bits"),
            (Xkv { budget: Budget::Times(0.0), ..xkv }, "times"),
            (Xkv { budget: Budget::Bytes(20), ..xkv }, "kv-bytes"),
            (Xkv { budget: Budget::Bytes(20), bits: None, ..xkv }, "kv-bytes"),
        ] {
            let error = xkv.check(&config).unwrap_err();
            assert!(matches!(&error, Error::Argument { name, .. } if name == option), "{error}");
            assert!(xkv.check_prompt(&config, 5, 9).is_err());
        }
        assert!(matches!(xkv.check_prompt(&config, 0, 9), Err(Error::Argument { name, .. }) if name == "prompt"));
        assert!(matches!(xkv.check_prompt(&config, 10, 9), Err(Error::Context { needed: 10, capacity: 9 })));
        xkv.check_prompt(&config, 9, 9).unwrap();
    }
}
