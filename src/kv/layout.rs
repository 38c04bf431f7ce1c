//! Where latents stand: those that are read together stand together, so that a kernel reads all of
//! a side from one buffer.

use super::{KvSide, LatentSet, LatentSpec, Source};

/// Where one row's words begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// In which store.
    pub store: usize,
    /// Words into a token's.
    pub word: usize,
}

/// The stores of a model's latents.
///
/// Rows that one side of one layer reads share a store, token by token. A row over several layers
/// is in one store for all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Words of a token in each store.
    pub stores: Vec<usize>,
    /// By row.
    pub places: Vec<Place>,
}

impl Layout {
    /// Groups `specs`, the rows of a model of `layers` layers.
    pub fn new(specs: &[LatentSpec], layers: usize, head_dim: usize) -> Layout {
        // By row, the least row that is read together with it.
        let mut first: Vec<usize> = (0..specs.len()).collect();
        for layer in 0..layers {
            for side in [KvSide::Keys, KvSide::Values] {
                let read: Vec<usize> = LatentSet::sources(specs, layer, side, head_dim).iter().map(|source| first[source.row]).collect();
                let least = read.iter().copied().min().unwrap_or(0);
                first.iter_mut().filter(|row| read.contains(row)).for_each(|row| *row = least);
            }
        }
        let (mut stores, mut store_of) = (Vec::new(), vec![0; specs.len()]);
        let places = specs.iter().zip(&first).enumerate().map(|(row, (spec, &first))| {
            if first == row {
                store_of[row] = stores.len();
                stores.push(0);
            }
            let store = store_of[first];
            let word = stores[store];
            stores[store] += spec.format.words();
            Place { store, word }
        });
        let places = places.collect();
        Layout { stores, places }
    }

    /// The store that these sources of one side of one layer are read from.
    pub fn store(&self, sources: &[Source]) -> usize {
        self.places[sources[0].row].store
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::{Format, LatentKind};

    #[test]
    fn rows_that_are_read_together_share_a_store() {
        let row = |first_layer, layers, kind, first_head| LatentSpec {
            first_layer,
            layers,
            kind,
            first_head,
            kv_heads: 1,
            format: Format::half(1 + first_head),
        };
        let specs = [
            row(0, 1, LatentKind::PreRopeKeys, 0),
            row(1, 1, LatentKind::PreRopeKeys, 0),
            row(0, 2, LatentKind::Values, 0),
            row(0, 1, LatentKind::PreRopeKeys, 1),
            row(1, 1, LatentKind::PreRopeKeys, 1),
            row(0, 2, LatentKind::Values, 1),
            row(2, 1, LatentKind::Both, 0),
            row(2, 1, LatentKind::Both, 1),
        ];
        let layout = Layout::new(&specs, 3, 16);
        let place = |store, word| Place { store, word };
        assert_eq!(layout.stores, [24; 4]);
        assert_eq!(layout.places, [place(0, 0), place(1, 0), place(2, 0), place(0, 8), place(1, 8), place(2, 8), place(3, 0), place(3, 8)]);
        // Keys of two layers that share a row with one another's values are all one.
        let chained = [row(0, 1, LatentKind::PreRopeKeys, 0), row(0, 2, LatentKind::PreRopeKeys, 1), row(1, 1, LatentKind::Both, 0)];
        assert_eq!(Layout::new(&chained, 2, 16).stores, [32]);
    }
}
