//! `survey.wgsl`, and a kernel for every selector: which coded tokens a token reads, by the scores
//! of landmarks.

mod chunkkv;
mod shadowkv;

use super::attention::AttentionBuffers;
use super::columns::Block;
use super::landmark::Landmarks;
use super::{AttentionShape, WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work};
use crate::kv::{Selection, Selector};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    first: u32,
    count: u32,
    stride: u32,
}

/// Lanes that choose for one list.
const CHOOSING: u32 = 256;

/// Scores one layer's landmarks and chooses among their tokens.
pub struct Select {
    survey: Kernel,
    choose: Kernel,
    /// Lists that are made.
    lists: u32,
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

/// A selector's kernel, which reads the scores of landmarks and writes lists of tokens.
pub(super) fn choose(attention: &AttentionShape, selection: Selection) -> Spec {
    let (shader, constants) = match selection.by {
        Selector::ShadowKv => ("shadowkv.wgsl", shadowkv::constants(attention, selection)),
        Selector::ChunkKv => ("chunkkv.wgsl", chunkkv::constants(attention, selection)),
    };
    let all = [vec![("WORKGROUP", CHOOSING), ("CHUNK", Selection::CHUNK as u32)], constants].concat();
    spec(shader, &[], &all, &[(0, Access::Write), (1, Access::Write)])
}

impl Select {
    /// Reads `queries`, works in `landmarks` and writes `chosen` of `b`.
    pub(crate) fn plan(
        device: &Device,
        attention: &AttentionShape,
        b: &AttentionBuffers,
        selection: Selection,
        landmarks: &Landmarks,
    ) -> Result<Select> {
        Ok(Select {
            survey: device.kernel(survey(attention), &[&b.queries, &landmarks.words, &b.landmarks])?,
            choose: device.kernel(choose(attention, selection), &[&b.landmarks, &b.chosen])?,
            lists: if selection.by.shared() { 1 } else { attention.kv_heads as u32 },
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
        let params = Params { first, count, stride: self.stride };
        let [chunks, kv_heads, heads, dim, words] = [count, self.kv_heads, self.heads, self.head_dim, self.words].map(u64::from);
        let dots = 4 * chunks * heads;
        let survey = Work { bytes: 4 * chunks * kv_heads * words + dots + 4 * heads * dim, flops: 2 * chunks * heads * dim };
        self.survey.record(pass, &params, [count.div_ceil(WORKGROUP), self.kv_heads, 1], survey);
        self.choose.record(pass, &params, [self.lists, 1, 1], Work { bytes: dots, flops: 0 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::pad;
    use crate::kernels::oracle::{buffers, devices, numbers, run};

    /// Entries of a list.
    fn tokens_of(selection: Selection) -> usize {
        selection.listed(usize::MAX)
    }

    /// The same tokens as the specification says, for few and many of them, from the first on and
    /// from a later one, and where many are equal.
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
        for (tokens, by) in [2, 48, 256, 1000].into_iter().flat_map(|tokens| Selector::ALL.map(|by| (tokens, by))) {
            let selection = Selection { tokens, by };
            for (first, end) in [(0, 700), (1, 40), (0, 2), (3, 290)] {
                let score = |head: usize, chunk: usize| {
                    Selection::score(&landmarks[(chunk * 2 + head / 3) * words..][..words], &queries[head * padded..][..14])
                };
                let dots: Vec<Vec<f32>> = (0..6).map(|head| (first..end).map(|chunk| score(head, chunk)).collect()).collect();
                let tokens = |chunk: usize| [0, 1].map(|i| (2 * (first + chunk) + i) as u32);
                let expected: Vec<Vec<u32>> =
                    selection.choose(&dots, 2).into_iter().map(|chunks| chunks.into_iter().flat_map(tokens).collect()).collect();
                for device in devices(None) {
                    let cache = Landmarks::new(&device, &c, 0, Selection::CHUNK * chunks).unwrap();
                    device.queue.write_buffer(&cache.words, 0, bytemuck::cast_slice(&landmarks));
                    let from = device.upload("queries", &queries).unwrap();
                    let lists = if by.shared() { 1 } else { 2 };
                    let listed = selection.listed(end - first);
                    let dots = device.buffer("dots", 6 * 4 * chunks as u64).unwrap();
                    let chosen = device.buffer("chosen", 4 * (lists * tokens_of(selection)) as u64).unwrap();
                    let through = AttentionBuffers { queries: from, landmarks: dots, chosen: chosen.clone(), ..buffers(&device, 0) };
                    let select = Select::plan(&device, &c, &through, selection, &cache).unwrap();
                    let mut block = Block::new(0, 1, 0, None, None);
                    block.chunks = first as u32..end as u32;
                    let got = run::<u32>(&device, &chosen, lists * tokens_of(selection), |pass| select.record(pass, &block));
                    for (got, expected) in got.chunks_exact(tokens_of(selection)).zip(&expected) {
                        let (there, nobody) = got[..listed].split_at(expected.len());
                        assert_eq!(there, expected, "{selection:?} of {first} to {end}, {:?}", device.tier());
                        assert!(nobody.iter().all(|token| *token == u32::MAX), "{nobody:?}");
                    }
                }
            }
        }
    }
}
