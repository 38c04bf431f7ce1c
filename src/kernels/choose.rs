//! `choose.wgsl`: which chunks of coded keys a token reads, by the scores of their landmarks.

use super::score::{Block, Score};
use super::spec;
use crate::Result;
use crate::cache::{LandmarkCache, Slots};
use crate::checkpoint::Config;
use crate::gpu::{Access, Device, Kernel, Pass, Spec};
use crate::rows::Selection;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    first: u32,
    count: u32,
    chunks: u32,
    stride: u32,
}

/// Lanes that look after one key/value head.
const WORKGROUP: u32 = 256;

/// Scores one layer's landmarks and chooses among their chunks.
pub struct Choose {
    score: Score,
    kernel: Kernel,
    kv_heads: u32,
    step: Step,
}

fn variant(config: &Config, selection: Selection) -> Spec {
    let constants = [
        ("WORKGROUP", WORKGROUP),
        ("GROUP", config.group_size() as u32),
        ("MOST", selection.most() as u32),
        ("OUTLIERS", selection.outliers() as u32),
    ];
    spec("choose.wgsl", &[], &constants, &[(0, Access::Write), (1, Access::Read), (2, Access::Write)])
}

pub(super) fn variants() -> Vec<Spec> {
    super::score::configs().iter().flat_map(|config| [8, 256].map(|tokens| variant(config, Selection { tokens }))).collect()
}

impl Choose {
    /// `queries`: a token's, and how many numbers they are; `dots`: `[H][chunks]` f32, to work in; `chosen`: `[H_kv][`[`Selection::most`]`]` chunks.
    pub(crate) fn plan(
        device: &Device,
        config: &Config,
        selection: Selection,
        queries: (&wgpu::Buffer, usize),
        landmarks: &LandmarkCache,
        dots: &wgpu::Buffer,
        chosen: &wgpu::Buffer,
    ) -> Result<Choose> {
        // Landmarks are keys like others, whose positions are their chunks'. They have no window.
        let boundless = Config { sliding_window: None, ..config.clone() };
        let score = Score::plan(device, &boundless, queries.0, &landmarks.rows, Slots::ALL, dots, landmarks.chunks, dots, None, false)?;
        Ok(Choose {
            score: score.with_query_stride(queries.1),
            kernel: device.kernel(variant(config, selection), &[dots, &landmarks.cosines, chosen])?,
            kv_heads: config.num_key_value_heads as u32,
            step: Step { first: 0, count: 0, chunks: landmarks.chunks as u32, stride: landmarks.chunks as u32 },
        })
    }

    /// For the token of `block`, which reads chosen keys.
    pub fn record(&self, pass: &mut Pass, block: &Block) {
        let (first, count) = (block.chunks.start, block.chunks.len() as u32);
        if count == 0 {
            return;
        }
        self.score.record(pass, &Block::keys(first, first + count));
        self.kernel.record(pass, &Step { first, count, ..self.step }, [self.kv_heads, 1, 1]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::pad;
    use crate::kernels::oracle::{devices, halves, numbers, run};
    use crate::kernels::score::config;

    /// The same chunks as the specification says, for few and many of them, from the first on and from a later one.
    #[test]
    fn the_chunks_are_those_of_the_specification() {
        let c = config(false, None, 6, 2, 14);
        let (padded, chunks) = (pad(14), 700);
        let mut queries: Vec<f32> = numbers(1, 6 * padded).into_iter().map(|x| 4.0 * x).collect();
        queries.chunks_exact_mut(padded).for_each(|query| query[14..].fill(0.0));
        let (means, cosines) = (halves(2, chunks * 2 * padded), numbers(3, 2 * chunks));
        for tokens in [8, 48, 256] {
            let selection = Selection { tokens };
            for (first, end) in [(0, 700), (1, 40), (0, 2), (3, 290)] {
                let dot = |head: usize, chunk: usize| {
                    let landmark = &means[(chunk * 2 + head / 3) * padded..][..14];
                    queries[head * padded..].iter().zip(landmark).map(|(q, k)| q * k.to_f32()).sum::<f32>() / 14f32.sqrt()
                };
                let expected: Vec<Vec<u32>> = (0..2)
                    .map(|kv| {
                        let dots: Vec<Vec<f32>> = (kv * 3..kv * 3 + 3).map(|head| (first..end).map(|chunk| dot(head, chunk)).collect()).collect();
                        selection.choose(&dots, &cosines[kv * chunks..][first..end]).into_iter().map(|chunk| (first + chunk) as u32).collect()
                    })
                    .collect();
                for device in devices(None) {
                    let landmarks = LandmarkCache::new(&device, &c, 0, 8 * chunks).unwrap();
                    device.queue.write_buffer(&landmarks.rows.keys, 0, bytemuck::cast_slice(&means));
                    device.queue.write_buffer(&landmarks.cosines, 0, bytemuck::cast_slice(&cosines));
                    let from = device.upload("queries", &queries).unwrap();
                    let (dots, chosen) =
                        (device.buffer("dots", 6 * 4 * chunks as u64).unwrap(), device.buffer("chosen", 8 * selection.most() as u64).unwrap());
                    let choose = Choose::plan(&device, &c, selection, (&from, 6 * padded), &landmarks, &dots, &chosen).unwrap();
                    let mut block = Block::keys(0, 1);
                    block.chunks = first as u32..end as u32;
                    let got = run::<u32>(&device, &chosen, 2 * selection.most(), |pass| choose.record(pass, &block));
                    for (got, expected) in got.chunks_exact(selection.most()).zip(&expected) {
                        assert_eq!(&got[..expected.len()], expected, "{tokens} of {first} to {end}, {:?}", device.tier());
                    }
                }
            }
        }
    }
}
