//! What runs most: the variants of a decode step and of a prompt's chunk, on the shapes of two
//! models.

use super::coded::{Coded, Slice};
use super::columns::Kinds;
use super::score::Reading;
use super::{AttentionShape, argmax, embed, flash, gather, landmark, matmul, matvec, merge, norm, pack, prepare, rebuild, score, select, values};
use crate::gpu::{Quantised, Spec, Tuning, WeightType};
use crate::kv::{Band, Format, RUN, Scale, Selection, Selector};

/// A variant that runs in every step or chunk.
#[derive(Debug, Clone)]
pub struct Hot {
    /// Shader, flags, whether it is for one token or for many, and the model.
    ///
    /// `score ABSORBED, many, 8B`.
    pub name: String,
    /// The variant.
    pub spec: Spec,
}

/// The variants that take most of the time, of Llama 3.1 8B and of SmolLM2-135M.
///
/// Dense and with latents, as a GPU gets them that says it forms subgroups of so many lanes.
pub fn hot_variants(subgroups: [u32; 2]) -> Vec<Hot> {
    let (block, tuning) = (matvec::block(Some(subgroups), &Tuning::of(false)), Tuning::of(false));
    // Both models' widths are whole pairs of vectors.
    let matvec = |weights, flags: &[&'static str]| matvec::variant((weights, 4096), flags, [block, 1], &tuning);
    let matmul = |weights, flags: &[&'static str]| matmul::variant(weights, flags, &tuning.tile);
    let mut all = vec![
        hot("argmax LEAVE", argmax::variant(&["LEAVE"])),
        hot("argmax CHOOSE", argmax::variant(&["CHOOSE", "RECORD"])),
        hot("norm", norm::variant(&[])),
        hot("matmul FULL", matmul(WeightType::F32, &[])),
        hot("pack", pack::variant(&trellis(), &tuning)),
    ];
    for weights in [WeightType::F16].into_iter().chain(Quantised::ALL.map(WeightType::Quantised)) {
        let name = |kernel: &str| [&[kernel], weights.flags()].concat().join(" ");
        all.extend([
            hot(&name("embed"), embed::variant(weights, false)),
            hot(&name("matvec NORM"), matvec(weights, &["NORM"])),
            hot(&name("matvec NORM GATED"), matvec(weights, &["NORM", "GATED"])),
            hot(&name("matvec RESIDUAL"), matvec(weights, &["RESIDUAL"])),
            hot(&name("matvec RESIDUAL, a few tokens"), matvec::variant((weights, 4096), &["RESIDUAL"], [block, 8], &tuning)),
            hot(&name("matmul"), matmul(weights, &[])),
            hot(&name("matmul GATED"), matmul(weights, &["GATED"])),
            hot(&name("matmul RESIDUAL"), matmul(weights, &["RESIDUAL"])),
        ]);
    }
    for kind in Quantised::ALL {
        let name = |kernel: &str| [&[kernel], kind.flags()].concat().join(" ");
        all.push(hot(&name("matvec_int8 NORM GATED"), matvec::int8_variant((kind, 4096), &["NORM", "GATED"], block, &tuning)));
    }
    for (model, attention) in [("8B", AttentionShape::of(false, None, 32, 8, 128)), ("135M", AttentionShape::of(false, None, 9, 3, 64))] {
        all.extend(of_model(&attention, &tuning).into_iter().map(|Hot { name, spec }| Hot { name: format!("{name}, {model}"), spec }));
    }
    all
}

fn hot(name: &str, spec: Spec) -> Hot {
    Hot { name: name.to_owned(), spec }
}

/// Those that know a model's geometry.
fn of_model(attention: &AttentionShape, tuning: &Tuning) -> Vec<Hot> {
    let selection = Selection { tokens: 256, by: Selector::ShadowKv };
    let (all_kinds, chosen) = (Kinds::default(), Kinds { listed: Some(selection.tokens), counted: 0 });
    let [one, all] = [1, attention.kv_heads].map(|heads| rows_over(attention, heads));
    let turning =
        |rows: &Coded| Coded { mean_pairs: vec![(0..attention.head_dim as u32 / 2).collect(); attention.kv_heads], words: 100, ..rows.clone() };
    let two = rows_over(attention, 2);
    let (turning, turning_two) = (turning(&one), turning(&two));
    let absorbed = |coded: &Coded| Reading::Absorbed(coded.codes(), 8, 1);
    let score = |reading, kinds, many| score::variant(attention, reading, kinds, 1, many);
    let values = |coded: Option<&Coded>, kinds: Kinds| {
        values::variant(attention, coded.map(Coded::codes), kinds, values::shape(attention, coded, kinds.listed.is_some()).1, tuning)
    };
    vec![
        hot("prepare", prepare::variant(attention, false, None)),
        hot("prepare ABSORBED", prepare::variant(attention, false, Some(prepare::shares((attention.kv_heads * attention.head_dim) as u32, tuning)))),
        hot("score, one", score(Reading::None, all_kinds, false)),
        hot("score, many", score(Reading::None, all_kinds, true)),
        hot("score ABSORBED, one head, one", score(absorbed(&one), all_kinds, false)),
        hot("score ABSORBED, one head, four keys", score(Reading::Absorbed(one.codes(), attention.group_size() as u32, 4), all_kinds, false)),
        hot("score ABSORBED, one", score(absorbed(&all), all_kinds, false)),
        hot("score ABSORBED, many", score(absorbed(&all), all_kinds, true)),
        hot("score ABSORBED LISTED, one", score(absorbed(&one), chosen, false)),
        hot("score REBUILT, one", score(Reading::Rebuilt, all_kinds, false)),
        hot("score REBUILT, many", score(Reading::Rebuilt, all_kinds, true)),
        hot("score REBUILT LISTED, one", score(Reading::Rebuilt, chosen, false)),
        hot("rebuild", rebuild::variant(attention, all.codes(), all_kinds)),
        hot("rebuild LISTED", rebuild::variant(attention, all.codes(), chosen)),
        hot("values", values(None, all_kinds)),
        hot("values CODED, one head", values(Some(&one), all_kinds)),
        hot("values CODED, all heads", values(Some(&all), all_kinds)),
        hot("values CODED LISTED", values(Some(&all), chosen)),
        hot("flash", flash::variant(attention, None, 32, tuning)),
        hot("flash CODED", flash::variant(attention, Some(flash::Sides { keys: &turning, values: &one, rebuilt: false }), 32, tuning)),
        hot("flash CODED, two heads", flash::variant(attention, Some(flash::Sides { keys: &turning_two, values: &two, rebuilt: false }), 32, tuning)),
        hot("merge", merge::variant(attention, false, false, false, tuning)),
        hot("merge CODED", merge::variant(attention, true, false, false, tuning)),
        hot("merge CODED, many", merge::variant(attention, true, false, true, tuning)),
        hot("survey", select::survey(attention)),
        hot("shadowkv", select::choose(attention, selection)),
        hot("gather", gather::variant(attention)),
        hot("landmark", landmark::variant(attention)),
    ]
}

/// Codes that are chosen together, as most rows have.
fn trellis() -> Format {
    Format { bands: vec![Band { bits: 3, runs: 2 }], scale: Scale::Band }
}

/// Rows over so many key/value heads each.
fn rows_over(attention: &AttentionShape, kv_heads: usize) -> Coded {
    let format = trellis();
    let slice = |first_head| Slice { row: 0, word: 0, offset: 0, first_head, kv_heads, runs: 0..format.rank() / RUN, format: format.clone() };
    Coded { store: 0, words: 0, slices: (0..attention.kv_heads).step_by(kv_heads).map(slice).collect(), mean_pairs: Vec::new(), block: 1 }
}
