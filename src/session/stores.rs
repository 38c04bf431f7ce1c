//! The stores of a saved cache by name, into a file and out of it.
//!
//! Where a store is added to [`Saved`] the patterns here no longer compile: none is forgotten.
//!
//! | store | numbers |
//! |---|---|
//! | `tokens` | `[tokens]` |
//! | `rows.{i}` | words of latent `i`: `[coded][words]` |
//! | `layers.{l}.keys`, `.values` | exact rows, sinks first: `[tokens][H_kv·d]`, keys after RoPE |
//! | `layers.{l}.landmarks` | `[chunks][H_kv·words]` |
//! | `layers.{l}.received` | attention that the exact rows have received |
//! | `layers.{l}.candidates.positions`, `.masses`, `.keys`, `.values` | of tokens that stay exact by the attention they receive |
//! | `layers.{l}.listed` | tokens that are read from their latents |
//! | `layers.{l}.sketch.count`, `.buckets`, `.sums`, `.totals`, `.mean` | what is left of the others |
//! | `bases.{i}.mean`, `.up`, `.down` | bases of a prompt's own, as in an adapter file, by column |

use super::container::{Stores, Writer};
use crate::kv::{
    Coder, Energy, Exact, LatentSet, LatentSpec, Saved, SavedBases, SavedEviction, SavedLayer, SavedPrompt, SavedSketch, Selection, Standing,
};
use crate::{Error, Result};
use nalgebra::{DMatrix, DVector};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

/// What is no store: in the header.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct CacheHead {
    pub standing: Standing,
    pub kept_from: usize,
    layers: usize,
    rows: usize,
    prompt: Option<PromptHead>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct PromptHead {
    tokens: usize,
    check_at: usize,
    bases: Option<BasesHead>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct BasesHead {
    specs: Vec<LatentSpec>,
    exact: Exact,
    /// The bits of the two sums.
    prompt: [u64; 2],
    since: [u64; 2],
}

fn bits(Energy { all, held }: Energy) -> [u64; 2] {
    [all.to_bits(), held.to_bits()]
}

fn energy([all, held]: [u64; 2]) -> Energy {
    Energy { all: f64::from_bits(all), held: f64::from_bits(held) }
}

/// Adds all stores of `saved`, and says what else there is.
pub(super) fn write<'a>(saved: &'a Saved, writer: &mut Writer<'a>) -> CacheHead {
    let Saved { tokens, standing, layers, rows, prompt } = saved;
    writer.add("tokens", tokens.len(), tokens);
    rows.iter().enumerate().for_each(|(row, words)| writer.add(format!("rows.{row}"), standing.coded, words));
    for (index, SavedLayer { keys, values, landmarks, eviction }) in layers.iter().enumerate() {
        let (name, held) = (|part: &str| format!("layers.{index}.{part}"), standing.held_tokens());
        writer.add(name("keys"), held, keys);
        writer.add(name("values"), held, values);
        writer.add(name("landmarks"), standing.coded.div_ceil(Selection::CHUNK), landmarks);
        let Some(SavedEviction { received, positions, masses, keys, values, listed, sketch }) = eviction else { continue };
        let candidates = positions.len();
        writer.add(name("received"), held, received);
        writer.add(name("candidates.positions"), candidates, positions);
        writer.add(name("candidates.masses"), candidates, masses);
        writer.add(name("candidates.keys"), candidates, keys);
        writer.add(name("candidates.values"), candidates, values);
        writer.add(name("listed"), listed.len(), listed);
        let Some(SavedSketch { count, buckets, sums, totals, mean }) = sketch else { continue };
        writer.add(name("sketch.count"), 1, std::slice::from_ref(count));
        writer.add(name("sketch.buckets"), buckets.len(), buckets.as_flattened());
        writer.add(name("sketch.sums"), buckets.len(), sums);
        writer.add(name("sketch.totals"), 1, totals);
        writer.add(name("sketch.mean"), 1, mean);
    }
    let prompt = prompt.as_ref().map(|SavedPrompt { tokens, check_at, bases }| PromptHead {
        tokens: *tokens,
        check_at: *check_at,
        bases: bases.as_ref().map(|SavedBases { set, prompt, since }| {
            let LatentSet { specs, coders, exact } = &**set;
            for (index, Coder { format: _, mean, down, up }) in coders.iter().enumerate() {
                let name = |part: &str| format!("bases.{index}.{part}");
                writer.add(name("mean"), 1, mean.as_slice());
                writer.add(name("up"), up.ncols(), up.as_slice());
                down.iter().for_each(|down| writer.add(name("down"), down.ncols(), down.as_slice()));
            }
            BasesHead { specs: specs.clone(), exact: *exact, prompt: bits(*prompt), since: bits(*since) }
        }),
    });
    CacheHead { standing: *standing, kept_from: saved.kept_from(), layers: layers.len(), rows: rows.len(), prompt }
}

