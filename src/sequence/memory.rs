//! What a model and a context will take in memory, counted before anything is allocated.

/// Bytes by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct MemoryPlan {
    /// Tokens that there is room for.
    pub context: usize,
    /// The model's weights.
    pub weights: u64,
    /// The bases of its latents.
    pub bases: u64,
    /// Rows that stay exact.
    pub exact_rows: u64,
    /// Rows that are coded, and what is kept beside them.
    pub coded_rows: u64,
    /// Everything between weights and cache.
    pub scratch: u64,
    /// What weights pass through on their way.
    pub staging: u64,
}

impl MemoryPlan {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.bases + self.exact_rows + self.coded_rows + self.scratch + self.staging
    }

    /// The longest context of up to `most` tokens whose `plan` is no more than `bytes`; `None`
    /// where none is.
    pub fn longest(most: usize, bytes: u64, plan: impl Fn(usize) -> MemoryPlan) -> Option<usize> {
        let fits = |context: usize| plan(context).total() <= bytes;
        if fits(most) {
            return Some(most);
        }
        // The longest that fits is in `short..long`, if any is.
        let (mut short, mut long) = (0, most);
        while long - short > 1 {
            let middle = short + (long - short) / 2;
            if fits(middle) {
                short = middle;
            } else {
                long = middle;
            }
        }
        (short > 0).then_some(short)
    }
}

#[cfg(test)]
mod tests {
    use super::MemoryPlan;

    #[test]
    fn the_longest_context_is_the_last_that_fits() {
        let plan = |context: usize| MemoryPlan { context, weights: 100, exact_rows: 3 * context as u64, ..MemoryPlan::default() };
        let longest = |most, bytes| MemoryPlan::longest(most, bytes, plan);
        assert_eq!(
            [longest(50, 1000), longest(50, 250), longest(50, 249), longest(50, 103), longest(50, 102)],
            [Some(50), Some(50), Some(49), Some(1), None]
        );
    }
}
