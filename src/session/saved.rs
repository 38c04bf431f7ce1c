//! A session in a file: written as a whole or not at all, and opened by another process, on
//! whatever device.

use super::container::{Container, Writer};
use super::stores::{self, CacheHead};
use super::{Prompt, Session};
use crate::checkpoint::Origin;
use crate::sequence::Sequence;
use crate::{Error, Result, task};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;
use std::sync::Arc;

/// The header of a saved session.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Head {
    origin: Origin,
    /// Where the sampler's random stream began, and how far it has come.
    sampler: [u64; 2],
    /// What the program keeps with it.
    note: String,
    #[serde(flatten)]
    pub cache: CacheHead,
}

/// What a saved session has brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// Tokens that need not be read again.
    pub tokens: usize,
    /// What was kept with it: the `note` of [`Session::save`].
    pub note: String,
}

impl Session {
    /// The same session, which says of what model its cache is: without that it cannot be saved.
    pub fn of(self, origin: Arc<Origin>) -> Session {
        Session { origin: Some(origin), ..self }
    }

    pub(super) fn origin(&self) -> Result<&Arc<Origin>> {
        let message = || "it was made of a sequence alone, and no model is known; `Session::of` says which".into();
        self.origin.as_ref().ok_or_else(|| Error::Argument { name: "session".into(), message: message() })
    }

    /// Writes all that it holds to the file at `path`, in the place of what is there, with a `note`
    /// of the program's; returns how many bytes they are.
    ///
    /// The file is written under another name, synced, and renamed: whenever the process ends, what
    /// is at `path` is the old state or the new one.
    ///
    /// # Errors
    /// [`Error::Argument`] where this cannot be saved, [`Error::Io`], and the device's.
    pub fn save(&mut self, path: &Path, note: &str) -> Result<u64> {
        let origin = Origin::clone(self.origin()?);
        // What an answer needs anew each time is not kept, nor what the program chooses.
        let Session { context, tokenizer: _, sampler, stop: _, max_tokens: _, ends: _, draft: _, cancel: _, origin: _, method: _ } = self;
        let saved = context.save()?;
        let mut writer = Writer::default();
        let cache = stores::write(&saved, &mut writer);
        let bytes = writer.finish(Head { origin, sampler: sampler.stream(), note: note.into(), cache }, path)?;
        task::replace(path, &bytes)?;
        Ok(bytes.len() as u64)
    }

    /// Goes on from what [`save`](Self::save) wrote, by this process or another, on this device or
    /// another. No token is read again; what this session had read before is forgotten.
    ///
    /// The sampler's random stream goes on where it was, unless this session has another seed.
    ///
    /// # Errors
    /// [`Error::Session`] where the file is damaged, of another version, of another model or
    /// adapter, or of a cache that was kept in another way; [`Error::Context`] where it does not
    /// fit; all before anything is done. Those of reading, and the device's, after which the
    /// session is empty.
    pub fn restore(&mut self, path: &Path) -> Result<Restored> {
        let bytes = fs::read(path).map_err(Error::io("read", path))?;
        let container: Container<Head> = Container::open(path, &bytes)?;
        container.verify()?;
        let refused = |message: String| Error::Session { path: path.into(), message };
        let own = self.origin()?;
        container.own.origin.check(own).map_err(refused)?;
        let stores = container.stores(most_bytes(own, self.capacity()))?;
        let Head { origin: _, sampler, note, cache } = container.own;
        let saved = stores::read(cache, stores, own.model.head_dim, path)?;
        self.context.restore(&saved).map_err(|error| match error {
            Error::Argument { name, message } if name == "session" => refused(message),
            other => other,
        })?;
        self.sampler.go_on(sampler);
        Ok(Restored { tokens: saved.standing.position, note })
    }

    /// Reads `prompt` and answers nothing yet: what [`generate`](Self::generate) then need not
    /// read. Returns how many of its tokens were in the cache already.
    ///
    /// # Errors
    /// As [`generate`](Self::generate), and those of reading.
    pub fn read<'a>(&mut self, prompt: impl Into<Prompt<'a>>) -> Result<usize> {
        let tokens = self.encode(prompt)?;
        Ok(self.context.read(&tokens)?.reused)
    }
}

/// More than a session of this model with this context holds, however it is kept.
fn most_bytes(origin: &Origin, capacity: usize) -> u64 {
    let model = &origin.model;
    let all = (2 * model.layers as u64).saturating_mul(model.kv_heads as u64).saturating_mul(model.head_dim as u64);
    // Exact rows, coded ones, sums of a sketch and landmarks; and bases of all layers together.
    let rows = (capacity as u64 + 256).saturating_mul(16).saturating_mul(all);
    rows.saturating_add(all.saturating_mul(all).saturating_mul(8)).saturating_add(1 << 20)
}
