//! How exact rows become coded ones: what a row is made from, less its mean, then its coordinates, then their codes.

use super::Model;
use super::sequence::Buffers;
use crate::Result;
use crate::cache::Cache;
use crate::gpu::Pass;
use crate::kernels::gather::Gather;
use crate::kernels::matmul::Matmul;
use crate::kernels::matvec::Around;
use crate::kernels::pack::Pack;
use crate::rows::Reach;
use std::ops::Range;

/// Every row of the model.
pub(super) struct Coding {
    /// By the last of their layers.
    layers: Vec<Vec<Row>>,
    /// Tokens that the buffers take at once.
    most: usize,
}

struct Row {
    /// By layer of the row.
    gathers: Vec<Gather>,
    down: Matmul,
    pack: Pack,
}

/// What the queries of one call read of coded rows, and which rows are coded meanwhile.
#[derive(Clone)]
pub(super) struct Turn {
    /// `None` in a dense cache.
    pub reach: Option<Reach>,
    pub code: Range<usize>,
    /// Whether before they are read, layer by layer.
    pub at_once: bool,
}

impl Coding {
    pub fn plan(model: &Model, cache: &Cache, b: &Buffers, most: usize) -> Result<Coding> {
        let (device, config) = (&*model.device, &model.config);
        let mut layers: Vec<Vec<Row>> = model.layers.iter().map(|_| Vec::new()).collect();
        let Some(coded) = &model.coded else { return Ok(Coding { layers, most }) };
        for ((spec, basis), place) in coded.specs.iter().zip(&coded.bases).zip(&coded.layout.places) {
            let gather = |layer: usize| Gather::plan(device, config, spec, layer, &cache.layers[layer], cache.slots, &b.turns, &basis.mean, &b.coded);
            let (store, words) = (&cache.stores[place.store], coded.layout.stores[place.store]);
            layers[spec.last_layer()].push(Row {
                gathers: (spec.first_layer..=spec.last_layer()).map(gather).collect::<Result<_>>()?,
                down: Matmul::plan(device, &basis.down, &b.coded, &b.coordinates, spec.format.rank(), Around::default())?,
                pack: Pack::plan(device, &spec.format, &b.coordinates, &basis.table, store, place.word, words)?,
            });
        }
        Ok(Coding { layers, most })
    }

    /// Codes the rows that end with `layer`, where that is due before (`reading`) or after they are read.
    pub fn record(&self, pass: &mut Pass, layer: usize, turn: &Turn, reading: bool) {
        if turn.at_once != reading {
            return;
        }
        for row in &self.layers[layer] {
            for first in turn.code.clone().step_by(self.most) {
                let (at, tokens) = (first as u32, (turn.code.end - first).min(self.most) as u32);
                row.gathers.iter().for_each(|gather| gather.record(pass, at, tokens));
                row.down.record(pass, tokens);
                row.pack.record(pass, at, tokens);
            }
        }
    }
}
