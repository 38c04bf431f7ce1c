//! RoPE's settings in a `config.json`: `rope_theta` and `rope_scaling`, or both in the newer
//! `rope_parameters`, of all layers or by their kind.

use super::describe::Sizes;
use super::family::Architecture;
use super::fields::Fields;
use super::rope::{Rope, RopeScaling, Temperature};
use crate::{Error, Result};
use serde_json::{Map, Value};

/// What such an object may hold. What is not among them may change frequencies.
const KNOWN: [&str; 19] = [
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "short_factor",
    "long_factor",
    "finetuned",
    "llama_4_scaling_beta",
];

impl<'a> Fields<'a> {
    /// The table of layers of a kind, `sliding_attention` or `full_attention`.
    pub(super) fn rope(&self, architecture: Architecture, kind: &str, sizes: &Sizes) -> Result<Rope> {
        use Architecture::{Gemma3, Glm, Glm4, Nemotron, Olmo3, Phi3, Stablelm};
        let (by_kind, local) = (matches!(architecture, Gemma3 | Olmo3), kind == "sliding_attention");
        let partial = matches!(architecture, Glm | Glm4 | Nemotron | Phi3 | Stablelm);
        let top = self.number("rope_theta", Some(if architecture == Gemma3 { 1e6 } else { 1e4 }))?;
        let local_theta = if architecture == Gemma3 { self.number("rope_local_base_freq", Some(1e4))? } else { top };
        let whole = match architecture {
            Glm | Glm4 | Nemotron => 0.5,
            Stablelm => 0.25,
            _ => 1.0,
        };
        let part = self.number("partial_rotary_factor", Some(whole))?;
        if part != 1.0 && !partial {
            return Err(self.unsupported(format!("partial_rotary_factor {part} is not supported in this family of models")));
        }
        let plain = |theta: f64, part: f64| Rope::new(theta, (sizes.head_dim as f64 * part) as usize);
        let (name, value) = match (self.get("rope_parameters"), self.get("rope_scaling")) {
            (Some(new), Some(old)) if !old.as_object().is_some_and(Map::is_empty) => {
                self.refuse_disagreeing(old, new)?;
                ("rope_scaling", old)
            }
            (Some(value), _) => ("rope_parameters", value),
            // In files of this age what is scaled is what sees everything.
            (None, Some(_)) if by_kind && local => return Ok(plain(local_theta, part)),
            (None, Some(value)) => ("rope_scaling", value),
            (None, None) => return Ok(plain(if by_kind && local { local_theta } else { top }, part)),
        };
        let object = |value: &'a Value| value.as_object().ok_or_else(|| self.bad(format!("{name} is {value}; an object is expected")));
        let mut map = object(value)?;
        if map.values().any(Value::is_object) {
            if !by_kind {
                return Err(self.unsupported(format!("{name}: frequencies that differ by layer are not supported in this family of models")));
            }
            map = object(map.get(kind).ok_or_else(|| self.bad(format!("{name} lacks {kind}")))?)?;
        }
        if let Some((key, value)) = map.iter().find(|(key, value)| !KNOWN.contains(&key.as_str()) && *key != "alpha" && !value.is_null()) {
            return Err(self.unsupported(format!("{name}: {key} {value} is not supported")));
        }
        let inner = self.inner(map);
        if std::ptr::eq(map, object(value)?) {
            self.refuse_outer(name, &inner)?;
        }
        refuse_untyped(name, &inner)?;
        // In proportional RoPE it is how many pairs rotate, in any family.
        let proportional = inner.get("rope_type").and_then(Value::as_str) == Some("proportional");
        let part_here = inner.number("partial_rotary_factor", Some(1.0))?;
        if part_here != 1.0 && !partial && !proportional {
            return Err(self.unsupported(format!("{name}: partial_rotary_factor {part_here} is not supported in this family of models")));
        }
        let within = |error: Error| match error {
            Error::Checkpoint { path, message } => Error::Checkpoint { path, message: format!("{name}: {message}") },
            Error::Unsupported { path, message } => Error::Unsupported { path, message: format!("{name}: {message}") },
            other => other,
        };
        scaled(self, &inner, (architecture, sizes), plain(top, part)).map_err(within)
    }

    /// Where a file has both spellings transformers takes the older one and nothing of the newer.
    /// That is the model where the newer scales nothing, or says the same.
    fn refuse_disagreeing(&self, old: &Value, new: &Value) -> Result<()> {
        let usual = |key: &str| (key == "rope_theta").then(|| Value::from(1e4));
        let said = |key: &str| old.get(key).filter(|value| !value.is_null()).or_else(|| self.get(key)).cloned().or_else(|| usual(key));
        let same = |a: Option<Value>, b: &Value| a.is_some_and(|a| a == *b || a.as_f64().is_some() && a.as_f64() == b.as_f64());
        let plain = matches!(kind(new).and_then(Value::as_str), None | Some("default"));
        let newer = new.as_object().into_iter().flatten().filter(|(key, value)| !value.is_null() && !TYPE.contains(&key.as_str()));
        let agree = newer.into_iter().all(|(key, value)| same(said(key), value)) && (plain || kind(old) == kind(new));
        if agree {
            return Ok(());
        }
        Err(self.unsupported(format!("rope_scaling {old} and rope_parameters {new} disagree; leave the one in that the model was trained with")))
    }

