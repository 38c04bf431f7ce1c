//! The plan of one token: every kernel of every layer, bound once.

use super::Model;
use super::coded::{CodedLayer, CodedRows};
use super::coding::Coding;
use super::scratch::Buffers;
use crate::Result;
use crate::cache::Cache;
use crate::gpu::Pass;
use crate::kernels::argmax::Argmax;
use crate::kernels::choose::Choose;
use crate::kernels::credit::Credit;
use crate::kernels::embed::Embed;
use crate::kernels::matvec::{Around, Matvec};
use crate::kernels::merge::{self, Merge};
use crate::kernels::prepare::{Prepare, Queries, Taken};
use crate::kernels::score::{Block, CodedKeys, Score};
use crate::kernels::values::{CodedValues, Values};
use crate::rows::{Call, Selection, Stores};

/// Attention from the projection to the heads' outputs: the same kernels for one token and for many.
pub(super) struct Attention {
    prepare: Prepare,
    choose: Option<(Selection, Choose)>,
    score: Score,
    values: Values,
    merge: Merge,
    /// Where tokens are forgotten.
    credit: Option<(Credit, Stores)>,
    /// Whether there are coded rows.
    coded: bool,
}

impl Attention {
    /// That of layer `index`, which reads `coded` rows, those of them that a token chooses where it goes through alone, or none.
    pub fn plan(model: &Model, index: usize, coded: Option<&CodedLayer>, cache: &Cache, b: &Buffers, many: bool) -> Result<Attention> {
        let (device, config, slots) = (&*model.device, &model.config, cache.slots);
        let attention = &super::attention(config);
        let (layer, exact) = (&model.layers[index], &cache.layers[index]);
        let select = b.select.filter(|_| !many);
        let chosen = select.map(|select| (select, &b.chosen));
        let queries = Queries { buffer: &b.queries, record: b.record, layer: index as u32 };
        let taken = coded.filter(|c| c.taken).map(|c| Taken { coded: &c.keys, table: &c.key_table, up: &c.key_up });
        let keys = coded.map(|c| CodedKeys {
            coded: &c.keys,
            rows: &cache.stores[c.keys.store],
            table: &c.key_table,
            up: &c.key_up,
            taken: c.taken,
            chosen,
        });
        let values = coded.map(|c| CodedValues { coded: &c.values, rows: &cache.stores[c.values.store], table: &c.value_table, chosen });
        let groups = coded.map_or(&layer.value_groups, |c| if chosen.is_some() { &c.chosen_groups } else { &c.value_groups });
        let up = coded.map(|c| merge::Up { coded: &c.values, heads: &c.query_heads, up: &c.value_up, means: &c.value_means });
        let choose = select.filter(|_| coded.is_some()).map(|select| {
            let choose = Choose::plan(device, attention, select, &b.queries, &cache.landmarks[index], &b.landmarks, &b.chosen)?;
            Ok((select, choose))
        });
        let credit =
            exact.side.as_ref().map(|side| Ok((Credit::plan(device, attention, &b.scores, b.columns, &b.weights, side, slots)?, side.stores)));
        Ok(Attention {
            credit: credit.transpose()?,
            coded: coded.is_some(),
            prepare: Prepare::plan(device, attention, &b.projected, &b.turns, queries, exact, slots, layer.added.as_ref(), layer.bias, taken)?,
            choose: choose.transpose()?,
            score: Score::plan(device, attention, &b.queries, exact, slots, &b.scores, b.columns, &b.turns, keys, many)?,
            values: Values::plan(device, attention, &b.scores, b.columns, exact, slots, values, groups, &b.sums, &b.weights)?,
            merge: Merge::plan(device, attention, &b.sums, &b.weights, &b.attended, up, many)?,
        })
    }

    /// Queries and exact rows of `tokens` at positions `first`, ….
    pub fn prepare(&self, pass: &mut Pass, first: u32, tokens: u32) {
        self.prepare.record(pass, first, tokens);
    }

