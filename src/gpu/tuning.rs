//! How kernels divide their work where devices want it differently.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Vectors of values that the lanes of a workgroup share keys in: see `shaders/values.wgsl`.
pub(crate) const SHARING: u32 = 16;

/// What a workgroup computes, and what a lane does of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tile {
    /// Tokens, and rows of weights.
    pub tokens: u32,
    /// See [`tokens`](Self::tokens).
    pub rows: u32,
    /// Numbers along k that are staged at a time.
    pub depth: u32,
    /// Tokens and rows whose sums a lane keeps.
    pub lane_tokens: u32,
    /// See [`lane_tokens`](Self::lane_tokens).
    pub lane_rows: u32,
}

impl Tile {
    /// Whether the kernel can be made of it: whole lanes, 256 at the most, pairs of rows in one
    /// lane, and both operands in 16 KiB.
    fn fits(&self) -> bool {
        let numbers = [self.tokens, self.rows, self.depth, self.lane_tokens, self.lane_rows];
        if numbers.iter().any(|n| !(1..=4096).contains(n)) {
            return false;
        }
        let whole = self.tokens.is_multiple_of(self.lane_tokens) && self.rows.is_multiple_of(self.lane_rows) && self.depth.is_multiple_of(4);
        let lanes = (self.tokens / self.lane_tokens) * (self.rows / self.lane_rows);
        whole && self.lane_rows.is_multiple_of(2) && (1..=256).contains(&lanes) && (self.tokens + self.rows) * self.depth <= 4096
    }
}

/// How kernels divide their work where devices want it differently.
///
/// A kernel reads it as it is planned: what is planned keeps what it was planned with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuning {
    /// The most splits of one token's exact keys.
    pub splits: u32,
    /// And of its coded ones: their sums are longer, and all of them are read again to be joined.
    pub coded_splits: u32,
    /// The most queries for which a lane unpacks a coded row, each of which takes a register for
    /// every key.
    pub score_rows: u32,
    /// The most coded keys that a lane scores, where there are enough of them for all lanes.
    ///
    /// Loads that all lanes share are then for so many.
    pub score_keys: u32,
    /// Workgroups from which there are enough: with fewer a lane scores one key.
    pub score_workgroups: u32,
    /// Whether scores and values of one token are one kernel, where there are subgroups and rows
    /// are not too long.
    pub flash: bool,
    /// The most key/value heads of a row then; rows over more are read by two kernels. A software
    /// renderer compiles the one for half a minute where there are several.
    pub flash_heads: u32,
    /// Keys that a lane then has under way.
    pub flash_keys: u32,
    /// Lanes of a workgroup then, or those that share a row where these are more: a power of two.
    pub flash_lanes: u32,
    /// Times eight numbers that a lane then has in registers of queries, and of sums: query heads
    /// of a workgroup, times their share of a row.
    pub flash_parts: u32,
    /// Lanes of a workgroup that packs rows: sixteen for each run whose codes it searches for at a
    /// time.
    pub pack_lanes: u32,
    /// Keys weighed at a time.
    ///
    /// A split is a multiple of them, and they are a multiple of 16 · `in_flight`.
    pub keys: u32,
    /// What a lane loads before it adds up the first: keys' values, splits' sums.
    pub in_flight: u32,
    /// Rows of sums that a workgroup adds up over its lanes at a time.
    ///
    /// Each takes a KiB of its memory, and each time two barriers.
    pub ends: u32,
    /// The most coordinates of an absorbed query that a workgroup makes.
    pub absorb: u32,
    /// Rows of weights that a team of lanes multiplies at once.
    ///
    /// An even number, since gate and up are neighbours.
    pub team_rows: u32,
    /// Loads from each of its rows of weights that a lane has under way.
    pub ahead: u32,
    /// Whether such a load is two vectors, where rows have an even number of them.
    pub paired: bool,
    /// Whether quantised weights are multiplied by activations in eight bits, as integers, where
    /// there are subgroups.
    pub int8: bool,
    /// How often a workgroup's teams then take rows: so often do rows use what it quantised first.
    pub passes: u32,
    /// Logits that a workgroup looks at, of which another then chooses.
    pub logits: u32,
    /// Lanes of a workgroup that joins the splits of one token.
    pub merge_lanes: u32,
    /// How products of many tokens are divided.
    pub tile: Tile,
}

impl Tuning {
    /// Tuning for a GPU or for a software renderer.
    ///
    /// A GPU hides latency behind many workgroups with several loads each; on a renderer both only
    /// cost. As measured: docs/results/2026-11-27-h200.md, and on lavapipe.
    pub fn of(software: bool) -> Tuning {
        let tile = Tile { tokens: 64, rows: 64, depth: 32, lane_tokens: 8, lane_rows: 4 };
        match software {
            true => Tuning {
                tile: Tile { depth: 16, lane_rows: 8, ..tile },
                splits: 32,
                coded_splits: 32,
                score_rows: 8,
                score_keys: 1,
                score_workgroups: 1024,
                flash: true,
                flash_heads: 1,
                flash_keys: 1,
                flash_lanes: 128,
                flash_parts: 32,
                pack_lanes: 16,
                keys: 128,
                in_flight: 1,
                ends: 8,
                absorb: 4096,
                team_rows: 8,
                ahead: 1,
                paired: false,
                int8: false,
                passes: 1,
                logits: 1 << 16,
                merge_lanes: 64,
            },
            false => Tuning {
                tile,
                splits: 256,
                coded_splits: 128,
                score_rows: 16,
                score_keys: 4,
                score_workgroups: 1024,
                flash: true,
                flash_heads: 64,
                flash_keys: 4,
                flash_lanes: 128,
                flash_parts: 4,
                pack_lanes: 64,
                keys: 64,
                in_flight: 4,
                ends: 2,
                absorb: 64,
                team_rows: 2,
                ahead: 2,
                paired: true,
                int8: false,
                passes: 2,
                logits: 1024,
                merge_lanes: 256,
            },
        }
    }
}

