//! What runs most: the variants of a decode step and of a prompt's chunk, on the shapes of two models.

use super::coded::{Coded, Slice};
use super::{AttentionShape, argmax, choose, embed, gather, landmark, matmul, matvec, merge, norm, pack, prepare, score, values};
use crate::gpu::Spec;
use crate::gpu::Tuning;
use crate::rows::{Format, RUN, Scale, Selection};

/// A variant that runs in every step or chunk.
#[derive(Debug, Clone)]
pub struct Hot {
    /// Shader, flags, whether it is for one token or for many, and the model: `score TAKEN, many, 8B`.
    pub name: String,
    /// The variant.
    pub spec: Spec,
}

/// The variants in which time passes, as a GPU is given them that says it forms subgroups of so many lanes: of Llama 3.1 8B and of SmolLM2-135M, dense and with coded rows.
pub fn hot_variants(subgroups: [u32; 2]) -> Vec<Hot> {
    let (block, tuning) = (matvec::block(Some(subgroups), &Tuning::of(false)), Tuning::of(false));
    let matvec = |flags: &[&'static str]| {
        let paired = tuning.paired.then_some("PAIRED");
        matvec::variant(&flags.iter().copied().chain(paired).collect::<Vec<_>>(), block, &tuning)
    };
    let mut all = vec![
        hot("embed", embed::variant()),
        hot("matvec NORM", matvec(&["NORM"])),
        hot("matvec NORM GATED", matvec(&["NORM", "GATED"])),
        hot("matvec RESIDUAL", matvec(&["RESIDUAL"])),
        hot("argmax LEAVE", argmax::variant(&["LEAVE"])),
        hot("argmax CHOOSE", argmax::variant(&["CHOOSE"])),
        hot("norm", norm::variant()),
        hot("matmul", matmul::variant(&[], &tuning.tile)),
        hot("matmul GATED", matmul::variant(&["GATED"], &tuning.tile)),
        hot("matmul RESIDUAL", matmul::variant(&["RESIDUAL"], &tuning.tile)),
        hot("matmul FULL", matmul::variant(&["FULL"], &tuning.tile)),
        hot("pack", pack::variant()),
    ];
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
    let selection = Selection { tokens: 256 };
    let (taken, rebuilt, chosen) = (Some((true, None)), Some((false, None)), Some(selection));
    let score = |kind, many| score::variant(attention, kind, score::Aligned::default(), None, score::rows(attention, many));
    let [one, all] = [1, attention.kv_heads].map(|heads| rows_over(attention, heads));
    let values = |coded: Option<&Coded>, chosen: Option<Selection>| {
        values::variant(attention, coded.map(Coded::striped), chosen, None, values::shape(attention, coded, chosen.is_some()).1, tuning)
    };
    vec![
        hot("prepare", prepare::variant(attention, false, None)),
        hot("prepare TAKEN", prepare::variant(attention, false, Some(prepare::take((attention.kv_heads * attention.head_dim) as u32, tuning)))),
        hot("score, one", score(None, false)),
        hot("score, many", score(None, true)),
        hot("score TAKEN, one", score(taken, false)),
        hot("score TAKEN, many", score(taken, true)),
        hot("score TAKEN CHOSEN, one", score(Some((true, chosen)), false)),
        hot("score REBUILT, one", score(rebuilt, false)),
        hot("score REBUILT, many", score(rebuilt, true)),
        hot("score REBUILT CHOSEN, one", score(Some((false, chosen)), false)),
        hot("values", values(None, None)),
        hot("values CODED, one head", values(Some(&one), None)),
        hot("values CODED, all heads", values(Some(&all), None)),
        hot("values CODED CHOSEN", values(Some(&all), chosen)),
        hot("merge", merge::variant(attention, false, false, tuning)),
        hot("merge CODED", merge::variant(attention, true, false, tuning)),
        hot("merge CODED, many", merge::variant(attention, true, true, tuning)),
        hot("survey", choose::survey(attention)),
        hot("choose", choose::choose(attention, selection)),
        hot("gather", gather::variant(attention)),
        hot("landmark", landmark::variant(attention)),
    ]
}

/// Rows over so many key/value heads each.
fn rows_over(attention: &AttentionShape, kv_heads: usize) -> Coded {
    let format = Format { bands: Vec::new(), scale: Scale::Band };
    let slice = |first_head| Slice { row: 0, word: 0, offset: 0, first_head, kv_heads, runs: 0..format.rank() / RUN, format: format.clone() };
    Coded { store: 0, words: 0, slices: (0..attention.kv_heads).step_by(kv_heads).map(slice).collect(), turning: Vec::new(), block: 1 }
}
