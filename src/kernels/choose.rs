//! `survey.wgsl` and `choose.wgsl`: which coded tokens a token reads, by the scores of their chunks' landmarks.

use super::attention::AttentionBuffers;
use super::columns::Block;
use super::landmark::Landmarks;
use super::{AttentionShape, WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work};
use crate::rows::Selection;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    first: u32,
    count: u32,
    stride: u32,
}

/// Lanes that choose for one key/value head.
const CHOOSING: u32 = 256;

/// Scores one layer's landmarks and chooses among their chunks.
pub struct Choose {
    survey: Kernel,
    choose: Kernel,
    kv_heads: u32,
    heads: u32,
    /// Numbers of a landmark, and its words.
    head_dim: u32,
    words: u32,
    stride: u32,
}

pub(super) fn survey(attention: &AttentionShape) -> Spec {
    let constants = [
        ("WORKGROUP", WORKGROUP),
        ("GROUP", attention.group_size() as u32),
        ("HEAD", attention.head_dim as u32),
        ("KV_HEADS", attention.kv_heads as u32),
    ];
    spec("survey.wgsl", &[], &constants, &[(0, Access::Read), (1, Access::Read), (2, Access::Write)])
}

pub(super) fn choose(attention: &AttentionShape, selection: Selection) -> Spec {
    let constants =
        [("WORKGROUP", CHOOSING), ("GROUP", attention.group_size() as u32), ("MOST", selection.chunks() as u32), ("CHUNK", Selection::CHUNK as u32)];
    spec("choose.wgsl", &[], &constants, &[(0, Access::Write), (1, Access::Write)])
}

pub(super) fn variants() -> Vec<Spec> {
    let of =
        |attention: &AttentionShape| [survey(attention), choose(attention, Selection { tokens: 8 }), choose(attention, Selection { tokens: 256 })];
    AttentionShape::examples().iter().flat_map(of).collect()
}

impl Choose {
    /// Reads `queries`, works in `landmarks` and writes `chosen` of `b`.
    pub(crate) fn plan(
        device: &Device,
        attention: &AttentionShape,
        b: &AttentionBuffers,
        selection: Selection,
        landmarks: &Landmarks,
    ) -> Result<Choose> {
        Ok(Choose {
            survey: device.kernel(survey(attention), &[&b.queries, &landmarks.words, &b.landmarks])?,
            choose: device.kernel(choose(attention, selection), &[&b.landmarks, &b.chosen])?,
            kv_heads: attention.kv_heads as u32,
            heads: attention.heads as u32,
            head_dim: attention.head_dim as u32,
            words: Selection::format(attention.head_dim).words() as u32,
            stride: landmarks.chunks as u32,
        })
    }

    /// For the token of `block`, which reads chosen keys.
    pub fn record(&self, pass: &mut Pass, block: &Block) {
        let (first, count) = (block.chunks.start, block.chunks.len() as u32);
        if count == 0 {
            return;
        }
        let step = Step { first, count, stride: self.stride };
        let [chunks, kv_heads, heads, dim, words] = [count, self.kv_heads, self.heads, self.head_dim, self.words].map(u64::from);
        let dots = 4 * chunks * heads;
        let survey = Work { bytes: 4 * chunks * kv_heads * words + dots + 4 * heads * dim, flops: 2 * chunks * heads * dim };
        self.survey.record(pass, &step, [count.div_ceil(WORKGROUP), self.kv_heads, 1], survey);
        self.choose.record(pass, &step, [self.kv_heads, 1, 1], Work { bytes: dots, flops: 0 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::pad;
    use crate::kernels::oracle::{buffers, devices, numbers, run};

    /// The same chunks as the specification says, for few and many of them, from the first on and from a later one, and where many are equal.
    #[test]
    fn the_chunks_are_those_of_the_specification() {
        let c = AttentionShape::of(false, None, 6, 2, 14);
        let (padded, chunks, words) = (pad(14), 700, Selection::format(14).words());
        let mut queries: Vec<f32> = numbers(1, 6 * padded).into_iter().map(|x| 4.0 * x).collect();
        queries.chunks_exact_mut(padded).for_each(|query| query[14..].fill(0.0));
        let mut means = numbers(2, chunks * 2 * 14);
        // A stretch of equals among the others.
        means.copy_within(0..28, 28 * 300);
        (300..450).for_each(|chunk| means.copy_within(28 * 300..28 * 301, 28 * chunk));
        let mut landmarks = vec![0u32; chunks * 2 * words];
        means.chunks_exact(14).zip(landmarks.chunks_exact_mut(words)).for_each(|(mean, words)| Selection::pack(mean, words));
        for tokens in [2, 48, 256, 1000] {
            let selection = Selection { tokens };
            for (first, end) in [(0, 700), (1, 40), (0, 2), (3, 290)] {
                let score = |head: usize, chunk: usize| {
                    Selection::score(&landmarks[(chunk * 2 + head / 3) * words..][..words], &queries[head * padded..][..14])
                };
                let expected: Vec<Vec<u32>> = (0..2)
                    .map(|kv| {
                        let dots: Vec<Vec<f32>> = (kv * 3..kv * 3 + 3).map(|head| (first..end).map(|chunk| score(head, chunk)).collect()).collect();
                        selection.choose(&dots).into_iter().flat_map(|chunk| [0, 1].map(|i| (2 * (first + chunk) + i) as u32)).collect()
                    })
                    .collect();
                for device in devices(None) {
                    let cache = Landmarks::new(&device, &c, 0, Selection::CHUNK * chunks).unwrap();
                    device.queue.write_buffer(&cache.words, 0, bytemuck::cast_slice(&landmarks));
                    let from = device.upload("queries", &queries).unwrap();
                    let (dots, chosen) =
                        (device.buffer("dots", 6 * 4 * chunks as u64).unwrap(), device.buffer("chosen", 8 * selection.tokens as u64).unwrap());
                    let through = AttentionBuffers { queries: from, landmarks: dots, chosen: chosen.clone(), ..buffers(&device, 0) };
                    let choose = Choose::plan(&device, &c, &through, selection, &cache).unwrap();
                    let mut block = Block::new(0, 1, 0, None, None);
                    block.chunks = first as u32..end as u32;
                    let got = run::<u32>(&device, &chosen, 2 * selection.tokens, |pass| choose.record(pass, &block));
                    for (got, expected) in got.chunks_exact(selection.tokens).zip(&expected) {
                        assert_eq!(&got[..expected.len()], expected, "{tokens} of {first} to {end}, {:?}", device.tier());
                    }
                }
            }
        }
    }
}
