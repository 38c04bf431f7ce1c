//! The description of a model, from the settings of its `config.json`: one line or two for every
//! family, of what it does otherwise than Llama.

use super::design::{Activation, ClampedSwiglu, Design, Experts, HeadRows, LayerSpec, MlpSpec, NormKind, Norms, QkNorm};
use super::family::Architecture;
use super::fields::Fields;
use super::rope::Rope;
use crate::Result;
use serde_json::Value;

/// The sizes that descriptions depend on.
pub(super) struct Sizes {
    pub hidden: usize,
    pub layers: usize,
    pub head_dim: usize,
    /// The context that the model was trained for.
    pub trained: usize,
}

/// What all layers have in common.
///
/// # Errors
/// Those of [`Fields`].
pub(super) fn design(fields: &Fields, architecture: Architecture, sizes: &Sizes) -> Result<Design> {
    use Architecture::*;
    let activation = |name: &str, default: Activation| fields.activation(name, default);
    let scale = |name: &str| fields.number(name, Some(1.0)).map(|x| x as f32);
    let cap = |name: &str| fields.get(name).map(|_| fields.number(name, None).map(|x| x as f32)).transpose();
    let plain = MlpSpec { gate: None, ..MlpSpec::GATED };
    let llama = Design::llama(sizes.head_dim);
    let mlp = |spec: MlpSpec, default: Activation, bias: bool| {
        Ok::<_, crate::Error>(MlpSpec { activation: activation("hidden_act", default)?, bias, ..spec })
    };
    let biases = |attention: &str, by_default: bool, mlp_bias: &str| {
        let mlp = mlp(MlpSpec::GATED, Activation::Silu, fields.flag(mlp_bias, false)?)?;
        Ok::<_, crate::Error>(Design { attention_bias: fields.flag(attention, by_default)?, mlp, ..llama.clone() })
    };
    let usual = || biases("attention_bias", architecture == Qwen2, "mlp_bias");
    let gemma = || {
        fields.get("hidden_act");
        let mlp = MlpSpec { activation: activation("hidden_activation", Activation::GeluTanh)?, ..MlpSpec::GATED };
        let (attention_bias, embedding_scale) = (fields.flag("attention_bias", false)?, (sizes.hidden as f32).sqrt());
        Ok::<_, crate::Error>(Design { gains_less_one: true, embedding_scale, mlp, attention_bias, ..llama.clone() })
    };
    let gemma2 = || {
        Ok::<_, crate::Error>(Design {
            norms: Norms::BOTH,
            attention_scale: fields.number("query_pre_attn_scalar", None)?.powf(-0.5),
            attention_cap: cap("attn_logit_softcapping")?,
            logit_cap: cap("final_logit_softcapping")?,
            ..gemma()?
        })
    };
    Ok(match architecture {
        Llama | Mistral | Ministral | Ministral3 | Qwen2 | Smollm3 | SeedOss | Phi3 => usual()?,
        Qwen3 => Design { qk_norm: Some(QkNorm::HEADS), ..usual()? },
        Internlm3 if fields.get("qkv_bias").is_some() => biases("qkv_bias", false, "bias")?,
        Internlm3 => usual()?,
        Arcee => Design { mlp: mlp(plain, Activation::Relu2, fields.flag("mlp_bias", false)?)?, ..usual()? },
        Ernie45 => Design { head_rows: HeadRows::Interleaved, ..biases("use_bias", false, "use_bias")? },
        HunyuanDense => {
            // One expert is none.
            if fields.size("num_experts", Some(1))? > 1 {
                return Err(fields.unsupported("num_experts above 1 is not supported".into()));
            }
            Design { qk_norm: fields.flag("use_qk_norm", true)?.then_some(QkNorm::ROTATED), ..usual()? }
        }
        Exaone4 => Design { norms: Norms::AFTER, qk_norm: Some(QkNorm::HEADS), ..usual()? },
        Granite | GraniteMoe => Design {
            experts: (architecture == GraniteMoe).then(|| fields.experts("intermediate_size", true)).transpose()?,
            embedding_scale: scale("embedding_multiplier")?,
            residual_scale: scale("residual_multiplier")?,
            attention_scale: fields.number("attention_multiplier", Some(1.0))?,
            logit_scale: 1.0 / scale("logits_scaling")?,
            ..usual()?
        },
        Olmo2 | Olmo3 => Design { norms: Norms::AFTER, qk_norm: Some(QkNorm::PROJECTION), ..usual()? },
        Gemma => gemma()?,
        Gemma2 => gemma2()?,
        Vaultgemma => Design { norms: Norms { mlp: Some("pre_feedforward_layernorm"), ..Norms::BEFORE }, ..gemma2()? },
        Gemma3 => Design { qk_norm: Some(QkNorm::HEADS), ..gemma2()? },
        Glm | Helium => Design { head_rows: HeadRows::Interleaved, ..usual()? },
        Glm4 => {
            let norms = Norms { after_attention: Some("post_self_attn_layernorm"), after_mlp: Some("post_mlp_layernorm"), ..Norms::BEFORE };
            Design { head_rows: HeadRows::Interleaved, norms, ..usual()? }
        }
        Starcoder2 => {
            let bias = fields.flag("use_bias", true)?;
            let mlp = mlp(MlpSpec { up: "c_fc", down: "c_proj", ..plain }, Activation::GeluTanh, bias)?;
            Design { norm: NormKind::Layer, attention_bias: bias, mlp, ..llama }
        }
        Nemotron => {
            let mlp = mlp(plain, Activation::Relu2, fields.flag("mlp_bias", false)?)?;
            Design { norm: NormKind::Layer, gains_less_one: true, mlp, ..usual()? }
        }
        Mixtral => Design { experts: Some(fields.experts("intermediate_size", true)?), ..usual()? },
        Qwen2Moe => {
            let shared = Some(fields.size("shared_expert_intermediate_size", None)?);
            let experts = Experts { shared, ..fields.experts("moe_intermediate_size", fields.flag("norm_topk_prob", false)?)? };
            Design { experts: Some(experts), ..biases("qkv_bias", true, "mlp_bias")? }
        }
        Qwen3Moe => {
            let experts = fields.experts("moe_intermediate_size", fields.flag("norm_topk_prob", false)?)?;
            Design { qk_norm: Some(QkNorm::HEADS), experts: Some(experts), ..usual()? }
        }
        GptOss => {
            if fields.get("quantization_config").is_some_and(|quantisation| quantisation["quant_method"] != "mxfp4") {
                return Err(fields.unsupported("quantization_config of another quant_method than mxfp4 is not supported".into()));
            }
            let number = |name: &str, default: f64| fields.number(name, Some(default)).map(|x| x as f32);
            let swiglu = ClampedSwiglu { alpha: number("swiglu_alpha", 1.702)?, limit: number("swiglu_limit", 7.0)? };
            let experts = Experts { swiglu: Some(swiglu), ..fields.experts("intermediate_size", true)? };
            let attention_bias = fields.flag("attention_bias", true)?;
            Design { sinks: true, attention_bias, mlp: mlp(MlpSpec::GATED, Activation::Silu, true)?, experts: Some(experts), ..llama }
        }
        Olmoe => {
            let experts = fields.experts("intermediate_size", fields.flag("norm_topk_prob", false)?)?;
            Design { qk_norm: Some(QkNorm::PROJECTION), experts: Some(experts), ..usual()? }
        }
        Stablelm => Design { norm: NormKind::Layer, ..biases("use_qkv_bias", false, "mlp_bias")? },
    })
}