impl Tuning {
    /// The same with another value of the constant `name`, a field of this type.
    ///
    /// # Errors
    /// What is wrong, in words: there is no such constant, or it cannot have this value beside the
    /// others.
    pub fn with(&self, name: &str, value: &Value) -> Result<Tuning, String> {
        let Ok(Value::Object(mut fields)) = serde_json::to_value(self) else { return Err("constants cannot be written".into()) };
        let field = fields.get_mut(name).ok_or_else(|| format!("there is no constant {name:?}"))?;
        *field = value.clone();
        let tuning: Tuning = serde_json::from_value(Value::Object(fields)).map_err(|e| format!("{name} cannot be {value}: {e}"))?;
        tuning.problem().map_or(Ok(tuning), |problem| Err(format!("{name} cannot be {value}: {problem}")))
    }

    /// What contradicts what the fields say; nothing where kernels can be made so.
    pub fn problem(&self) -> Option<String> {
        // Far beyond what is of use, and what tables of the kernels have room for.
        let counts = [
            ("splits", self.splits, 1024),
            ("coded_splits", self.coded_splits, 1024),
            ("score_rows", self.score_rows, 32),
            ("score_keys", self.score_keys, 32),
            ("score_workgroups", self.score_workgroups, u32::MAX),
            ("flash_heads", self.flash_heads, 1024),
            ("flash_keys", self.flash_keys, 16),
            ("flash_lanes", self.flash_lanes, 256),
            ("flash_parts", self.flash_parts, 64),
            ("pack_lanes", self.pack_lanes, 64),
            ("keys", self.keys, 256),
            ("in_flight", self.in_flight, 16),
            ("ends", self.ends, 8),
            ("absorb", self.absorb, 1 << 16),
            ("team_rows", self.team_rows, 16),
            ("ahead", self.ahead, 16),
            ("passes", self.passes, 64),
            ("logits", self.logits, 1 << 24),
            ("merge_lanes", self.merge_lanes, 256),
        ];
        if let Some((name, _, most)) = counts.into_iter().find(|(_, count, most)| !(1..=*most).contains(count)) {
            return Some(format!("{name} is not from 1 to {most}"));
        }
        if !self.keys.is_multiple_of(SHARING * self.in_flight) {
            return Some(format!("keys is no multiple of {SHARING} · in_flight"));
        }
        for (name, lanes) in [("merge_lanes", self.merge_lanes), ("flash_lanes", self.flash_lanes)] {
            if !lanes.is_power_of_two() {
                return Some(format!("{name} is no power of two"));
            }
        }
        if !self.pack_lanes.is_power_of_two() || self.pack_lanes < 16 {
            return Some("pack_lanes is no power of two from 16 on".into());
        }
        if !self.team_rows.is_multiple_of(2) {
            return Some("team_rows is odd".into());
        }
        (!self.tile.fits()).then(|| "no kernel can be made of the tile".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_constant_is_replaced_by_name_where_it_can_be() {
        for own in [Tuning::of(true), Tuning::of(false)] {
            assert_eq!(own.problem(), None);
            assert_eq!(own.with("keys", &json!(256)).unwrap(), Tuning { keys: 256, ..own });
            assert_eq!(own.with("paired", &json!(!own.paired)).unwrap(), Tuning { paired: !own.paired, ..own });
            let tile = Tile { tokens: 32, rows: 64, depth: 32, lane_tokens: 4, lane_rows: 4 };
            assert_eq!(own.with("tile", &serde_json::to_value(tile).unwrap()).unwrap(), Tuning { tile, ..own });
            for (name, value, why) in [
                ("kees", json!(64), "no constant \"kees\""),
                ("keys", json!("many"), "keys cannot be \"many\""),
                ("keys", json!(72), "no multiple"),
                ("keys", json!(-1), "keys cannot be -1"),
                ("splits", json!(0), "from 1 to 1024"),
                ("splits", json!(u32::MAX), "from 1 to 1024"),
                ("merge_lanes", json!(96), "power of two"),
                ("team_rows", json!(3), "odd"),
                ("pack_lanes", json!(8), "power of two"),
                ("tile", json!({ "tokens": 64, "rows": 64, "depth": 0, "lane_tokens": 0, "lane_rows": 4 }), "tile"),
            ] {
                let problem = own.with(name, &value).unwrap_err();
                assert!(problem.contains(why), "{name} {value}: {problem}");
            }
        }
    }
}
