//! Coded rows: which of them a query reads, and what they stand for.

use super::columns::Run;
use super::eviction::Eviction;
use super::landmarks::Landmarks;
use super::rope::Rope;
use crate::kv::{Coder, Energy, KvSide, LatentKind, LatentSet, LatentSpec, Schedule, Selection};
use crate::linalg::tr_product;
use nalgebra::DMatrix;
use std::ops::Range;
use std::sync::Arc;

/// Coded rows of a sequence.
pub(super) struct Coded {
    pub(super) set: Arc<LatentSet>,
    pub(super) schedule: Schedule,
    pub(super) head_dim: usize,
    /// By row: `[capacity][words]`.
    pub(super) words: Vec<Vec<u32>>,
    pub(super) landmarks: Option<Landmarks>,
    /// Candidates and what is left of evicted tokens, where the sequence evicts.
    pub(super) eviction: Option<Eviction>,
    /// What bases hold of the rows that were coded here.
    pub(super) energy: Energy,
}

impl Coded {
    /// The runs of `tokens` that `queries` read, columns from `column` on, and which key/value head
    /// reads which.
    pub(super) fn runs(&self, layer: usize, queries: &DMatrix<f32>, tokens: Range<usize>, column: usize) -> (Vec<Run>, Option<Vec<Vec<usize>>>) {
        let chosen = match &self.landmarks {
            Some(landmarks) if queries.ncols() == 1 => landmarks.choose(layer, queries, Selection::range(tokens.start, tokens.end)),
            _ => None,
        };
        let Some(chosen) = chosen else { return (self.between(layer, tokens, column), None) };
        let mut chunks = chosen.concat();
        chunks.sort_unstable();
        chunks.dedup();
        let mut next = column;
        let run = |&chunk: &usize| {
            let within = (chunk * Selection::CHUNK).max(tokens.start)..((chunk + 1) * Selection::CHUNK).min(tokens.end);
            next += within.len();
            Run { column: next - within.len(), tokens: within }
        };
        let runs = chunks.iter().map(run).collect();
        let heads = chosen.iter().map(|head| head.iter().filter_map(|chunk| chunks.binary_search(chunk).ok()).collect()).collect();
        (runs, Some(heads))
    }

    /// The runs of `tokens` that have nothing but a row: all in one, or those between the
    /// candidates.
    fn between(&self, layer: usize, tokens: Range<usize>, column: usize) -> Vec<Run> {
        let candidates = match &self.eviction {
            None => return vec![Run { tokens, column }],
            Some(eviction) if eviction.beside_rows() => eviction.positions(layer),
            // Without rows there is nothing between.
            Some(_) => return Vec::new(),
        };
        let (mut runs, mut start, mut next) = (Vec::new(), tokens.start, column);
        for end in candidates.into_iter().chain([tokens.end]) {
            if start < end {
                runs.push(Run { tokens: start..end, column: next });
                next += end - start;
            }
            start = end + 1;
        }
        runs
    }

    /// The coordinates of the tokens of `runs`, `[r, tokens]`.
    fn coordinates(&self, row: usize, runs: &[Run]) -> DMatrix<f32> {
        let (coder, words) = (&self.set.coders[row], self.set.coders[row].format.words());
        let packed = |tokens: Range<usize>| &self.words[row][tokens.start * words..tokens.end * words];
        if coder.format.block() == 1 {
            return coder.coordinates(&runs.iter().flat_map(|run| packed(run.tokens.clone())).copied().collect::<Vec<u32>>());
        }
        let parts: Vec<DMatrix<f32>> = runs
            .iter()
            .map(|run| {
                // Whole blocks, of which a run may begin or end within one.
                let block = coder.format.block();
                let first = self.schedule.whole(run.tokens.start);
                let end = self.schedule.whole(run.tokens.end + block - 1);
                coder.coordinates(packed(first..end)).columns(run.tokens.start - first, run.tokens.len()).into_owned()
            })
            .collect();
        let mut all = DMatrix::zeros(coder.format.rank(), parts.iter().map(DMatrix::ncols).sum());
        let mut next = 0;
        for part in parts {
            all.columns_mut(next, part.ncols()).copy_from(&part);
            next += part.ncols();
        }
        all
    }

    /// Fills the columns of `runs`, which begin at `first`, of both sides, keys and values, with
    /// what their rows stand for.
    pub(super) fn rebuild(&self, layer: usize, runs: &[Run], first: usize, mut sides: [&mut DMatrix<f32>; 2], rope: &Rope) {
        let count = sides[0].ncols() - first;
        for (row, (spec, coder)) in self.set.specs.iter().zip(&self.set.coders).enumerate() {
            let offsets = [KvSide::Keys, KvSide::Values].map(|side| spec.offset(layer, side, self.head_dim));
            if offsets == [None, None] {
                continue;
            }
            let z = self.coordinates(row, runs);
            let (head, height) = (spec.first_head * self.head_dim, spec.kv_heads * self.head_dim);
            for (side, (offset, all)) in offsets.into_iter().zip(&mut sides).enumerate() {
                let Some(offset) = offset else { continue };
                let mut y = tr_product(coder.up.columns(offset, height), z.as_view());
                for run in runs {
                    let mut y = y.columns_mut(run.column - first, run.tokens.len());
                    y += means(coder, spec, offset..offset + height, run.tokens.clone(), rope);
                    if side == 0 && spec.kind != LatentKind::PostRopeKeys {
                        rope.rotate(y, run.tokens.start);
                    }
                }
                all.view_mut((head, first), (height, count)).copy_from(&y);
            }
        }
    }
}

/// What a part of a row is about, for some tokens: the mean, which rotates as the keys do where
/// they are coded after RoPE.
pub(super) fn means(coder: &Coder, spec: &LatentSpec, part: Range<usize>, tokens: Range<usize>, rope: &Rope) -> DMatrix<f32> {
    let mean = coder.mean.rows_range(part);
    let mut means = DMatrix::from_fn(mean.len(), tokens.len(), |i, _| mean[i]);
    if spec.kind == LatentKind::PostRopeKeys {
        rope.rotate(&mut means, tokens.start);
    }
    means
}
