//! The tables by which shaders write and read packed rows: see `shaders/lib/rows.wgsl`.

use super::AttentionShape;
use crate::gpu::pad;
use crate::kv::Layout;
use crate::kv::{EIGHT_BITS, Format, KvSide, LatentSet, LatentSpec, RUN, Run, Scale, ScaleSource, Steps, levels};
use half::f16;
use std::ops::Range;

/// A row as one side of a layer reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slice {
    /// Which row of the model.
    pub row: usize,
    /// Words into a token's at which it begins.
    pub word: usize,
    /// Where the side begins in the row's vector `y`.
    pub offset: usize,
    /// Its first key/value head, and how many.
    pub first_head: usize,
    pub kv_heads: usize,
    /// The whole row's.
    pub format: Format,
    /// Which of the row's runs it reads: a head's own, where heads are apart, else all.
    pub runs: Range<usize>,
}

impl Slice {
    /// Coordinates that are read.
    pub fn rank(&self) -> usize {
        RUN * self.runs.len()
    }
}

/// What one side of a layer reads of latents: all from one store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Coded {
    pub store: usize,
    /// Words of a token in the store.
    pub words: usize,
    /// In the order of the heads, all of which they cover.
    pub slices: Vec<Slice>,
    /// By key/value head, where keys are coded after RoPE.
    ///
    /// The pairs of RoPE in which their mean, which rotates, is not zero, or that of a head which
    /// reads the same slice. Else nothing.
    pub mean_pairs: Vec<Vec<u32>>,
    /// Tokens that are coded together, of this side or of the other.
    pub block: usize,
}

/// How a shader's constants and flags say what rows it reads: it has code for no others.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Codes {
    pub flags: Vec<&'static str>,
    pub constants: Vec<(&'static str, u32)>,
}

impl Codes {
    /// To read rows of these formats: coded in blocks of tokens either all of them or none.
    pub fn of<'a>(formats: impl Iterator<Item = &'a Format>) -> Codes {
        let formats: Vec<&Format> = formats.collect();
        let in_blocks = |format: &Format| matches!(format.scale, Scale::Blocks(_));
        let kinds = formats.iter().filter(|format| !in_blocks(format)).flat_map(|format| runs(format)).fold(0, |kinds, run| kinds | kinds_of(run));
        let mut codes = Codes { flags: Vec::new(), constants: vec![("CODES", kinds)] };
        if let Some(Format { scale: Scale::Blocks(blocks), .. }) = formats.first() {
            codes.flags.push("BLOCKS");
            match blocks.steps {
                Steps::Channels => {}
                Steps::BalancedChannels => codes.flags.push("TOKEN_FACTORS"),
                Steps::BalancedTokens => codes.flags.push("CHANNEL_FACTORS"),
            }
            let constants = [("TOKENS", blocks.tokens), ("OWN", blocks.own()), ("STRIPE", blocks.stripe(formats[0].rank()))];
            codes.constants.extend(constants.map(|(name, number)| (name, number as u32)));
        }
        codes
    }
}

/// `CODES` of a run, as `lib/rows.wgsl` has it: its width, and whether a byte of the header scales
/// it.
fn kinds_of([_, bits, _, scale]: [u32; 4]) -> u32 {
    match (bits, scale) {
        (16, _) => 4,
        (_, AFFINE..) => 8,
        (8, _) => 2 | if scale > 0 { 16 } else { 0 },
        _ => 1 | if scale > 0 { 16 } else { 0 },
    }
}

impl Coded {
    pub fn new(attention: &AttentionShape, specs: &[LatentSpec], layout: &Layout, layer: usize, side: KvSide) -> Coded {
        let sources = LatentSet::sources(specs, layer, side, attention.head_dim);
        let store = layout.store(&sources);
        let slices = sources.iter().flat_map(|source| {
            let format = &specs[source.row].format;
            let parts = if format.by_head() { source.kv_heads } else { 1 };
            let (heads, runs) = (source.kv_heads / parts, format.rank() / RUN / parts);
            (0..parts).map(move |part| Slice {
                row: source.row,
                word: layout.places[source.row].word,
                offset: source.offset + part * heads * attention.head_dim,
                first_head: source.first_head + part * heads,
                kv_heads: heads,
                format: format.clone(),
                runs: part * runs..(part + 1) * runs,
            })
        });
        Coded { store, words: layout.stores[store], slices: slices.collect(), mean_pairs: Vec::new(), block: LatentSet::block(specs) }
    }

    /// The most key/value heads that read the same coordinates.
    pub fn widest(&self) -> usize {
        self.slices.iter().map(|slice| slice.kv_heads).max().unwrap_or(1)
    }

    /// What a shader has to know of the rows.
    pub fn codes(&self) -> Codes {
        Codes::of(self.slices.iter().map(|slice| &slice.format))
    }

