//! A sequence's content taken off the device, and put on one ([`Saved`]).

use super::sequence::{GpuSequence, Own};
use crate::Result;
use crate::kv::{Energy, Room, Saved, SavedBases, SavedPrompt};
use crate::sequence::Sequence;

impl GpuSequence {
    /// All that it holds.
    ///
    /// # Errors
    /// The device's.
    pub(super) fn saved(&mut self) -> Result<Saved> {
        // A step that has begun early writes into the cache.
        self.forget();
        if self.cursor.position() == 0 {
            return Ok(Saved::default());
        }
        let since = if self.bases.is_some() { self.since()? } else { Energy::default() };
        let GpuSequence {
            model,
            cache,
            buffers: _,
            generation: _,
            plans: _,
            attention: _,
            coding: _,
            cursor,
            ahead: _,
            rows,
            own: _,
            bases,
            counters: _,
            policy: _,
            pacing: _,
            stale: _,
            cancel: _,
        } = &*self;
        let standing = cursor.standing();
        let latents = rows.as_ref().map(|rows| (&rows.layout, &rows.specs[..]));
        let (layers, rows) = cache.save(&model.device, &standing, latents)?;
        // What the device has counted is in `since`.
        let own = |Own { set, prompt, since: _, counted: _ }: &Own| SavedPrompt::of(SavedBases { set: set.clone(), prompt: *prompt, since });
        Ok(Saved { tokens: Vec::new(), standing, layers, rows, prompt: bases.as_ref().map(own) })
    }

    /// Goes on from what was saved, with the bases that it has already.
    ///
    /// # Errors
    /// As [`Sequence::restore`].
    pub(super) fn take_over(&mut self, saved: &Saved) -> Result<()> {
        saved.check(&self.room())?;
        self.truncate(0);
        if saved.standing.position == 0 {
            return Ok(());
        }
        let device = &self.model.device;
        self.cache.clear_evicted(device)?;
        let latents = self.rows.as_ref().map(|rows| (&rows.layout, &rows.specs[..]));
        self.cache.restore(device, saved, latents)?;
        device.wait()?;
        self.stale = false;
        self.cursor.stand(&saved.standing);
        Ok(())
    }

    /// What bases of its own hold of what was coded after their prompt.
    ///
    /// # Errors
    /// The device's.
    pub(super) fn since(&self) -> Result<Energy> {
        let (Some(rows), Some(bases)) = (&self.rows, &self.bases) else { return Ok(Energy::default()) };
        let Energy { all, held } = rows.energy(&self.model.device)?;
        let Own { set: _, prompt: _, since, counted } = bases;
        Ok(Energy { all: since.all + all - counted.all, held: since.held + held - counted.held })
    }

    fn room(&self) -> Room<'_> {
        Room {
            geometry: self.model.config.geometry(),
            capacity: self.cursor.capacity(),
            coding: self.cursor.coding(),
            rows: self.rows(),
            selects: self.cache.select.is_some(),
            stores: self.cache.stores(),
        }
    }
}
