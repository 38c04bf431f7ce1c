//! What a decoder offers to everything above it: a sequence of tokens with its cache. Implemented by [`crate::cpu`] and by the GPU decoder.

use crate::cancel::Cancel;
use crate::compress::Xkv;
use crate::rows::{Exact, Reviver, RowSet, RowSpec, Selection};
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
    /// What stays exact beside coded rows; `None` for what the checkpoint says. A dense cache is exact throughout.
    pub exact: Option<Exact>,
    /// Whether tokens that go through the model together read each other as if they had come one by one ([`Exact::reach`]): what an evaluation measures. Otherwise they read each other exactly,
    /// which is better, and always so where rows belong to several layers.
    pub strict: bool,
    /// The most tokens that go through the model together; `None` for what suits the device.
    pub chunk: Option<usize>,
    /// How many coded tokens one that goes through the model alone reads; `None` for all.
    pub select: Option<Selection>,
    /// How the prompt of a dense model is compressed in bases of its own, if at all.
    pub xkv: Option<Xkv>,
    /// How tokens are forgotten, if they are.
    pub reviver: Option<Reviver>,
}

impl SequenceOptions {
    /// The method that compresses the cache while it exists, where there is one.
    pub fn method(&self) -> Option<&'static str> {
        self.xkv.map(|_| "xkv").or(self.reviver.map(|_| "kvreviver"))
    }

    /// How rows are stored, in words, where those of the checkpoint are stored as `layout` says.
    pub fn layout(&self, layout: &str) -> String {
        let online = self.xkv.map(|xkv| xkv.options()).or(self.reviver.map(|reviver| reviver.options(layout != "f16")));
        let select = self.select.map(|selection| format!("{} selected", selection.tokens));
        online.iter().map(String::as_str).chain(self.xkv.is_none().then_some(layout)).chain(select.as_deref()).collect::<Vec<_>>().join(", ")
    }

    /// Whether they are possible ones, for a model that has coded `rows` or none.
    ///
    /// # Errors
    /// [`Error::Argument`] with what is possible.
    pub fn check(&self, rows: Option<&[RowSpec]>) -> Result<()> {
        let refuse = |name: &str, message: String| Err(Error::Argument { name: name.into(), message });
        let block = RowSet::block(rows.unwrap_or_default());
        if block > 1 && (self.select.is_some() || self.reviver.is_some()) {
            let message =
                format!("this model's rows are coded in blocks of {block} tokens, and are read whole; leave it out, or take another --method");
            return refuse(if self.select.is_some() { "select" } else { "method" }, message);
        }
        match self.select {
            Some(Selection { tokens }) if tokens == 0 || tokens % Selection::CHUNK != 0 || tokens > Selection::MOST => {
                refuse("select", format!("{tokens} tokens; choose a multiple of {}, up to {}", Selection::CHUNK, Selection::MOST))
            }
            Some(_) if rows.is_none() => {
                refuse("select", "a dense cache has no rows to be rebuilt, so there is nothing to choose from; compress the model first".into())
            }
            Some(_) if self.reviver.is_some() => refuse(
                "select",
                "kvreviver keeps what its candidates are, and every token reads all of it; leave out --select, or take another method".into(),
            ),
            _ if self.xkv.is_some() && self.reviver.is_some() => {
                refuse("method", "xkv codes all tokens and kvreviver forgets some of them; choose one of the two".into())
            }
            _ => Ok(()),
        }
    }
}

impl From<usize> for SequenceOptions {
    /// Room for so many tokens, and all else as it comes.
    fn from(capacity: usize) -> SequenceOptions {
        SequenceOptions { capacity, ..SequenceOptions::default() }
    }
}

/// What one sequence's cache holds, counted from what is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct KvMemory {
    /// Bytes the cache grows by per token, over the whole model: allocated bytes of the rows divided by the capacity.
    pub kv_bytes_per_token: u64,
    /// Bytes that do not grow with the context.
    pub kv_fixed_bytes: u64,
    /// Bytes allocated for `capacity` tokens, fixed ones included.
    pub allocated_bytes: u64,
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

/// One sequence being decoded: its position and its cache. Tokens are appended; nothing but [`truncate`](Self::truncate) removes them.
pub trait Sequence: Send {
    /// Tokens in the cache: the position of the next one.
    fn position(&self) -> usize;

    /// Tokens that the cache has room for.
    fn capacity(&self) -> usize;

    /// The number of tokens that one call of [`forward`](Self::forward) is best given, so that no single submit runs long.
    fn chunk(&self) -> usize;

    /// Runs `tokens` through the model and appends a row for each. Any number of tokens: longer texts are cut into chunks.
    ///
    /// Returns no logits, those after the last token (`[vocab]`), or those after each (`[tokens][vocab]`).
    ///
    /// # Errors
    /// [`crate::Error::Context`] where they do not fit (nothing is appended), [`crate::Error::Argument`] for a token outside the vocabulary, and the device's.
    fn forward(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>>;

    /// Appends `token` and returns the most likely next one (the lowest id among equals). On a GPU: one submit, four bytes read back.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    fn step(&mut self, token: u32) -> Result<u32>;

    /// Forgets all tokens from `position` on, or all where that is below [`kept_from`](Self::kept_from). Does nothing where there are fewer. Where tokens compete by the attention they receive, what
    /// those cut off have given still counts.
    fn truncate(&mut self, position: usize);

    /// The least position, besides 0, that [`truncate`](Self::truncate) can go back to.
    fn kept_from(&self) -> usize {
        0
    }

    /// What the cache holds.
    fn memory(&self) -> KvMemory;

    /// What the last call cost.
    fn counters(&self) -> StepCounters;

    /// Has calls that read a whole text stop, with [`crate::Error::Interrupted`], where `cancel` is set. Others are short.
    fn set_cancel(&mut self, _cancel: Cancel) {}

    /// The coded rows that are read; none in an exact cache.
    fn rows(&self) -> &[RowSpec] {
        &[]
    }

    /// Where bases were made of a prompt: the share of keys' and values' energy that they do not hold, of the prompt and of what was coded after it.
    ///
    /// # Errors
    /// The device's.
    fn lost(&mut self) -> Result<Option<[f64; 2]>> {
        Ok(None)
    }

    /// What the user should know of how the text is kept, as a sentence without its end.
    fn remark(&self) -> Option<String> {
        None
    }
}
