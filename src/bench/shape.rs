//! Models and caches to measure where no checkpoint is at hand: the shapes of well-known models
//! with random numbers in them ([`crate::decoder`]), and rows as wide as their plans make them.

use crate::checkpoint::{Architecture, Config, Design, LayerSpec, Rope};
use crate::compress::rotated;
use crate::kv::{Band, Coder, Exact, Format, LatentKind, LatentSet, LatentSpec, RUN, Read, Scale};
use crate::linalg::Random;
use crate::{Error, Result};
use nalgebra::{DMatrix, DVector};
use std::str::FromStr;

/// The shape of a well-known model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// stories15M: for a look on a software renderer.
    M15,
    /// SmolLM2-135M.
    M135,
    /// Llama 3.2 1B.
    B1,
    /// Llama 3.2 3B.
    B3,
    /// Llama 3.1 8B.
    B8,
}

impl Shape {
    /// All of them, smallest first.
    pub const ALL: [Shape; 5] = [Shape::M15, Shape::M135, Shape::B1, Shape::B3, Shape::B8];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Shape::M15 => "15m",
            Shape::M135 => "135m",
            Shape::B1 => "1b",
            Shape::B3 => "3b",
            Shape::B8 => "8b",
        }
    }

    /// Its numbers, with a context of 131,072 tokens.
    pub fn config(self) -> Config {
        let llama = Config {
            architecture: Architecture::Llama,
            hidden_size: 4096,
            intermediate_size: 14336,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 8,
            head_dim: 128,
            vocab_size: 128_256,
            max_position_embeddings: 131_072,
            norm_eps: 1e-5,
            tie_word_embeddings: false,
            design: Design::llama(128),
            layers: Vec::new(),
            ropes: Vec::new(),
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        };
        let tied = Config { tie_word_embeddings: true, ..llama.clone() };
        let config = match self {
            Shape::B8 => llama,
            Shape::B3 => Config { hidden_size: 3072, intermediate_size: 8192, num_hidden_layers: 28, num_attention_heads: 24, ..tied },
            Shape::B1 => Config { hidden_size: 2048, intermediate_size: 8192, num_hidden_layers: 16, head_dim: 64, ..tied },
            Shape::M15 => Config {
                hidden_size: 288,
                intermediate_size: 768,
                num_hidden_layers: 6,
                num_attention_heads: 6,
                num_key_value_heads: 6,
                head_dim: 48,
                vocab_size: 32_000,
                ..tied
            },
            Shape::M135 => Config {
                hidden_size: 576,
                intermediate_size: 1536,
                num_hidden_layers: 30,
                num_attention_heads: 9,
                num_key_value_heads: 3,
                head_dim: 64,
                vocab_size: 49_152,
                ..tied
            },
        };
        let (design, rope) = (Design::llama(config.head_dim), Rope::new(5e5, config.head_dim));
        Config { design, ropes: vec![rope], ..config }.with_layers(LayerSpec { window: None, rope: 0 })
    }
}

impl FromStr for Shape {
    type Err = Error;

    fn from_str(text: &str) -> Result<Shape> {
        named("shape", text, &Shape::ALL, Shape::name)
    }
}

/// The one of `all` that is called `text`.
fn named<T: Copy>(what: &str, text: &str, all: &[T], name: impl Fn(T) -> &'static str) -> Result<T> {
    let names = || all.iter().map(|one| name(*one)).collect::<Vec<_>>().join(", ");
    let found = all.iter().copied().find(|one| name(*one) == text);
    found.ok_or_else(|| Error::Argument { name: what.into(), message: format!("{text:?} is none of {}", names()) })
}

/// How a random cache stores its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RandomRows {
    /// Exact, in f16.
    Dense,
    /// Rotated, 4 bits.
    Rotated,
    /// `--layout fast --times 4`.
    Fast,
    /// The same in rows over so many key/value heads each, not over all: 2, or 1.
    FastPairs,
    /// See [`FastPairs`](Self::FastPairs).
    FastHeads,
    /// `--layout small --times 8`.
    Small,
    /// The same, of which 256 tokens are read.
    Select,
    /// `--method xkv --times 4`.
    Xkv,
}

