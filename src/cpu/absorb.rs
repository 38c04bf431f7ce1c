//! Coded columns as a few queries read them: queries absorb the basis of keys, and values are
//! summed as coordinates, so that no row is rebuilt.
//!
//! With `k = B·ẑ + R_t μ`, a key coded after RoPE, `q·k = (Bᵀq)·ẑ + q·R_t μ` (KQ-SVD, arXiv
//! 2512.05916; the mean's part is src/kv/spec.rs's), and `Σ w·v = B·(Σ w·ẑ) + (Σ w)·μ`. A kernel
//! does the same on a GPU: shaders/score.wgsl, values.wgsl, merge.wgsl.

use super::landmarks::Landmarks;
use super::latents::Coded;
use super::rope::Rope;
use crate::kv::{Coder, KvSide, LatentKind, LatentSpec, Selection};
use crate::linalg::{product, tr_product, tr_product_into};
use nalgebra::{DMatrix, DMatrixView, DMatrixViewMut};
use rayon::prelude::*;
use std::ops::Range;

/// The most queries of a head that absorb: of more, each key is rebuilt for all of them.
const FEW: usize = 8;

/// Tokens whose coordinates are unpacked at a time: they stay in a core's cache.
const TILE: usize = 64;

/// Coded columns of a layer.
pub(super) struct Absorbed<'a> {
    coded: &'a Coded,
    layer: usize,
    /// Which tokens they are.
    tokens: Range<usize>,
    rope: &'a Rope,
}

/// One side's part of a row: of some key/value heads.
struct Part<'a> {
    spec: &'a LatentSpec,
    coder: &'a Coder,
    words: &'a [u32],
    /// Where the side begins in the row's vector.
    offset: usize,
}

impl Coded {
    /// Coded columns of `tokens` of a layer that `queries` tokens read as coordinates; `None` where
    /// their keys have to be rebuilt, or some are not read.
    pub(super) fn absorbed<'a>(&'a self, layer: usize, tokens: Range<usize>, queries: usize, rope: &'a Rope) -> Option<Absorbed<'a>> {
        let plain = |row: usize| {
            let (spec, format) = (&self.set.specs[row], &self.set.coders[row].format);
            let [keys, values] = [KvSide::Keys, KvSide::Values].map(|side| spec.offset(layer, side, self.head_dim).is_some());
            !(keys || values) || format.block() == 1 && (!keys || spec.kind == LatentKind::PostRopeKeys)
        };
        let chosen = |landmarks: &Landmarks| queries == 1 && landmarks.are_too_many(&Selection::range(tokens.start, tokens.end));
        let few = queries <= FEW && !self.landmarks.as_ref().is_some_and(chosen) && self.eviction.is_none();
        (few && !tokens.is_empty() && (0..self.set.specs.len()).all(plain)).then_some(Absorbed { coded: self, layer, tokens, rope })
    }
}

