//! Settings of a `config.json`, one by one: what they are, what they are without being named, and
//! what lowkey does not do.

use super::family::{Architecture, RopeScaling};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// A JSON object's fields, read with errors that name them.
pub(super) struct Fields<'a> {
    pub(super) map: &'a Map<String, Value>,
    pub(super) path: &'a Path,
}

impl Fields<'_> {
    pub(super) fn bad(&self, message: String) -> Error {
        Error::Checkpoint { path: self.path.into(), message }
    }

    pub(super) fn unsupported(&self, message: String) -> Error {
        Error::Unsupported { path: self.path.into(), message }
    }

    /// A field that is there and not null.
    pub(super) fn get(&self, name: &str) -> Option<&Value> {
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
            (None, Some(class)) => Architecture::ALL.into_iter().find(|architecture| architecture.names().1 == class),
            (None, None) => return Err(self.bad("names no model: it has neither \"model_type\" nor \"architectures\"".into())),
        };
        match found {
            Some(architecture) if class.is_none_or(|class| class == architecture.names().1) => Ok(architecture),
            _ => {
                let name = class.or(model_type).unwrap_or_default();
                let known: Vec<_> = Architecture::ALL.iter().map(|architecture| architecture.names().1).collect();
                Err(self.unsupported(format!("the architecture {name} is not supported (supported: {})", known.join(", "))))
            }
        }
    }

    /// Settings that change what a layer computes and that no supported family needs.
    pub(super) fn refuse_unknown_mathematics(&self) -> Result<()> {
        if let Some(activation) = self.get("hidden_act")
            && !matches!(activation.as_str(), Some("silu" | "swish"))
        {
            return Err(self.unsupported(format!("hidden_act {activation} is not supported (supported: silu)")));
        }
        if self.flag("mlp_bias", false)? {
            return Err(self.unsupported("mlp_bias is not supported".into()));
        }
        if self.flag("rope_interleaved", false)? {
            return Err(self.unsupported("rope_interleaved is not supported".into()));
        }
        if self.number("partial_rotary_factor", Some(1.0))? != 1.0 {
            return Err(self.unsupported("partial_rotary_factor other than 1 is not supported".into()));
        }
        if let Some(quantisation) = self.get("quantization_config") {
            let method = quantisation["quant_method"].as_str().unwrap_or("quantization_config");
            return Err(self.unsupported(format!("weights quantised by {method} are not supported; take the float checkpoint, or a GGUF of it")));
        }
        Ok(())
    }

    /// `rope_theta` and `rope_scaling`, or both in the newer `rope_parameters`.
    pub(super) fn rope(&self) -> Result<(f64, RopeScaling)> {
        let top = self.number("rope_theta", Some(10_000.0))?;
        let (name, value) = match (self.get("rope_parameters"), self.get("rope_scaling")) {
            (Some(value), _) => ("rope_parameters", value),
            (None, Some(value)) => ("rope_scaling", value),
            (None, None) => return Ok((top, RopeScaling::None)),
        };
        let Value::Object(map) = value else { return Err(self.bad(format!("{name} is {value}; an object is expected"))) };
        let inner = Fields { map, path: self.path };
        let theta = inner.number("rope_theta", Some(top))?;
        if inner.number("partial_rotary_factor", Some(1.0))? != 1.0 {
            return Err(self.unsupported(format!("{name}: partial_rotary_factor other than 1 is not supported")));
        }
        let within = |error: Error| match error {
            Error::Checkpoint { path, message } => Error::Checkpoint { path, message: format!("{name}: {message}") },
            other => other,
        };
        let kind = inner.get("rope_type").or(inner.get("type")).map_or(Some("default"), Value::as_str);
        let scaling = match kind {
            Some("default") if map.values().any(Value::is_object) => {
                return Err(self.unsupported(format!("{name}: frequencies that differ by layer are not supported")));
            }
            Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: inner.number("factor", None).map_err(within)? },
            Some("llama3") => RopeScaling::Llama3 {
                factor: inner.number("factor", None).map_err(within)?,
                low_freq_factor: inner.number("low_freq_factor", None).map_err(within)?,
                high_freq_factor: inner.number("high_freq_factor", None).map_err(within)?,
                original_max_position_embeddings: inner.number("original_max_position_embeddings", None).map_err(within)?,
            },
            other => {
                let other = other.unwrap_or("that is no string");
                return Err(self.unsupported(format!("{name}: the type {other} is not supported (supported: default, linear, llama3)")));
            }
        };
        Ok((theta, scaling))
    }

    /// One window for all layers, or none. Qwen's files name a window and switch it off; Llama has
    /// none whatever its file says.
    pub(super) fn sliding_window(&self, architecture: Architecture, layers: usize) -> Result<Option<usize>> {
        let switched_on = match architecture {
            Architecture::Llama => false,
            Architecture::Mistral => true,
            Architecture::Qwen2 | Architecture::Qwen3 => self.flag("use_sliding_window", false)?,
        };
        if !switched_on || self.get("sliding_window").is_none() {
            return Ok(None);
        }
        let sliding: Vec<bool> = match self.get("layer_types").and_then(Value::as_array) {
            Some(types) => types.iter().map(|kind| kind == "sliding_attention").collect(),
            None if architecture == Architecture::Mistral => vec![true],
            // The first `max_window_layers` layers attend to everything.
            None => {
                let full = self.size("max_window_layers", Some(layers))?;
                (0..layers).map(|layer| layer >= full).collect()
            }
        };
        match (sliding.contains(&true), sliding.contains(&false)) {
            (true, true) => Err(self.unsupported("a sliding window in some layers but not in all is not supported".into())),
            (true, false) => Ok(Some(self.size("sliding_window", None)?)),
            (false, _) => Ok(None),
        }
    }
}