/// Bands of a plan, as shares of a row's width: bits, and coordinates that get so many. Means over
/// the layers of SmolLM2-135M-Instruct, calibrated with the built-in text.
type Shares = [(u8, f64); 4];
const FAST_KEYS: Shares = [(8, 0.156), (4, 0.353), (3, 0.256), (2, 0.197)];
const FAST_VALUES: Shares = [(8, 0.156), (4, 0.411), (3, 0.194), (2, 0.167)];
const SMALL: Shares = [(8, 0.057), (4, 0.151), (3, 0.142), (2, 0.218)];
/// After a prompt of 2,048 tokens of WikiText-2, whose bases take the rest of the budget.
const XKV_KEYS: Shares = [(8, 0.029), (4, 0.146), (3, 0.137), (2, 0.034)];
const XKV_VALUES: Shares = [(8, 0.036), (4, 0.217), (3, 0.167), (2, 0.048)];

/// Layers that share a basis of xKV.
const GROUP: usize = 4;

impl RandomRows {
    /// All of them; what the others are compared with comes first.
    pub const ALL: [RandomRows; 8] = [
        RandomRows::Dense,
        RandomRows::Rotated,
        RandomRows::Fast,
        RandomRows::FastPairs,
        RandomRows::FastHeads,
        RandomRows::Small,
        RandomRows::Select,
        RandomRows::Xkv,
    ];

    /// Those that are measured where none are named.
    pub fn usual() -> Vec<RandomRows> {
        let narrow = [RandomRows::FastPairs, RandomRows::FastHeads];
        RandomRows::ALL.into_iter().filter(|rows| !narrow.contains(rows)).collect()
    }

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            RandomRows::Dense => "f16",
            RandomRows::Rotated => "q4",
            RandomRows::Fast => "fast",
            RandomRows::FastPairs => "fast-pairs",
            RandomRows::FastHeads => "fast-heads",
            RandomRows::Small => "small",
            RandomRows::Select => "select",
            RandomRows::Xkv => "xkv",
        }
    }

    /// The method whose rows they are.
    pub fn method(self) -> &'static str {
        match self {
            RandomRows::Dense | RandomRows::Rotated => "dense",
            RandomRows::Xkv => "xkv",
            _ => "lowkey",
        }
    }

    /// Which latents a token reads.
    pub fn read(self) -> Read {
        Read::top((self == RandomRows::Select).then_some(256))
    }

    /// Coders of random bases for a model of this shape; `None` where every row is exact.
    pub fn rows(self, config: &Config) -> Option<LatentSet> {
        let all = config.num_key_value_heads;
        let fast = |heads| Some(random(config, (1, heads), &[(LatentKind::PostRopeKeys, FAST_KEYS), (LatentKind::Values, FAST_VALUES)], true));
        match self {
            RandomRows::Dense => None,
            RandomRows::Rotated => Some(rotated(config, 4, Exact::default())),
            RandomRows::Fast => fast(all),
            RandomRows::FastPairs => fast(2),
            RandomRows::FastHeads => fast(1),
            RandomRows::Small | RandomRows::Select => Some(random(config, (1, all), &[(LatentKind::Both, SMALL)], true)),
            RandomRows::Xkv => Some(random(config, (GROUP, all), &[(LatentKind::PreRopeKeys, XKV_KEYS), (LatentKind::Values, XKV_VALUES)], false)),
        }
    }
}

impl FromStr for RandomRows {
    type Err = Error;

    fn from_str(text: &str) -> Result<RandomRows> {
        named("rows", text, &RandomRows::ALL, RandomRows::name)
    }
}

