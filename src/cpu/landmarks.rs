//! Landmarks of coded tokens, by which a token chooses what it reads ([`Selection`]).

use super::RowType;
use super::rows::Rows;
use crate::linalg::tr_product;
use crate::rows::Selection;
use nalgebra::DMatrix;
use std::ops::Range;

/// The landmarks of all layers.
pub(super) struct Landmarks {
    selection: Selection,
    head_dim: usize,
    layers: Vec<Layer>,
}

struct Layer {
    /// A row for each chunk: the mean of its turned keys, `[H_kv·d]`.
    means: Rows,
    /// The least cosine between a landmark and its keys, by key/value head and chunk.
    cosines: Vec<Vec<f32>>,
}

impl Landmarks {
    /// Room for `capacity` tokens whose keys are `width` wide.
    pub(super) fn new(selection: Selection, layers: usize, width: usize, head_dim: usize, capacity: usize, row_type: RowType) -> Landmarks {
        let chunks = capacity.div_ceil(Selection::CHUNK);
        let layer = || Layer { means: Rows::new(width, chunks, row_type), cosines: vec![vec![0.0; chunks]; width / head_dim] };
        Landmarks { selection, head_dim, layers: (0..layers).map(|_| layer()).collect() }
    }

    /// Makes the landmarks of the chunks that hold the tokens from `first` on, whose turned keys in `layer` are the columns of `keys`.
    pub(super) fn make(&mut self, layer: usize, first: usize, keys: &DMatrix<f32>) {
        let Layer { means, cosines } = &mut self.layers[layer];
        let end = first + keys.ncols();
        for chunk in first / Selection::CHUNK..end.div_ceil(Selection::CHUNK) {
            let from = (chunk * Selection::CHUNK).max(first) - first;
            let to = ((chunk + 1) * Selection::CHUNK).min(end) - first;
            let some = keys.columns(from, to - from);
            let mean = some.column_mean();
            for (head, cosines) in cosines.iter_mut().enumerate() {
                let part = head * self.head_dim..(head + 1) * self.head_dim;
                let landmark = mean.rows_range(part.clone());
                let cosine = |key: nalgebra::DVectorView<f32>| {
                    let key = key.rows_range(part.clone());
                    key.dot(&landmark) / (key.norm() * landmark.norm()).max(f32::MIN_POSITIVE)
                };
                cosines[chunk] = some.column_iter().map(cosine).fold(f32::INFINITY, f32::min);
            }
            means.write(chunk, mean.as_slice());
        }
    }

    /// For each key/value head, which of `chunks` the token with these `queries: [H·d, 1]` reads in `layer`; `None` where that is all of them.
    pub(super) fn choose(&self, layer: usize, queries: &DMatrix<f32>, chunks: Range<usize>) -> Option<Vec<Vec<usize>>> {
        if chunks.len() <= self.selection.most() {
            return None;
        }
        let Layer { means, cosines } = &self.layers[layer];
        let mut landmarks = DMatrix::zeros(means.width(), chunks.len());
        means.read(chunks.start, landmarks.as_mut_slice());
        let (d, group) = (self.head_dim, queries.nrows() / means.width());
        let scale = 1.0 / (d as f32).sqrt();
        let of_head = |(kv, cosines): (usize, &Vec<f32>)| {
            let dots = |head: usize| tr_product(landmarks.rows(kv * d, d), queries.rows(head * d, d)).iter().map(|dot| dot * scale).collect();
            let dots: Vec<Vec<f32>> = (kv * group..(kv + 1) * group).map(dots).collect();
            self.selection.choose(&dots, &cosines[chunks.clone()]).into_iter().map(|chunk| chunks.start + chunk).collect()
        };
        Some(cosines.iter().enumerate().map(of_head).collect())
    }

    /// Bytes allocated.
    pub(super) fn bytes(&self) -> usize {
        let layer = |layer: &Layer| layer.means.bytes() + layer.cosines.iter().map(|line| line.capacity() * size_of::<f32>()).sum::<usize>();
        self.layers.iter().map(layer).sum()
    }
}
