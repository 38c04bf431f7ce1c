//! The two elementary layers: a linear map with an optional bias, and a norm.

use super::weight::Weight;
use crate::Result;
use crate::checkpoint::{Checkpoint, NormKind, WeightStorage};
use nalgebra::{DMatrix, DVector};

/// Where weights come from, and what they are to be.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) storage: WeightStorage,
}

/// `y = Wᵀx + b`.
pub(super) struct Linear {
    /// `[in, out]`.
    pub(super) weight: Weight,
    /// `[out]`.
    pub(super) bias: Option<DVector<f32>>,
}

impl Linear {
    /// Reads `{name}.weight`, of `shape` (outputs, inputs), and with `bias` also `{name}.bias`.
    pub(super) fn load(source: Source, name: &str, shape: [usize; 2], bias: bool) -> Result<Linear> {
        let Source { checkpoint, storage } = source;
        let outputs = shape[0];
        Ok(Linear {
            weight: Weight::load(checkpoint, &format!("{name}.weight"), shape, storage)?,
            bias: if bias { Some(vector(checkpoint, &format!("{name}.bias"), outputs)?) } else { None },
        })
    }

    /// `x: [in, tokens]` to `[out, tokens]`.
    pub(super) fn apply(&self, x: &DMatrix<f32>) -> DMatrix<f32> {
        let mut y = self.weight.apply(x);
        if let Some(bias) = &self.bias {
            add_to_columns(&mut y, bias);
        }
        y
    }

    /// The gradient with respect to `x`, from that with respect to `y`.
    pub(super) fn backward(&self, upstream: &DMatrix<f32>) -> DMatrix<f32> {
        self.weight.backward(upstream)
    }
}

/// Adds `bias` to every column of `y`.
pub(super) fn add_to_columns(y: &mut DMatrix<f32>, bias: &DVector<f32>) {
    for mut column in y.column_iter_mut() {
        column += bias;
    }
}

/// `x / rms(x) · gain` (Zhang and Sennrich, arXiv 1910.07467, equation 4), or where `x` is centred
/// first, LayerNorm (Ba et al., arXiv 1607.06450), which may have a bias.
pub(super) struct Norm {
    gain: DVector<f32>,
    bias: Option<DVector<f32>>,
    centred: bool,
    epsilon: f32,
}

impl Norm {
    /// Reads `{name}.weight`, `[width]`: the model's kind of norm.
    pub(super) fn load(checkpoint: &Checkpoint, name: &str, width: usize) -> Result<Norm> {
        let (bias, kind) = (format!("{name}.bias"), checkpoint.config().design.norm);
        let norm = Norm::rms(checkpoint, name, width)?;
        match kind {
            NormKind::Rms => Ok(norm),
            NormKind::Layer => {
                let bias = if checkpoint.has(&bias) { Some(vector(checkpoint, &bias, width)?) } else { None };
                Ok(Norm { centred: true, bias, ..norm })
            }
        }
    }

    /// RMSNorm whatever the model's kind.
    pub(super) fn rms(checkpoint: &Checkpoint, name: &str, width: usize) -> Result<Norm> {
        let gain = DVector::from_vec(checkpoint.gain(&format!("{name}.weight"), width)?);
        Ok(Norm { gain, bias: None, centred: false, epsilon: checkpoint.config().norm_eps })
    }

    /// Normalises every column of `x`.
    pub(super) fn apply(&self, x: &DMatrix<f32>) -> DMatrix<f32> {
        let mut y = x.clone();
        self.apply_to_runs(&mut y);
        y
    }

    /// What is subtracted from a run, and what it is then multiplied by.
    fn moments(&self, run: &[f32]) -> (f32, f32) {
        let mean = if self.centred { run.iter().sum::<f32>() / run.len() as f32 } else { 0.0 };
        let mean_square = run.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / run.len() as f32;
        (mean, (mean_square + self.epsilon).sqrt().recip())
    }

    /// Normalises, in place, every run of `width` numbers of every column of `x`: columns
    /// themselves, or the heads stacked in them.
    pub(super) fn apply_to_runs(&self, x: &mut DMatrix<f32>) {
        for run in x.as_mut_slice().chunks_exact_mut(self.gain.len()) {
            let (mean, scale) = self.moments(run);
            for (x, gain) in run.iter_mut().zip(self.gain.iter()) {
                *x = (*x - mean) * (scale * gain);
            }
            for (x, bias) in run.iter_mut().zip(self.bias.iter().flat_map(|bias| bias.iter())) {
                *x += bias;
            }
        }
    }

    /// The gradient with respect to `x`, from `upstream`, that with respect to what
    /// [`apply_to_runs`](Self::apply_to_runs) made of it.
    pub(super) fn backward(&self, x: &DMatrix<f32>, mut upstream: DMatrix<f32>) -> DMatrix<f32> {
        let width = self.gain.len();
        for (run, x) in upstream.as_mut_slice().chunks_exact_mut(width).zip(x.as_slice().chunks_exact(width)) {
            let (mean, scale) = self.moments(x);
            run.iter_mut().zip(self.gain.iter()).for_each(|(y, gain)| *y *= gain);
            let along = run.iter().zip(x).map(|(y, x)| y * (x - mean)).sum::<f32>() * scale * scale / width as f32;
            let level = if self.centred { run.iter().sum::<f32>() / width as f32 } else { 0.0 };
            run.iter_mut().zip(x).for_each(|(y, x)| *y = scale * (*y - level - along * (x - mean)));
        }
        upstream
    }
}

fn vector(checkpoint: &Checkpoint, name: &str, width: usize) -> Result<DVector<f32>> {
    Ok(DVector::from_vec(checkpoint.f32(name, &[width])?))
}
