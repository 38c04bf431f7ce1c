//! One model at one depth: what was timed, and the line that it makes of a table.

use super::Subject;
use crate::gpu::Roofline;
use crate::sequence::StepCounters;

/// One model at one depth: a line of the table, and an object of `"rows"` in JSON.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Row {
    /// The model.
    pub model: String,
    /// Its method.
    pub method: String,
    /// How its rows are stored.
    pub layout: String,
    /// The type its weights have in memory.
    pub weights: String,
    /// How many weights it has.
    pub parameters: u64,
    /// Bytes that they take in memory.
    pub weight_bytes: u64,
    /// Tokens in the cache at the start.
    pub depth: usize,
    /// Measurements: as many as were asked for, or as the row's time allowed.
    pub rounds: usize,
    /// Tokens prefilled in each of them: as many as were asked for, or as the row's time allowed.
    pub prefill: usize,
    /// Tokens decoded in each of them: as many as were asked for, or as the row's time allowed.
    pub steps: usize,
    /// Tokens prefilled per second: the mean of all rounds.
    pub prefill_tps: f64,
    /// Its standard deviation over rounds; 0 of a single one.
    pub prefill_tps_deviation: f64,
    /// Tokens decoded per second: the mean of all rounds.
    pub decode_tps: f64,
    /// Its standard deviation over rounds; 0 of a single one.
    pub decode_tps_deviation: f64,
    /// Milliseconds that the fastest tenth of steps did not exceed.
    pub decode_ms_p10: f64,
    /// The median step, in milliseconds.
    pub decode_ms_p50: f64,
    /// Milliseconds that nine tenths of steps did not exceed.
    pub decode_ms_p90: f64,
    /// Bytes the cache grows by per token.
    pub kv_bytes_per_token: u64,
    /// Bytes that a step has to move at the mean depth of those measured.
    pub bytes_per_step: u64,
    /// Operations that it has to make there.
    pub flops_per_step: u64,
    /// The least time that this can take on this device, divided by the time that it took.
    pub share_of_roofline: f64,
    /// Compute dispatches recorded per step.
    pub dispatches_per_step: u32,
    /// Command buffers submitted per step.
    pub submits_per_step: u32,
    /// Bytes read back per step.
    pub readback_bytes_per_step: u64,
}

/// Timings of one round.
pub(super) struct Round {
    /// Tokens that were prefilled.
    pub tokens: usize,
    /// Seconds that it took.
    pub prefill: f64,
    /// Seconds of each step.
    pub steps: Vec<f64>,
    /// What the last step cost.
    pub counters: StepCounters,
}

impl Round {
    /// Seconds of all of it.
    pub fn seconds(&self) -> f64 {
        self.prefill + self.steps.iter().sum::<f64>()
    }
}

impl Row {
    /// The row of `rounds`, at least one, with as many tokens and steps in each.
    pub(super) fn of(subject: &Subject, depth: usize, rounds: &[Round], roofline: &Roofline) -> Row {
        // A clock too coarse to see a step must not make its speed infinite.
        let rates =
            |count: usize, seconds: &dyn Fn(&Round) -> f64| rounds.iter().map(|round| count as f64 / seconds(round).max(1e-9)).collect::<Vec<_>>();
        let prefill = rounds.first().map_or(0, |round| round.tokens);
        let steps = rounds.iter().map(|round| round.steps.len()).min().unwrap_or(0);
        let [prefill_tps, prefill_tps_deviation] = mean_and_deviation(&rates(prefill, &|round| round.prefill));
        let [decode_tps, decode_tps_deviation] = mean_and_deviation(&rates(steps, &|round| round.steps.iter().sum()));
        let mut sorted: Vec<f64> = rounds.iter().flat_map(|round| round.steps.iter().copied()).collect();
        sorted.sort_unstable_by(f64::total_cmp);
        let milliseconds = |percent| percentile(&sorted, percent) * 1e3;

        // Step s of a measurement reads depth + s cached rows and its own.
        let mean_depth = depth + steps.div_ceil(2);
        let kv_bytes_per_token = subject.text.sequence().memory().kv_bytes_per_token;
        let cost = (subject.cost)(subject.text.sequence());
        let bytes_per_step = cost.bytes(mean_depth, kv_bytes_per_token);
        let flops_per_step = cost.flops(mean_depth);
        let counters = rounds.last().map_or(StepCounters::default(), |round| round.counters);
        Row {
            model: subject.model.clone(),
            method: subject.method.clone(),
            layout: subject.layout.clone(),
            weights: subject.weights.clone(),
            parameters: subject.parameters,
            weight_bytes: subject.weight_bytes,
            depth,
            rounds: rounds.len(),
            prefill,
            steps,
            prefill_tps,
            prefill_tps_deviation,
            decode_tps,
            decode_tps_deviation,
            decode_ms_p10: milliseconds(10),
            decode_ms_p50: milliseconds(50),
            decode_ms_p90: milliseconds(90),
            kv_bytes_per_token,
            bytes_per_step,
            flops_per_step,
            share_of_roofline: roofline.least_seconds(bytes_per_step, flops_per_step) * decode_tps,
            dispatches_per_step: counters.dispatches,
            submits_per_step: counters.submits,
            readback_bytes_per_step: counters.readback_bytes,
        }
    }
}

/// The mean, and the standard deviation of a sample; 0 where there is but one.
fn mean_and_deviation(values: &[f64]) -> [f64; 2] {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count.max(1.0);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    [mean, if values.len() < 2 { 0.0 } else { (squares / (count - 1.0)).sqrt() }]
}

/// The value that `percent` % of `sorted` do not exceed (nearest rank); 0 where there are none.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let sorted: Vec<f64> = (1..=20).map(f64::from).collect();
        assert_eq!([10, 50, 90, 100].map(|p| percentile(&sorted, p)), [2.0, 10.0, 18.0, 20.0]);
        assert_eq!([10, 50, 90].map(|p| percentile(&[7.0], p)), [7.0; 3]);
        assert_eq!(percentile(&[], 50), 0.0);
    }

    #[test]
    fn deviations_are_those_of_a_sample() {
        assert_eq!(mean_and_deviation(&[2.0, 4.0, 6.0]), [4.0, 2.0]);
        assert_eq!(mean_and_deviation(&[5.0]), [5.0, 0.0]);
        assert_eq!(mean_and_deviation(&[]), [0.0, 0.0]);
    }
}
