//! Attention, from the projection to the heads' outputs: what of a step is bound to one sequence's
//! cache.

use super::Model;
use super::coding::Coding;
use super::latents::{LatentLayer, Latents};
use super::scratch::Buffers;
use crate::Result;
use crate::cache::Cache;
use crate::gpu::Pass;
use crate::kernels::AttentionBuffers;
use crate::kernels::accumulate::Accumulate;
use crate::kernels::columns::{Block, List};
use crate::kernels::flash::{self, Flash};
use crate::kernels::merge::{self, Merge};
use crate::kernels::prepare::{Absorbed, Added, Prepare};
use crate::kernels::rebuild::Rebuild;
use crate::kernels::score::{CodedKeys, Score};
use crate::kernels::select::Select;
use crate::kernels::sketch::Sketch;
use crate::kernels::values::{CodedValues, Values};
use crate::kv::{Call, Evicted, Selection, Stores};

/// Attention of all layers, of one token or of many: the same kernels.
pub(super) struct AttentionPlan {
    layers: Vec<Attention>,
    /// Tokens attended to together.
    block: u32,
    /// How far back a token sees, by layer, where that is limited.
    windows: Vec<Option<usize>>,
}

impl AttentionPlan {
    /// Plans attention to `cache`, which holds `coded` latents or none.
    pub fn plan(model: &Model, coded: Option<&Latents>, cache: &Cache, b: &Buffers, many: bool) -> Result<AttentionPlan> {
        let layer = |index: usize| Attention::plan(model, index, coded.map(|coded| &coded.layers[index]), cache, b, many);
        Ok(AttentionPlan {
            layers: (0..model.layers.len()).map(layer).collect::<Result<_>>()?,
            block: if many { b.block as u32 } else { 1 },
            windows: model.config.layers.iter().map(|layer| layer.window).collect(),
        })
    }

    /// Attention of the tokens of `call` in a layer, and what is coded of it before or after.
    pub fn record(&self, pass: &mut Pass, layer: usize, coding: &Coding, call: &Call) {
        let attention = &self.layers[layer];
        attention.prepare.record(pass, call.tokens.start as u32, call.tokens.len() as u32);
        coding.record(pass, layer, call, true);
        attention.attend(pass, self.block, self.windows[layer], call);
        coding.record(pass, layer, call, false);
    }
}

/// Attention of one layer.
struct Attention {
    prepare: Prepare,
    /// What a token that goes through alone chooses of latents.
    select: Option<(Selection, Select)>,
    /// Where coded keys are rebuilt.
    rebuild: Option<Rebuild>,
    /// Where something is left of evicted tokens in a sketch.
    sketch: Option<Sketch>,
    weighing: Weighing,
    merge: Merge,
    /// Where tokens are evicted.
    accumulate: Option<(Accumulate, Stores)>,
}

/// How columns are weighed, and their values summed.
enum Weighing {
    /// In one pass.
    Flash(Flash),
    /// Scores first, then values.
    Apart(Score, Values),
}

