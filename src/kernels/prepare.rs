//! `prepare.wgsl`: bias, QK-norm and RoPE, and the append of new rows to the cache.

use super::{WORKGROUP, spec};
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