/// Takes all stores out again, of a model whose heads are `head_dim` wide.
///
/// # Errors
/// [`Error::Session`] where one is of another type, or missing where its shape is known.
pub(super) fn read(head: CacheHead, mut stores: Stores, head_dim: usize, path: &Path) -> Result<Saved> {
    let damaged = |what: String| Error::Session { path: path.into(), message: format!("is damaged: {what}") };
    let CacheHead { standing, kept_from: _, layers, rows, prompt } = head;
    // What a header says of counts is believed as far as there are stores.
    let most = stores.len();
    if layers > most && layers > 0 || rows > most {
        return Err(damaged(format!("it has {most} stores, and not those of {layers} layers and {rows} rows")));
    }
    let tokens = stores.take("tokens")?;
    let rows = (0..rows).map(|row| stores.take(&format!("rows.{row}"))).collect::<Result<_>>()?;
    let mut layer = |index: usize| -> Result<SavedLayer> {
        let name = |part: &str| format!("layers.{index}.{part}");
        let mut eviction = None;
        if standing.kept.is_some_and(|kept| kept.evicts) {
            let count: Vec<u32> = stores.take(&name("sketch.count"))?;
            let sketch = match count.first() {
                None => None,
                Some(&count) => Some(SavedSketch {
                    count,
                    buckets: stores.take::<u32>(&name("sketch.buckets"))?.as_chunks::<4>().0.to_vec(),
                    sums: stores.take(&name("sketch.sums"))?,
                    totals: stores.take(&name("sketch.totals"))?,
                    mean: stores.take(&name("sketch.mean"))?,
                }),
            };
            eviction = Some(SavedEviction {
                received: stores.take(&name("received"))?,
                positions: stores.take(&name("candidates.positions"))?,
                masses: stores.take(&name("candidates.masses"))?,
                keys: stores.take(&name("candidates.keys"))?,
                values: stores.take(&name("candidates.values"))?,
                listed: stores.take(&name("listed"))?,
                sketch,
            });
        }
        let [keys, values] = [stores.take(&name("keys"))?, stores.take(&name("values"))?];
        Ok(SavedLayer { keys, values, landmarks: stores.take(&name("landmarks"))?, eviction })
    };
    let layers = (0..layers).map(&mut layer).collect::<Result<_>>()?;
    let prompt = match prompt {
        None => None,
        Some(PromptHead { tokens, check_at, bases: None }) => Some(SavedPrompt { tokens, check_at, bases: None }),
        Some(PromptHead { tokens, check_at, bases: Some(BasesHead { specs, exact, prompt, since }) }) => {
            let mut coders = Vec::new();
            for (index, spec) in specs.iter().enumerate() {
                spec.format.check().map_err(|message| damaged(format!("row {index} {message}")))?;
                let name = |part: &str| format!("bases.{index}.{part}");
                let [mean, up, down]: [Vec<f32>; 3] = [stores.take(&name("mean"))?, stores.take(&name("up"))?, stores.take(&name("down"))?];
                let rank = spec.format.rank();
                let size = spec.layers.checked_mul(spec.kv_heads).and_then(|heads| heads.checked_mul(2 * head_dim)?.checked_mul(rank));
                let width = mean.len();
                if size.is_none() || spec.width(head_dim) != width || up.len() != rank * width || ![0, up.len()].contains(&down.len()) {
                    return Err(damaged(format!("bases {index} are of another shape")));
                }
                let down = (!down.is_empty()).then(|| DMatrix::from_vec(width, rank, down));
                coders.push(Coder { format: spec.format.clone(), mean: DVector::from_vec(mean), down, up: DMatrix::from_vec(rank, width, up) });
            }
            let set = Arc::new(LatentSet { specs, coders, exact });
            Some(SavedPrompt { tokens, check_at, bases: Some(SavedBases { set, prompt: energy(prompt), since: energy(since) }) })
        }
    };
    stores.finish()?;
    Ok(Saved { tokens, standing, layers, rows, prompt })
}
