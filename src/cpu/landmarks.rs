//! Landmarks of coded tokens, by which a token chooses what it reads ([`Selection`]).

use crate::kv::Selection;
use crate::linalg::tr_product;
use nalgebra::{DMatrix, DMatrixView};
use rayon::prelude::*;
use std::ops::Range;

/// Landmarks that are unpacked at a time.
const TILE: usize = 64;

/// The landmarks of all layers.
pub(super) struct Landmarks {
    selection: Selection,
    head_dim: usize,
    /// Words of a landmark.
    words: usize,
    /// By layer and key/value head, packed: `[chunks][words]`.
    layers: Vec<Vec<Vec<u32>>>,
}

impl Landmarks {
    /// Room for `capacity` tokens whose keys are `width` wide.
    pub(super) fn new(selection: Selection, layers: usize, width: usize, head_dim: usize, capacity: usize) -> Landmarks {
        let words = Selection::format(head_dim).words();
        let head = || vec![0; capacity.div_ceil(Selection::CHUNK) * words];
        Landmarks { selection, head_dim, words, layers: (0..layers).map(|_| (0..width / head_dim).map(|_| head()).collect()).collect() }
    }

    /// Makes the landmarks of the chunks that hold the tokens from `first` on, whose keys after
    /// RoPE in `layer` are the columns of `keys`.
    pub(super) fn make(&mut self, layer: usize, first: usize, keys: &DMatrix<f32>) {
        let (d, words, end) = (self.head_dim, self.words, first + keys.ncols());
        for chunk in first / Selection::CHUNK..end.div_ceil(Selection::CHUNK) {
            let from = (chunk * Selection::CHUNK).max(first) - first;
            let to = ((chunk + 1) * Selection::CHUNK).min(end) - first;
            let mean = keys.columns(from, to - from).column_mean();
            for (mean, head) in mean.as_slice().chunks_exact(d).zip(&mut self.layers[layer]) {
                Selection::pack(mean, &mut head[chunk * words..][..words]);
            }
        }
    }

    /// Whether a token reads less than all of `chunks`.
    pub(super) fn are_too_many(&self, chunks: &Range<usize>) -> bool {
        chunks.len() > self.selection.chunks()
    }

    /// For each key/value head, which of `chunks` the token with these `queries: [H·d, 1]` reads in
    /// `layer`; `None` where that is all of them.
    pub(super) fn choose(&self, layer: usize, queries: &DMatrix<f32>, chunks: Range<usize>) -> Option<Vec<Vec<usize>>> {
        if !self.are_too_many(&chunks) {
            return None;
        }
        let (heads, d) = (&self.layers[layer], self.head_dim);
        let group = queries.nrows() / d / heads.len(); // query heads that share a key/value head
        let format = Selection::format(d);
        let scale = 1.0 / (d as f32).sqrt();
        // Unpacked once for all query heads that share them, some at a time.
        let of_head = |(head, landmarks): (usize, &Vec<u32>)| {
            let queries = DMatrixView::from_slice(&queries.as_slice()[head * group * d..], d, group);
            let tiles = landmarks[chunks.start * self.words..chunks.end * self.words].par_chunks(TILE * self.words).map(|words| {
                let mut z = DMatrix::zeros(format.rank(), words.len() / self.words);
                format.decode(words, z.as_mut_slice());
                tr_product(z.rows(0, d), queries) * scale
            });
            let tiles: Vec<DMatrix<f32>> = tiles.collect();
            (0..group).map(|query| tiles.iter().flat_map(|tile| tile.column(query).data.into_slice()).copied().collect()).collect::<Vec<Vec<f32>>>()
        };
        let dots: Vec<Vec<f32>> = heads.par_iter().enumerate().flat_map_iter(of_head).collect();
        let mut chosen = self.selection.choose(&dots, heads.len());
        chosen.iter_mut().flatten().for_each(|chunk| *chunk += chunks.start);
        Some(chosen)
    }

    /// A layer's first `chunks` landmarks, `[chunks][heads][words]`.
    pub(super) fn save(&self, layer: usize, chunks: usize) -> Vec<u32> {
        let Landmarks { selection: _, head_dim: _, words, layers } = self;
        let landmark = |chunk: usize| layers[layer].iter().flat_map(move |head| &head[chunk * words..][..*words]);
        (0..chunks).flat_map(landmark).copied().collect()
    }

    /// Takes them over.
    pub(super) fn restore(&mut self, layer: usize, saved: &[u32]) {
        let (words, heads) = (self.words, &mut self.layers[layer]);
        for (chunk, landmarks) in saved.chunks_exact(words * heads.len()).enumerate() {
            let each = heads.iter_mut().zip(landmarks.chunks_exact(words));
            each.for_each(|(head, landmark)| head[chunk * words..][..words].copy_from_slice(landmark));
        }
    }

    /// Bytes allocated.
    pub(super) fn bytes(&self) -> usize {
        self.layers.iter().flatten().map(|head| head.capacity() * size_of::<u32>()).sum()
    }
}
