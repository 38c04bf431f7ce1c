//! Which vectors share a row, and how all rows of a model cover its keys and values.

use super::{Blocks, Coder, Exact, Format, Geometry, Scale};
use serde::{Deserialize, Serialize};

/// What a row is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LatentKind {
    /// Keys after bias and QK-norm, before RoPE: a reader rebuilds and rotates them.
    #[serde(rename = "keys")]
    PreRopeKeys,
    /// Keys after RoPE: a reader absorbs the basis into its query and rebuilds nothing.
    #[serde(rename = "turned_keys")]
    PostRopeKeys,
    /// Values with their bias.
    Values,
    /// Keys before RoPE, then values.
    Both,
}

/// One latent for each token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatentSpec {
    /// Its layers are this one and those after it.
    pub first_layer: usize,
    /// How many.
    pub layers: usize,
    /// What of them.
    #[serde(rename = "holds")]
    pub kind: LatentKind,
    /// Its key/value heads are this one and those after it.
    pub first_head: usize,
    /// How many.
    pub kv_heads: usize,
    /// How it is packed.
    pub format: Format,
}

/// A side of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvSide {
    /// Keys.
    Keys,
    /// Values.
    Values,
}

impl LatentSpec {
    /// The width `w` of the vector `y`.
    ///
    /// Layer by layer, keys of all its heads and then values of all its heads, as far as it holds
    /// them.
    pub fn width(&self, head_dim: usize) -> usize {
        self.layers * self.stride(head_dim)
    }

    /// What one layer takes of it.
    fn stride(&self, head_dim: usize) -> usize {
        self.kv_heads * head_dim * if self.kind == LatentKind::Both { 2 } else { 1 }
    }

    /// Where in `y` the first head of one side of `layer` begins.
    ///
    /// `None` where the row does not hold it.
    pub fn offset(&self, layer: usize, side: KvSide, head_dim: usize) -> Option<usize> {
        let within = layer.checked_sub(self.first_layer).filter(|&within| within < self.layers)?;
        let start = within * self.stride(head_dim);
        match (self.kind, side) {
            (LatentKind::Both, KvSide::Values) => Some(start + self.kv_heads * head_dim),
            (LatentKind::Both | LatentKind::PreRopeKeys | LatentKind::PostRopeKeys, KvSide::Keys) | (LatentKind::Values, KvSide::Values) => {
                Some(start)
            }
            _ => None,
        }
    }

    /// Frequency pairs of RoPE in which `mean: [w]` rotates with the position, over all heads.
    ///
    /// Heads that share coordinates are scored together: a pair of one is a pair of all.
    pub fn mean_pairs(&self, mean: &[f32], head_dim: usize) -> usize {
        let (half, together) = (head_dim / 2, if self.format.by_head() { 1 } else { self.kv_heads });
        let rotates = |heads: &[f32], p: usize| heads.chunks_exact(head_dim).any(|head| head[p] != 0.0 || head[p + half] != 0.0);
        let pairs = |heads: &[f32]| together * (0..half).filter(|&p| rotates(heads, p)).count();
        if self.kind == LatentKind::PostRopeKeys { mean.chunks_exact(together * head_dim).map(pairs).sum() } else { 0 }
    }

    /// The last of its layers.
    pub fn last_layer(&self) -> usize {
        self.first_layer + self.layers - 1
    }
}

/// The part of a row that one side of one layer reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Which row.
    pub row: usize,
    /// Where the side begins in its `y`.
    pub offset: usize,
    /// Its first key/value head, and how many.
    pub first_head: usize,
    /// See [`first_head`](Self::first_head).
    pub kv_heads: usize,
}

/// All latents of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentSet {
    /// What they hold and how they are packed.
    pub specs: Vec<LatentSpec>,
    /// Their bases, in the same order.
    pub coders: Vec<Coder>,
    /// What stays exact beside them.
    pub exact: Exact,
}

impl LatentSet {
    /// Bytes that a token's rows take, over the whole model.
    pub fn bytes_per_token(specs: &[LatentSpec]) -> u64 {
        specs.iter().map(|spec| 4 * spec.format.words() as u64).sum()
    }