/// What a norm adds to what it takes the root of, by the name that the family has for it.
pub(super) fn epsilon(fields: &Fields, architecture: Architecture) -> Result<f32> {
    let (name, default) = match architecture {
        Architecture::Starcoder2 => ("norm_epsilon", 1e-5),
        Architecture::Nemotron => ("norm_eps", 1e-5),
        Architecture::Stablelm => ("layer_norm_eps", 1e-5),
        _ => ("rms_norm_eps", 1e-6),
    };
    fields.number(name, Some(default)).map(|x| x as f32)
}

/// Every layer's window and RoPE table, and the tables.
///
/// # Errors
/// Those of [`Fields`].
pub(super) fn layers(fields: &Fields, architecture: Architecture, sizes: &Sizes) -> Result<(Vec<LayerSpec>, Vec<Rope>)> {
    use Architecture::*;
    let windowed = windowed(fields, architecture, sizes.layers)?;
    let window = if windowed.contains(&true) { Some(fields.size("sliding_window", None)?) } else { None };
    // Without a window every layer of Exaone 4 knows positions.
    let positions = match architecture {
        Smollm3 => fields.rotating(sizes.layers)?,
        Exaone4 if window.is_some() => windowed.clone(),
        _ => vec![true; sizes.layers],
    };
    let table = |kind: &str| fields.rope(architecture, kind, sizes);
    let mut ropes: Vec<Rope> = Vec::new();
    let mut layers = Vec::new();
    for (windowed, positions) in windowed.into_iter().zip(positions) {
        let rope = match (positions, windowed) {
            (false, _) => Rope::none(),
            (true, true) => table("sliding_attention")?,
            (true, false) => table("full_attention")?,
        };
        let index = ropes.iter().position(|known| *known == rope).unwrap_or(ropes.len());
        if index == ropes.len() {
            ropes.push(rope);
        }
        layers.push(LayerSpec { window: window.filter(|_| windowed), rope: index });
    }
    Ok((layers, ropes))
}

