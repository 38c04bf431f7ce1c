//! `values.wgsl`: the weighted sum of value rows, split by split.

use super::score::Block;
use super::{WORKGROUP, spec};
use crate::Result;
use crate::cache::{LayerCache, Layout};
use crate::checkpoint::Config;
use crate::gpu::{Access, Device, Kernel, Pass, Spec};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    keys: u32,
    tokens: u32,
    start: u32,
    stride: u32,
    length: u32,
}

/// Keys weighed at a time.
const KEYS: u32 = 128;
/// The most query heads that a workgroup sums for: each costs four registers a lane, and a KiB of workgroup memory at the end.
const MOST_ROWS: usize = 8;
/// The most splits of one token's keys.
pub(crate) const SPLITS: u32 = 32;

/// Sums one layer's values.
pub struct Values {
    kernel: Kernel,
    groups: u32,
    blocks: u32,
    rows: u32,
    heads: u32,
    stride: u32,
}

/// Rows per workgroup, lanes along the slice, and blocks of the widest slice.
fn shape(config: &Config, layout: &Layout) -> (u32, u32, u32) {
    let most = layout.values.slices.iter().map(|s| s.kv_heads * config.group_size()).max().unwrap_or(1);
    let rows = most.div_ceil(most.div_ceil(MOST_ROWS));
    let widest = layout.values.slices.iter().map(|s| s.width / 4).max().unwrap_or(1);
    let dims = widest.next_power_of_two().min(WORKGROUP as usize);
    (rows as u32, dims as u32, widest.div_ceil(dims) as u32)
}

fn variant(config: &Config, layout: &Layout) -> Spec {
    let (rows, dims, blocks) = shape(config, layout);
    let constants = [
        ("WORKGROUP", WORKGROUP),
        ("KEYS", KEYS),
        ("ROWS", rows),
        ("DIMS", dims),
        ("BLOCKS", blocks),
        ("HEADS", config.num_attention_heads as u32),
        ("VALUE_ROW", layout.values.row as u32),
        ("SUMS", layout.sums(config).1 as u32),
    ];
    let bindings = [(0, Access::Read), (1, Access::Read), (2, Access::Read), (3, Access::Write), (4, Access::Write)];
    spec("values.wgsl", &[], &constants, &bindings)
}

pub(super) fn variants() -> Vec<Spec> {
    super::score::shapes().iter().map(|(config, layout)| variant(config, layout)).collect()
}

/// The splits of a block's keys: their number and length. Many tokens fill the device by themselves.
pub(crate) fn splits(block: Block) -> (u32, u32) {
    let keys = block.keys();
    if block.tokens > 1 {
        return (1, keys);
    }
    let length = keys.div_ceil(SPLITS).next_multiple_of(KEYS);
    (keys.div_ceil(length), length)
}

/// The shader's table of value groups, five numbers each: vector at which the slice begins, its vectors, first query head, query heads, vector at which its sums begin.
pub(crate) fn groups(config: &Config, layout: &Layout) -> Vec<u32> {
    let (at, _) = layout.sums(config);
    let g = config.group_size();
    let group = |s: &crate::cache::Slice| [s.at / 4, s.width / 4, s.first_head * g, s.kv_heads * g, at[s.first_head * g] / 4].map(|n| n as u32);
    layout.values.slices.iter().flat_map(group).collect()
}

impl Values {
    /// `scores`: `[tokens][H][stride]`; `groups`: [`groups`]'s table; `sums`: `[tokens][splits][Σ widths]`; `weights`: `[tokens][splits][H]` pairs. All f32.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn plan(
        device: &Device,
        config: &Config,
        layout: &Layout,
        scores: &wgpu::Buffer,
        stride: usize,
        cache: &LayerCache,
        groups: &wgpu::Buffer,
        sums: &wgpu::Buffer,
        weights: &wgpu::Buffer,
    ) -> Result<Values> {
        let (rows, _, blocks) = shape(config, layout);
        Ok(Values {
            kernel: device.kernel(variant(config, layout), &[scores, &cache.values, groups, sums, weights])?,
            groups: layout.values.slices.len() as u32,
            blocks,
            rows,
            heads: layout.values.slices.iter().map(|s| s.kv_heads * config.group_size()).max().unwrap_or(1) as u32,
            stride: stride as u32,
        })
    }

    /// One workgroup per split, slice (or block of a wide one) and block of rows.
    pub fn record(&self, pass: &mut Pass, block: Block) {
        let (splits, length) = splits(block);
        let step = Step { keys: block.keys(), tokens: block.tokens, start: block.start, stride: self.stride, length };
        self.kernel.record(pass, &step, [splits, self.groups * self.blocks, (block.tokens * self.heads).div_ceil(self.rows)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{assert_close, devices, halves, numbers, run};
    use crate::kernels::score::config;

    /// Each split's largest score, its sum of weights and its sum of rows: 300 keys in three splits, and two tokens in one, the last keys of the first masked.
    #[test]
    fn every_split_is_the_sum_of_its_keys() {
        let c = config(false, None, 9, 3, 14);
        let layout = Layout::new(&c, None);
        let (heads, row, width, capacity) = (c.num_attention_heads, layout.values.row, 16, 310);
        let rows = halves(2, capacity * row);
        for (tokens, start, keys) in [(1, 9, 300), (2, 0, 131)] {
            let block = Block { first: (start + keys - tokens) as u32, tokens: tokens as u32, at: 0, start: start as u32 };
            let mut scores: Vec<f32> = numbers(1, tokens * heads * capacity).into_iter().map(|x| 5.0 * x).collect();
            for h in 0..heads {
                scores[h * capacity + keys - (tokens - 1)..h * capacity + keys].fill(-3.4028234e38);
            }
            let (count, length) = splits(block);
            let (mut sums, mut weights) = (Vec::new(), Vec::new());
            for (t, s) in (0..tokens).flat_map(|t| (0..count as usize).map(move |s| (t, s))) {
                for h in 0..heads {
                    let within = s * length as usize..keys.min((s + 1) * length as usize);
                    let line = &scores[(t * heads + h) * capacity..][..keys];
                    let largest = line[within.clone()].iter().copied().fold(f32::MIN, f32::max) as f64;
                    let p: Vec<f64> = within.clone().map(|k| (line[k] as f64 - largest).exp()).collect();
                    let value = |k: usize, i: usize| rows[(start + k) * row + h / 3 * width + i].to_f64();
                    sums.extend((0..width).map(|i| within.clone().zip(&p).map(|(k, p)| p * value(k, i)).sum::<f64>()));
                    weights.extend([largest, p.iter().sum()]);
                }
            }
            for device in devices(None) {
                let from = device.upload("scores", &scores).unwrap();
                let cache = LayerCache { keys: device.buffer("keys", 4).unwrap(), values: device.upload("values", &rows).unwrap() };
                let table = device.upload("slices", &groups(&c, &layout)).unwrap();
                let [out, shares] = [sums.len(), weights.len()].map(|n| device.buffer("out", n as u64 * 4).unwrap());
                let values = Values::plan(&device, &c, &layout, &from, capacity, &cache, &table, &out, &shares).unwrap();
                let what = format!("{tokens} tokens, {:?}", device.tier());
                let got = run::<f32>(&device, &out, sums.len(), |pass| values.record(pass, block));
                assert_close(got.into_iter().map(f64::from), &sums, 1e-10, &what);
                let got = run::<f32>(&device, &shares, weights.len(), |_| ());
                assert_close(got.into_iter().map(f64::from), &weights, 1e-10, &what);
            }
        }
    }
}