    /// Tokens that are coded together.
    pub fn block(specs: &[LatentSpec]) -> usize {
        specs.iter().map(|spec| spec.format.block()).max().unwrap_or(1)
    }

    /// By latent, the RoPE pairs in which the mean of a key head is not zero, over all heads.
    ///
    /// Only the mean of keys after RoPE rotates.
    pub fn mean_pairs(&self, head_dim: usize) -> Vec<usize> {
        self.specs.iter().zip(&self.coders).map(|(spec, coder)| spec.mean_pairs(coder.mean.as_slice(), head_dim)).collect()
    }

    /// Whether any row belongs to several layers.
    pub fn spans(&self) -> bool {
        self.specs.iter().any(|spec| spec.layers > 1)
    }

    /// What one side of `layer` reads, in the order of the heads.
    pub fn sources(specs: &[LatentSpec], layer: usize, side: KvSide, head_dim: usize) -> Vec<Source> {
        let mut sources: Vec<Source> = specs
            .iter()
            .enumerate()
            .filter_map(|(row, spec)| {
                let offset = spec.offset(layer, side, head_dim)?;
                Some(Source { row, offset, first_head: spec.first_head, kv_heads: spec.kv_heads })
            })
            .collect();
        sources.sort_by_key(|source| source.first_head);
        sources
    }

    /// Whether every key and value of the model is in exactly one row, and every row can be packed.
    ///
    /// # Errors
    /// What is wrong, as a sentence.
    pub fn check(specs: &[LatentSpec], geometry: &Geometry) -> Result<(), String> {
        let (layers, heads) = (geometry.layers, geometry.kv_heads);
        for (index, spec) in specs.iter().enumerate() {
            spec.format.check().map_err(|message| format!("row {index} {message}"))?;
            let ends = [(spec.first_layer, spec.layers, layers, "layers"), (spec.first_head, spec.kv_heads, heads, "heads")];
            for (first, count, all, what) in ends {
                if count == 0 || first.checked_add(count).is_none_or(|end| end > all) {
                    return Err(format!("row {index} takes {count} {what} from {first} on, of {all}"));
                }
            }
            if let Scale::Blocks(blocks) = spec.format.scale {
                // A block is coded at once, and what is read together is striped alike.
                let beside = |other: &&LatentSpec| (other.first_layer, other.kind) == (spec.first_layer, spec.kind);
                let alike = specs.iter().filter(beside).all(|other| other.format == spec.format);
                if blocks.tokens != LatentSet::block(specs) || blocks.heads != spec.kv_heads || !alike {
                    let Blocks { tokens, heads, .. } = blocks;
                    return Err(format!("row {index} has blocks of {tokens} tokens and {heads} heads, and those beside it are of others"));
                }
            }
            if spec.format.by_head() {
                let runs = spec.format.rank() / super::RUN;
                if runs != spec.kv_heads * geometry.head_dim.div_ceil(super::RUN) || spec.layers != 1 || spec.kind == LatentKind::Both {
                    return Err(format!("row {index} keeps heads apart, but has {runs} runs of {} heads in {} layers", spec.kv_heads, spec.layers));
                }
                continue;
            }
            let width = spec.width(geometry.head_dim);
            if spec.format.rank() >= width + super::RUN {
                return Err(format!("row {index} has {} coordinates of a vector of {width}", spec.format.rank()));
            }
        }
        for layer in 0..layers {
            for (side, what) in [(KvSide::Keys, "keys"), (KvSide::Values, "values")] {
                let mut next = 0;
                for source in LatentSet::sources(specs, layer, side, geometry.head_dim) {
                    if source.first_head != next {
                        return Err(format!("the {what} of layer {layer}, head {} are in no row or in two", next.min(source.first_head)));
                    }
                    next += source.kv_heads;
                }
                if next != heads {
                    return Err(format!("the {what} of layer {layer}, head {next} are in no row"));
                }
            }
        }
        Ok(())
    }
}