/// Which layers have a window. Qwen's files name a window and switch it off; Llama has none
/// whatever its file says.
fn windowed(fields: &Fields, architecture: Architecture, layers: usize) -> Result<Vec<bool>> {
    use Architecture::*;
    let rule: Box<dyn Fn(usize) -> bool> = match architecture {
        Mistral | Ministral | Ministral3 | Phi3 | Starcoder2 | Mixtral => Box::new(|_| true),
        Qwen2 | Qwen3 | Qwen2Moe | Qwen3Moe if fields.flag("use_sliding_window", false)? => {
            // The first `max_window_layers` layers attend to everything.
            let full = fields.size("max_window_layers", Some(layers))?;
            Box::new(move |layer| layer >= full)
        }
        Smollm3 if fields.flag("use_sliding_window", false)? => {
            let rotating = fields.rotating(layers)?;
            Box::new(move |layer| !rotating[layer])
        }
        Gemma2 | Vaultgemma | GptOss => Box::new(|layer| layer % 2 == 0),
        Gemma3 | Olmo3 | Exaone4 => {
            let every = if architecture == Gemma3 { 6 } else { 4 };
            match fields.get("sliding_window_pattern") {
                // `LLLG`: three windowed layers, then one that sees everything.
                Some(Value::String(pattern)) if !pattern.is_empty() => {
                    let local: Vec<bool> = pattern.chars().map(|c| c == 'L').collect();
                    Box::new(move |layer| local[layer % local.len()])
                }
                _ => {
                    let every = fields.size("sliding_window_pattern", Some(every))?.max(1);
                    Box::new(move |layer| (layer + 1) % every != 0)
                }
            }
        }
        _ => return Ok(vec![false; layers]),
    };
    if fields.get("sliding_window").is_none() {
        return Ok(vec![false; layers]);
    }
    match fields.get("layer_types") {
        None => Ok((0..layers).map(rule).collect()),
        Some(types) => {
            let kind = |kind: &Value| match kind.as_str() {
                Some("sliding_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                _ => Err(fields.unsupported(format!("layer_types: {kind} is not supported (supported: full_attention, sliding_attention)"))),
            };
            let kinds = types.as_array().map_or(Ok(Vec::new()), |types| types.iter().map(kind).collect::<Result<Vec<_>>>())?;
            if kinds.len() != layers {
                return Err(fields.bad(format!("layer_types names {} layers of {layers}", kinds.len())));
            }
            Ok(kinds)
        }
    }
}

/// Whether the head is the embedding table where a file says nothing of it.
pub(super) fn tied(architecture: Architecture) -> bool {
    use Architecture::*;
    matches!(architecture, Gemma | Gemma2 | Gemma3 | Vaultgemma | Smollm3 | Ernie45 | Starcoder2)
}
