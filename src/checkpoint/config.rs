//! A model's geometry, in the words of Hugging Face's `config.json`; read from that file or from
//! GGUF metadata.
//!
//! What a file asks for is either honoured or refused by name: a setting that changes the
//! mathematics and is not implemented is never ignored.

use super::describe::{self, Sizes};
use super::design::{Design, HeadRows, LayerSpec};
use super::family::Architecture;
use super::fields::Fields;
use super::rope::Rope;
use crate::kv::Geometry;
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Tensors are stored otherwise than the family's files have them: `rows`, `gains`, both `plain`.
///
/// A GGUF file holds gains whole, and its rows have been brought into the decoders' order when they
/// are written again.
pub(crate) const STORED: &str = "lowkey_stored";

/// The geometry of a decoder-only transformer, and what its layers compute.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Config {
    /// The family.
    pub architecture: Architecture,
    /// Width of the residual stream, `D`.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads, `H`.
    pub num_attention_heads: usize,
    /// Key/value heads, `H_kv`; divides `H`.
    pub num_key_value_heads: usize,
    /// Width of a head, `d`; even.
    pub head_dim: usize,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// The context that the model was trained for.
    pub max_position_embeddings: usize,
    /// What norms add to what they take the root of.
    pub norm_eps: f32,
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// What the layers compute.
    pub design: Design,
    /// What differs between them.
    pub layers: Vec<LayerSpec>,
    /// RoPE's tables: each layer has one of them.
    pub ropes: Vec<Rope>,
    /// The token that starts a text.
    pub bos_token_id: Option<u32>,
    /// The tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
}

impl Config {
    /// A Llama of two layers, for tests: four heads on two, 16 wide.
    #[cfg(test)]
    pub(crate) fn example() -> Config {
        Config {
            architecture: Architecture::Llama,
            hidden_size: 64,
            intermediate_size: 96,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            vocab_size: 100,
            max_position_embeddings: 8192,
            norm_eps: 1e-5,
            tie_word_embeddings: true,
            design: Design::llama(16),
            layers: vec![LayerSpec { window: None, rope: 0 }; 2],
            ropes: vec![Rope::new(1e4, 16)],
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        }
    }

    /// What the cache depends on.
    pub fn geometry(&self) -> Geometry {
        Geometry { layers: self.num_hidden_layers, heads: self.num_attention_heads, kv_heads: self.num_key_value_heads, head_dim: self.head_dim }
    }

    /// Query heads per key/value head, `g`.
    pub fn group_size(&self) -> usize {
        self.geometry().group_size()
    }

    /// Every layer as `layer` says.
    pub fn with_layers(self, layer: LayerSpec) -> Config {
        Config { layers: vec![layer; self.num_hidden_layers], ..self }
    }

    /// The shortest of its layers' windows.
    pub fn window(&self) -> Option<usize> {
        self.layers.iter().filter_map(|layer| layer.window).min()
    }

    /// RoPE's angular frequencies of a layer, `[head_dim / 2]`, in a sequence with room for
    /// `context` tokens.
    pub fn rope_frequencies(&self, layer: usize, context: usize) -> Vec<f64> {
        self.ropes[self.layers[layer].rope].frequencies(self.head_dim, context)
    }

    /// What a layer's queries are multiplied by beside the rotation, those numbers that rotate and
    /// the others: everything in which the softmax's scale is not `1/√head_dim`, so that all that
    /// comes after can take it for that, and the square of what RoPE multiplies both sides by, so
    /// that keys are rotated and nothing else.
    pub fn query_scales(&self, layer: usize) -> [f32; 2] {
        let scale = self.design.attention_scale * (self.head_dim as f64).sqrt();
        [scale * self.ropes[self.layers[layer].rope].attention_factor().powi(2), scale].map(|x| x as f32)
    }

    /// Reads `config.json`'s value; `path` names the file in errors.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an architecture or setting that lowkey does not run,
    /// [`Error::Checkpoint`] for a number that is missing or makes no sense.
    pub fn from_json(value: &Value, path: &Path) -> Result<Config> {
        let Value::Object(map) = value else {
            return Err(Error::Checkpoint { path: path.into(), message: "is not a JSON object".into() });
        };
        let fields = Fields::new(map, path);
        let architecture = fields.architecture()?;

        let num_attention_heads = fields.size("num_attention_heads", None)?;
        let hidden_size = fields.size("hidden_size", None)?;
        // Only Llama's default is safe to rely on: the others' are one model's numbers.
        let default_kv_heads = (architecture == Architecture::Llama).then_some(num_attention_heads);
        let head_dim = match fields.get("head_dim") {
            None if num_attention_heads == 0 || !hidden_size.is_multiple_of(num_attention_heads) => {
                return Err(fields.bad(format!("hidden_size {hidden_size} cannot be divided among num_attention_heads {num_attention_heads}")));
            }
            None => hidden_size / num_attention_heads,
            Some(_) => fields.size("head_dim", None)?,
        };
        let num_hidden_layers = fields.size("num_hidden_layers", None)?;
        let max_position_embeddings = fields.size("max_position_embeddings", None)?;
        let sizes = Sizes { hidden: hidden_size, layers: num_hidden_layers, head_dim, trained: max_position_embeddings };
        bounded(path, "num_hidden_layers", num_hidden_layers, MOST_LAYERS)?;
        let mut design = describe::design(&fields, architecture, &sizes)?;
        if let Some(stored) = fields.get(STORED) {
            let plain = |part: &str| stored[part] == "plain";
            design.head_rows = if plain("rows") { HeadRows::Paired } else { design.head_rows };
            design.gains_less_one &= !plain("gains");
        }
        let (layers, ropes) = describe::layers(&fields, architecture, &sizes)?;
        let config = Config {
            architecture,
            hidden_size,
            intermediate_size: fields.size("intermediate_size", None)?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: fields.size("num_key_value_heads", default_kv_heads)?,
            head_dim,
            vocab_size: fields.size("vocab_size", None)?,
            max_position_embeddings,
            norm_eps: describe::epsilon(&fields, architecture)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings", describe::tied(architecture))?,
            design,
            layers,
            ropes,
            bos_token_id: fields.tokens("bos_token_id")?.first().copied(),
            eos_token_ids: fields.tokens("eos_token_id")?,
        };
        fields.refuse_unknown_mathematics()?;
        config.validate(path)?;
        Ok(config)
    }

