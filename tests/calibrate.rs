//! Calibration: sums are those of the tokens that count, and sensitivity is what a disturbance
//! does.

mod common;

use common::{Random, SyntheticModel, families};
use lowkey::calibrate::{Options, SensitivityKind, Statistics, gather};
use lowkey::checkpoint::{Architecture, Checkpoint};
use lowkey::cpu::{Heads, Model, Observer, RowType};
use lowkey::linalg::Moments;
use lowkey::sequence::Logits;
use lowkey::task::Progress;
use lowkey::{Error, Result};
use nalgebra::{DMatrix, DVector};
use std::ops::ControlFlow;
use std::sync::Arc;

fn load(synthetic: &SyntheticModel) -> Arc<Model> {
    let directory = synthetic.write_temporary();
    Arc::new(Model::load(&Checkpoint::open(directory.path()).unwrap()).unwrap())
}

fn statistics(model: &Arc<Model>, texts: &[Vec<u32>], options: &Options) -> Result<Statistics> {
    let mut quietly = |_: Progress| ControlFlow::Continue(());
    Ok(gather(model, texts, "source".into(), "text".into(), options, &mut quietly)?.0)
}

/// A layer's queries, keys, keys after RoPE and values, a column for each token of one window.
type Layer = [DMatrix<f64>; 4];

/// Keeps all heads of one window.
struct Keep(Vec<Layer>);

impl Observer for Keep {
    fn heads(&mut self, layer: usize, position: usize, heads: &Heads) {
        for (kept, here) in self.0[layer].iter_mut().zip([heads.queries, heads.keys, heads.post_rope_keys, heads.values]) {
            kept.resize_mut(here.nrows(), position + here.ncols(), 0.0);
            kept.columns_mut(position, here.ncols()).copy_from(&here.map(f64::from));
        }
    }
}

fn heads(model: &Arc<Model>, window: &[u32]) -> Vec<Layer> {
    let mut kept = Keep(vec![std::array::from_fn(|_| DMatrix::zeros(0, 0)); model.config().num_hidden_layers]);
    model.sequence(window.len(), RowType::F32).unwrap().observe(window, Logits::None, &mut kept).unwrap();
    kept.0
}

fn near(found: &DMatrix<f32>, expected: &DMatrix<f64>) {
    let difference = (found.map(f64::from) - expected).norm() / expected.norm();
    assert!(difference < 1e-6, "{difference}");
}

/// `found` against the mean and second moment of `columns`, token by token.
fn near_moments(found: &Moments, columns: &[DVector<f64>]) {
    let count = columns.len() as f64;
    let mean = columns.iter().sum::<DVector<f64>>() / count;
    near(&DMatrix::from_columns(std::slice::from_ref(&found.mean)), &DMatrix::from_columns(&[mean]));
    let second = columns.iter().map(|column| column * column.transpose()).sum::<DMatrix<f64>>() / count;
    near(&found.second, &second);
    assert_eq!(found.second, found.second.transpose());
}