    /// Refuses settings beside `rope_parameters` that say otherwise than those in it.
    fn refuse_outer(&self, name: &str, inner: &Fields) -> Result<()> {
        for key in ["rope_theta", "partial_rotary_factor"] {
            if let (Some(outer), Some(own)) = (self.get(key), inner.get(key))
                && outer.as_f64() != own.as_f64()
            {
                return Err(
                    self.unsupported(format!("{key} is {outer}, and in {name} it is {own}; leave the one in that the model was trained with"))
                );
            }
        }
        Ok(())
    }
}

/// The two names that the type has.
const TYPE: [&str; 2] = ["rope_type", "type"];

/// The type of scaling that an object names.
fn kind(object: &Value) -> Option<&Value> {
    TYPE.into_iter().find_map(|name| object.get(name).filter(|value| !value.is_null()))
}

/// Refuses numbers that no type makes use of, and types that are two.
fn refuse_untyped(name: &str, inner: &Fields) -> Result<()> {
    let [newer, older] = TYPE.map(|key| inner.get(key));
    if let (Some(newer), Some(older)) = (newer, older)
        && newer != older
        && (newer != "longrope" || older != "su")
    {
        return Err(inner.unsupported(format!("{name}: rope_type is {newer}, and type is {older}; leave the right one in")));
    }
    if newer.or(older).is_some_and(|kind| kind != "default") {
        return Ok(());
    }
    for key in ["factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "attention_factor", "beta_fast", "beta_slow"] {
        if let Some(value) = inner.get(key).filter(|value| value.as_f64() != Some(1.0)) {
            return Err(
                inner.unsupported(format!("{name}: {key} is {value}, and no rope_type says what for; name the type (linear, dynamic, yarn, …)"))
            );
        }
    }
    Ok(())
}

/// `plain` as `inner` scales it; `top` is what stands around that.
fn scaled(top: &Fields, inner: &Fields, (architecture, sizes): (Architecture, &Sizes), plain: Rope) -> Result<Rope> {
    let theta = inner.number("rope_theta", Some(plain.theta))?;
    let dims = match inner.get("partial_rotary_factor") {
        Some(_) => (sizes.head_dim as f64 * inner.number("partial_rotary_factor", None)?) as usize,
        None => plain.dims,
    };
    let kind = inner.get("rope_type").or(inner.get("type")).map_or(Some("default"), Value::as_str);
    let factor = || inner.number("factor", None);
    let original = |default: Option<f64>| {
        let outside = top.get("original_max_position_embeddings").map(|_| top.number("original_max_position_embeddings", None)).transpose()?;
        inner.number("original_max_position_embeddings", outside.or(default))
    };
    let trained = sizes.trained as f64;
    let mut rope = Rope::new(theta, dims);
    let alpha = inner.number("alpha", Some(0.0))?;
    rope.scaling = match kind {
        Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: factor()? },
        Some("llama3") => RopeScaling::Llama3 {
            factor: factor()?,
            low_freq_factor: inner.number("low_freq_factor", None)?,
            high_freq_factor: inner.number("high_freq_factor", None)?,
            original_max_position_embeddings: inner.number("original_max_position_embeddings", None)?,
        },
        // HunYuan calls dynamic what is the same for every length.
        Some("dynamic") if architecture == Architecture::HunyuanDense && alpha > 0.0 && dims > 2 => {
            rope.theta *= alpha.powf(dims as f64 / (dims as f64 - 2.0));
            RopeScaling::None
        }
        Some("dynamic") => RopeScaling::Dynamic { factor: factor()?, trained },
        Some("yarn") => {
            let factor = factor()?;
            let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
            let [scale, all] = ["mscale", "mscale_all_dim"].map(|name| inner.number(name, Some(0.0)));
            let (scale, all) = (scale?, all?);
            let usual = if scale != 0.0 && all != 0.0 { magnitude(scale) / magnitude(all) } else { magnitude(1.0) };
            RopeScaling::Yarn {
                factor,
                beta_fast: inner.number("beta_fast", Some(32.0))?,
                beta_slow: inner.number("beta_slow", Some(1.0))?,
                truncate: inner.flag("truncate", true)?,
                original_max_position_embeddings: original(Some(trained))?,
                attention_factor: inner.number("attention_factor", Some(usual))?,
            }
        }
        Some("longrope" | "su") => {
            let original = original(Some(trained))?;
            let factor = inner.number("factor", Some(trained / original))?;
            let usual = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
            RopeScaling::Longrope {
                short: inner.numbers("short_factor")?,
                long: inner.numbers("long_factor")?,
                original_max_position_embeddings: original,
                attention_factor: inner.number("attention_factor", Some(usual))?,
            }
        }
        Some("proportional") => {
            rope.dims = sizes.head_dim;
            RopeScaling::Proportional { factor: inner.number("factor", Some(1.0))?, rotating: dims / 2 }
        }
        other => {
            let other = other.unwrap_or("that is no string");
            let known = "default, linear, llama3, dynamic, yarn, longrope, proportional";
            return Err(top.unsupported(format!("the type {other} is not supported (supported: {known})")));
        }
    };
    let beta = inner.number("llama_4_scaling_beta", Some(0.0))?;
    match (beta != 0.0, architecture) {
        (false, _) => {}
        (true, Architecture::Ministral3) => rope.temperature = Some(Temperature { beta, period: original(Some(trained))? }),
        (true, _) => return Err(top.unsupported(format!("llama_4_scaling_beta {beta} is not supported in this family of models"))),
    }
    if alpha != 0.0 && architecture != Architecture::HunyuanDense {
        return Err(top.unsupported(format!("alpha {alpha} is not supported in this family of models")));
    }
    Ok(rope)
}