    /// The same for post-RoPE keys, about `means: [H_kv][head_dim]` before RoPE.
    pub fn about(self, attention: &AttentionShape, means: &[f32]) -> Coded {
        let (dim, half) = (attention.head_dim, attention.head_dim / 2);
        let pairs = |slice: &Slice| -> Vec<u32> {
            let means = &means[slice.first_head * dim..][..slice.kv_heads * dim];
            (0..half).filter(|&p| means.chunks_exact(dim).any(|mean| mean[p] != 0.0 || mean[p + half] != 0.0)).map(|p| p as u32).collect()
        };
        let mean_pairs = self.slices.iter().flat_map(|slice| vec![pairs(slice); slice.kv_heads]).collect();
        Coded { mean_pairs, ..self }
    }

    /// The pairs in which the mean of a key/value head's keys rotates.
    fn mean_pairs(&self, kv_head: usize) -> &[u32] {
        self.mean_pairs.get(kv_head).map_or(&[], Vec::as_slice)
    }

    /// The slice that a key/value head reads, and its place among them.
    pub fn of_head(&self, kv_head: usize) -> (usize, &Slice) {
        let i = self.slices.partition_point(|s| s.first_head + s.kv_heads <= kv_head);
        (i, &self.slices[i])
    }

    /// Words of a token that all heads together read.
    pub fn row_words(&self) -> usize {
        let first = |slice: &&Slice| slice.runs.start == 0;
        self.slices.iter().filter(first).map(|slice| slice.format.words()).sum()
    }

    /// Coordinates that a key/value head reads.
    pub fn rank(&self, kv_head: usize) -> usize {
        self.of_head(kv_head).1.rank()
    }

    /// Of all heads one after the other, `size` of each: where they begin, and where the last ends.
    fn begins(&self, heads: usize, size: impl Fn(usize) -> usize) -> Vec<usize> {
        (0..=heads)
            .scan(0, |at, head| {
                let begin = *at;
                *at += if head < heads { size(head) } else { 0 };
                Some(begin)
            })
            .collect()
    }

    /// Vectors of a token's queries: whole ones, padded to four, and where they are taken, `q̃` and
    /// what the mean adds, two numbers for each pair in which it rotates.
    fn queries(&self, attention: &AttentionShape, taken: bool) -> Vec<usize> {
        let whole = attention.heads * pad(attention.head_dim) / 4;
        let each = |kv: usize| if taken { attention.group_size() * (self.rank(kv) / 4 + self.mean_pairs(kv).len().div_ceil(2)) } else { 0 };
        self.begins(attention.kv_heads, each).iter().map(|at| whole + at).collect()
    }

    /// Numbers from one token's queries to the next.
    pub fn query_stride(&self, attention: &AttentionShape, taken: bool) -> usize {
        4 * self.queries(attention, taken)[attention.kv_heads]
    }

    /// [`books`], whose last vector says how many words of a token the store has.
    fn books(&self) -> Vec<[u32; 4]> {
        let mut books = books();
        books[BOOKS as usize - 1][2] = self.words as u32;
        books
    }

    /// The table that keys are scored with, as `score.wgsl` says.
    ///
    /// `means` by key/value head, `[H_kv][head_dim]`.
    pub fn key_table(&self, attention: &AttentionShape, taken: bool, means: &[f32]) -> Vec<[u32; 4]> {
        let (heads, dim) = (attention.kv_heads, attention.head_dim);
        let up = self.begins(heads, |kv| self.rank(kv) / 4 * if taken { pad(dim) } else { dim });
        let queries = self.queries(attention, taken);
        let mut table = self.books();
        let pairs_at = table.len() + 2 * heads + means.len().div_ceil(4);
        let pairs_of = self.begins(heads, |kv| self.mean_pairs(kv).len().div_ceil(4));
        let runs_at = pairs_at + pairs_of[heads];
        let runs_of = self.begins(self.slices.len(), |i| self.slices[i].runs.len());
        for kv in 0..heads {
            let (i, slice) = self.of_head(kv);
            table.push([slice.word, runs_at + runs_of[i], slice.runs.len(), queries[kv]].map(|n| n as u32));
            let together = if slice.first_head == kv { slice.kv_heads } else { 0 };
            table.push([up[kv], pairs_at + pairs_of[kv], self.mean_pairs(kv).len(), together].map(|n| n as u32));
        }
        table.extend(floats(means));
        for kv in 0..heads {
            table.extend(self.mean_pairs(kv).chunks(4).map(|pairs| std::array::from_fn(|i| pairs.get(i).copied().unwrap_or(0))));
        }
        self.slices.iter().for_each(|slice| table.extend_from_slice(&runs(&slice.format)[slice.runs.clone()]));
        table
    }

    /// The table that values are summed with: codebooks and runs.
    pub fn value_table(&self) -> Vec<[u32; 4]> {
        let runs = self.slices.iter().map(|slice| runs(&slice.format)[slice.runs.clone()].to_vec());
        std::iter::once(self.books()).chain(runs).flatten().collect()
    }

    /// Where in [`value_table`](Self::value_table) each slice's runs begin.
    pub fn value_runs(&self) -> Vec<usize> {
        self.begins(self.slices.len(), |i| self.slices[i].runs.len()).iter().map(|at| BOOKS as usize + at).collect()
    }