#[test]
fn sums_are_those_of_the_positions_that_count_over_any_span() {
    let synthetic = SyntheticModel { architecture: Architecture::Qwen2, layers: 5, ..SyntheticModel::default() };
    let model = load(&synthetic);
    // More than one chunk of the decoder in a window; a remainder after each text's last whole
    // window.
    let (window, mut random) = (300, Random(31));
    let texts = [650, 340].map(|length| random.tokens(length, synthetic.vocab));
    let windows: Vec<Vec<Layer>> = [&texts[0][..300], &texts[0][300..600], &texts[1][..300]].map(|window| heads(&model, window)).into();
    let options = Options { window, longest: window, sinks: 3, recent: 20, sensitivity: SensitivityKind::None, ..Options::default() };
    // What `part` makes of each token from `first` on.
    let tokens = |first: usize, part: &dyn Fn(&[Layer], usize) -> DVector<f64>| -> Vec<DVector<f64>> {
        windows.iter().flat_map(|layers| (first..window).map(|token| part(layers, token)).collect::<Vec<_>>()).collect()
    };
    let rows = |layers: std::ops::Range<usize>| {
        tokens(3, &|kept: &[Layer], token| {
            let sides = layers.clone().flat_map(|layer| [1, 3].map(|side| &kept[layer][side]));
            DVector::from_iterator(
                layers.len() * 2 * synthetic.kv_heads * synthetic.head_dim,
                sides.flat_map(|side| side.column(token).iter().copied().collect::<Vec<_>>()),
            )
        })
    };
    for span in [1, 2, 4] {
        let found = statistics(&model, &texts, &Options { span, ..options.clone() }).unwrap();
        assert_eq!((found.tokens, found.longest, found.span, found.moments.len()), (900, window, span, 5usize.div_ceil(span)));
        for layer in 0..5 {
            near_moments(&found.rows(layer..layer + 1).unwrap(), &rows(layer..layer + 1));
            let post_rope_keys = tokens(3, &|kept, token| kept[layer][2].column(token).into_owned());
            near_moments(&found.layers[layer].post_rope_keys, &post_rope_keys);
            // Every fourth of 891 tokens is no more than 256.
            let every_fourth = |all: Vec<DVector<f64>>| DMatrix::from_columns(&all.into_iter().step_by(4).collect::<Vec<_>>());
            near(&found.layers[layer].sample.rows, &every_fourth(rows(layer..layer + 1)));
            near(&found.layers[layer].sample.post_rope_keys, &every_fourth(post_rope_keys));
            for (head, found) in found.layers[layer].queries.iter().enumerate() {
                let mut expected = DMatrix::zeros(synthetic.head_dim, synthetic.head_dim);
                for queries in tokens(20, &|kept, token| kept[layer][0].column(token).into_owned()) {
                    for query_head in 2 * head..2 * head + 2 {
                        let query = queries.rows(query_head * synthetic.head_dim, synthetic.head_dim);
                        expected += query * query.transpose() / (3.0 * 280.0);
                    }
                }
                near(found, &expected);
            }
        }
        for layers in [0..2, 2..4, 0..4] {
            if layers.len() <= span {
                near_moments(&found.rows(layers.clone()).unwrap(), &rows(layers));
            } else {
                assert!(matches!(found.rows(layers), Err(Error::Argument { .. })));
            }
        }
        #[allow(clippy::reversed_empty_ranges)]
        for layers in [3..5, 5..6, 2..2, 3..1, 9..10] {
            assert!(matches!(found.rows(layers), Err(Error::Argument { .. })));
        }
    }
    // A text that has no window does not go unnoticed.
    let short = [texts[0].clone(), vec![1; 299]];
    assert!(statistics(&model, &short, &options).unwrap_err().to_string().contains("299"));
    assert!(statistics(&model, &[], &options).is_err());
}

#[test]
fn noise_moves_the_output_as_far_as_the_gradients_say() {
    for (family, synthetic) in families() {
        let model = load(&synthetic);
        let texts = [Random(32).tokens(24 * 160, synthetic.vocab)];
        // Nearer than the sliding window of one family, beyond which no query sees anything.
        let options = Options { window: 160, longest: 160, recent: 8, scalar_windows: 24, ..Options::default() };
        let full = statistics(&model, &texts, &options).unwrap();
        let scalar = statistics(&model, &texts, &Options { sensitivity: SensitivityKind::Scalar, ..options.clone() }).unwrap();
        for (layer, (full, scalar)) in full.layers.iter().zip(&scalar.layers).enumerate() {
            assert!(full.scalar.is_none() && scalar.sensitivity.is_none() && scalar.fisher.is_none());
            let gradients = full.sensitivity.as_ref().unwrap();
            let means = [&gradients.keys, &gradients.values].map(|matrix| matrix.trace() / matrix.nrows() as f32);
            for (side, (noise, gradient)) in scalar.scalar.unwrap().into_iter().zip(means).enumerate() {
                let ratio = noise / gradient;
                assert!((1.0 / 1.5..1.5).contains(&ratio), "{family}, layer {layer}, side {side}: {noise} against {gradient}");
            }
        }
    }
}

