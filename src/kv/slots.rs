//! Where exact rows stand: the first tokens in slots of their own, those after them in a ring.

use super::Schedule;
use std::ops::Range;

/// Slots of one layer's exact rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slots {
    /// The first tokens.
    pub sinks: u32,
    /// Slots of the ring.
    pub ring: u32,
}

/// Consecutive tokens in consecutive slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// The position of the first.
    pub position: usize,
    /// Its slot.
    pub slot: usize,
    /// How many.
    pub count: usize,
}

impl Slots {
    /// Every token has a slot of its own.
    pub const ALL: Slots = Slots { sinks: 0, ring: u32::MAX };

    /// Slots for what stays exact, where up to `chunk` tokens are read together.
    ///
    /// Beside latents of `capacity` tokens.
    pub fn new(schedule: &Schedule, chunk: usize, capacity: usize) -> Slots {
        Slots { sinks: schedule.exact.sinks.min(capacity) as u32, ring: schedule.window(chunk).min(capacity) as u32 }
    }

    /// Slots in all.
    pub fn count(&self) -> usize {
        self.sinks as usize + self.ring as usize
    }

    /// Where the token at `position` stands.
    pub fn of(&self, position: usize) -> usize {
        let sinks = self.sinks as usize;
        if position < sinks { position } else { sinks + (position - sinks) % self.ring as usize }
    }

    /// `positions`, cut where slots do not follow each other.
    ///
    /// After the sinks, and where the ring comes round.
    pub fn stretches(self, positions: Range<usize>) -> impl Iterator<Item = Stretch> {
        let mut position = positions.start;
        std::iter::from_fn(move || {
            if position >= positions.end {
                return None;
            }
            let slot = self.of(position);
            let end = if position < self.sinks as usize { self.sinks as usize } else { self.count() };
            let count = (end - slot).min(positions.end - position);
            position += count;
            Some(Stretch { position: position - count, slot, count })
        })
    }

    /// Which of the first `position` tokens have slots of their own: sinks and the newest.
    pub fn held(&self, position: usize) -> [Range<usize>; 2] {
        let sinks = (self.sinks as usize).min(position);
        [0..sinks, position.saturating_sub(self.ring as usize).max(sinks)..position]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::Exact;

    #[test]
    fn stretches_cover_all_positions_in_their_slots() {
        let few = Slots::new(&Exact { sinks: 4, recent: 8 }.blocks(1), 10, 1000);
        assert_eq!((few.sinks, few.ring), (4, 8 + 32 + 10));
        for slots in [few, Slots::ALL, Slots { sinks: 0, ring: 7 }] {
            for positions in [0..0, 0..3, 2..60, 3..4, 50..51, 100..300] {
                let found: Vec<usize> = slots.stretches(positions.clone()).flat_map(|s| s.slot..s.slot + s.count).collect();
                assert_eq!(found, positions.clone().map(|position| slots.of(position)).collect::<Vec<_>>(), "{slots:?} {positions:?}");
            }
        }
        assert_eq!(few.held(3), [0..3, 3..3]);
        assert_eq!(few.held(30), [0..4, 4..30]);
        assert_eq!(few.held(200), [0..4, 150..200]);
        assert_eq!(Slots::ALL.held(200), [0..0, 0..200]);
    }
}