impl Attention {
    /// Plans attention of layer `index`, which reads `coded` latents or none.
    ///
    /// Where tokens go through alone they may choose among them.
    fn plan(model: &Model, index: usize, coded: Option<&LatentLayer>, cache: &Cache, b: &Buffers, many: bool) -> Result<Attention> {
        let (device, attention) = (&*model.device, &super::layer_attention(&model.config, index));
        let (layer, exact) = (&model.layers[index], &cache.layers[index]);
        let b = &AttentionBuffers { head_sinks: layer.head_sinks.clone(), ..b.of_layer(&model.config, index) };
        let select = cache.select.filter(|_| !many && coded.is_some());
        let evicted = exact.eviction.as_ref().and_then(|eviction| eviction.listed.as_ref());
        let list = match select {
            Some(select) => Some(List { tokens: &b.chosen, by_head: if select.by.shared() { 0 } else { select.tokens } }),
            None => evicted.map(|tokens| List { tokens, by_head: 0 }),
        };
        let absorbed = coded.filter(|c| c.absorbed).map(|c| Absorbed { coded: &c.keys, table: &c.key_table, up: &c.key_up });
        let keys = coded.map(|c| CodedKeys {
            coded: &c.keys,
            rows: &cache.stores[c.keys.store],
            table: &c.key_table,
            up: &c.key_up,
            absorbed: c.absorbed,
            list,
        });
        let values = coded.map(|c| CodedValues {
            coded: &c.values,
            rows: &cache.stores[c.values.store],
            table: &c.value_table,
            groups: if list.is_some_and(|list| list.by_head > 0) { &c.chosen_groups } else { &c.value_groups },
            list,
        });
        let up = coded.map(|c| merge::Up { coded: &c.values, heads: &c.query_heads, up: &c.value_up, means: &c.value_means });
        let select = select.map(|by| Ok((by, Select::plan(device, attention, b, by, &cache.landmarks[index])?)));
        let rebuild = keys.filter(|keys| !keys.absorbed).map(|keys| Rebuild::plan(device, attention, b, keys, cache.slots));
        let added = layer.added.as_ref().map(|numbers| Added { numbers, bias: layer.bias });
        let accumulate = Accumulate::plan(device, attention, b, exact)?;
        let weighing = if !many && flash::fits(device, attention, exact, keys.zip(values)) {
            Weighing::Flash(Flash::plan(device, attention, b, exact, keys.zip(values))?)
        } else {
            let score = Score::plan(device, attention, b, exact, keys, many)?;
            Weighing::Apart(score, Values::plan(device, attention, b, exact, &layer.value_groups, values)?)
        };
        Ok(Attention {
            prepare: Prepare::plan(device, (attention, index), b, exact, added, absorbed)?,
            select: select.transpose()?,
            rebuild: rebuild.transpose()?,
            sketch: Sketch::plan(device, attention, b, exact)?,
            weighing,
            merge: Merge::plan(device, attention, b, up, many)?,
            accumulate: accumulate.zip(exact.eviction.as_ref().map(|eviction| eviction.stores)),
        })
    }

    /// What a block of tokens reads.
    fn columns(&self, block: Block, evicted: usize) -> Block {
        let block = match &self.select {
            Some((selection, _)) => block.choosing(*selection),
            None => block,
        };
        let Some((_, stores)) = &self.accumulate else { return block };
        let held = stores.held(evicted);
        let coded = if stores.evicted_as == Evicted::Rows { evicted - held } else { 0 };
        block.beside((held + stores.evicted_columns()) as u32).listed(coded as u32)
    }

    /// Attends for the tokens of `call`, in blocks of at most `block`.
    ///
    /// Each sees keys from `window` before it on.
    fn attend(&self, pass: &mut Pass, block: u32, window: Option<usize>, call: &Call) {
        let (first, tokens) = (call.tokens.start as u32, call.tokens.len() as u32);
        let blocks = (0..tokens).step_by(block as usize).map(|at| {
            let whole = Block::new(first + at, block.min(tokens - at), at, window, call.reach);
            self.columns(whole, call.evicted)
        });
        if let Some(sketch) = &self.sketch {
            sketch.record(pass);
        }
        // Keys are rebuilt once for all blocks.
        let of_all = self.columns(Block::new(first, tokens, 0, window, call.reach), call.evicted);
        for (index, block) in blocks.enumerate() {
            if let Some((_, select)) = &self.select {
                select.record(pass, &block);
            }
            if let Some(rebuild) = self.rebuild.as_ref().filter(|_| index == 0) {
                rebuild.record(pass, of_all.start, of_all.coded);
            }
            match &self.weighing {
                Weighing::Flash(flash) => flash.record(pass, &block),
                Weighing::Apart(score, values) => {
                    score.record(pass, &block, block.start - of_all.start);
                    values.record(pass, &block);
                }
            }
            self.merge.record(pass, &block);
            if let Some((accumulate, _)) = &self.accumulate {
                accumulate.record(pass, &block);
            }
        }
    }
}
