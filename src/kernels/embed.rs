//! `embed.wgsl`: token ids to rows of the embedding table.

use super::{WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, ElementType, Kernel, Matrix, Part, Pass, Spec, Tensor, WeightType, Work, pad};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    first: u32,
    rows: u32,
    width: u32,
}

/// Looks tokens up in every part of the table.
pub struct Embed {
    parts: Vec<(Kernel, Params)>,
}

pub(super) fn variant() -> Spec {
    spec("embed.wgsl", &[], &[("WORKGROUP", WORKGROUP)], &[(0, Access::Read), (1, Access::Read), (2, Access::Write)])
}

impl Embed {
    /// `tokens`: `[n][1]` u32, each below the table's rows; `out`: `[n][cols]` f32.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, table: &Matrix, tokens: &Tensor, out: &Tensor) -> Result<Embed> {
        tokens.expect("embed", ElementType::U32, 1);
        out.expect_padded("embed", ElementType::F32, table.cols);
        let part = |part: &Part| {
            assert!(part.kind == WeightType::F16, "embed: {} where the table is F16", part.weights);
            let params = Params { first: part.first as u32, rows: part.rows() as u32, width: (pad(table.cols) / 4) as u32 };
            Ok((device.kernel(variant(), &[&part.weights, tokens, out])?, params))
        };
        Ok(Embed { parts: table.parts.iter().map(part).collect::<Result<_>>()? })
    }

    /// One dispatch per part of the table.
    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        for (kernel, params) in &self.parts {
            // As if every part held all of them: which holds how many is not known here.
            let work = Work { bytes: (8 + 16) * u64::from(tokens) * u64::from(params.width), flops: 0 };
            kernel.record(pass, params, [tokens, 1, 1], work);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Shape;
    use crate::kernels::oracle::{devices, halves, run};

    #[test]
    fn rows_come_from_whichever_part_holds_them() {
        let (rows, cols) = (301, 10);
        let table = halves(1, rows * cols);
        let tokens = [300u32, 0, 127, 128, 255, 256, 0];
        let row = |t: &u32| table[*t as usize * cols..][..cols].iter().map(|x| x.to_f32()).chain([0.0; 2]).collect::<Vec<_>>();
        let expected = tokens.iter().flat_map(row).collect::<Vec<f32>>();
        for device in devices(Some(4096)) {
            let matrix = Matrix::upload(&device, "table", &table, [rows, cols]).unwrap();
            assert_eq!(matrix.parts.len(), 3);
            let out = Tensor::zeroed(&device, "out", ElementType::F32, Shape::padded(tokens.len(), cols)).unwrap();
            let ids = Tensor::upload(&device, "tokens", &tokens, Shape::dense(tokens.len(), 1)).unwrap();
            let embed = Embed::plan(&device, &matrix, &ids, &out).unwrap();
            let got = run::<f32>(&device, &out, expected.len(), |pass| embed.record(pass, tokens.len() as u32));
            assert_eq!(got, expected, "{:?}", device.tier());
        }
    }
}