    /// Takes the tokens that `generation_config.json` ends answers with, in the place of the
    /// config's: chat models often name their end of turn only there.
    pub(super) fn take_end_tokens(&mut self, generation: &Value, path: &Path) -> Result<()> {
        let Value::Object(map) = generation else { return Ok(()) };
        let ends = Fields::new(map, path).tokens("eos_token_id")?;
        if !ends.is_empty() {
            self.eos_token_ids = ends;
        }
        self.validate(path)
    }

    /// Checks that the numbers make sense together. Bounds are generous (a hundred times today's
    /// largest models); they keep products of sizes from overflowing.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the number.
    pub(super) fn validate(&self, path: &Path) -> Result<()> {
        let bad = |message: String| Err(Error::Checkpoint { path: path.into(), message });
        for (name, value, most) in [
            ("hidden_size", self.hidden_size, 1 << 20),
            ("intermediate_size", self.intermediate_size, 1 << 22),
            ("num_hidden_layers", self.num_hidden_layers, MOST_LAYERS),
            ("num_attention_heads", self.num_attention_heads, 1 << 14),
            ("num_key_value_heads", self.num_key_value_heads, 1 << 14),
            ("head_dim", self.head_dim, 1 << 13),
            ("vocab_size", self.vocab_size, 1 << 24),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 30),
        ] {
            bounded(path, name, value, most)?;
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return bad(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return bad(format!("head_dim is {}; RoPE needs an even number", self.head_dim));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return bad(format!("rms_norm_eps is {}; a number above 0 and below 1 is expected", self.norm_eps));
        }
        if let Some(fault) = self.ropes.iter().find_map(|rope| rope.fault(self.head_dim)) {
            return bad(fault);
        }
        if let Some(experts) = &self.design.experts {
            bounded(path, "the number of experts", experts.count, MOST_EXPERTS)?;
            bounded(path, "num_experts_per_tok", experts.chosen, experts.count)?;
            bounded(path, "the width of an expert", experts.width, 1 << 22)?;
            experts.shared.map_or(Ok(()), |width| bounded(path, "shared_expert_intermediate_size", width, 1 << 22))?;
            if let Some(limit) = experts.swiglu.map(|swiglu| swiglu.limit).filter(|limit| !(limit.is_finite() && *limit > 0.0)) {
                return bad(format!("swiglu_limit is {limit}; a number above 0 is expected"));
            }
        }
        let Design { attention_scale, attention_cap, embedding_scale, residual_scale, logit_scale, logit_cap, .. } = &self.design;
        let scales = [Some(*embedding_scale), Some(*residual_scale), Some(*logit_scale), *attention_cap, *logit_cap, Some(*attention_scale as f32)];
        if let Some(scale) = scales.into_iter().flatten().find(|scale| !(scale.is_finite() && *scale > 0.0)) {
            return bad(format!("a multiplier, scale or soft cap is {scale}; a number above 0 is expected"));
        }
        if self.window() == Some(0) {
            return bad("sliding_window is 0; leave it out where there is none".into());
        }
        for (name, id) in self.bos_token_id.iter().map(|id| ("bos_token_id", id)).chain(self.eos_token_ids.iter().map(|id| ("eos_token_id", id))) {
            if *id as usize >= self.vocab_size {
                return bad(format!("{name} is {id}, outside the vocabulary of {}", self.vocab_size));
            }
        }
        Ok(())
    }

    /// Bytes that a dense f16 cache grows by per token, over the whole model.
    pub fn dense_kv_bytes_per_token(&self) -> u64 {
        self.geometry().dense_bytes_per_token()
    }
}

/// The most layers of a model.
const MOST_LAYERS: usize = 1 << 12;

/// The most experts of a layer.
const MOST_EXPERTS: usize = 1 << 10;

/// Whether a size is a number from 1 to `most`.
fn bounded(path: &Path, name: &str, value: usize, most: usize) -> Result<()> {
    if (1..=most).contains(&value) {
        return Ok(());
    }
    Err(Error::Checkpoint { path: path.into(), message: format!("{name} is {value}; a number from 1 to {most} is expected") })
}
