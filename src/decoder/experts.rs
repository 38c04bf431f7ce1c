//! The experts of a layer: their weights on the device, one behind the other.
//!
//! An expert that all tokens share is as wide as several others together. The numbers between its
//! matrices have nothing to do with each other, so it comes apart into experts of the common width,
//! which every token goes through with one weight.

use super::stored::{Source, Stored, interleave};
use crate::checkpoint::{self, Config};
use crate::gpu::{Device, Matrix, Shape, Tensor, WeightType};
use crate::kernels::route::Routing;
use crate::{Error, Result};

/// How tokens choose among experts.
pub(super) fn routing(spec: &checkpoint::Experts) -> Routing {
    let shared = spec.shared.map_or(0, |width| width / spec.width);
    Routing { count: spec.count, chosen: spec.chosen, normalised: spec.normalised, shared }
}

/// What of a model's experts the kernels cannot be made for.
pub(super) fn unsupported(config: &Config) -> Option<String> {
    let (experts, design) = (config.design.experts.as_ref()?, &config.design);
    if let Some(width) = experts.shared.filter(|width| !width.is_multiple_of(experts.width) || design.mlp.bias) {
        return Some(format!("the shared expert is {width} wide, no multiple of the others' {}", experts.width));
    }
    let plain = design.mlp.gate.is_some() && design.norms.after_mlp.is_none();
    (!plain).then(|| "experts without a gate, or with a norm behind them, are not supported".into())
}

/// The weights of all experts of a layer.
pub(super) struct ExpertTensors {
    pub routing: Routing,
    /// `[rows][D]` f32: the experts', and the gate of one that all tokens share.
    pub router: Tensor,
    pub router_bias: Option<Tensor>,
    /// Of every expert rows in pairs: gate, up.
    pub gate_up: Matrix,
    pub gate_up_bias: Option<Tensor>,
    pub down: Matrix,
    pub down_bias: Option<Tensor>,
}

impl ExpertTensors {
    /// Of layer `l`, one expert at a time.
    pub fn load(device: &Device, source: Source, l: usize, spec: &checkpoint::Experts) -> Result<ExpertTensors> {
        let (checkpoint, routing) = (source.checkpoint, routing(spec));
        let c = checkpoint.config();
        let (hidden, width, mlp) = (c.hidden_size, spec.width, &c.design.mlp);
        let at = |name: &str| format!("model.layers.{l}.mlp.{name}");
        let label = |what: &str| format!("layer {l}'s {what}");
        let gate = mlp.gate.unwrap_or(mlp.up);
        let matrix = |name: String, shape: [usize; 2]| source.matrix(&at(&format!("{name}.weight")), shape);

        let mut gate_up = Stack { device, label: label("experts' gates and ups"), height: 2 * width, cols: hidden, matrix: None, next: None };
        let mut down = Stack { device, label: label("experts' downs"), height: hidden, cols: width, matrix: None, next: None };
        for expert in 0..spec.count {
            let inner = |name: &str| matrix(format!("experts.{expert}.{name}"), [width, hidden]);
            gate_up.push(interleave(inner(gate)?, inner(mlp.up)?, hidden))?;
            down.push(matrix(format!("experts.{expert}.{}", mlp.down), [hidden, width])?)?;
        }
        if let Some(all) = spec.shared {
            let shared = |name: &str, shape| matrix(format!("shared_expert.{name}"), shape);
            let (gate, up, out) = (shared(gate, [all, hidden])?, shared(mlp.up, [all, hidden])?, shared(mlp.down, [hidden, all])?);
            let both = interleave(gate, up, hidden);
            for piece in 0..routing.shared {
                gate_up.push(both.rows_from(2 * piece * width, 2 * width, hidden))?;
                down.push(out.columns(piece * width, width, all))?;
            }
        }

        let mut router = checkpoint.f32(&at("router.weight"), &[spec.count, hidden])?;
        if spec.shared.is_some() {
            router.extend(checkpoint.f32(&at("shared_expert_gate.weight"), &[1, hidden])?);
        }
        let biases = |what: &str, parts: Vec<Result<Vec<f32>>>| {
            let numbers = parts.into_iter().collect::<Result<Vec<_>>>()?.concat();
            if numbers.is_empty() { Ok(None) } else { Tensor::vector(device, &label(what), &numbers).map(Some) }
        };
        let each = |name: &str, expert: usize, rows: usize| checkpoint.f32(&at(&format!("experts.{expert}.{name}.bias")), &[rows]);
        let pairs = |expert: usize| {
            let (gates, ups) = (each(gate, expert, width)?, each(mlp.up, expert, width)?);
            Ok(gates.into_iter().zip(ups).flat_map(|(gate, up)| [gate, up]).collect())
        };
        let biased = 0..if mlp.bias { spec.count } else { 0 };
        Ok(ExpertTensors {
            routing,
            router: Tensor::upload(device, &label("router"), &router, Shape::padded(routing.rows(), hidden))?,
            router_bias: biases("router's bias", biased.clone().take(1).map(|_| checkpoint.f32(&at("router.bias"), &[spec.count])).collect())?,
            gate_up: gate_up.finish()?,
            gate_up_bias: biases("experts' gate and up biases", biased.clone().map(pairs).collect())?,
            down: down.finish()?,
            down_bias: biases("experts' down biases", biased.map(|expert| each(mlp.down, expert, hidden)).collect())?,
        })
    }
}

/// Experts' matrices one behind the other, in as few parts as bindings and types allow, each of
/// whole experts.
struct Stack<'a> {
    device: &'a Device,
    label: String,
    /// Rows of an expert.
    height: usize,
    cols: usize,
    matrix: Option<Matrix>,
    /// The rows of the next part.
    next: Option<Stored>,
}

impl Stack<'_> {
    fn push(&mut self, rows: Stored) -> Result<()> {
        let kind = rows.weight_type();
        let most = Matrix::most_rows(self.device, kind, self.cols);
        if self.height > most {
            let bytes = (self.height * kind.row_bytes(self.cols)) as u64;
            return Err(Error::OutOfMemory { what: format!("one of {}, in one binding", self.label), bytes });
        }
        match &mut self.next {
            Some(next) if next.weight_type() == kind && next.count(self.cols) + self.height <= most => {
                next.append(rows);
                Ok(())
            }
            _ => {
                self.flush()?;
                self.next = Some(rows);
                Ok(())
            }
        }
    }

    fn flush(&mut self) -> Result<()> {
        let Some(next) = self.next.take() else { return Ok(()) };
        let part = Matrix::of(self.device, &self.label, &[next.rows(self.cols)], self.cols)?;
        match &mut self.matrix {
            Some(matrix) => matrix.append(part),
            none => *none = Some(part),
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Matrix> {
        self.flush()?;
        match self.matrix {
            Some(matrix) => Ok(matrix),
            None => Matrix::zeroed(self.device, &self.label, WeightType::F16, [0, self.cols]),
        }
    }
}
