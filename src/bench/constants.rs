//! Constants of kernels that devices want differently, and the values that are worth a try.

use crate::gpu::{Tile, Tuning};
use serde_json::{Value, json};

/// One of them.
pub(super) struct Constant {
    /// What `--sweep` calls it: the field of [`Tuning`], in words.
    pub name: &'static str,
    /// The kernels that it concerns, by their shaders.
    pub kernels: &'static [&'static str],
    /// Rows of random caches by which it is chosen.
    pub rows: &'static [&'static str],
    values: Vec<Value>,
}

impl Constant {
    /// The field of [`Tuning`].
    pub fn field(&self) -> String {
        self.name.replace(' ', "_")
    }

    /// Whether it is about what many tokens take: their products are the chunk's alone, and few
    /// steps pack any rows.
    pub fn is_of_chunks(&self) -> bool {
        self.kernels == ["matmul"] || self.kernels == ["pack"]
    }

    /// Whether what it concerns takes the longer the more tokens are cached.
    pub fn is_of_attention(&self) -> bool {
        self.kernels.iter().any(|kernel| ["values", "merge", "score", "flash", "prepare"].contains(kernel))
    }

    /// `own` with each of the other values that it can have beside the rest: what is set, its
    /// value, and the whole.
    pub fn others(&self, own: &Tuning) -> Vec<(String, Value, Tuning)> {
        let with = |value: &Value| Some((self.label(value), value.clone(), own.with(&self.field(), value).ok()?));
        self.values.iter().filter_map(with).filter(|(.., tuning)| tuning != own).collect()
    }

    fn label(&self, value: &Value) -> String {
        match serde_json::from_value(value.clone()) {
            Ok(Tile { tokens, rows, depth, lane_tokens, lane_rows }) => {
                format!("{} {tokens}×{rows}×{depth}, {lane_tokens}×{lane_rows} a lane", self.name)
            }
            Err(_) => format!("{} {value}", self.name),
        }
    }
}

/// Exact rows of a model whose weights have few bits.
pub(super) const FEW_BITS: &str = "f16, q4 weights";

/// All of them; those on which most of a step depends come first.
pub(super) fn constants() -> Vec<Constant> {
    const ATTENTION: &[&str] = &["flash", "values", "merge"];
    const MATVEC: &[&str] = &["matvec", "matvec_int8"];
    const BOTH: &[&str] = &["f16", "fast"];
    type Few = (&'static str, &'static [&'static str], &'static [&'static str], &'static [u32]);
    let numbers: [Few; 19] = [
        ("team rows", MATVEC, &["f16"], &[2, 4, 8]),
        ("ahead", MATVEC, &["f16"], &[1, 2, 4]),
        ("passes", &["matvec_int8"], &[FEW_BITS], &[1, 2, 4]),
        ("flash keys", &["flash"], BOTH, &[1, 2, 4, 8]),
        ("flash heads", &["flash", "score", "values"], &["fast"], &[1, 2, 64]),
        ("flash lanes", &["flash"], BOTH, &[1, 32, 64, 128]),
        ("flash parts", &["flash", "score", "values"], BOTH, &[2, 4, 8, 16, 32]),
        ("keys", ATTENTION, BOTH, &[64, 128, 256]),
        ("in flight", ATTENTION, BOTH, &[1, 2, 4]),
        ("splits", ATTENTION, &["f16"], &[16, 32, 64, 128, 256]),
        ("coded splits", ATTENTION, &["fast"], &[16, 32, 64, 128, 256]),
        ("pack lanes", &["pack"], &["fast"], &[16, 32, 64]),
        ("score rows", &["score"], &["fast"], &[4, 8, 16, 32]),
        ("score keys", &["score"], &["fast"], &[1, 2, 4, 8]),
        ("score workgroups", &["score"], &["fast"], &[64, 256, 1024, 4096]),
        ("ends", &["values"], BOTH, &[2, 4, 8]),
        ("absorb", &["prepare"], &["fast"], &[64, 128, 256, 4096]),
        ("merge lanes", &["merge"], BOTH, &[64, 128, 256]),
        ("logits", &["argmax"], &["f16"], &[512, 1024, 2048, 4096, 8192, 65536]),
    ];
    let mut all: Vec<Constant> = Vec::new();
    for (name, kernels, rows, values) in numbers {
        all.push(Constant { name, kernels, rows, values: values.iter().map(|value| json!(value)).collect() });
    }
    all.insert(2, Constant { name: "int8", kernels: MATVEC, rows: &[FEW_BITS], values: vec![json!(false), json!(true)] });
    all.insert(2, Constant { name: "flash", kernels: &["flash", "score", "values"], rows: BOTH, values: vec![json!(false), json!(true)] });
    all.insert(2, Constant { name: "paired", kernels: &["matvec"], rows: &["f16"], values: vec![json!(false), json!(true)] });
    let tile = |[tokens, rows, depth, lane_tokens, lane_rows]: [u32; 5]| json!({ "tokens": tokens, "rows": rows, "depth": depth, "lane_tokens": lane_tokens, "lane_rows": lane_rows });
    let tiles = [
        [64, 64, 16, 8, 8],
        [64, 64, 32, 8, 4],
        [128, 64, 16, 8, 4],
        [128, 64, 16, 8, 8],
        [128, 128, 16, 8, 8],
        [32, 64, 32, 4, 4],
        [64, 128, 16, 4, 8],
    ];
    all.insert(3, Constant { name: "tile", kernels: &["matmul"], rows: &["f16"], values: tiles.map(tile).into() });
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_constant_of_a_tuning_is_varied() {
        let own = Tuning::of(true);
        let Value::Object(fields) = serde_json::to_value(own).unwrap() else { panic!("a tuning is no object") };
        let mut names: Vec<String> = constants().iter().map(Constant::field).collect();
        let mut expected: Vec<String> = fields.keys().cloned().collect();
        names.sort();
        expected.sort();
        assert_eq!(names, expected);
        for own in [Tuning::of(true), Tuning::of(false)] {
            for constant in constants() {
                let others = constant.others(&own);
                assert!(!others.is_empty(), "{}", constant.name);
                for (label, value, tuning) in others {
                    assert!(label.starts_with(constant.name) && tuning == own.with(&constant.field(), &value).unwrap(), "{label}");
                }
            }
        }
        let tile = constants().into_iter().find(|constant| constant.name == "tile").unwrap();
        assert_eq!(tile.others(&own)[0].0, "tile 64×64×32, 8×4 a lane");
    }
}
