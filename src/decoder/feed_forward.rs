//! What stands behind attention in a layer: the weights of an MLP, or of a mixture of them.

use super::experts::ExpertTensors;
use super::stored::{Source, interleave};
use crate::Result;
use crate::gpu::{Device, Matrix, Tensor};

/// One MLP, or experts.
pub(super) enum FeedForward {
    Mlp(Box<MlpTensors>),
    Experts(Box<ExpertTensors>),
}

/// An MLP.
pub(super) struct MlpTensors {
    /// Rows in pairs: gate, up; or without a gate those of up.
    pub gate_up: Matrix,
    pub gate_up_bias: Option<Tensor>,
    pub down: Matrix,
    pub down_bias: Option<Tensor>,
}

impl FeedForward {
    /// Of layer `l`.
    pub fn load(device: &Device, source: Source, l: usize) -> Result<FeedForward> {
        let config = source.checkpoint.config();
        Ok(match &config.design.experts {
            None => FeedForward::Mlp(Box::new(MlpTensors::load(device, source, l)?)),
            Some(spec) => FeedForward::Experts(Box::new(ExpertTensors::load(device, source, l, spec)?)),
        })
    }

    /// Its matrices.
    pub fn matrices(&self) -> [&Matrix; 2] {
        match self {
            FeedForward::Mlp(mlp) => [&mlp.gate_up, &mlp.down],
            FeedForward::Experts(experts) => [&experts.gate_up, &experts.down],
        }
    }

    /// Bytes of them that one token reads.
    pub fn read_bytes(&self) -> u64 {
        let all: u64 = self.matrices().into_iter().flat_map(|matrix| &matrix.parts).map(|part| part.bytes()).sum();
        match self {
            FeedForward::Mlp(_) => all,
            FeedForward::Experts(experts) => all * experts.routing.slots() as u64 / experts.routing.experts() as u64 + experts.router.size(),
        }
    }
}

impl MlpTensors {
    fn load(device: &Device, source: Source, l: usize) -> Result<MlpTensors> {
        let c = source.checkpoint.config();
        let (hidden, ffn, mlp) = (c.hidden_size, c.intermediate_size, &c.design.mlp);
        let at = |name: &str| format!("model.layers.{l}.mlp.{name}");
        let label = |what: &str| format!("layer {l}'s {what}");
        let inner = |name: &str| source.matrix(&at(&format!("{name}.weight")), [ffn, hidden]);
        let gate_up = match mlp.gate {
            Some(gate) => interleave(inner(gate)?, inner(mlp.up)?, hidden),
            None => inner(mlp.up)?,
        };
        let bias = |name: &str, width: usize| source.checkpoint.f32(&at(&format!("{name}.bias")), &[width]);
        let gate_up_bias = match mlp.gate {
            _ if !mlp.bias => None,
            Some(gate) => Some(bias(gate, ffn)?.into_iter().zip(bias(mlp.up, ffn)?).flat_map(|(gate, up)| [gate, up]).collect()),
            None => Some(bias(mlp.up, ffn)?),
        };
        let down_bias = mlp.bias.then(|| bias(mlp.down, hidden)).transpose()?;
        let vector = |what: &str, numbers: Option<Vec<f32>>| numbers.map(|numbers| Tensor::vector(device, &label(what), &numbers)).transpose();
        let down = source.matrix(&at(&format!("{}.weight", mlp.down)), [hidden, ffn])?;
        Ok(MlpTensors {
            gate_up: Matrix::of(device, &label("gate and up projection"), &[gate_up.rows(hidden)], hidden)?,
            gate_up_bias: vector("gate and up bias", gate_up_bias)?,
            down: Matrix::of(device, &label("down projection"), &[down.rows(ffn)], ffn)?,
            down_bias: vector("down bias", down_bias)?,
        })
    }
}
