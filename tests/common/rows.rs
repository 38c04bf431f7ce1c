//! Latents for the tests: bases that are random rotations, scaled by what a model's keys and values
//! are on random tokens.

use super::Random;
use lowkey::checkpoint::{Checkpoint, Config};
use lowkey::cpu::{self, Heads, Observer, RowType};
use lowkey::kv::{Band, Coder, Exact, Format, KvSide, LatentKind, LatentSet, LatentSpec, RUN, Scale};
use lowkey::sequence::Logits;
use nalgebra::{DMatrix, DVector};
use std::sync::Arc;

/// Keys before and after RoPE, and values, `[H_kv·d, tokens]`, of every layer.
struct Seen(Vec<[DMatrix<f32>; 3]>);

impl Observer for Seen {
    fn residual(&mut self, _: usize, _: usize, _: &DMatrix<f32>) {}

    fn heads(&mut self, _: usize, _: usize, heads: &Heads) {
        self.0.push([heads.keys, heads.post_rope_keys, heads.values].map(Clone::clone));
    }
}

/// Bases for `specs`: mean and spread are those of 150 random tokens, directions are drawn. A row
/// as wide as its vector loses nothing but what its bands do.
pub fn coded(checkpoint: &Checkpoint, specs: Vec<LatentSpec>, exact: Exact) -> LatentSet {
    let config = checkpoint.config();
    let mut seen = Seen(Vec::new());
    let tokens = Random(11).tokens(150, config.vocab_size);
    Arc::new(cpu::Model::with_latents(checkpoint, None).unwrap())
        .sequence(150, RowType::F32)
        .unwrap()
        .observe(&tokens, Logits::None, &mut seen)
        .unwrap();
    let mut random = Random(12);
    let mut coder = |spec: &LatentSpec| {
        let (w, r, d) = (spec.width(config.head_dim), spec.format.rank(), config.head_dim);
        let mut y = DMatrix::zeros(w, tokens.len());
        for layer in spec.first_layer..=spec.last_layer() {
            let keys = usize::from(spec.kind == LatentKind::PostRopeKeys);
            for (side, from) in [(KvSide::Keys, keys), (KvSide::Values, 2)] {
                if let Some(offset) = spec.offset(layer, side, d) {
                    let part = seen.0[layer][from].rows(spec.first_head * d, spec.kv_heads * d);
                    y.rows_mut(offset, spec.kv_heads * d).copy_from(&part);
                }
            }
        }
        let mean: DVector<f32> = y.column_mean();
        y.column_iter_mut().for_each(|mut column| column -= &mean);
        let rotation = DMatrix::from_vec(w, w, random.normals(w * w, 1.0)).qr().q();
        let z = rotation.transpose() * y;
        let spread = |i: usize| (z.row(i).norm_squared() / tokens.len() as f32).sqrt().max(1e-6);
        let number = |i: usize, j: usize| if j < w { rotation[(i, j)] } else { 0.0 };
        Coder {
            format: spec.format.clone(),
            mean,
            down: Some(DMatrix::from_fn(w, r, |i, j| number(i, j) / if j < w { spread(j) } else { 1.0 })),
            up: DMatrix::from_fn(r, w, |j, i| number(i, j) * if j < w { spread(j) } else { 1.0 }),
        }
    };
    LatentSet { coders: specs.iter().map(&mut coder).collect(), specs, exact }
}

fn row(first_layer: usize, layers: usize, kind: LatentKind, heads: (usize, usize), bands: Vec<Band>, scale: Scale) -> LatentSpec {
    LatentSpec { first_layer, layers, kind, first_head: heads.0, kv_heads: heads.1, format: Format { bands, scale } }
}

/// Runs of 16 coordinates that hold a whole vector of `width`, and the bands they fall into: the
/// first some of each of `bits`, the rest of the last.
fn bands(width: usize, bits: &[u8]) -> Vec<Band> {
    let (count, mut runs) = (bits.len(), width.div_ceil(RUN));
    let mut bands = Vec::new();
    for (i, &bits) in bits.iter().enumerate() {
        let here = if i + 1 < count { 1.min(runs) } else { runs };
        runs -= here;
        bands.extend((here > 0).then_some(Band { bits, runs: here }));
    }
    bands
}

/// All ways to code a model of three layers, by name.
pub fn ways(config: &Config) -> Vec<(&'static str, Vec<LatentSpec>)> {
    let (d, heads, layers) = (config.head_dim, config.num_key_value_heads, config.num_hidden_layers);
    let all = (0, heads);
    let width = heads * d;
    let by_layer = |rows: &dyn Fn(usize) -> Vec<LatentSpec>| (0..layers).flat_map(rows).collect::<Vec<_>>();
    let slices = || [(0, heads.div_ceil(2)), (heads.div_ceil(2), heads / 2)].into_iter().filter(|slice| slice.1 > 0);
    let half = |heads: usize| vec![Band { bits: 16, runs: (heads * d * 2 / 3).div_ceil(RUN) }];
    vec![
        ("f16 latents in two groups", {
            let groups = |l: usize, kind| slices().map(move |slice| row(l, 1, kind, slice, half(slice.1), Scale::Fixed)).collect::<Vec<_>>();
            by_layer(&|l| [groups(l, LatentKind::PreRopeKeys), groups(l, LatentKind::Values)].concat())
        }),
        ("joint rows", by_layer(&|l| vec![row(l, 1, LatentKind::Both, all, bands(2 * width, &[8, 4, 3, 2]), Scale::Band)])),
        ("joint rows over two layers", {
            let span = |l: usize| row(l, 2.min(layers - l), LatentKind::Both, all, bands(2 * width * 2.min(layers - l), &[16, 8, 4]), Scale::Fixed);
            (0..layers).step_by(2).map(span).collect()
        }),
        ("keys after RoPE by head, values over two layers", {
            let keys = by_layer(&|l| (0..heads).map(|h| row(l, 1, LatentKind::PostRopeKeys, (h, 1), bands(d, &[8, 4]), Scale::Band)).collect());
            let values = |l: usize| row(l, 2.min(layers - l), LatentKind::Values, all, bands(width * 2.min(layers - l), &[8, 4]), Scale::Fixed);
            keys.into_iter().chain((0..layers).step_by(2).map(values)).collect()
        }),
        ("eight bits throughout", {
            let affine = |l: usize, kind| row(l, 1, kind, all, bands(width, &[8]), Scale::Affine);
            by_layer(&|l| vec![affine(l, LatentKind::PostRopeKeys), affine(l, LatentKind::Values)])
        }),
    ]
}