impl Absorbed<'_> {
    /// Columns.
    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The parts of one side, which together are of all heads.
    fn parts(&self, side: KvSide) -> Vec<Part<'_>> {
        let set = &self.coded.set;
        let parts = set.specs.iter().zip(&set.coders).zip(&self.coded.words).filter_map(|((spec, coder), words)| {
            let offset = spec.offset(self.layer, side, self.coded.head_dim)?;
            Some(Part { spec, coder, words, offset })
        });
        parts.collect()
    }

    /// The lines of a part's query heads, and their key/value heads.
    fn lines(&self, part: &Part, lines: usize, [heads, group]: [usize; 2]) -> Vec<(usize, usize)> {
        let own = part.spec.first_head * group..(part.spec.first_head + part.spec.kv_heads) * group;
        (0..lines / heads).flat_map(|token| own.clone().map(move |head| (token * heads + head, head / group))).collect()
    }

    /// The basis of a part's key/value head, `[r, d]`.
    fn basis<'b>(&self, part: &'b Part, kv_head: usize) -> DMatrixView<'b, f32> {
        let d = self.coded.head_dim;
        part.coder.up.columns(part.offset + (kv_head - part.spec.first_head) * d, d)
    }

    fn mean<'b>(&self, part: &'b Part, kv_head: usize) -> &'b [f32] {
        let d = self.coded.head_dim;
        &part.coder.mean.as_slice()[part.offset + (kv_head - part.spec.first_head) * d..][..d]
    }

    /// Scores `[lines, columns]`, still to be divided by `√d`, of `queries: [d, lines]`: a line for
    /// each token and query head, `heads[0]` of them a token, of which `heads[1]` share a key.
    pub(super) fn scores(&self, queries: DMatrixView<'_, f32>, heads: [usize; 2]) -> DMatrix<f32> {
        let (lines, d) = (queries.ncols(), self.coded.head_dim);
        let absorbed: Vec<_> = self
            .parts(KvSide::Keys)
            .into_iter()
            .map(|part| {
                let own = self.lines(&part, lines, heads);
                let rank = part.coder.format.rank();
                let (mut queries_of, mut turning) = (DMatrix::zeros(rank, own.len()), DMatrix::zeros(d, own.len()));
                for (column, &(line, kv_head)) in own.iter().enumerate() {
                    let query = queries.column(line);
                    queries_of.set_column(column, &product(self.basis(&part, kv_head), query.as_view()).column(0));
                    turn(query.as_slice(), self.mean(&part, kv_head), turning.column_mut(column).as_mut_slice());
                }
                (part, own, queries_of, turning)
            })
            .collect();
        let mut scores = DMatrix::zeros(lines, self.len());
        scores.as_mut_slice().par_chunks_mut(lines * TILE).enumerate().for_each(|(index, scores)| {
            let first = self.tokens.start + index * TILE;
            let mut scores = DMatrixViewMut::from_slice(scores, lines, scores.len() / lines);
            for (part, own, queries, turning) in &absorbed {
                let z = coordinates(part, first..first + scores.ncols());
                let mut of_part = tr_product(queries.as_view(), z.as_view());
                of_part += tr_product(turning.as_view(), self.rope.angles(first..first + scores.ncols()));
                own.iter().enumerate().for_each(|(row, &(line, _))| scores.row_mut(line).copy_from(&of_part.row(row)));
            }
        });
        scores
    }

    /// Adds to `sums: [d, lines]` what `weights: [lines, columns]` make of values.
    pub(super) fn add_values(&self, weights: &DMatrix<f32>, heads: [usize; 2], sums: &mut DMatrix<f32>) {
        let lines = weights.nrows();
        for part in self.parts(KvSide::Values) {
            let own = self.lines(&part, lines, heads);
            let rank = part.coder.format.rank();
            let tiles = weights.as_slice().par_chunks(lines * TILE).enumerate().map(|(index, weights)| {
                let first = self.tokens.start + index * TILE;
                let weights = DMatrixView::from_slice(weights, lines, weights.len() / lines);
                let z = coordinates(&part, first..first + weights.ncols());
                let mut own_weights = DMatrix::zeros(weights.ncols(), own.len());
                own.iter().enumerate().for_each(|(column, &(line, _))| own_weights.column_mut(column).tr_copy_from(&weights.row(line)));
                product(z.as_view(), own_weights.as_view())
            });
            let of_part = tiles.reduce(|| DMatrix::zeros(rank, own.len()), |a, b| a + b);
            for (column, &(line, kv_head)) in own.iter().enumerate() {
                let mut sum = DMatrix::zeros(self.coded.head_dim, 1);
                tr_product_into(self.basis(&part, kv_head), of_part.column(column).as_view(), sum.as_view_mut());
                let all = weights.row(line).sum();
                let mean = self.mean(&part, kv_head);
                sums.column_mut(line).iter_mut().zip(&sum).zip(mean).for_each(|((y, sum), mean)| *y += sum + all * mean);
            }
        }
    }
}

/// What the mean adds to a score, by pair the factors of cosine and sine:
/// `q·R_t μ = Σ cos(tθ)·(q₁μ₁ + q₂μ₂) + sin(tθ)·(q₂μ₁ − q₁μ₂)`.
fn turn(query: &[f32], mean: &[f32], out: &mut [f32]) {
    let half = query.len() / 2;
    for (i, out) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let ([q, p], [m, n]) = ([query[i], query[i + half]], [mean[i], mean[i + half]]);
        *out = [q * m + p * n, p * m - q * n];
    }
}

/// Coordinates `[r, tokens]`.
fn coordinates(part: &Part, tokens: Range<usize>) -> DMatrix<f32> {
    let (format, words) = (&part.coder.format, part.coder.format.words());
    let mut z = DMatrix::zeros(format.rank(), tokens.len());
    format.decode(&part.words[tokens.start * words..tokens.end * words], z.as_mut_slice());
    z
}
