//! What a decoder offers to everything above it: a sequence of tokens with its cache. Implemented
//! by [`crate::cpu`] and by the GPU decoder.

mod chunks;
mod context;
mod memory;
mod prompted;

pub(crate) use chunks::ChunkPolicy;
pub use context::{Context, Read};
pub use memory::MemoryPlan;
pub(crate) use prompted::{Prompted, Reader};

pub use crate::kv::KvMemory;
use crate::kv::{CacheMethod, Exact, LatentSpec, PromptBases, Saved};
use crate::logits::argmax;
use crate::task::Cancel;
use crate::{Error, Result};

/// Which logits [`Sequence::forward`] returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// None: the tokens are only cached.
    None,
    /// Those after the last token: `[vocab]`.
    Last,
    /// Those after every token: `[tokens][vocab]`.
    All,
}

/// How a sequence is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SequenceOptions {
    /// Tokens that it has room for.
    pub capacity: usize,
    /// How it keeps keys and values.
    pub method: CacheMethod,
    /// What stays exact beside latents; `None` for what the checkpoint says.
    ///
    /// A dense cache is exact throughout.
    pub exact: Option<Exact>,
    /// Whether tokens of one call read each other as if they had come one by one.
    ///
    /// This is what an evaluation measures ([`Exact::reach`]). Otherwise they read each other
    /// exactly, which is better, and always so where rows belong to several layers.
    pub strict: bool,
    /// The most tokens that go through the model together; `None` for what suits the device.
    pub chunk: Option<usize>,
}

impl From<usize> for SequenceOptions {
    /// Room for so many tokens, and all else as it comes.
    fn from(capacity: usize) -> SequenceOptions {
        SequenceOptions { capacity, ..SequenceOptions::default() }
    }
}

/// A prompt that is read to make bases of it.
pub struct Prompt<'a> {
    /// Its tokens.
    pub tokens: &'a [u32],
    /// What makes the bases.
    pub bases: &'a dyn PromptBases,
    /// Which logits are wanted.
    pub logits: Logits,
    /// Stops the reading.
    pub cancel: &'a Cancel,
}

/// What the last forward call or step cost in traffic with the device. All zero on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct StepCounters {
    /// Compute dispatches recorded.
    pub dispatches: u32,
    /// Command buffers submitted.
    pub submits: u32,
    /// Bytes read back from the device.
    pub readback_bytes: u64,
}

impl std::ops::AddAssign for StepCounters {
    fn add_assign(&mut self, other: StepCounters) {
        self.dispatches += other.dispatches;
        self.submits += other.submits;
        self.readback_bytes += other.readback_bytes;
    }
}

impl std::ops::Div<u32> for StepCounters {
    type Output = StepCounters;

    /// Of so many calls, in whole numbers.
    fn div(self, calls: u32) -> StepCounters {
        StepCounters { dispatches: self.dispatches / calls, submits: self.submits / calls, readback_bytes: self.readback_bytes / u64::from(calls) }
    }
}

/// One sequence being decoded: its position and its cache.
///
/// Tokens are appended; nothing but [`truncate`](Self::truncate) removes them.
pub trait Sequence: Send {
    /// Tokens in the cache: the position of the next one.
    fn position(&self) -> usize;

    /// Tokens that the cache has room for.
    fn capacity(&self) -> usize;

    /// The number of tokens that one call of [`forward`](Self::forward) is best given, so that no
    /// single submit runs long.
    fn chunk(&self) -> usize;

    /// Runs `tokens` through the model and appends a row for each. Any number of tokens: longer
    /// texts are cut into chunks.
    ///
    /// Returns no logits, those after the last token (`[vocab]`), or those after each
    /// (`[tokens][vocab]`).
    ///
    /// # Errors
    /// [`Error::Context`] where they do not fit (nothing is appended),
    /// [`Error::Argument`] for a token outside the vocabulary, and the device's.
    fn forward(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>>;

    /// Appends `token` and returns the most likely next one (the lowest id among equals). On a GPU:
    /// one submit, four bytes read back.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    fn step(&mut self, token: u32) -> Result<u32>;

    /// The same where the token that is returned is likely to be given next: a GPU begins with it
    /// at once. Where another one is, or tokens are dropped, that is forgotten.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    fn step_ahead(&mut self, token: u32) -> Result<u32> {
        self.step(token)
    }

    /// How many tokens [`verify`](Self::verify) takes at once as if they had come one by one, and
    /// can drop as if they had never come: at least one.
    fn verifiable(&self) -> usize {
        1
    }

    /// Appends up to [`verifiable`](Self::verifiable) tokens, and returns the most likely next one
    /// after each of them.
    ///
    /// With a draft of what comes next this is several steps for the price of little more than one
    /// (Leviathan et al., arXiv 2211.17192); whoever has drafted drops what did not come true.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    fn verify(&mut self, tokens: &[u32]) -> Result<Vec<u32>> {
        let logits = self.forward(tokens, Logits::All)?;
        logits.chunks_exact((logits.len() / tokens.len().max(1)).max(1)).map(argmax).collect()
    }

    /// Drops all tokens from `position` on, or all where that is below
    /// [`kept_from`](Self::kept_from). Does nothing where there are fewer. Where tokens compete by
    /// the attention they receive, what those cut off have given still counts.
    fn truncate(&mut self, position: usize);

    /// The least position, besides 0, that [`truncate`](Self::truncate) can go back to.
    fn kept_from(&self) -> usize {
        0
    }

    /// What the cache holds.
    fn memory(&self) -> KvMemory;

    /// What the last call cost.
    fn counters(&self) -> StepCounters;

    /// Has calls stop where `cancel` is set, with [`crate::Error::Interrupted`].
    ///
    /// Those that read a whole text do between two chunks, and on a GPU those that take longer than
    /// a second.
    fn set_cancel(&mut self, _cancel: Cancel) {}

    /// The latents that are read; none in an exact cache.
    fn rows(&self) -> &[LatentSpec] {
        &[]
    }

    /// Where bases were made of a prompt: the share of keys' and values' energy that they do not
    /// hold, of the prompt and of what was coded after it.
    ///
    /// # Errors
    /// The device's.
    fn lost(&mut self) -> Result<Option<[f64; 2]>> {
        Ok(None)
    }

    /// All that the cache holds: what [`restore`](Self::restore) goes on from.
    ///
    /// # Errors
    /// [`Error::Argument`] where this kind of sequence cannot be saved, and the device's.
    fn save(&mut self) -> Result<Saved> {
        Err(Error::Argument { name: "session".into(), message: "this kind of sequence cannot be saved".into() })
    }

    /// Goes on from what another sequence of the same model has [saved](Self::save), on whatever
    /// device: no token is read again.
    ///
    /// # Errors
    /// [`Error::Argument`] where it was kept in another way and [`Error::Context`] where it does
    /// not fit, both before anything is done; the device's, after which this sequence is empty.
    fn restore(&mut self, _saved: &Saved) -> Result<()> {
        Err(Error::Argument { name: "session".into(), message: "this kind of sequence cannot go on from a saved one".into() })
    }

    /// What the user should know of how the text is kept, as a sentence without its end.
    fn remark(&self) -> Option<String> {
        None
    }
}
