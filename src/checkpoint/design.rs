//! What families of models do differently: the description that both decoders read.
//!
//! What differs from layer to layer is a [`LayerSpec`], all else a [`Design`]. The tensors that
//! norms and projections are stored as have the names of the family's own files.

/// Where one layer looks, and how it knows positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct LayerSpec {
    /// Keys so far before a query, or farther, are not attended to; `None` for all.
    pub window: Option<usize>,
    /// Which of the model's RoPE tables is its own.
    pub rope: usize,
}

/// What all layers of a model have in common, and what stands before and after them.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Design {
    /// The norm before and after attention and MLP, and before the head.
    pub norm: NormKind,
    /// Where it stands.
    pub norms: Norms,
    /// Whether gains are stored less one: `x / rms(x) · (1 + w)` (Gemma).
    pub gains_less_one: bool,
    /// The norm of queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// Whether query, key and value projections have a bias.
    pub attention_bias: bool,
    /// What the softmax has scores multiplied by; `1 / √head_dim` in most.
    pub attention_scale: f64,
    /// Scores `s` become `c·tanh(s / c)` before the softmax (Gemma 2).
    pub attention_cap: Option<f32>,
    /// Whether every query head has a number that joins its softmax's sum, as the score of a key
    /// whose value is zero (attention sinks as gpt-oss has them).
    pub sinks: bool,
    /// The MLP, or what each expert is.
    pub mlp: MlpSpec,
    /// Of which there are several, if so, in every layer.
    pub experts: Option<Experts>,
    /// What embeddings are multiplied by.
    pub embedding_scale: f32,
    /// What attention and MLP are multiplied by as they are added to the residual stream.
    pub residual_scale: f32,
    /// What logits are multiplied by.
    pub logit_scale: f32,
    /// Logits `y` become `c·tanh(y / c)`.
    pub logit_cap: Option<f32>,
    /// How queries' and keys' rows are stored.
    pub head_rows: HeadRows,
}

/// What a norm subtracts and divides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// RMSNorm: the root of the mean square.
    Rms,
    /// LayerNorm: the mean, then the standard deviation; with a bias where there is one stored.
    Layer,
}

/// The norms of a layer, by the names of their tensors; `None` where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Norms {
    /// Of what enters attention.
    pub attention: Option<&'static str>,
    /// Of what attention adds to the residual stream.
    pub after_attention: Option<&'static str>,
    /// Of what enters the MLP.
    pub mlp: Option<&'static str>,
    /// Of what the MLP adds.
    pub after_mlp: Option<&'static str>,
}

impl Norms {
    /// Before attention and MLP, as in Llama.
    pub(super) const BEFORE: Norms =
        Norms { attention: Some("input_layernorm"), after_attention: None, mlp: Some("post_attention_layernorm"), after_mlp: None };
    /// After them (OLMo 2).
    pub(super) const AFTER: Norms =
        Norms { attention: None, after_attention: Some("post_attention_layernorm"), mlp: None, after_mlp: Some("post_feedforward_layernorm") };
    /// Both (Gemma 2).
    pub(super) const BOTH: Norms = Norms {
        attention: Some("input_layernorm"),
        after_attention: Some("post_attention_layernorm"),
        mlp: Some("pre_feedforward_layernorm"),
        after_mlp: Some("post_feedforward_layernorm"),
    };

    /// All that there are.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        [self.attention, self.after_attention, self.mlp, self.after_mlp].into_iter().flatten()
    }
}

/// RMSNorm of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct QkNorm {
    /// Tensors of the gains, below `self_attn`.
    pub names: [&'static str; 2],
    /// What is normalised.
    pub over: QkNormOver,
}

/// What QK-norm normalises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNormOver {
    /// Every head, before RoPE.
    Heads,
    /// Every head, after RoPE.
    RotatedHeads,
    /// All heads together, before RoPE.
    Projection,
}

impl QkNorm {
    /// Every head, before RoPE (Qwen3).
    pub const HEADS: QkNorm = QkNorm { names: ["q_norm", "k_norm"], over: QkNormOver::Heads };
    /// All heads together (OLMo 2).
    pub const PROJECTION: QkNorm = QkNorm { over: QkNormOver::Projection, ..QkNorm::HEADS };
    /// Every head, after RoPE (HunYuan).
    pub const ROTATED: QkNorm = QkNorm { names: ["query_layernorm", "key_layernorm"], over: QkNormOver::RotatedHeads };
}

/// An MLP: `down(activation(gate(x)) · up(x))`, or without a gate `down(activation(up(x)))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct MlpSpec {
    /// Its activation.
    pub activation: Activation,
    /// Tensors below `mlp`.
    pub gate: Option<&'static str>,
    /// As `gate`.
    pub up: &'static str,
    /// As `gate`.
    pub down: &'static str,
    /// Whether all of them have a bias.
    pub bias: bool,
}

impl MlpSpec {
    pub(super) const GATED: MlpSpec =
        MlpSpec { activation: Activation::Silu, gate: Some("gate_proj"), up: "up_proj", down: "down_proj", bias: false };
}

/// A mixture of experts: several MLPs, of which each token goes through a few, and what they make
/// is weighed and summed (Shazeer et al., arXiv 1701.06538).
///
/// Tensors below `mlp`, whatever a file calls them: `router` `[count, hidden]`, with a bias where
/// MLPs have one; `experts.E` for each; `shared_expert` and `shared_expert_gate` `[1, hidden]`.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many of them a token goes through: those with the router's largest logits.
    pub chosen: usize,
    /// Numbers between an expert's matrices.
    pub width: usize,
    /// Whether the weights of those that are chosen sum to one.
    ///
    /// They are a softmax of their logits then, and else of all experts'.
    pub normalised: bool,
    /// What gate and up become where that is not the activation of one times the other.
    pub swiglu: Option<ClampedSwiglu>,
    /// The width of an MLP that every token goes through besides, weighed by the sigmoid of a gate.
    pub shared: Option<usize>,
}

/// With gate `g` at most `limit` and up `u` within `±limit`, `(u + 1) · g / (1 + exp(−α·g))`
/// (gpt-oss).
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct ClampedSwiglu {
    /// `α`.
    pub alpha: f32,
    /// Above zero.
    pub limit: f32,
}

/// What an MLP makes of a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x / (1 + exp(−x))`.
    Silu,
    /// `x·Φ(x)` (Hendrycks and Gimpel, arXiv 1606.08415).
    Gelu,
    /// Its approximation by a tanh.
    GeluTanh,
    /// `max(x, 0)²`.
    Relu2,
}

/// In which order the rows of a query's or key's head are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadRows {
    /// Pair `i` is rows `i` and `i + dims / 2` of the `dims` that rotate; the others follow.
    Halves,
    /// Pair `i` is rows `2i` and `2i + 1`; the others follow.
    Interleaved,
    /// As both decoders have them: pair `i` is rows `i` and `i + head_dim / 2`, also of those that
    /// do not rotate.
    Paired,
}

impl Design {
    /// That of Llama, with heads of this width.
    pub fn llama(head_dim: usize) -> Design {
        Design {
            norm: NormKind::Rms,
            norms: Norms::BEFORE,
            gains_less_one: false,
            qk_norm: None,
            attention_bias: false,
            attention_scale: (head_dim as f64).powf(-0.5),
            attention_cap: None,
            sinks: false,
            mlp: MlpSpec::GATED,
            experts: None,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            logit_cap: None,
            head_rows: HeadRows::Halves,
        }
    }
}
