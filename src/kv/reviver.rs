//! KVReviver (Yuan et al., *KVReviver: Reversible KV Cache Compression with Sketch-Based Token
//! Reconstruction*, arXiv 2512.17917): tokens that are evicted leave a trace.
//!
//! Published, as far as it can be read: a cache of three parts, *recent* tokens, *candidates* and
//! *vague* (evicted) ones; the last part is a variant of a count-sketch from which evicted tokens
//! are rebuilt, so that attention runs over all tokens. The rest is our inference:
//!
//! - *sinks* and *recent* tokens are exact as anywhere else ([`Exact`]). Those that leave the
//!   recent ones, in blocks, compete with the candidates for the candidates' slots; what has
//!   received the most attention, over all heads and queries of the layer, what was received
//!   [`HALF_LIFE`] tokens ago counting half, stays exact ([`Stores::keep`]). All heads share the
//!   candidates, since a row here belongs to all of them.
//! - the others are evicted: nothing at all ([`Evicted::None`]: eviction by heavy hitters, as in
//!   H2O, arXiv 2306.14048), their mean, as often as they are many ([`Evicted::Mean`]), a
//!   count-sketch of keys after RoPE and values as published ([`Evicted::Sketch`]), or one around
//!   the mean and shrunk ([`Evicted::Shrunk`]): [`Sketch`]. Where the model has a basis for
//!   latents, every token leaves one, and a candidate is read exactly instead of from it
//!   ([`Evicted::Rows`]).
//! - a evicted token can be *revived* only where it is known: alone in its bucket. Then it competes
//!   with the others, by the attention that its bucket receives, and comes back as it was. Those
//!   that share bucket and sign cannot be told apart by attention, nor one be taken out without the
//!   others' error. A latent brings nothing back that it does not say anyway.
//!
//! A prompt is read as it comes, in blocks, and evicted on the way: the cache never holds more than
//! its budget and the blocks under way. What a token receives later than that is not foreseen. The
//! budget is for the whole capacity: sinks, recent tokens, candidates and what is left of evicted
//! tokens, all counted in bytes, with the marks by which a device finds them. A sketch's sums take
//! four bytes where a row takes two.

use super::sketch::Sketch;
use super::{Budget, Exact, Geometry, LatentSet, LatentSpec};
use crate::{Error, Result};
use std::sync::Arc;

/// Tokens after which attention counts half: a token that was looked at long ago makes room.
pub const HALF_LIFE: usize = 128;

/// What attention received so many tokens ago still counts.
pub(crate) fn fade(tokens: usize) -> f32 {
    (-(tokens as f32) / HALF_LIFE as f32).exp2()
}

/// What is left of tokens that are evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Evicted {
    /// Nothing.
    None,
    /// Their mean, once for all of them.
    Mean,
    /// A count-sketch, as published.
    Sketch,
    /// A count-sketch around their mean, shrunk towards it.
    Shrunk,
    /// Their latents: for models that are compressed already.
    Rows,
}

impl Evicted {
    /// Whether tokens are summed in buckets.
    pub fn is_sketched(self) -> bool {
        matches!(self, Evicted::Sketch | Evicted::Shrunk)
    }

    /// Whether their mean is known.
    pub fn has_mean(self) -> bool {
        matches!(self, Evicted::Mean | Evicted::Shrunk)
    }
}

/// How a sequence evicts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reviver {
    /// What a token may take, over the whole model, when the capacity is used up.
    pub budget: Budget,
    /// What is left of the evicted.
    ///
    /// `None` for what measures best: rows where the model has them, and nothing elsewhere.
    pub evicted_as: Option<Evicted>,
    /// Where there is a sketch: its share of the bytes that it and the candidates have.
    pub sketch_share: f64,
}

/// What one layer has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stores {
    /// What is left of the evicted.
    pub evicted_as: Evicted,
    /// Tokens beside sinks and recent ones that are exact.
    pub candidates: usize,
    /// Buckets of the sketch.
    pub buckets: usize,
    /// Numbers of a key and a value.
    width: usize,
    /// Tokens in all.
    capacity: usize,
}

