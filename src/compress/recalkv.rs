//! ReCalKV (Yan et al., arXiv 2505.24357): low-rank keys in groups of similar heads, low-rank
//! values over all heads.
//!
//! In our notation (`x: [D]` a hidden state after RMSNorm, `C = E[xᵀx]`, rows as vectors), for a
//! layer with `H_kv` heads of width `d`:
//!
//! - **Keys: head-wise similarity reordering.** Similarity of heads `i` and `j` is linear CKA of
//!   their outputs, `‖G_ij‖²_F / (‖G_ii‖_F·‖G_jj‖_F)`, where `G = W_KᵀCW_K`, `[H_kv·d, H_kv·d]`, is
//!   all that is needed. Greedily, the most similar heads share a group of at most `s`; each group
//!   is factored by itself, `W_g ≈ A_g·B_g` with `A_g: [D, r_g]`, `B_g: [r_g, s·d]` ([`Basis`]).
//!   The row `x·[A_1 … A_G]` is cached, before RoPE; the key is rebuilt from it, `z·B + b`, and
//!   rotated as ever.
//! - **Values: offline calibration.** All heads share one latent, `W_V ≈ A·B`. The paper alternates
//!   least squares, `B ← (AᵀCA)⁻¹AᵀCW` (its equation 7) and `A ← WBᵀ(BBᵀ)⁻¹` (equation 8), from a
//!   plain SVD. The whitened SVD of the same `C` is the fixed point of both, and the global
//!   optimum: it is computed at once.
//! - **Fusion.** The paper folds `B_h·W_O^(h)` into the output projection. The exact rows that
//!   stand beside the coded ones here need `W_O` as it is, so the sum of latents is brought back
//!   first, `(Σ p·z)·B_h`, once per token; with all heads in one latent that is also the smaller of
//!   the two.
//!
//! What differs from the paper and its released code, and why: the permutation of heads is absorbed
//! into the weights (queries, keys, values, their biases and the rows of `W_O` move together), so
//! nothing is reordered at run time, and a key bias moves with its head, which the code forgets.
//! Moments are divided by the number of tokens and everything is solved in f64; the code squares
//! unnormalised sums in f16. CKA is taken of the outputs, not of the rows of a whitened weight
//! around their mean, which depends on the square root of `C` that one happens to pick; where keys
//! are normalised before RoPE, of the normalised ones. CKA does not promise that a group loses
//! less: [`Grouping::Loss`] looks at what it is to stand for, `Σ_{i>r} λ_i(G_g)`, summed over the
//! groups. The calibrated inputs are the dense model's.

use super::basis::{Basis, about};
use super::method::{Grouping, ReCalKv};
use super::tensors::MadeTensors;
use super::unit::{Context, Unit};
use crate::Result;
use crate::checkpoint::QkNormOver;
use crate::kv::{KvSide, LatentKind};
use crate::linalg::Eigen;
use crate::linalg::Moments;
use nalgebra::{DMatrix, DVector};
use std::collections::HashMap;

/// The rows of one layer, and its projections with the heads in the order of the groups.
///
/// # Errors
/// Those of reading the weights, and [`crate::Error::Numeric`].
pub(super) fn units(context: &Context, options: &ReCalKv, layer: usize) -> Result<(Vec<Unit>, MadeTensors)> {
    let ReCalKv { low_rank, group_heads, grouping } = *options;
    let (heads, d) = (context.heads, context.head_dim);
    let n = heads * d;
    let moments = context.statistics.rows(layer..layer + 1)?;
    let sizes: Vec<usize> = (0..heads).step_by(group_heads).map(|first| group_heads.min(heads - first)).collect();
    // Losses at the ranks that a uniform deal would give; the rule that deals them out sees the
    // groups only when they stand.
    let keep = context.keep(low_rank.budget)?;
    let ranks: Vec<usize> = sizes.iter().map(|size| (keep * (size * d) as f64).round() as usize).collect();
    let grams = about(&moments.part(0..n), &context.bias(layer, KvSide::Keys)?);
    let order = group(&format!("the keys of layer {layer}"), grouping, &grams, d, &sizes, &ranks)?;
    let columns: Vec<usize> = order.iter().flat_map(|&head| head * d..(head + 1) * d).collect();
    let side = |first: usize| {
        let part = moments.part(first..first + n);
        let second = part.second.select_rows(&columns).select_columns(&columns);
        Moments { mean: part.mean.select_rows(&columns), second }
    };
    let tensors = reorder(context, layer, &order)?;
    let bias = |side| -> Result<DVector<f64>> { Ok(context.bias(layer, side)?.select_rows(&columns)) };
    let (key_bias, value_bias) = (bias(KvSide::Keys)?, bias(KvSide::Values)?);

    let (keys, values) = (side(0), side(n));
    let unit = |kind, first_head, kv_heads, basis| Unit { first_layer: layer, layers: 1, kind, first_head, kv_heads, basis };
    let (mut units, mut first) = (Vec::new(), 0);
    for size in sizes {
        let range = first * d..(first + size) * d;
        let bias = key_bias.rows_range(range.clone()).into_owned();
        let what = format!("the keys of layer {layer}, group at {first}");
        units.push(unit(LatentKind::PreRopeKeys, first, size, Basis::principal(&what, &keys.part(range), bias, None)?));
        first += size;
    }
    let basis = Basis::principal(&format!("the values of layer {layer}"), &values, value_bias, None)?;
    units.push(unit(LatentKind::Values, 0, heads, basis));
    Ok((units, tensors))
}

