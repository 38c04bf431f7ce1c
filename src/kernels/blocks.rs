//! `blocks.wgsl`: the numbers that scale blocks of tokens, from their coordinates.

use super::{WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, ElementType, Kernel, Pass, Spec, Tensor, Work};
use crate::kv::{Blocks as Shape, Format, LEAST_DEVIATION, LOGARITHMS, ROUNDS, Steps};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    bits: u32,
    least: f32,
    low: f32,
    high: f32,
}

/// Scales one row's blocks.
pub struct Blocks {
    kernel: Kernel,
    shape: Shape,
    /// Coordinates of a row, and numbers of a block.
    rank: usize,
    numbers: usize,
    params: Params,
}

/// What shaders know of blocks: flags and constants.
pub(super) fn constants(format: &Format, shape: Shape) -> (Vec<&'static str>, Vec<(&'static str, u32)>) {
    let (rank, flags) = (
        format.rank(),
        match shape.steps {
            Steps::Channels => vec![],
            Steps::BalancedChannels => vec!["BALANCED", "TOKEN_FACTORS"],
            Steps::BalancedTokens => vec!["BALANCED", "CHANNEL_FACTORS"],
        },
    );
    let numbers = [
        ("TOKENS", shape.tokens),
        ("HEADS", shape.heads),
        ("WIDTH", rank / shape.heads),
        ("OWN", shape.own()),
        ("SHARED", shape.shared(rank)),
        ("STRIPE", shape.stripe(rank)),
        ("HEADER", format.header()),
        ("EACH", format.words()),
    ];
    let ours = [("WORKGROUP", WORKGROUP), ("ROUNDS", ROUNDS as u32)];
    (flags, ours.into_iter().chain(numbers.map(|(name, number)| (name, number as u32))).collect())
}

fn variant(format: &Format, shape: Shape) -> Spec {
    let (flags, constants) = constants(format, shape);
    spec("blocks.wgsl", &flags, &constants, &[(0, Access::Read), (1, Access::Write)])
}

/// Holds what both kernels of blocks are bound to against the format.
///
/// `coordinates`: `[n][rank]`; `numbers`: `[1][numbers]`, of `n` tokens. All f32.
pub(super) fn check(kernel: &str, format: &Format, shape: Shape, coordinates: &Tensor, numbers: &Tensor) {
    coordinates.expect(kernel, ElementType::F32, format.rank());
    numbers.expect(kernel, ElementType::F32, Blocks::numbers(format, shape, coordinates.shape.rows));
}

impl Blocks {
    /// Numbers of so many tokens: by block the tokens' own, then what they share.
    pub fn numbers(format: &Format, shape: Shape, tokens: usize) -> usize {
        tokens.div_ceil(shape.tokens) * (shape.tokens * shape.own() + shape.shared(format.rank()))
    }

    /// `coordinates`: `[n][rank]`; `numbers`: `[1][numbers]`, of `n` tokens. All f32.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, format: &Format, shape: Shape, coordinates: &Tensor, numbers: &Tensor) -> Result<Blocks> {
        check("blocks", format, shape, coordinates, numbers);
        let params = Params { bits: u32::from(format.bands[0].bits), least: LEAST_DEVIATION, low: LOGARITHMS[0], high: LOGARITHMS[1] };
        let kernel = device.kernel(variant(format, shape), &[coordinates, numbers])?;
        Ok(Blocks { kernel, shape, rank: format.rank(), numbers: Blocks::numbers(format, shape, 1), params })
    }

    /// Those of the first `tokens`, which are whole blocks.
    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        let blocks = tokens / self.shape.tokens as u32;
        let work = Work { bytes: 4 * (u64::from(tokens) * self.rank as u64 + u64::from(blocks) * self.numbers as u64), flops: 0 };
        self.kernel.record(pass, &self.params, [blocks, self.shape.heads as u32, 1], work);
    }
}
