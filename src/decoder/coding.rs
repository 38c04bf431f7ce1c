//! What becomes of exact rows whose time is up. Where a token leaves a latent: what the row is made
//! from, less its mean, then its coordinates, then their codes. Where tokens are evicted: which
//! take a slot, and what is left of the others.

use super::Model;
use super::latents::Latents;
use super::scratch::{Buffers, CHUNK};
use crate::Result;
use crate::cache::Cache;
use crate::gpu::{Pass, Shape, Tensor, pad};
use crate::kernels::Fusion;
use crate::kernels::blocks::Blocks;
use crate::kernels::energy::Energy;
use crate::kernels::evict::{Evict, MOST_LEAVING, Moves};
use crate::kernels::exact::ExactRows;
use crate::kernels::gather::{Gather, Source};
use crate::kernels::landmark::Landmark;
use crate::kernels::matmul::Matmul;
use crate::kernels::move_rows::MoveRows;
use crate::kernels::pack::{Pack, PackedRow};
use crate::kernels::project::{Project, Slice};
use crate::kernels::stripe::Stripe;
use crate::kv::{Call, KvSide, LatentKind, Scale, Slots, Stores};
use std::ops::Range;

/// Every row of the model.
pub(super) struct Coding {
    /// By the last of their layers.
    layers: Vec<Vec<Row>>,
    /// By layer, where tokens choose among latents.
    landmarks: Vec<Landmark>,
    /// By layer, where tokens are evicted.
    eviction: Vec<Eviction>,
    sinks: usize,
    /// Tokens that the buffers take at once.
    most: usize,
}

/// How tokens leave one layer's window for its slots, or for what is left of evicted tokens.
struct Eviction {
    evict: Evict,
    move_rows: MoveRows,
    stores: Stores,
}

impl Eviction {
    /// In every layer; none where nothing is evicted.
    fn plan(model: &Model, cache: &Cache) -> Result<Vec<Eviction>> {
        let (device, config) = (&*model.device, &model.config);
        let attention = &super::attention_shape(config);
        let Some(first) = cache.layers.first().and_then(|layer| layer.eviction.as_ref()) else { return Ok(Vec::new()) };
        let moves = Moves::new(device, &first.stores, 2 * config.num_key_value_heads * pad(config.head_dim))?;
        let mut layers = Vec::new();
        for layer in &cache.layers {
            if let (Some(eviction), Some(move_rows)) = (&layer.eviction, MoveRows::plan(device, attention, layer, &moves)?) {
                let evict = Evict::plan(device, eviction, cache.slots, cache.sketched.as_ref(), &moves)?;
                layers.push(Eviction { evict, move_rows, stores: eviction.stores });
            }
        }
        Ok(layers)
    }

    /// The tokens of `leaving`, when `evicted` have left before them.
    fn record(&self, pass: &mut Pass, leaving: Range<usize>, mut evicted: usize) {
        for start in leaving.clone().step_by(MOST_LEAVING) {
            let now = start..leaving.end.min(start + MOST_LEAVING);
            self.evict.record(pass, &now, evicted);
            evicted += now.len();
            self.move_rows.record(pass, evicted - self.stores.held(evicted));
        }
    }
}

/// What codes one row.
pub(super) struct Row {
    /// By layer of the row.
    gathers: Vec<Gather>,
    down: Down,
    codes: Codes,
}

/// What takes coordinates to codes.
enum Codes {
    /// Token by token.
    Rows(Pack),
    /// Block by block of tokens.
    Blocks(Blocks, Stripe),
}

/// What takes a row's vector to its coordinates.
enum Down {
    Matrix(Matmul),
    /// By layer of the row; and what the basis holds.
    Up(Vec<Project>, Energy),
}

/// What rows are coded from, and where: see [`Scratch`](super::scratch::Scratch).
#[derive(Clone, Copy)]
pub(super) struct CodingBuffers<'a> {
    /// The exact rows of all layers, in their slots.
    pub exact: &'a [ExactRows],
    pub slots: Slots,
    /// RoPE's tables: a layer has one of them.
    pub ropes: &'a [Tensor],
    pub vectors: &'a Tensor,
    pub coordinates: &'a Tensor,
    pub scales: &'a Tensor,
}

