//! `embed.wgsl`: token ids to rows of the embedding table.

use super::fusion::bindings;
use super::{WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Device, ElementType, Kernel, Matrix, Part, Pass, Spec, Tensor, WeightType, Work, pad};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    first: u32,
    rows: u32,
    width: u32,
    scale: f32,
}

/// Looks tokens up in every part of the table.
pub struct Embed {
    /// With the bytes of a row.
    parts: Vec<(Kernel, Params, u64)>,
}

pub(super) fn variant(table: WeightType, scaled: bool) -> Spec {
    let constants = [&table.constants()[..], &[("WORKGROUP", WORKGROUP)]].concat();
    let flags = [table.flags(), if scaled { &["SCALED"] } else { &[] }].concat();
    spec("embed.wgsl", &flags, &constants, &bindings(table, &[]))
}

impl Embed {
    /// `tokens`: `[n][1]` u32, each below the table's rows; `out`: `[n][cols]` f32, `scale` times
    /// what the table has.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, table: &Matrix, tokens: &Tensor, out: &Tensor, scale: f32) -> Result<Embed> {
        tokens.expect("embed", ElementType::U32, 1);
        out.expect_padded("embed", ElementType::F32, table.cols);
        let part = |part: &Part| {
            assert!(part.kind != WeightType::F32, "embed: {} where the table is F16 or quantised", part.weights);
            let mut buffers: Vec<&wgpu::Buffer> = vec![&part.weights, tokens, out];
            buffers.extend(part.beside.iter().map(|plane| &**plane));
            let params = Params { first: part.first as u32, rows: part.rows() as u32, width: (pad(table.cols) / 4) as u32, scale };
            Ok((device.kernel(variant(part.kind, scale != 1.0), &buffers)?, params, part.kind.row_bytes(table.cols) as u64))
        };
        Ok(Embed { parts: table.parts.iter().map(part).collect::<Result<_>>()? })
    }

    /// One dispatch per part of the table.
    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        for (kernel, params, bytes) in &self.parts {
            // As if every part held all of them: which holds how many is not known here.
            let work = Work { bytes: u64::from(tokens) * (bytes + 16 * u64::from(params.width)), flops: 0 };
            kernel.record(pass, params, [tokens, 1, 1], work);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Quantised, Shape};
    use crate::kernels::matvec::tests::random_rows;
    use crate::kernels::oracle::{assert_close, devices, run};

    #[test]
    fn rows_come_from_whichever_part_holds_them() {
        let rows = 301;
        let tokens = [300u32, 0, 127, 128, 255, 256, 0];
        for device in devices(Some(9000)) {
            for kind in [WeightType::F16].into_iter().chain(Quantised::ALL.map(WeightType::Quantised)) {
                // In f16 padded, and of quantised rows only half a set.
                let cols = if kind == WeightType::F16 { 10 } else { 32 };
                let (table, numbers) = random_rows(kind, 1, [rows, cols]);
                // A power of two: products are not rounded.
                let scale = if kind == WeightType::F16 { 4.0 } else { 1.0 };
                let scaled: Vec<f64> = numbers.iter().map(|x| x * f64::from(scale)).collect();
                let row = |t: &u32| scaled[*t as usize * cols..][..cols].iter().copied().chain(vec![0.0; pad(cols) - cols]).collect::<Vec<_>>();
                let expected = tokens.iter().flat_map(row).collect::<Vec<f64>>();
                let matrix = Matrix::of(&device, "table", &[table], cols).unwrap();
                assert_eq!(matrix.parts.len(), if kind == WeightType::F16 { 2 } else { 3 });
                let out = Tensor::zeroed(&device, "out", ElementType::F32, Shape::padded(tokens.len(), cols)).unwrap();
                let ids = Tensor::upload(&device, "tokens", &tokens, Shape::dense(tokens.len(), 1)).unwrap();
                let embed = Embed::plan(&device, &matrix, &ids, &out, scale).unwrap();
                let got = run::<f32>(&device, &out, expected.len(), |pass| embed.record(pass, tokens.len() as u32));
                // Products of a code and a scale, and sums of them, are not rounded by much.
                assert_close(got.into_iter().map(f64::from), &expected, 1e-14, &format!("{kind:?}, {:?}", device.tier()));
            }
        }
    }
}