    /// The tokens of `call`, in blocks of at most `block`, each of which sees keys from `window` before it on.
    pub fn attend(&self, pass: &mut Pass, block: u32, window: Option<usize>, call: &Call) {
        let (first, tokens) = (call.tokens.start as u32, call.tokens.len() as u32);
        for at in (0..tokens).step_by(block as usize) {
            let mut block = Block::new(first + at, block.min(tokens - at), at, window, call.reach);
            if let Some((_, stores)) = &self.credit {
                block = block.beside((stores.held(call.evicted) + stores.vague_columns()) as u32, self.coded);
            }
            if let Some((selection, choose)) = &self.choose {
                block = block.choosing(*selection);
                choose.record(pass, &block);
            }
            self.score.record(pass, &block);
            self.values.record(pass, &block);
            self.merge.record(pass, &block);
            if let Some((credit, _)) = &self.credit {
                credit.record(pass, &block);
            }
        }
    }
}

struct LayerStep {
    projection: Matvec,
    attention: Attention,
    output: Matvec,
    gate_up: Matvec,
    down: Matvec,
}

/// One token through the model.
pub(super) struct Step {
    embed: Embed,
    layers: Vec<LayerStep>,
    head: Matvec,
    argmax: Argmax,
    window: Option<usize>,
}

impl Step {
    pub fn plan(model: &Model, coded: Option<&CodedRows>, cache: &Cache, b: &Buffers) -> Result<Step> {
        let (device, c) = (&*model.device, &model.config);
        let norm = |gain| Around { norm: Some((gain, c.rms_norm_eps, c.hidden_size)), ..Default::default() };
        let layers = model.layers.iter().enumerate().map(|(index, layer)| {
            Ok(LayerStep {
                projection: Matvec::plan(device, &layer.projection, &b.x, &b.projected, norm(&layer.attention_gain))?,
                attention: Attention::plan(model, index, coded.map(|coded| &coded.layers[index]), cache, b, false)?,
                output: Matvec::plan(
                    device,
                    &layer.output,
                    &b.attended,
                    &b.x,
                    Around { residual: true, bias: layer.output_bias.as_ref(), ..Default::default() },
                )?,
                gate_up: Matvec::plan(device, &layer.gate_up, &b.x, &b.gated, Around { gated: true, ..norm(&layer.mlp_gain) })?,
                down: Matvec::plan(device, &layer.down, &b.gated, &b.x, Around { residual: true, ..Default::default() })?,
            })
        });
        let head = model.ends.head.as_ref().unwrap_or(&model.ends.embedding);
        Ok(Step {
            embed: Embed::plan(device, &model.ends.embedding, &b.tokens, &b.x)?,
            layers: layers.collect::<Result<_>>()?,
            head: Matvec::plan(device, head, &b.x, &b.logits, norm(&model.ends.final_gain))?,
            argmax: Argmax::plan(device, &b.logits, &b.token, c.vocab_size as u32)?,
            window: c.sliding_window,
        })
    }

    /// The token in `tokens[0]`, that of `call`.
    pub fn record(&self, pass: &mut Pass, coding: &Coding, call: &Call) {
        self.embed.record(pass, 1);
        for (index, layer) in self.layers.iter().enumerate() {
            layer.projection.record(pass);
            layer.attention.prepare(pass, call.tokens.start as u32, 1);
            coding.record(pass, index, call, true);
            layer.attention.attend(pass, 1, self.window, call);
            coding.record(pass, index, call, false);
            layer.output.record(pass);
            layer.gate_up.record(pass);
            layer.down.record(pass);
        }
        self.end(pass);
    }

    /// What follows the last layer: logits, and the largest.
    pub fn end(&self, pass: &mut Pass) {
        self.head.record(pass);
        self.argmax.record(pass);
    }
}