/// The projections of a layer with its key/value heads, and the query heads that go with each, in
/// another order.
fn reorder(context: &Context, layer: usize, order: &[usize]) -> Result<MadeTensors> {
    let (checkpoint, config, d) = (context.checkpoint, context.checkpoint.config(), context.head_dim);
    let (hidden, group) = (config.hidden_size, config.group_size());
    let rows = |width: usize| -> Vec<usize> { order.iter().flat_map(|&head| head * width..(head + 1) * width).collect() };
    let (kv_rows, query_rows) = (rows(d), rows(group * d));
    let mut tensors = MadeTensors::new();
    for (part, rows) in [("q_proj", &query_rows), ("k_proj", &kv_rows), ("v_proj", &kv_rows)] {
        let name = |kind: &str| format!("model.layers.{layer}.self_attn.{part}.{kind}");
        // Row by row `[out, in]` is column by column `[in, out]`.
        let weight = DMatrix::from_vec(hidden, rows.len(), checkpoint.f32(&name("weight"), &[rows.len(), hidden])?);
        tensors.insert(name("weight"), (vec![rows.len(), hidden], weight.select_columns(rows).as_slice().to_vec()));
        if checkpoint.has(&name("bias")) {
            let bias = DVector::from_vec(checkpoint.f32(&name("bias"), &[rows.len()])?).select_rows(rows);
            tensors.insert(name("bias"), (vec![rows.len()], bias.as_slice().to_vec()));
        }
    }
    // A norm over all heads has gains for each.
    for norm in config.design.qk_norm.iter().filter(|norm| norm.over == QkNormOver::Projection) {
        for (name, rows) in norm.names.into_iter().zip([&query_rows, &kv_rows]) {
            let name = format!("model.layers.{layer}.self_attn.{name}.weight");
            let gains = DVector::from_vec(checkpoint.f32(&name, &[rows.len()])?).select_rows(rows);
            tensors.insert(name, (vec![rows.len()], gains.as_slice().to_vec()));
        }
    }
    let name = format!("model.layers.{layer}.self_attn.o_proj.weight");
    let output = DMatrix::from_vec(query_rows.len(), hidden, checkpoint.f32(&name, &[hidden, query_rows.len()])?);
    tensors.insert(name, (vec![hidden, query_rows.len()], output.select_rows(&query_rows).as_slice().to_vec()));
    Ok(tensors)
}

/// Linear CKA between heads, `[H, H]`, from the second moment `[H·d, H·d]` of their outputs: 1
/// where two span the same directions with the same weights, whatever rotation lies between them; 0
/// where they have nothing in common. A head without outputs is like no other.
fn similarity(moment: &DMatrix<f64>, d: usize) -> DMatrix<f64> {
    let heads = moment.nrows() / d;
    let norm = |i: usize, j: usize| moment.view((i * d, j * d), (d, d)).norm();
    DMatrix::from_fn(heads, heads, |i, j| {
        let own = norm(i, i) * norm(j, j);
        if own > 0.0 { norm(i, j).powi(2) / own } else { 0.0 }
    })
}

