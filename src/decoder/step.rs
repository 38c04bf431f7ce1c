//! The plan of one token: every kernel of every layer, bound once.

use super::Model;
use super::sequence::Buffers;
use super::weights::Layer;
use crate::Result;
use crate::cache::{Cache, LayerCache};
use crate::gpu::Pass;
use crate::kernels::argmax::Argmax;
use crate::kernels::embed::Embed;
use crate::kernels::matvec::{Around, Matvec};
use crate::kernels::merge::{self, Merge};
use crate::kernels::prepare::Prepare;
use crate::kernels::score::{self, Block, Score};
use crate::kernels::values::Values;

/// Attention from the projection to the heads' outputs: the same kernels for one token and for many.
pub(super) struct Attention {
    prepare: Prepare,
    score: Score,
    values: Values,
    merge: Merge,
}

impl Attention {
    pub fn plan(model: &Model, layer: &Layer, cache: &LayerCache, b: &Buffers, many: bool) -> Result<Attention> {
        let (device, config, layout) = (&*model.device, &model.config, &layer.layout);
        let gains = layer.gains.as_ref();
        let key_up = layer.key_up.as_ref().map(|u| score::Up {
            turns: &b.turns,
            heads: &u.heads,
            up: &u.up,
            bias: u.bias.as_ref(),
            gain: gains.map(|g| &g[1]),
        });
        let value_up = layer.value_up.as_ref().map(|u| merge::Up { up: &u.up, bias: u.bias.as_ref() });
        Ok(Attention {
            prepare: Prepare::plan(
                device,
                config,
                layout,
                &b.projected,
                &b.turns,
                &b.queries,
                cache,
                layer.projection_bias.as_ref(),
                gains.map(|g| &g[0]),
            )?,
            score: Score::plan(device, config, layout, &b.queries, cache, &b.scores, b.columns, key_up, many)?,
            values: Values::plan(device, config, layout, &b.scores, b.columns, cache, &layer.value_groups, &b.sums, &b.weights)?,
            merge: Merge::plan(device, config, layout, &b.sums, &b.weights, &layer.query_heads, &b.attended, value_up)?,
        })
    }

    /// `tokens` at positions `first`, …, attended to in blocks of at most `block` tokens, each of which sees keys from `window` before it on.
    pub fn record(&self, pass: &mut Pass, first: u32, tokens: u32, block: u32, window: Option<usize>) {
        self.prepare.record(pass, first, tokens);
        let mut at = 0;
        while at < tokens {
            let start = window.map_or(0, |w| (first + at + 1).saturating_sub(w as u32));
            let block = Block { first: first + at, tokens: block.min(tokens - at), at, start };
            self.score.record(pass, block);
            self.values.record(pass, block);
            self.merge.record(pass, block);
            at += block.tokens;
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
    pub fn plan(model: &Model, cache: &Cache, b: &Buffers) -> Result<Step> {
        let (device, c) = (&*model.device, &model.config);
        let norm = |gain| Around { norm: Some((gain, c.rms_norm_eps, c.hidden_size)), ..Default::default() };
        let layers = model.layers.iter().zip(&cache.layers).map(|(layer, cache)| {
            Ok(LayerStep {
                projection: Matvec::plan(device, &layer.projection, &b.x, &b.projected, norm(&layer.attention_gain))?,
                attention: Attention::plan(model, layer, cache, b, false)?,
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

    /// The token in `tokens[0]`, at `position`.
    pub fn record(&self, pass: &mut Pass, position: u32) {
        self.embed.record(pass, 1);
        for layer in &self.layers {
            layer.projection.record(pass);
            layer.attention.record(pass, position, 1, 1, self.window);
            layer.output.record(pass);
            layer.gate_up.record(pass);
            layer.down.record(pass);
        }
        self.head.record(pass);
        self.argmax.record(pass);
    }
}
