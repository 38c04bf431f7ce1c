//! Settings of a `config.json`, one by one: what they are, what they are without being named, and
//! what lowkey does not do.

use super::design::{Activation, Experts};
use super::family::Architecture;
use super::foreign;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

/// Settings that change what some family computes, with the number that changes nothing, if there
/// is one; true and false are 1 and 0. Where a description has not asked for one, its family is not
/// known to have it.
const MATHEMATICS: [(&str, Option<f64>); 27] = [
    ("attention_bias", Some(0.0)),
    ("mlp_bias", Some(0.0)),
    ("use_bias", Some(0.0)),
    ("use_qkv_bias", Some(0.0)),
    ("lm_head_bias", Some(0.0)),
    ("partial_rotary_factor", Some(1.0)),
    ("rope_interleaved", Some(0.0)),
    ("rope_local_base_freq", None),
    ("no_rope_layers", None),
    ("embedding_multiplier", Some(1.0)),
    ("residual_multiplier", Some(1.0)),
    ("attention_multiplier", None),
    ("logits_scaling", Some(1.0)),
    ("logit_scale", Some(1.0)),
    ("attn_logit_softcapping", None),
    ("final_logit_softcapping", None),
    ("query_pre_attn_scalar", None),
    ("attn_temperature_tuning", Some(0.0)),
    ("qk_layernorm", Some(0.0)),
    ("use_qk_norm", Some(0.0)),
    ("use_parallel_residual", Some(0.0)),
    ("use_bidirectional_attention", Some(0.0)),
    ("clip_qkv", None),
    ("alibi", Some(0.0)),
    ("num_local_experts", Some(0.0)),
    ("num_experts", Some(0.0)),
    ("attention_chunk_size", None),
];