/// Puts heads into groups of the given sizes, most similar pairs first: both heads of a pair into
/// the first group with room for two, or the one that is still free beside the other. What is left
/// over fills the gaps. Returns the heads in the order of the groups, ascending within each.
fn group_heads(similarity: &DMatrix<f64>, sizes: &[usize]) -> Vec<usize> {
    let heads = similarity.nrows();
    let mut pairs: Vec<(usize, usize)> = (0..heads).flat_map(|i| (i + 1..heads).map(move |j| (i, j))).collect();
    pairs.sort_by(|&a, &b| similarity[b].total_cmp(&similarity[a]));
    let mut groups: Vec<Vec<usize>> = vec![Vec::new(); sizes.len()];
    let mut group_of: Vec<Option<usize>> = vec![None; heads];
    let with_room = |groups: &[Vec<usize>], room: usize| (0..sizes.len()).find(|&group| groups[group].len() + room <= sizes[group]);
    let put = |groups: &mut [Vec<usize>], group_of: &mut [Option<usize>], head: usize, group: usize| {
        groups[group].push(head);
        group_of[head] = Some(group);
    };
    for (i, j) in pairs {
        match (group_of[i], group_of[j]) {
            (None, None) => {
                if let Some(group) = with_room(&groups, 2) {
                    put(&mut groups, &mut group_of, i, group);
                    put(&mut groups, &mut group_of, j, group);
                }
            }
            (Some(group), None) if groups[group].len() < sizes[group] => put(&mut groups, &mut group_of, j, group),
            (None, Some(group)) if groups[group].len() < sizes[group] => put(&mut groups, &mut group_of, i, group),
            _ => {}
        }
    }
    for head in 0..heads {
        if let (None, Some(group)) = (group_of[head], with_room(&groups, 1)) {
            put(&mut groups, &mut group_of, head, group);
        }
    }
    groups.iter_mut().for_each(|group| group.sort_unstable());
    groups.concat()
}

/// Partitions that are all looked at: 8 heads in groups of 4 have 35, 9 in groups of 3 have 280.
const FEW: usize = 300;
/// Times that exchanges between all pairs of groups are tried.
const SWEEPS: usize = 4;

/// Puts heads of keys into groups of the given sizes and ranks.
///
/// `moment: [H·d, H·d]` is their second moment. Returns the heads in the order of the groups,
/// ascending within each. `what` names the keys in errors.
///
/// # Errors
/// [`crate::Error::Numeric`] where the moment is not finite or has no eigenvalues.
///
/// # Panics
/// Where the sizes do not sum to `H`, or are not as many as the ranks.
pub fn group(what: &str, grouping: Grouping, moment: &DMatrix<f64>, d: usize, sizes: &[usize], ranks: &[usize]) -> Result<Vec<usize>> {
    let heads = moment.nrows() / d;
    assert_eq!((sizes.len(), sizes.iter().sum()), (ranks.len(), heads), "groups of heads");
    let similar = group_heads(&similarity(moment, d), sizes);
    if grouping == Grouping::Cka {
        return Ok(similar);
    }
    let mut spectra = Spectra { what, moment, d, known: HashMap::new() };
    let groups = match partitions(heads, sizes, ranks) {
        Some(all) => spectra.best(all, ranks)?,
        None => {
            let mut next = similar.into_iter();
            let groups = sizes.iter().map(|&size| next.by_ref().take(size).collect()).collect();
            spectra.exchange(groups, ranks)?
        }
    };
    Ok(groups.concat())
}

/// All ways to put `heads` heads into groups, ascending within each; groups of equal size and rank
/// are not told apart. `None` where there are more than [`FEW`].
fn partitions(heads: usize, sizes: &[usize], ranks: &[usize]) -> Option<Vec<Vec<Vec<usize>>>> {
    let mut all = vec![vec![Vec::new(); sizes.len()]];
    for head in 0..heads {
        let mut grown = Vec::new();
        for groups in &all {
            for group in 0..sizes.len() {
                let twin = |&other: &usize| groups[other].is_empty() && (sizes[other], ranks[other]) == (sizes[group], ranks[group]);
                let again = groups[group].is_empty() && (0..group).any(|other| twin(&other));
                if groups[group].len() < sizes[group] && !again {
                    let mut groups = groups.clone();
                    groups[group].push(head);
                    grown.push(groups);
                }
            }
        }
        // Every partial one can be completed, so there are at least as many in the end.
        if grown.len() > FEW {
            return None;
        }
        all = grown;
    }
    Some(all)
}