impl Reviver {
    /// With as many bytes for a sketch, if there is one, as for candidates.
    pub fn new(budget: Budget, evicted_as: Option<Evicted>) -> Reviver {
        Reviver { budget, evicted_as, sketch_share: 0.5 }
    }

    /// In words, for a model whose rows are `coded` or not.
    pub fn options(&self, coded: bool) -> String {
        let left = match self.evicted_as(coded) {
            Evicted::None => "nothing of the evicted",
            Evicted::Mean => "mean of the evicted",
            Evicted::Sketch => "sketch of the evicted",
            Evicted::Shrunk => "shrunk sketch of the evicted",
            Evicted::Rows => "rows of the evicted",
        };
        format!("candidates, {left}")
    }

    fn evicted_as(&self, coded: bool) -> Evicted {
        self.evicted_as.unwrap_or(if coded { Evicted::Rows } else { Evicted::None })
    }

    /// What the budget has room for in each layer, beside `exact` tokens and latents.
    ///
    /// # Errors
    /// [`Error::Argument`] where this model cannot be read so, or the budget holds nothing.
    pub fn stores(&self, geometry: &Geometry, rows: &[LatentSpec], exact: Exact, capacity: usize) -> Result<Stores> {
        let refuse = |name: &str, message: &str| Err(Error::Argument { name: name.into(), message: message.into() });
        let evicted_as = self.evicted_as(!rows.is_empty());
        match (evicted_as, rows.is_empty()) {
            (Evicted::Rows, true) => {
                return refuse("evicted", "a dense model has no coded rows; compress it first, or choose none, mean, sketch or shrunk");
            }
            (Evicted::Rows, false) | (_, true) => {}
            (_, false) => return refuse("evicted", "this model leaves a coded row of every token; choose rows, or give the dense model"),
        }
        let layers = geometry.layers as u128;
        let width = width(geometry);
        let bytes = u128::from(self.budget.bytes(geometry.dense_bytes_per_token())?) * capacity as u128 / layers;
        let kept = (exact.sinks as u128 + exact.recent as u128) * 2 * width as u128;
        let rows = u128::from(LatentSet::bytes_per_token(rows)) * capacity as u128 / layers;
        let mean = if evicted_as.has_mean() { Sketch::mean_bytes(width) } else { 0 };
        // Which tokens are read from their rows, or which bucket a token falls into: the table of
        // that is of all layers.
        let marks = match evicted_as {
            Evicted::Rows => capacity as u128 * size_of::<u32>() as u128,
            _ if evicted_as.is_sketched() => (Sketch::place_bytes() as u128 * capacity as u128).div_ceil(layers),
            _ => 0,
        };
        let left = bytes.saturating_sub(kept + rows + marks + mean as u128);
        if !(0.0..=1.0).contains(&self.sketch_share) {
            return refuse("sketch_share", &format!("{}; a share is between 0 and 1", self.sketch_share));
        }
        let sketch = if evicted_as.is_sketched() { ((left as f64 * self.sketch_share) as u128).min(left) } else { 0 };
        // More than there are tokens is room for all of them.
        let fit = |bytes: u128, each: usize| usize::try_from(bytes / each as u128).unwrap_or(usize::MAX).min(capacity);
        let buckets = fit(sketch, Sketch::bucket_bytes(width));
        let candidates = fit(left - buckets as u128 * Sketch::bucket_bytes(width) as u128, Stores::candidate_bytes(width));
        if candidates == 0 || evicted_as.is_sketched() && buckets == 0 {
            let Exact { sinks, recent } = exact;
            let message = format!(
                "the budget for {capacity} tokens, {bytes} bytes in each layer, leaves nothing beside {sinks} sinks and {recent} recent tokens ({kept} bytes), \
                 coded rows ({rows}), the marks of tokens ({marks}) and a mean ({mean}); allow more, or a longer context"
            );
            return refuse("kv-bytes", &message);
        }
        Ok(Stores { evicted_as, candidates, buckets, width, capacity })
    }
}

/// Numbers of a token's key and value in one layer, as a device pads them.
fn width(geometry: &Geometry) -> usize {
    2 * geometry.kv_heads * geometry.head_dim.next_multiple_of(4)
}

