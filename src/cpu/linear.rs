//! The two elementary layers: a linear map with an optional bias, and RMSNorm.

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::linalg::{product, tr_product};
use nalgebra::{DMatrix, DVector};

/// `y = Wᵀx + b`.
pub(super) struct Linear {
    /// `[in, out]`: column by column what a checkpoint stores row by row.
    pub(super) weight: DMatrix<f32>,
    /// `[out]`.
    pub(super) bias: Option<DVector<f32>>,
}

impl Linear {
    /// Reads `{name}.weight`, `[outputs, inputs]`, and with `bias` also `{name}.bias`.
    pub(super) fn load(checkpoint: &Checkpoint, name: &str, inputs: usize, outputs: usize, bias: bool) -> Result<Linear> {
        Ok(Linear {
            weight: DMatrix::from_vec(inputs, outputs, checkpoint.f32(&format!("{name}.weight"), &[outputs, inputs])?),
            bias: if bias { Some(vector(checkpoint, &format!("{name}.bias"), outputs)?) } else { None },
        })
    }

    /// `x: [in, tokens]` to `[out, tokens]`.
    pub(super) fn apply(&self, x: &DMatrix<f32>) -> DMatrix<f32> {
        let mut y = tr_product(self.weight.as_view(), x.as_view());
        if let Some(bias) = &self.bias {
            add_to_columns(&mut y, bias);
        }
        y
    }

    /// The gradient with respect to `x`, from that with respect to `y`.
    pub(super) fn backward(&self, upstream: &DMatrix<f32>) -> DMatrix<f32> {
        product(self.weight.as_view(), upstream.as_view())
    }
}

/// Adds `bias` to every column of `y`.
pub(super) fn add_to_columns(y: &mut DMatrix<f32>, bias: &DVector<f32>) {
    for mut column in y.column_iter_mut() {
        column += bias;
    }
}

/// `x / rms(x) · weight` (Zhang and Sennrich, arXiv 1910.07467, equation 4).
pub(super) struct RmsNorm {
    weight: DVector<f32>,
    epsilon: f32,
}

impl RmsNorm {
    /// Reads `{name}.weight`, `[width]`.
    pub(super) fn load(checkpoint: &Checkpoint, name: &str, width: usize) -> Result<RmsNorm> {
        Ok(RmsNorm { weight: vector(checkpoint, &format!("{name}.weight"), width)?, epsilon: checkpoint.config().rms_norm_eps })
    }

    /// Normalises every column of `x`.
    pub(super) fn apply(&self, x: &DMatrix<f32>) -> DMatrix<f32> {
        let mut y = x.clone();
        self.apply_to_runs(&mut y);
        y
    }

    /// Normalises, in place, every run of `width` numbers of every column of `x`: columns
    /// themselves, or the heads stacked in them.
    pub(super) fn apply_to_runs(&self, x: &mut DMatrix<f32>) {
        for run in x.as_mut_slice().chunks_exact_mut(self.weight.len()) {
            let mean_square = run.iter().map(|x| x * x).sum::<f32>() / run.len() as f32;
            let scale = (mean_square + self.epsilon).sqrt().recip();
            for (x, weight) in run.iter_mut().zip(self.weight.iter()) {
                *x *= scale * weight;
            }
        }
    }

    /// The gradient with respect to `x`, from `upstream`, that with respect to what
    /// [`apply_to_runs`](Self::apply_to_runs) made of it.
    pub(super) fn backward(&self, x: &DMatrix<f32>, mut upstream: DMatrix<f32>) -> DMatrix<f32> {
        let width = self.weight.len();
        for (run, x) in upstream.as_mut_slice().chunks_exact_mut(width).zip(x.as_slice().chunks_exact(width)) {
            let mean_square = x.iter().map(|x| x * x).sum::<f32>() / width as f32;
            let scale = (mean_square + self.epsilon).sqrt().recip();
            run.iter_mut().zip(self.weight.iter()).for_each(|(y, weight)| *y *= weight);
            let along = run.iter().zip(x).map(|(y, x)| y * x).sum::<f32>() * scale * scale / width as f32;
            run.iter_mut().zip(x).for_each(|(y, x)| *y = scale * (*y - along * x));
        }
        upstream
    }
}

fn vector(checkpoint: &Checkpoint, name: &str, width: usize) -> Result<DVector<f32>> {
    Ok(DVector::from_vec(checkpoint.f32(name, &[width])?))
}
