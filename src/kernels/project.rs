//! `project.wgsl`: coordinates by an orthonormal basis, from what keys and values are read with.

use super::{WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, ElementType, Kernel, Pass, Spec, Tensor, Work};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    tokens: u32,
    at: u32,
    stride: u32,
    heads: u32,
    vectors: u32,
    onto: u32,
}

/// One layer's part in the coordinates of its rows.
pub struct Project {
    kernel: Kernel,
    /// Numbers of a token that it reads.
    width: u32,
    params: Params,
}

fn variant(head_dim: usize) -> Spec {
    spec("project.wgsl", &[], &[("WORKGROUP", WORKGROUP), ("HEAD", head_dim as u32)], &[(0, Access::Read), (1, Access::Read), (2, Access::Write)])
}

/// Where a layer's numbers stand.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slice {
    /// Numbers into a token's `y` at which the layer begins.
    pub at: usize,
    pub heads: usize,
    pub head_dim: usize,
    /// Whether another layer has begun.
    pub onto: bool,
}

impl Project {
    /// `y`: `[n][w]` f32; `up`: by head, `[rank / 4][head_dim]` vectors of f16; `z`: `[n][rank]`
    /// f32.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, y: &Tensor, up: &Tensor, z: &Tensor, slice: Slice) -> Result<Project> {
        let (width, rank) = (slice.heads * slice.head_dim, z.shape.cols);
        y.expect("project", ElementType::F32, y.shape.cols);
        assert!(slice.at + width <= y.shape.cols, "project: {slice:?} of {y}");
        up.expect("project", ElementType::F16, width * rank);
        z.expect_padded("project", ElementType::F32, rank);
        let [at, stride, heads, vectors] = [slice.at, y.shape.stride, slice.heads, rank / 4].map(|n| n as u32);
        let params = Params { tokens: 0, at, stride, heads, vectors, onto: u32::from(slice.onto) };
        Ok(Project { kernel: device.kernel(variant(slice.head_dim), &[y, up, z])?, width: width as u32, params })
    }

    /// Those of the first `tokens`.
    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        const TOKENS: u32 = 8;
        let [n, width, rank] = [tokens, self.width, 4 * self.params.vectors].map(u64::from);
        let work = Work { bytes: 2 * rank * width + 4 * n * (width + rank), flops: 2 * n * width * rank };
        self.kernel.record(pass, &Params { tokens, ..self.params }, [self.params.vectors.div_ceil(WORKGROUP), tokens.div_ceil(TOKENS), 1], work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Shape;
    use crate::kernels::coded::by_coordinates;
    use crate::kernels::oracle::{assert_close, devices, halves, numbers, run, upload};

    /// Two layers of two heads, one onto the other, of more coordinates than a workgroup has lanes.
    #[test]
    fn layers_add_up_to_coordinates() {
        let (rank, head_dim, tokens, stride) = (272, 14, 11, 60);
        let (y, up) = (numbers(1, tokens * stride), halves(2, 4 * rank * head_dim));
        let number = |head: usize, coordinate: usize, dim: usize| up[(head * rank + coordinate) * head_dim + dim].to_f32();
        let layer = |layer: usize| -> Vec<_> {
            (0..2).flat_map(|head| by_coordinates(|coordinate, dim| number(2 * layer + head, coordinate, dim), rank, head_dim)).collect()
        };
        let mut expected = Vec::new();
        for (t, i) in (0..tokens).flat_map(|t| (0..rank).map(move |i| (t, i))) {
            let part = |head: usize, dim: usize| f64::from(y[t * stride + 2 + head * head_dim + dim]) * f64::from(number(head, i, dim));
            expected.push((0..4).map(|head| (0..head_dim).map(|dim| part(head, dim)).sum::<f64>()).sum::<f64>());
        }
        for device in devices(None) {
            let from = upload(&device, &y, stride);
            let z = Tensor::zeroed(&device, "z", ElementType::F32, Shape::padded(tokens, rank)).unwrap();
            let ups = [0, 1].map(|l| Tensor::vector(&device, "up", &layer(l)).unwrap());
            let plan = |l: usize| {
                let slice = Slice { at: 2 + l * 2 * head_dim, heads: 2, head_dim, onto: l > 0 };
                Project::plan(&device, &from, &ups[l], &z, slice).unwrap()
            };
            let both = [plan(0), plan(1)];
            let got = run::<f32>(&device, &z, expected.len(), |pass| both.iter().for_each(|project| project.record(pass, tokens as u32)));
            assert_close(got.into_iter().map(f64::from), &expected, 1e-11, &format!("{:?}", device.tier()));
        }
    }
}