    /// Where each key/value head's up-projection begins, laid end to end.
    ///
    /// Each has `[rank / 4][head_dim]` vectors.
    pub fn ups(&self, attention: &AttentionShape) -> Vec<usize> {
        self.begins(attention.kv_heads, |kv| self.rank(kv) / 4 * attention.head_dim)
    }

    /// Where each query head's sum of coordinates begins, in vectors, and where the last ends.
    pub fn sums(&self, attention: &AttentionShape) -> Vec<usize> {
        self.begins(attention.heads, |head| self.rank(head / attention.group_size()) / 4)
    }
}

/// Vectors of codebooks at the head of every table.
pub(crate) const BOOKS: u32 = 57;

/// `[BOOKS]`: the levels of 2, 3 and 4 bits, two to a word in f16, then the first level and the
/// step of 8.
pub(crate) fn books() -> Vec<[u32; 4]> {
    let levels: Vec<f16> = [2, 3, 4].into_iter().flat_map(levels).map(|&level| f16::from_f32(level)).collect();
    let pairs = levels.chunks(2).map(|pair| u32::from(pair[0].to_bits()) | u32::from(pair[1].to_bits()) << 16);
    let mut words: Vec<u32> = pairs.chain([EIGHT_BITS.0.to_bits(), EIGHT_BITS.1.to_bits()]).collect();
    words.resize(4 * BOOKS as usize, 0);
    words.chunks(4).map(|four| [four[0], four[1], four[2], four[3]]).collect()
}

/// f32 numbers as a table holds them, four to a vector.
pub(crate) fn floats(numbers: &[f32]) -> Vec<[u32; 4]> {
    let vector = |four: &[f32]| std::array::from_fn(|i| four.get(i).map_or(0, |x| x.to_bits()));
    numbers.chunks(4).map(vector).collect()
}

/// From here on what scales a run is a word of its header.
const AFFINE: u32 = 5;

/// What a shader knows of what scales a run: nothing, one of the header's first four bytes, or the
/// halves of one of its words. Of blocks the shader knows by itself.
fn scale(source: ScaleSource) -> u32 {
    match source {
        ScaleSource::One => 0,
        ScaleSource::Byte(byte) => 1 + byte as u32,
        ScaleSource::Affine(word) => AFFINE + word as u32,
        ScaleSource::Block => 0,
    }
}

/// The runs of a row: (word, bits, where the highest bits stand, scale); in blocks (word, bits,
/// first coordinate, head).
pub(crate) fn runs(format: &Format) -> Vec<[u32; 4]> {
    if let Scale::Blocks(blocks) = format.scale {
        let (runs, each) = (format.runs(), format.rank() / RUN / blocks.heads);
        return runs.iter().enumerate().map(|(i, run)| [run.word as u32, u32::from(run.bits), (RUN * i) as u32, (i / each) as u32]).collect();
    }
    format.runs().iter().map(|run| [run.word as u32, u32::from(run.bits), run.high as u32, scale(run.scale)]).collect()
}

/// The bands of a row, or its groups where these have scales of their own: (first run, runs, bits,
/// scale).
pub(crate) fn bands(format: &Format) -> Vec<[u32; 4]> {
    let runs = format.runs();
    if let Scale::Groups { runs: length, .. } = format.scale {
        let group = |(index, some): (usize, &[Run])| [(index * length) as u32, some.len() as u32, u32::from(some[0].bits), scale(some[0].scale)];
        return runs.chunks(length).enumerate().map(group).collect();
    }
    let mut first = 0;
    let band = |band: &crate::kv::Band| {
        let begin = first;
        first += band.runs;
        [begin as u32, band.runs as u32, u32::from(band.bits), scale(runs[begin].scale)]
    };
    format.bands.iter().map(band).collect()
}

/// An up-projection of one key/value head, `up(coordinate, dimension)`, as `[rank / 4][head_dim]`
/// vectors: neighbouring lanes have neighbouring dimensions.
pub(crate) fn by_coordinates(up: impl Fn(usize, usize) -> f32, rank: usize, head_dim: usize) -> Vec<f16> {
    let mut vectors = Vec::with_capacity(rank * head_dim);
    for v in 0..rank / 4 {
        for dim in 0..head_dim {
            vectors.extend((0..4).map(|i| f16::from_f32(up(4 * v + i, dim))));
        }
    }
    vectors
}

/// The same as `[pad(head_dim) / 4][rank]` vectors, padding zero: neighbouring lanes have
/// neighbouring coordinates.
pub(crate) fn by_dimensions(up: impl Fn(usize, usize) -> f32, rank: usize, head_dim: usize) -> Vec<f16> {
    let mut vectors = Vec::with_capacity(rank * pad(head_dim));
    for v in 0..pad(head_dim) / 4 {
        for coordinate in 0..rank {
            let number = |dim: usize| if dim < head_dim { f16::from_f32(up(coordinate, dim)) } else { f16::ZERO };
            vectors.extend((0..4).map(|j| number(4 * v + j)));
        }
    }
    vectors
}