impl Row {
    /// Codes `row` into its place in `stores`.
    pub fn plan(model: &Model, coded: &Latents, row: usize, stores: &[Tensor], b: CodingBuffers) -> Result<Row> {
        let (device, config) = (&*model.device, &model.config);
        let attention = &super::attention_shape(config);
        let (spec, basis, place) = (&coded.specs[row], &coded.bases[row], coded.layout.places[row]);
        let (format, layers) = (&spec.format, spec.first_layer..=spec.last_layer());
        let vectors = &b.vectors.view(Shape::padded(CHUNK, spec.width(config.head_dim)));
        let coordinates = &b.coordinates.view(Shape::dense(CHUNK, format.rank()));
        let gather = |layer: usize| {
            let from = Source { attention, rows: &b.exact[layer], slots: b.slots, rope_table: &b.ropes[config.layers[layer].rope] };
            Gather::plan(device, from, spec, layer, &basis.mean, vectors)
        };
        let project = |layer: usize| {
            let side = if spec.kind == LatentKind::Values { KvSide::Values } else { KvSide::Keys };
            let read = &coded.layers[layer];
            let up = if side == KvSide::Values { &read.value_up } else { &read.key_up };
            let slice = Slice {
                at: spec.offset(layer, side, config.head_dim).unwrap_or(0),
                heads: spec.kv_heads,
                head_dim: config.head_dim,
                onto: layer > spec.first_layer,
            };
            Project::plan(device, vectors, up, coordinates, slice)
        };
        let to = PackedRow { store: &stores[place.store], at: place.word };
        Ok(Row {
            gathers: layers.clone().map(gather).collect::<Result<_>>()?,
            down: match &basis.down {
                Some(down) => Down::Matrix(Matmul::plan(device, down, vectors, coordinates, Fusion::default())?),
                None => Down::Up(layers.map(project).collect::<Result<_>>()?, Energy::plan(device, vectors, coordinates, &coded.energies, row)?),
            },
            codes: match format.scale {
                Scale::Blocks(shape) => {
                    let scales = &b.scales.view(Shape::dense(1, Blocks::numbers(format, shape, CHUNK)));
                    let blocks = Blocks::plan(device, format, shape, coordinates, scales)?;
                    Codes::Blocks(blocks, Stripe::plan(device, format, shape, coordinates, scales, to)?)
                }
                _ => Codes::Rows(Pack::plan(device, format, coordinates, &basis.table, to)?),
            },
        })
    }

    /// The tokens from position `first` on.
    pub fn record(&self, pass: &mut Pass, first: u32, tokens: u32) {
        self.gathers.iter().for_each(|gather| gather.record(pass, first, tokens));
        match &self.down {
            Down::Matrix(matmul) => matmul.record(pass, tokens),
            Down::Up(layers, energy) => {
                layers.iter().for_each(|project| project.record(pass, tokens));
                energy.record(pass, tokens);
            }
        }
        match &self.codes {
            Codes::Rows(pack) => pack.record(pass, first, tokens),
            Codes::Blocks(blocks, stripe) => {
                blocks.record(pass, tokens);
                stripe.record(pass, first, tokens);
            }
        }
    }
}

impl Coding {
    pub fn plan(model: &Model, coded: Option<&Latents>, cache: &Cache, b: &Buffers, most: usize) -> Result<Coding> {
        let mut layers: Vec<Vec<Row>> = model.layers.iter().map(|_| Vec::new()).collect();
        let sinks = cache.slots.sinks as usize;
        let eviction = Eviction::plan(model, cache)?;
        let Some(coded) = coded else { return Ok(Coding { layers, landmarks: Vec::new(), eviction, sinks, most }) };
        let (device, config) = (&*model.device, &model.config);
        let attention = &super::attention_shape(config);
        let buffers = CodingBuffers {
            exact: &cache.layers,
            slots: cache.slots,
            ropes: &b.ropes,
            vectors: &b.vectors,
            coordinates: &b.coordinates,
            scales: &b.scales,
        };
        for (row, spec) in coded.specs.iter().enumerate() {
            layers[spec.last_layer()].push(Row::plan(model, coded, row, &cache.stores, buffers)?);
        }
        let landmark = |(exact, landmarks)| Landmark::plan(device, attention, exact, cache.slots, landmarks);
        let landmarks = cache.layers.iter().zip(&cache.landmarks).map(landmark).collect::<Result<_>>()?;
        Ok(Coding { layers, landmarks, eviction, sinks, most })
    }

    /// Codes the latents that end with `layer`.
    ///
    /// `reading`: whether this is called before they are read, or after.
    pub fn record(&self, pass: &mut Pass, layer: usize, call: &Call, reading: bool) {
        if call.code_first != reading {
            return;
        }
        let leaving = call.leaving(self.sinks);
        if let Some(landmark) = self.landmarks.get(layer) {
            landmark.record(pass, leaving.clone());
        }
        if let Some(eviction) = self.eviction.get(layer) {
            eviction.record(pass, leaving, call.evicted);
        }
        for row in &self.layers[layer] {
            for first in call.code.clone().step_by(self.most) {
                row.record(pass, first as u32, (call.code.end - first).min(self.most) as u32);
            }
        }
    }
}