impl Stores {
    /// Of a key and a value that are `width` numbers together, with position and weight.
    const fn candidate_bytes(width: usize) -> usize {
        2 * width + size_of::<u32>() + size_of::<f32>()
    }

    /// Bytes of all candidates and buckets in one layer, rows in f16.
    ///
    /// `None` where that is beyond counting.
    pub fn bytes(&self) -> Option<usize> {
        let candidates = self.candidates.checked_mul(Stores::candidate_bytes(self.width))?;
        candidates.checked_add(self.buckets.checked_mul(Sketch::bucket_bytes(self.width))?)
    }

    /// The most tokens that are read from their latents.
    pub(crate) fn listed(&self) -> usize {
        if self.evicted_as == Evicted::Rows { self.capacity } else { 0 }
    }

    /// Words that say what a device has to know of a sketch: what each bucket holds, or how many
    /// tokens there are.
    pub(crate) fn mark_words(&self) -> usize {
        match self.evicted_as {
            Evicted::None | Evicted::Rows => 0,
            Evicted::Mean => 1,
            Evicted::Sketch | Evicted::Shrunk => Sketch::BUCKET_WORDS * self.buckets,
        }
    }

    /// Of keys and values that are `width` numbers together, as a device pads them, whatever the
    /// budget for it is.
    #[cfg(test)]
    pub(crate) fn some(width: usize, evicted_as: Evicted, candidates: usize, buckets: usize, capacity: usize) -> Stores {
        Stores { evicted_as, candidates, buckets: if evicted_as.is_sketched() { buckets } else { 0 }, width, capacity }
    }

    /// Bytes of that table; `None` where that is beyond counting.
    pub fn place_bytes(&self) -> Option<usize> {
        if self.evicted_as.is_sketched() { self.capacity.checked_mul(Sketch::place_bytes()) } else { Some(0) }
    }

    /// The places of all tokens in a sketch's buckets, none where there is no sketch.
    pub fn places(&self) -> Arc<[u32]> {
        Sketch::places(self.buckets, self.capacity, 0)
    }

    /// An empty sketch of evicted tokens, where there is one.
    ///
    /// [`places`](Self::places) are their buckets; a token has `width` numbers.
    pub fn sketch(&self, width: usize, places: &Arc<[u32]>) -> Option<Sketch> {
        let of = |mean| Some(Sketch::new(width, self.buckets, mean, places.clone()));
        match self.evicted_as {
            Evicted::None | Evicted::Rows => None,
            Evicted::Mean | Evicted::Shrunk => of(true),
            Evicted::Sketch => of(false),
        }
    }

    /// How many candidates there are when `evicted` tokens have left the exact window.
    pub fn held(&self, evicted: usize) -> usize {
        evicted.min(self.candidates)
    }

    /// Bytes of the sums that [`evicted_columns`](Self::evicted_columns) are read from.
    pub fn evicted_bytes(&self) -> usize {
        let mean = if self.evicted_as.has_mean() { 1 } else { 0 };
        size_of::<u32>() * self.width * (self.buckets + mean)
    }

    /// Columns that stand for the evicted tokens.
    ///
    /// One for each bucket and sign, or one for the mean.
    pub fn evicted_columns(&self) -> usize {
        match self.evicted_as {
            Evicted::None | Evicted::Rows => 0,
            Evicted::Mean => 1,
            Evicted::Sketch | Evicted::Shrunk => 2 * self.buckets,
        }
    }

    /// Which of `contenders`, position and attention received, get a slot.
    ///
    /// Among equals the earlier ones do.
    pub fn keep(&self, contenders: &[(usize, f32)]) -> Vec<bool> {
        let mut order: Vec<usize> = (0..contenders.len()).collect();
        order.sort_by(|&a, &b| contenders[b].1.total_cmp(&contenders[a].1).then(contenders[a].0.cmp(&contenders[b].0)));
        let mut stays = vec![false; contenders.len()];
        order.iter().take(self.candidates).for_each(|&index| stays[index] = true);
        stays
    }
}