/// The eigenvalues of groups of heads, each found once.
struct Spectra<'a> {
    what: &'a str,
    moment: &'a DMatrix<f64>,
    d: usize,
    known: HashMap<Vec<usize>, Vec<f64>>,
}

impl Spectra<'_> {
    /// What the group of `heads`, ascending, loses at `rank`.
    fn loss(&mut self, heads: &[usize], rank: usize) -> Result<f64> {
        if !self.known.contains_key(heads) {
            let columns: Vec<usize> = heads.iter().flat_map(|head| head * self.d..(head + 1) * self.d).collect();
            let block = self.moment.select_rows(&columns).select_columns(&columns);
            let values = Eigen::of(self.what, &block)?.values;
            self.known.insert(heads.to_vec(), values.as_slice().to_vec());
        }
        Ok(self.known[heads].iter().skip(rank).map(|value| value.max(0.0)).sum())
    }

    /// The one of `all` partitions that loses least.
    fn best(&mut self, all: Vec<Vec<Vec<usize>>>, ranks: &[usize]) -> Result<Vec<Vec<usize>>> {
        let (mut best, mut least) = (Vec::new(), f64::INFINITY);
        for groups in all {
            let mut loss = 0.0;
            for (heads, &rank) in groups.iter().zip(ranks) {
                loss += self.loss(heads, rank)?;
            }
            if loss < least || best.is_empty() {
                (best, least) = (groups, loss);
            }
        }
        Ok(best)
    }

    /// Exchanges single heads between groups where both together then lose less.
    fn exchange(&mut self, mut groups: Vec<Vec<usize>>, ranks: &[usize]) -> Result<Vec<Vec<usize>>> {
        let exchanged = |from: &[usize], index: usize, other: usize| {
            let mut heads = from.to_vec();
            heads[index] = other;
            heads.sort_unstable();
            heads
        };
        for _ in 0..SWEEPS {
            let mut helped = false;
            for b in 1..groups.len() {
                for a in 0..b {
                    for i in 0..groups[a].len() {
                        for j in 0..groups[b].len() {
                            let new = [exchanged(&groups[a], i, groups[b][j]), exchanged(&groups[b], j, groups[a][i])];
                            let before = self.loss(&groups[a], ranks[a])? + self.loss(&groups[b], ranks[b])?;
                            let after = self.loss(&new[0], ranks[a])? + self.loss(&new[1], ranks[b])?;
                            // More than rounding, so that equals are not exchanged for ever.
                            if after < before * (1.0 - 1e-9) {
                                [groups[a], groups[b]] = new;
                                helped = true;
                            }
                        }
                    }
                }
            }
            if !helped {
                break;
            }
        }
        Ok(groups)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cka_ignores_rotations_and_scales_within_a_head() {
        let (n, d) = (50, 3);
        let x = DMatrix::from_fn(n, d, |i, j| ((i * 7 + j * 31) as f64 * 0.61).sin());
        let rotation = nalgebra::Rotation3::from_euler_angles(0.3, 1.1, -0.7).matrix().map(|x| 2.5 * x);
        let other = DMatrix::from_fn(n, d, |i, j| ((i * 13 + j * 17) as f64 * 1.37).cos());
        let mut heads = DMatrix::zeros(n, 4 * d);
        heads.columns_mut(0, d).copy_from(&x);
        heads.columns_mut(d, d).copy_from(&(&x * rotation));
        heads.columns_mut(2 * d, d).copy_from(&other);
        let cka = similarity(&(heads.transpose() * &heads), d);
        assert!((cka[(0, 0)] - 1.0).abs() < 1e-12);
        assert!((cka[(0, 1)] - 1.0).abs() < 1e-12, "{}", cka[(0, 1)]);
        assert_eq!(cka[(0, 2)], cka[(2, 0)]);
        assert!(cka[(0, 2)] < 0.5);
        assert_eq!(cka[(0, 3)], 0.0);
        assert_eq!(cka[(3, 3)], 0.0);
    }

    #[test]
    fn similar_heads_are_grouped_and_every_head_has_its_place() {
        // Heads of the same parity belong together.
        let parity = DMatrix::from_fn(6, 6, |i, j| if i % 2 == j % 2 { 0.9 } else { 0.1 });
        assert_eq!(group_heads(&parity, &[3, 3]), [0, 2, 4, 1, 3, 5]);
        // Uneven last groups, groups of one, a single group.
        for sizes in [vec![4, 2], vec![2, 2, 2], vec![4, 1, 1], vec![5, 1], vec![1; 6], vec![6]] {
            for seed in 0..20 {
                let random = DMatrix::from_fn(6, 6, |i, j| ((i.min(j) * 5 + i.max(j) * 11 + seed * 17) as f64).sin().abs());
                let mut order = group_heads(&random, &sizes);
                order.sort_unstable();
                assert_eq!(order, [0, 1, 2, 3, 4, 5], "{sizes:?}, seed {seed}");
            }
        }
        assert_eq!(group_heads(&DMatrix::from_element(1, 1, 1.0), &[1]), [0]);
        assert_eq!(group_heads(&DMatrix::from_element(3, 3, f64::NAN), &[2, 1]).len(), 3);
    }
    /// Heads `[n, H·d]` that share parts of each other's directions.
    fn related_heads(heads: usize, d: usize, seed: u64) -> DMatrix<f64> {
        let mut random = crate::linalg::Random::new(seed);
        let mut gaussian = |rows: usize, columns: usize| DMatrix::from_fn(rows, columns, |_, j| random.gaussian() * 0.7f64.powi((j % d) as i32));
        let x = gaussian(200, 2 * d) * gaussian(2 * d, heads * d);
        x.transpose() * x / 200.0
    }

    fn loss(moment: &DMatrix<f64>, d: usize, order: &[usize], sizes: &[usize], ranks: &[usize]) -> f64 {
        let mut spectra = Spectra { what: "test", moment, d, known: HashMap::new() };
        let mut next = order.iter().copied();
        let groups = sizes.iter().map(|&size| next.by_ref().take(size).collect::<Vec<_>>()).collect::<Vec<_>>();
        groups.iter().zip(ranks).map(|(heads, &rank)| spectra.loss(heads, rank).unwrap()).sum()
    }

    #[test]
    fn by_loss_no_partition_is_better_than_the_one_found() {
        let d = 4;
        let mut better = 0;
        for (seed, sizes, ranks) in [(1, [3, 3], [6, 6]), (2, [4, 2], [7, 4]), (3, [3, 3], [8, 4]), (4, [2, 4], [3, 3])] {
            let moment = related_heads(6, d, seed);
            let order = group("test", Grouping::Loss, &moment, d, &sizes, &ranks).unwrap();
            let found = loss(&moment, d, &order, &sizes, &ranks);
            // Every subset of the right size as the first group.
            for subset in (0..64u32).filter(|subset| subset.count_ones() as usize == sizes[0]) {
                let (first, second): (Vec<_>, Vec<_>) = (0..6usize).partition(|head| subset >> head & 1 == 1);
                assert!(found <= loss(&moment, d, &[first, second].concat(), &sizes, &ranks) * (1.0 + 1e-12), "seed {seed}");
            }
            let similar = group("test", Grouping::Cka, &moment, d, &sizes, &ranks).unwrap();
            better += usize::from(found < 0.999 * loss(&moment, d, &similar, &sizes, &ranks));
        }
        assert!(better > 0, "similarity never finds the best here, or this test shows nothing");
    }

    #[test]
    fn exchanges_improve_on_similarity_where_partitions_are_many() {
        let (heads, d) = (12, 3);
        let (sizes, ranks) = ([4, 4, 4], [5, 6, 5]);
        assert!(partitions(heads, &sizes, &ranks).is_none());
        assert_eq!(partitions(8, &[4, 4], &[5, 5]).unwrap().len(), 35);
        assert_eq!(partitions(8, &[4, 4], &[5, 6]).unwrap().len(), 70);
        for seed in 0..5 {
            let moment = related_heads(heads, d, seed);
            let of = |grouping| group("test", grouping, &moment, d, &sizes, &ranks).unwrap();
            let (similar, exchanged) = (of(Grouping::Cka), of(Grouping::Loss));
            let mut all = exchanged.clone();
            all.sort_unstable();
            assert_eq!(all, (0..heads).collect::<Vec<_>>());
            assert!(exchanged.chunks(4).all(|group| group.is_sorted()));
            assert!(loss(&moment, d, &exchanged, &sizes, &ranks) < loss(&moment, d, &similar, &sizes, &ranks), "seed {seed}");
        }
    }
}
