//! `gather.wgsl`: what rows are coded from, out of the exact keys and values.

use super::{AttentionShape, NEAR, WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, ElementType, Kernel, Pass, Spec, Tensor, Work, pad};
use crate::kernels::exact::ExactRows;
use crate::kv::Slots;
use crate::kv::{KvSide, LatentKind, LatentSpec};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    first: u32,
    sinks: u32,
    ring: u32,
    head: u32,
    keys: u32,
    pre_rope: u32,
    at: u32,
    width: u32,
    stride: u32,
}

/// One layer's part of a row's `y − μ`.
pub struct Gather {
    kernel: Kernel,
    params: Params,
    heads: u32,
    head_dim: u32,
}

pub(super) fn variant(attention: &AttentionShape) -> Spec {
    let bindings = [(0, Access::Read), (1, Access::Read), (2, Access::Read), (3, Access::Read), (4, Access::Write)];
    let constants = [
        ("WORKGROUP", WORKGROUP),
        ("PAIRS", (attention.head_dim / 2) as u32),
        ("NEAR", NEAR),
        ("EXACT_ROW", (attention.kv_heads * pad(attention.head_dim)) as u32),
    ];
    spec("gather.wgsl", &[], &constants, &bindings)
}

/// One layer's exact keys and values.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub attention: &'a AttentionShape,
    /// In their slots.
    pub rows: &'a ExactRows,
    pub slots: Slots,
    /// RoPE's tables: [`rope_table`](super::rope_table).
    pub rope_table: &'a Tensor,
}

impl Gather {
    /// The part of `layer`, which `from` is of, in `row`. `mean`: `[1][w]`; `out`: `[n][w]`; f32.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, from: Source, row: &LatentSpec, layer: usize, mean: &Tensor, out: &Tensor) -> Result<Gather> {
        let head_dim = from.attention.head_dim;
        let side = |side| row.offset(layer, side, head_dim);
        let (keys, values) = (side(KvSide::Keys), side(KvSide::Values));
        let heads = row.kv_heads as u32;
        let width = row.width(head_dim);
        from.rope_table.expect("gather", ElementType::F32, head_dim);
        mean.expect("gather", ElementType::F32, width);
        out.expect_padded("gather", ElementType::F32, width);
        let params = Params {
            first: 0,
            sinks: from.slots.sinks,
            ring: from.slots.ring,
            head: row.first_head as u32,
            keys: if keys.is_some() { heads } else { 0 },
            pre_rope: u32::from(row.kind != LatentKind::PostRopeKeys),
            at: keys.or(values).unwrap_or(0) as u32,
            width: width as u32,
            stride: pad(width) as u32,
        };
        let sides = u32::from(keys.is_some()) + u32::from(values.is_some());
        let kernel = device.kernel(variant(from.attention), &[&from.rows.keys, &from.rows.values, from.rope_table, mean, out])?;
        Ok(Gather { kernel, params, heads: sides * heads, head_dim: head_dim as u32 })
    }

    /// Tokens at positions `first`, `first + 1`, ….
    pub fn record(&self, pass: &mut Pass, first: u32, tokens: u32) {
        let numbers = u64::from(tokens) * u64::from(self.heads) * u64::from(self.head_dim);
        self.kernel.record(pass, &Params { first, ..self.params }, [self.heads, tokens, 1], Work { bytes: (2 + 4) * numbers, flops: 0 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Shape;
    use crate::kernels::oracle::{assert_close, devices, frequencies, halves, numbers, rotated, run};
    use crate::kernels::rope_table;
    use crate::kv::Format;

    /// Two layers side by side, from slots that wrap around: keys before RoPE and values, keys
    /// after it, values alone.
    #[test]
    fn a_row_begins_as_keys_and_values_without_their_mean() {
        let c = AttentionShape::of(false, None, 6, 3, 14);
        let slots = Slots { sinks: 2, ring: 7 };
        let (first, tokens, padded) = (63, 5, pad(c.head_dim));
        let exact: Vec<_> = (0..4).map(|seed| halves(seed, slots.count() * 3 * padded)).collect();
        for kind in [LatentKind::Both, LatentKind::PreRopeKeys, LatentKind::PostRopeKeys, LatentKind::Values] {
            let row = LatentSpec { first_layer: 4, layers: 2, kind, first_head: 1, kv_heads: 2, format: Format::half(1) };
            let (w, mean) = (row.width(c.head_dim), numbers(9, row.width(c.head_dim)));
            let mut expected = Vec::new();
            for position in first..first + tokens {
                let mut y = Vec::new();
                for layer in exact.chunks(2) {
                    for (side, numbers) in layer.iter().enumerate() {
                        if [LatentKind::Both, [LatentKind::PreRopeKeys, LatentKind::Values][side]].contains(&kind)
                            || (side == 0 && kind == LatentKind::PostRopeKeys)
                        {
                            for head in 1..3 {
                                let from = &numbers[(slots.of(position) * 3 + head) * padded..][..c.head_dim];
                                let pair = |i: usize| {
                                    let (a, b) = (from[i % 7].to_f64(), from[i % 7 + 7].to_f64());
                                    let (sin, cos) = match side == 0 && kind != LatentKind::PostRopeKeys {
                                        true => (position as f64 * frequencies(c.head_dim)[i % 7]).sin_cos(),
                                        false => (0.0, 1.0),
                                    };
                                    if i < 7 { a * cos + b * sin } else { b * cos - a * sin }
                                };
                                y.extend((0..14).map(pair));
                            }
                        }
                    }
                }
                assert_eq!(y.len(), w);
                let wide: Vec<f64> = mean.iter().map(|x| f64::from(*x)).collect();
                let about: Vec<f64> = match kind {
                    LatentKind::PostRopeKeys => wide.chunks(14).flat_map(|head| rotated(&c, head, None, position)).collect(),
                    _ => wide,
                };
                y.iter_mut().zip(about).for_each(|(y, mean)| *y -= mean);
                y.resize(pad(w), 0.0);
                expected.extend(y);
            }
            for device in devices(None) {
                let rope_table = rope_table(&frequencies(c.head_dim), 70);
                let rope_table =
                    Tensor::upload(&device, "RoPE tables", rope_table.as_flattened(), Shape::dense(2 * rope_table.len() / c.head_dim, c.head_dim))
                        .unwrap();
                let mean = Tensor::vector(&device, "mean", &mean).unwrap();
                let out = Tensor::vector(&device, "out", &vec![f32::NAN; expected.len()]).unwrap().view(Shape::padded(tokens, w));
                let gathers: Vec<_> = (0..2)
                    .map(|l| {
                        let upload = |side: usize| device.upload("exact", &exact[2 * l + side]).unwrap();
                        let rows = &ExactRows { keys: upload(0), values: upload(1), slots, eviction: None };
                        Gather::plan(&device, Source { attention: &c, rows, slots, rope_table: &rope_table }, &row, 4 + l, &mean, &out).unwrap()
                    })
                    .collect();
                let got = run::<f32>(&device, &out, expected.len(), |pass| gathers.iter().for_each(|g| g.record(pass, first as u32, tokens as u32)));
                assert_close(got.into_iter().map(f64::from), &expected, 1e-10, &format!("{kind:?}, {:?}", device.tier()));
            }
        }
    }
}