/// A JSON object's fields, read with errors that name them.
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: &'a Path,
    /// Those that have been asked for.
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Fields<'a> {
    /// The fields of `map`, which is in the file `path`.
    pub(super) fn new(map: &'a Map<String, Value>, path: &'a Path) -> Fields<'a> {
        Fields { map, path, read: RefCell::default() }
    }

    /// Those of an object in the same file.
    pub(super) fn inner(&self, map: &'a Map<String, Value>) -> Fields<'a> {
        Fields::new(map, self.path)
    }

    pub(super) fn bad(&self, message: String) -> Error {
        Error::Checkpoint { path: self.path.into(), message }
    }

    pub(super) fn unsupported(&self, message: String) -> Error {
        Error::Unsupported { path: self.path.into(), message }
    }

    /// A field that is there and not null.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(name.into());
        self.map.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn size(&self, name: &str, default: Option<usize>) -> Result<usize> {
        match (self.get(name), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.bad(format!("lacks {name}"))),
            (Some(value), _) => {
                value.as_u64().and_then(|n| usize::try_from(n).ok()).ok_or_else(|| self.bad(format!("{name} is {value}; a whole number is expected")))
            }
        }
    }

    pub(super) fn number(&self, name: &str, default: Option<f64>) -> Result<f64> {
        match (self.get(name), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.bad(format!("lacks {name}"))),
            (Some(value), _) => value.as_f64().ok_or_else(|| self.bad(format!("{name} is {value}; a number is expected"))),
        }
    }

    pub(super) fn numbers(&self, name: &str) -> Result<Vec<f64>> {
        let value = self.get(name).ok_or_else(|| self.bad(format!("lacks {name}")))?;
        let list = value.as_array().map(|list| list.iter().filter_map(Value::as_f64).collect::<Vec<_>>());
        list.filter(|list| value.as_array().map(Vec::len) == Some(list.len())).ok_or_else(|| self.bad(format!("{name} is no list of numbers")))
    }

    pub(super) fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.bad(format!("{name} is {value}; true or false is expected"))),
        }
    }

    /// One token id or a list of them; negative ones, by which some files mean "none", are left
    /// out.
    pub(super) fn tokens(&self, name: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(name) else { return Ok(Vec::new()) };
        let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let mut ids = Vec::new();
        for value in values {
            let id = value.as_i64().ok_or_else(|| self.bad(format!("{name} holds {value}; a token id is expected")))?;
            if id >= 0 {
                ids.push(u32::try_from(id).map_err(|_| self.bad(format!("{name} holds {id}, which is no token id")))?);
            }
        }
        Ok(ids)
    }

    pub(super) fn architecture(&self) -> Result<Architecture> {
        let class = self.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        let model_type = self.get("model_type").and_then(Value::as_str);
        let found = match (model_type, class) {
            (Some(name), _) => Architecture::from_model_type(name),
            (None, Some(class)) => Architecture::from_class(class),
            (None, None) => return Err(self.bad("names no model: it has neither \"model_type\" nor \"architectures\"".into())),
        };
        // transformers has InternLM 3 run, and saved, as a Llama.
        let as_llama = |class: &str| found == Some(Architecture::Internlm3) && class == "LlamaForCausalLM";
        // The same model, saved without its head.
        let with_head = |class: &str| class.strip_suffix("Model").map_or(class.into(), |family| format!("{family}ForCausalLM"));
        match found {
            Some(architecture) if class.is_none_or(|class| Architecture::from_class(&with_head(class)) == Some(architecture) || as_llama(class)) => {
                Ok(architecture)
            }
            _ => {
                let name = class.or(model_type).unwrap_or_default();
                let known: Vec<_> = Architecture::classes().collect();
                Err(self.unsupported(format!("the architecture {name} is not supported (supported: {})", known.join(", "))))
            }
        }
    }

    /// An activation by the name that transformers has for it.
    pub(super) fn activation(&self, name: &str, default: Activation) -> Result<Activation> {
        let Some(value) = self.get(name) else { return Ok(default) };
        Ok(match value.as_str() {
            Some("silu" | "swish") => Activation::Silu,
            Some("gelu") => Activation::Gelu,
            Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Activation::GeluTanh,
            Some("relu2") => Activation::Relu2,
            _ => return Err(self.unsupported(format!("{name} {value} is not supported (supported: silu, gelu, gelu_pytorch_tanh, relu2)"))),
        })
    }

    /// Which layers rotate queries and keys: 1 in `no_rope_layers`, or all but every so manieth.
    pub(super) fn rotating(&self, layers: usize) -> Result<Vec<bool>> {
        if self.get("no_rope_layers").is_some() {
            let list = self.numbers("no_rope_layers")?;
            let message = format!("no_rope_layers names {} layers of {layers}", list.len());
            return if list.len() == layers { Ok(list.into_iter().map(|rotates| rotates != 0.0).collect()) } else { Err(self.bad(message)) };
        }
        let every = self.size("no_rope_layer_interval", Some(4))?.max(1);
        Ok((0..layers).map(|layer| (layer + 1) % every != 0).collect())
    }

    /// The experts of a layer, where `width` names the setting of their inner width, and weights of
    /// those that are chosen sum to one by default or not.
    pub(super) fn experts(&self, width: &str, normalised: bool) -> Result<Experts> {
        let counts = ["num_experts", "num_local_experts"].map(|name| self.get(name).map(|_| self.size(name, None)));
        let count = match counts {
            [Some(count), None] | [None, Some(count)] => count?,
            [Some(one), Some(other)] if one.as_ref().ok() == other.as_ref().ok() => one?,
            [Some(one), Some(other)] => return Err(self.bad(format!("num_experts is {} and num_local_experts {}", one?, other?))),
            [None, None] => return Err(self.bad("lacks num_experts".into())),
        };
        if self.size("decoder_sparse_step", Some(1))? != 1 || self.get("mlp_only_layers").is_some_and(|layers| layers.as_array() != Some(&Vec::new()))
        {
            return Err(self.unsupported("decoder_sparse_step and mlp_only_layers, layers without experts among others, are not supported".into()));
        }
        let chosen = self.size("num_experts_per_tok", None)?;
        Ok(Experts { count, chosen, width: self.size(width, None)?, normalised, swiglu: None, shared: None })
    }

    /// Refuses settings that change what a layer computes and that nobody has asked for, and
    /// weights that are stored in other packages' ways.
    pub(super) fn refuse_unknown_mathematics(&self) -> Result<()> {
        let read = self.read.borrow().clone();
        for (name, neutral) in MATHEMATICS {
            let Some(value) = self.get(name).filter(|_| !read.contains(name)) else { continue };
            let number = value.as_f64().or(value.as_bool().map(|flag| f64::from(u8::from(flag))));
            if number.is_none() || number != neutral {
                return Err(self.unsupported(format!("{name} {value} is not supported in this family of models")));
            }
        }
        if let Some(quantisation) = self.get("quantization_config").filter(|_| !read.contains("quantization_config")) {
            let method = quantisation["quant_method"].as_str().unwrap_or("quantization_config");
            return Err(self.unsupported(foreign::quantised(method)));
        }
        // Its bits and group size; the name has no other meaning in transformers.
        if self.get("quantization").is_some() {
            return Err(self.unsupported(foreign::quantised("MLX")));
        }
        Ok(())
    }
}