/// Whether a run that is stopped again and again finds what one does that is not, to the last bit;
/// in how many runs.
fn resumed(model: &Arc<Model>, texts: &[Vec<u32>], options: &Options) -> usize {
    let whole = statistics(model, texts, options).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let options = Options { keep: Some(directory.path().to_path_buf()), ..options.clone() };
    let mut begun = Vec::new();
    for run in 1.. {
        // Stops a little later each time than where the last run was stopped.
        let (mut first, mut last) = (None, 0);
        let mut stop = |progress: Progress| {
            first.get_or_insert(progress.done);
            last = progress.done;
            if progress.done >= first.unwrap() + progress.total * 9 / 20 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        match gather(model, texts, "source".into(), "text".into(), &options, &mut stop) {
            Ok((found, _)) => {
                assert!(found == whole, "run {run} found something else");
                assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "something was left behind");
                assert!(begun.windows(2).all(|pair| pair[0] < pair[1]), "{begun:?}");
                return run;
            }
            Err(Error::Interrupted) => begun.push(first.unwrap()),
            Err(other) => panic!("{other}"),
        }
        assert!(run < 20, "{begun:?}");
    }
    unreachable!()
}

#[test]
fn a_run_that_was_stopped_goes_on_and_finds_the_same_bits() {
    let synthetic = SyntheticModel { architecture: Architecture::Qwen3, layers: 5, ..SyntheticModel::default() };
    let (model, texts) = (load(&synthetic), [Random(33).tokens(640, synthetic.vocab)]);
    let options = Options { window: 160, longest: 320, ..Options::default() };
    assert!(resumed(&model, &texts, &options) > 2);
    assert!(resumed(&model, &texts, &Options { span: 2, sensitivity: SensitivityKind::None, ..options }) > 2);
}

#[test]
fn what_was_left_for_another_run_is_not_taken() {
    let synthetic = SyntheticModel::default();
    let (model, texts) = (load(&synthetic), [Random(34).tokens(200, synthetic.vocab)]);
    let directory = tempfile::tempdir().unwrap();
    let options = Options { window: 100, longest: 100, keep: Some(directory.path().to_path_buf()), ..Options::default() };
    let mut calls = 0;
    let mut stop = |_: Progress| {
        calls += 1;
        if calls > 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    assert!(matches!(gather(&model, &texts, "source".into(), "text".into(), &options, &mut stop), Err(Error::Interrupted)));
    let left = || std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let first = left();
    assert_eq!(first.len(), 1);
    // Another seed draws other labels.
    statistics(&model, &texts, &Options { seed: 1, ..options.clone() }).unwrap();
    assert_eq!(left(), first);
    // Streams that were cut short: it begins anew.
    std::fs::OpenOptions::new().write(true).open(first[0].join("streams")).unwrap().set_len(100).unwrap();
    let plain = statistics(&model, &texts, &Options { keep: None, ..options.clone() }).unwrap();
    assert!(statistics(&model, &texts, &options).unwrap() == plain);
    assert_eq!(left().len(), 0);
}

#[test]
fn two_runs_of_the_same_do_not_meet() {
    let synthetic = SyntheticModel::default();
    let (model, texts) = (load(&synthetic), [Random(35).tokens(200, synthetic.vocab)]);
    let directory = tempfile::tempdir().unwrap();
    let options = Options { window: 100, longest: 100, keep: Some(directory.path().to_path_buf()), ..Options::default() };
    let (mut inner, mut begun) = (None, false);
    let mut within = |_: Progress| {
        if !std::mem::replace(&mut begun, true) {
            inner = Some(statistics(&model, &texts, &options).unwrap());
        }
        ControlFlow::Continue(())
    };
    let (outer, _) = gather(&model, &texts, "source".into(), "text".into(), &options, &mut within).unwrap();
    assert!(inner.unwrap() == outer);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}
