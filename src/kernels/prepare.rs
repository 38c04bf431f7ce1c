//! `prepare.wgsl`: bias, QK-norm and RoPE, and the append of new rows to the cache.

use super::{NEAR, WORKGROUP, spec};
use crate::Result;
use crate::cache::{LayerCache, Layout};
use crate::checkpoint::Config;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, pad};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    first: u32,
    stride: u32,
    epsilon: f32,
}

/// Makes a layer's queries and cache rows from its projection.
pub struct Prepare {
    kernel: Kernel,
    step: Step,
    units: u32,
}

/// Numbers of a latent row that one workgroup copies.
const BLOCK: usize = WORKGROUP as usize * 4;

fn variant(config: &Config, layout: &Layout, bias: bool) -> (Spec, u32) {
    let mut flags = Vec::new();
    let mut bindings = vec![(0, Access::Read), (1, Access::Read), (2, Access::Write), (3, Access::Write), (4, Access::Write)];
    if layout.direct {
        flags.push("DIRECT");
    }
    if bias {
        flags.push("BIAS");
        bindings.push((5, Access::Read));
    }
    if config.qk_norm {
        flags.push("QK_NORM");
        bindings.push((6, Access::Read));
    }
    let key_units = if layout.direct { config.num_key_value_heads } else { layout.keys.row.div_ceil(BLOCK) };
    let constants = [
        ("WORKGROUP", WORKGROUP),
        ("PAIRS", (config.head_dim / 2) as u32),
        ("NEAR", NEAR),
        ("QUERY_HEADS", config.num_attention_heads as u32),
        ("KEY_UNITS", key_units as u32),
        ("KEY_ROW", layout.keys.row as u32),
        ("VALUE_ROW", layout.values.row as u32),
    ];
    let units = config.num_attention_heads + key_units + layout.values.row.div_ceil(BLOCK);
    (spec("prepare.wgsl", &flags, &constants, &bindings), units as u32)
}

pub(super) fn variants() -> Vec<Spec> {
    super::score::shapes().iter().flat_map(|(config, layout)| [true, false].map(|bias| variant(config, layout, bias).0)).collect()
}

impl Prepare {
    /// `projected`: `[n][stride]` f32, query heads (each padded to four), key row, value row; `turns`: RoPE's tables; `queries`: `[n][H][pad(head_dim)]`; `bias` as a token in `projected`;
    /// `gains`: QK-norm's, `[2][head_dim]`, where the model has it.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn plan(
        device: &Device,
        config: &Config,
        layout: &Layout,
        projected: &wgpu::Buffer,
        turns: &wgpu::Buffer,
        queries: &wgpu::Buffer,
        cache: &LayerCache,
        bias: Option<&wgpu::Buffer>,
        gains: Option<&wgpu::Buffer>,
    ) -> Result<Prepare> {
        let (spec, units) = variant(config, layout, bias.is_some());
        let mut buffers = vec![projected, turns, queries, &cache.keys, &cache.values];
        buffers.extend(bias);
        buffers.extend(gains);
        let stride = config.num_attention_heads * pad(config.head_dim) + layout.keys.row + layout.values.row;
        let step = Step { first: 0, stride: stride as u32, epsilon: config.rms_norm_eps };
        Ok(Prepare { kernel: device.kernel(spec, &buffers)?, step, units })
    }

    /// Tokens at positions `first`, `first + 1`, ….
    pub fn record(&self, pass: &mut Pass, first: u32, tokens: u32) {
        self.kernel.record(pass, &Step { first, ..self.step }, [self.units, tokens, 1]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{FactoredLayer, Group};
    use crate::kernels::oracle::{assert_close, devices, numbers, run, turned};
    use crate::kernels::score::config;
    use crate::kernels::turns;
    use half::f16;

    /// Queries and rows of three tokens around position 64, where RoPE's tables meet: whole keys with everything, and latent ones without a norm.
    #[test]
    fn queries_are_turned_and_rows_appended() {
        let group = |kv_heads, rank| Group { kv_heads, rank };
        let factors = FactoredLayer { key_groups: vec![group(2, 9), group(1, 301)], value_groups: vec![group(3, 270)], fused: true };
        for (qk_norm, factors) in [(true, None), (false, Some(&factors))] {
            let c = config(qk_norm, None, 6, 3, 14);
            let layout = Layout::new(&c, factors);
            let (first, tokens, heads) = (63, 3, c.num_attention_heads);
            let (query, keys, values) = (pad(c.head_dim), layout.keys.row, layout.values.row);
            let stride = heads * query + keys + values;
            let (projected, bias, gains) = (numbers(1, tokens * stride), numbers(2, stride), numbers(3, 2 * c.head_dim));

            let input =
                |t: usize, at: usize, width: usize| (at..at + width).map(|i| projected[t * stride + i] as f64 + bias[i] as f64).collect::<Vec<_>>();
            let head = |t: usize, at: usize, gain: &[f32]| {
                let mut head = turned(&c, &input(t, at, c.head_dim), qk_norm.then_some(gain), first + t);
                head.resize(query, 0.0);
                head
            };
            let (query_gain, key_gain) = gains.split_at(c.head_dim);
            let queries: Vec<f64> =
                (0..tokens).flat_map(|t| (0..heads).flat_map(move |h| [(t, h)])).flat_map(|(t, h)| head(t, h * query, query_gain)).collect();
            let key_row = |t: usize| match layout.direct {
                true => (0..3).flat_map(|h| head(t, (heads + h) * query, key_gain)).collect(),
                false => input(t, heads * query, keys),
            };
            let key_rows: Vec<f64> = (0..tokens).flat_map(key_row).collect();
            let value_rows: Vec<f64> = (0..tokens).flat_map(|t| input(t, heads * query + keys, values)).collect();

            for device in devices(None) {
                let [projected, bias, gains, turns] =
                    [&projected, &bias, &gains, turns(&c.rope_frequencies(), 70).as_flattened()].map(|v| device.upload("numbers", v).unwrap());
                let out = device.buffer("queries", queries.len() as u64 * 4).unwrap();
                let rows = |row: usize| device.buffer("rows", 70 * row as u64 * 2).unwrap();
                let cache = LayerCache { keys: rows(keys), values: rows(values) };
                let gains = qk_norm.then_some(&gains);
                let prepare = Prepare::plan(&device, &c, &layout, &projected, &turns, &out, &cache, Some(&bias), gains).unwrap();
                let what = |side: &str| format!("{side}, direct: {}, {:?}", layout.direct, device.tier());
                let got = run::<f32>(&device, &out, queries.len(), |pass| prepare.record(pass, first as u32, tokens as u32));
                assert_close(got.into_iter().map(f64::from), &queries, 1e-10, &what("queries"));
                for (side, buffer, row, expected) in [("keys", &cache.keys, keys, &key_rows), ("values", &cache.values, values, &value_rows)] {
                    let got = run::<f16>(&device, buffer, 70 * row, |_| ());
                    let (before, rest) = got.split_at(first * row);
                    let (written, after) = rest.split_at(tokens * row);
                    assert!(before.iter().chain(after).all(|x| *x == f16::ZERO), "{}: other rows", what(side));
                    assert_close(written.iter().map(|x| x.to_f64()), expected, 1e-6, &what(side));
                }
            }
        }
    }
}