/// Rows over `span` layers and `heads` key/value heads each.
///
/// `down`: whether what codes them is another matrix than what reads them.
fn random(config: &Config, (span, heads): (usize, usize), kinds: &[(LatentKind, Shares)], down: bool) -> LatentSet {
    let (mut specs, mut coders): (Vec<LatentSpec>, Vec<Coder>) = (Vec::new(), Vec::new());
    for first_layer in (0..config.num_hidden_layers).step_by(span) {
        let layers = span.min(config.num_hidden_layers - first_layer);
        let firsts = (0..config.num_key_value_heads).step_by(heads);
        for ((kind, shares), first_head) in kinds.iter().flat_map(|kind| firsts.clone().map(move |first| (kind, first))) {
            let empty = Format { bands: Vec::new(), scale: Scale::Band };
            let kv_heads = heads.min(config.num_key_value_heads - first_head);
            let mut spec = LatentSpec { first_layer, layers, kind: *kind, first_head, kv_heads, format: empty };
            let width = spec.width(config.head_dim);
            let runs = |share: f64| ((share * width as f64 / RUN as f64).round() as usize).max(1);
            // A narrow row has no room for a run of every band, rounded up: the last are cut.
            let mut room = width / RUN;
            for (bits, share) in shares {
                let runs = runs(*share).min(room);
                room -= runs;
                spec.format.bands.extend((runs > 0).then_some(Band { bits: *bits, runs }));
            }
            // Which numbers they are does not matter, only that no two coordinates are alike:
            // layers of a shape share theirs.
            let alike = specs.iter().position(|other| (other.kind, other.layers, other.kv_heads) == (spec.kind, spec.layers, spec.kv_heads));
            coders.push(alike.map_or_else(|| coder(spec.format.clone(), width, down), |i| coders[i].clone()));
            specs.push(spec);
        }
    }
    LatentSet { specs, coders, exact: Exact::default() }
}

fn coder(format: Format, width: usize, down: bool) -> Coder {
    let (mut random, rank) = (Random::new(width as u64), format.rank());
    let scale = (3.0 / rank as f64).sqrt();
    let up = DMatrix::from_fn(rank, width, |_, _| ((random.unit() * 2.0 - 1.0) * scale) as f32);
    // Not zero: a mean that rotates with the keys has its price.
    Coder { format, mean: DVector::from_element(width, 0.1), down: down.then(|| up.transpose()), up }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_and_rows_are_those_of_models_and_plans() {
        // Parameters without norms, in millions.
        let parameters = |shape: Shape| {
            let c = shape.config();
            let (d, kv) = (c.hidden_size, c.num_key_value_heads * c.head_dim);
            let layer = 2 * d * c.num_attention_heads * c.head_dim + 2 * d * kv + 3 * d * c.intermediate_size;
            (c.num_hidden_layers * layer + c.vocab_size * d * if c.tie_word_embeddings { 1 } else { 2 }) as f64 / 1e6
        };
        assert_eq!(Shape::ALL.map(|shape| parameters(shape).round()), [15.0, 134.0, 1236.0, 3213.0, 8030.0]);
        for shape in [Shape::M135, Shape::B1] {
            let config = shape.config();
            let dense = config.dense_kv_bytes_per_token() as f64;
            for rows in RandomRows::ALL {
                let Some(set) = rows.rows(&config) else { continue };
                LatentSet::check(&set.specs, &config.geometry()).unwrap();
                let times = dense / LatentSet::bytes_per_token(&set.specs) as f64;
                let expected = match rows {
                    RandomRows::Rotated => 3.5..3.8,
                    RandomRows::Small | RandomRows::Select => 7.5..8.7,
                    RandomRows::Xkv => 9.5..11.5,
                    // Bands of a narrow row are rounded to runs.
                    RandomRows::FastPairs | RandomRows::FastHeads => 2.5..4.5,
                    _ => 3.7..4.4,
                };
                assert!(expected.contains(&times), "{} {}: {times}", shape.name(), rows.name());
            }
            assert_eq!(shape.name().parse::<Shape>().unwrap(), shape);
        }
        assert!("9b".parse::<Shape>().unwrap_err().to_string().contains("15m, 135m, 1b, 3b, 8b"));
    }
}
