//! What reading the cache costs a decode step in arithmetic, counted from shapes.
//!
//! A step makes, in a layer with `H` query heads of width `d`, for each cached token:
//!
//! - exact rows: `2·H·d` operations for scores and as many for values;
//! - keys coded before RoPE: `2·Σ rank·s·d` to rebuild the keys of each group of `s` heads, then
//!   `2·H·d` for scores;
//! - keys coded after RoPE: `2·rank` for the score of every query head, and `4` for each frequency
//!   pair of RoPE in which the mean of its key head is not zero: the mean rotates with the
//!   position, and is scored apart;
//! - values: `2·rank` for every query head.
//!
//! Once a step, whatever the depth, queries go through the bases of keys after RoPE, and sums of
//! values through theirs. One multiplication and one addition are two operations. Softmax, RoPE and
//! unpacking of codes are left out.

use super::{Geometry, KvSide, LatentKind, LatentSet, LatentSpec};

/// What reading the cache costs a decode step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Price {
    /// Numbers of the bases and rotating means that are read, once a step.
    ///
    /// What makes rows is read once for many tokens, and not counted.
    pub basis_numbers: u64,
    /// Operations with them, once a step.
    pub flops_per_step: u64,
    /// Operations for each cached token.
    pub flops_per_cached_token: u64,
}

impl Price {
    /// All layers of a model whose latents are `specs`; exact rows where there are none.
    ///
    /// `mean_pairs`: by row, frequency pairs in which a mean rotates, over all its heads
    /// ([`LatentSet::mean_pairs`]); those of rows beyond its end have none.
    pub fn of(specs: &[LatentSpec], mean_pairs: &[usize], geometry: &Geometry) -> Price {
        (0..geometry.layers).fold(Price::default(), |sum, layer| {
            let price = Price::of_layer(specs, mean_pairs, geometry, layer);
            Price {
                basis_numbers: sum.basis_numbers + price.basis_numbers,
                flops_per_step: sum.flops_per_step + price.flops_per_step,
                flops_per_cached_token: sum.flops_per_cached_token + price.flops_per_cached_token,
            }
        })
    }

    /// One layer of it.
    fn of_layer(specs: &[LatentSpec], mean_pairs: &[usize], geometry: &Geometry, layer: usize) -> Price {
        let (head, group_size) = (geometry.head_dim as u64, geometry.group_size() as u64);
        let mut price = Price::default();
        if specs.is_empty() {
            price.flops_per_cached_token = 4 * geometry.heads as u64 * head;
        }
        for side in [KvSide::Keys, KvSide::Values] {
            for source in LatentSet::sources(specs, layer, side, geometry.head_dim) {
                let spec = &specs[source.row];
                let kv_heads = source.kv_heads as u64;
                let rank = spec.format.rank() as u64 / if spec.format.by_head() { kv_heads } else { 1 };
                let up = kv_heads * head * rank;
                price.basis_numbers += up;
                if side == KvSide::Keys && spec.kind != LatentKind::PostRopeKeys {
                    // Rebuilt for every cached token, once for all queries, then scored at full
                    // width.
                    price.flops_per_cached_token += 2 * (up + kv_heads * group_size * head);
                    continue;
                }
                // Queries, or sums, go through the basis once; every row is used as it is stored.
                price.flops_per_step += 2 * up * group_size;
                price.flops_per_cached_token += 2 * kv_heads * group_size * rank;
                if spec.kind == LatentKind::PostRopeKeys {
                    // q · R_t μ = cos(tθ)·(q₁μ₁ + q₂μ₂) + sin(tθ)·(q₂μ₁ − q₁μ₂), the brackets once.
                    let pairs = mean_pairs.get(source.row).map_or(0, |pairs| *pairs as u64);
                    price.basis_numbers += 2 * pairs;
                    price.flops_per_step += 8 * pairs * group_size;
                    price.flops_per_cached_token += 4 * pairs * group_size;
                }
            }
        }
        price
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::Format;

    /// Two layers, four query heads on two key/value heads of eight numbers.
    const GEOMETRY: Geometry = Geometry { layers: 2, heads: 4, kv_heads: 2, head_dim: 8 };

    fn rows(kind: LatentKind, span: usize) -> Vec<LatentSpec> {
        let row = |first_layer, kind, runs| LatentSpec { first_layer, layers: span, kind, first_head: 0, kv_heads: 2, format: Format::half(runs) };
        let layer = |first| match kind {
            LatentKind::Both => vec![row(first, kind, 3)],
            kind => vec![row(first, kind, 2), row(first, LatentKind::Values, 1)],
        };
        (0..2).step_by(span).flat_map(layer).collect()
    }

    #[test]
    fn prices_are_those_worked_out_by_hand() {
        let price = |specs: &[LatentSpec], mean_pairs: &[usize]| {
            let Price { basis_numbers, flops_per_step, flops_per_cached_token } = Price::of(specs, mean_pairs, &GEOMETRY);
            [basis_numbers, flops_per_step, flops_per_cached_token]
        };
        // Scores and values: four heads of eight, two operations each, twice; in two layers.
        assert_eq!(price(&[], &[]), [0, 0, 256]);
        // Keys of rank 32 and values of rank 16, of 16 numbers: 512 and 256 numbers of bases.
        // Rebuilt: 1,024 for the keys, 64 for their scores, 128 for values.
        assert_eq!(price(&rows(LatentKind::PreRopeKeys, 1), &[]), [2 * 768, 2 * 2 * 2 * 256, 2 * (1024 + 64 + 128)]);
        // Not rebuilt: 256 for the scores of four heads, 128 for values.
        assert_eq!(price(&rows(LatentKind::PostRopeKeys, 1), &[]), [2 * 768, 2 * 2 * 2 * 768, 2 * (256 + 128)]);
        // Seven pairs of the first layer's two heads rotate: two query heads each, of two
        // multiply-adds; one pair of the second's.
        assert_eq!(
            price(&rows(LatentKind::PostRopeKeys, 1), &[7, 0, 1, 0]),
            [2 * 768 + 2 * 8, 2 * 2 * 2 * 768 + 8 * 2 * 8, 2 * (256 + 128) + 4 * 2 * 8]
        );
        // One row of rank 48 over both layers: each rebuilds its own 16 numbers of keys, and sums
        // 48 coordinates for values.
        assert_eq!(price(&rows(LatentKind::Both, 2), &[]), [2 * 2 * 768, 2 * 2 * 2 * 768, 2 * (2 * 768 + 64 + 2 * 4 * 48)]);
    }

    /// Of design figures for 32 heads on 8 of 128: multiply-adds of a layer, of exact rows, and of
    /// keys after RoPE and values in rows of full rank over all heads.
    #[test]
    fn rows_over_all_heads_cost_what_their_width_says() {
        let geometry = Geometry { layers: 1, heads: 32, kv_heads: 8, head_dim: 128 };
        assert_eq!(Price::of(&[], &[], &geometry).flops_per_cached_token / 2, 8192);
        let row = |kind| LatentSpec { first_layer: 0, layers: 1, kind, first_head: 0, kv_heads: 8, format: Format::half(64) };
        let specs = [row(LatentKind::PostRopeKeys), row(LatentKind::Values)];
        // A mean in all 64 pairs of 8 heads: 128 more for each of 32 query heads.
        assert_eq!(Price::of(&specs, &[512, 0], &geometry).flops_per_cached_token / 2, 2 * 32 * 1024 + 32 * 128);
    }
}
