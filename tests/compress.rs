//! Calibration and compression: the oracles that hold for every model family, and what is refused.

mod common;

use common::{Random, SyntheticModel, families, nmse};
use lowkey::calibrate::{Options, SensitivityKind, Statistics, gather, source_digest, text_digest};
use lowkey::checkpoint::Checkpoint;
use lowkey::compress::{Budget, Float, Form, LowKey, LowRank, Method, Output, Plan, Ranks, ReCalKv, Report, run};
use lowkey::cpu::{Model, RowType};
use lowkey::kv::Exact;
use lowkey::sequence::{Logits, Sequence, SequenceOptions};
use lowkey::task::Progress;
use lowkey::{Error, Result};
use safetensors::Dtype;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

fn quietly(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn load(checkpoint: &Checkpoint) -> Arc<Model> {
    Arc::new(Model::load(checkpoint).unwrap())
}

/// Statistics of a few hundred random tokens.
fn calibrate(checkpoint: &Checkpoint) -> Statistics {
    let model = load(checkpoint);
    let tokens = Random(77).tokens(640, model.config().vocab_size);
    let options = Options { window: 160, longest: 160, ..Options::default() };
    gather(&model, &[tokens], source_digest(checkpoint).unwrap(), text_digest(&["random"]), &options, &mut quietly).unwrap().0
}

fn compress(checkpoint: &Checkpoint, statistics: &Statistics, keep: f64, group_heads: usize, float: Float, output: &Path) -> Result<Report> {
    let low_rank = LowRank { budget: Budget::Keep(keep), ranks: Some(Ranks::Uniform), ..LowRank::default() };
    let plan = Plan::new(Method::ReCalKv(ReCalKv { low_rank, group_heads, ..ReCalKv::default() }));
    run(checkpoint, &plan, Some(statistics), &Output { float, ..Output::standalone(output) }, &mut quietly)
}

/// A sequence whose queries read all but eight keys and the first four from latents, however they
/// are asked.
fn strict(capacity: usize) -> SequenceOptions {
    SequenceOptions { capacity, strict: true, exact: Some(Exact { sinks: 4, recent: 8 }), ..SequenceOptions::default() }
}

fn logits(model: &Arc<Model>, row_type: RowType) -> Vec<f32> {
    let tokens = Random(78).tokens(150, model.config().vocab_size);
    model.sequence(strict(tokens.len()), row_type).unwrap().forward(&tokens, Logits::All).unwrap()
}

/// Runs `check` on a checkpoint of every family, in f32 so that copying it rounds nothing, and its
/// statistics.
fn for_every_family(check: impl Fn(&str, &SyntheticModel, &Checkpoint, &Statistics, &Path)) {
    for (family, synthetic) in families() {
        let synthetic = SyntheticModel { dtype: Dtype::F32, ..synthetic };
        let directory = synthetic.write_temporary();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let statistics = calibrate(&checkpoint);
        let outputs = tempfile::tempdir().unwrap();
        check(family, &synthetic, &checkpoint, &statistics, outputs.path());
    }
}

#[test]
fn full_rank_gives_the_dense_logits() {
    for_every_family(|family, _, checkpoint, statistics, outputs| {
        let dense = load(checkpoint);
        for (float, rows, most) in [(Float::F32, RowType::F32, 1e-5), (Float::F16, RowType::F16, 1e-5)] {
            // In groups of two, heads are permuted and the last group may be uneven.
            let output = outputs.join(format!("{float:?}"));
            compress(checkpoint, statistics, 1.0, 2, float, &output).unwrap();
            let factored = Checkpoint::open(&output).unwrap();
            assert!(factored.factored().is_some());
            let error = nmse(&logits(&load(&factored), rows), &logits(&dense, RowType::F32));
            assert!(error <= most, "{family} in {float:?}: {error}");
        }
    });
}

#[test]
fn error_falls_with_rank_and_memory_is_what_was_planned() {
    for_every_family(|family, _, checkpoint, statistics, outputs| {
        let dense = logits(&load(checkpoint), RowType::F32);
        let mut before = f64::INFINITY;
        for keep in [0.25, 0.5, 0.75, 1.0] {
            let output = outputs.join(format!("{keep}"));
            let report = compress(checkpoint, statistics, keep, 4, Float::F32, &output).unwrap();
            let model = load(&Checkpoint::open(&output).unwrap());
            let memory = model.sequence(100, RowType::F16).unwrap().memory();
            assert_eq!(memory.kv_bytes_per_token, report.kv_bytes_per_token, "{family}");
            let error = nmse(&logits(&model, RowType::F32), &dense);
            // Narrow heads may have the same runs of 16 at two budgets.
            assert!(error <= before, "{family}: {error} at {keep}, {before} with less");
            before = error;
        }
    });
}

#[test]
fn factored_sequences_do_not_depend_on_how_they_are_asked() {
    for_every_family(|family, synthetic, checkpoint, statistics, outputs| {
        for keep in [0.25, 0.5] {
            let output = outputs.join(format!("{keep}"));
            compress(checkpoint, statistics, keep, 2, Float::F16, &output).unwrap();
            let model = load(&Checkpoint::open(&output).unwrap());
            let tokens = Random(79).tokens(70, synthetic.vocab);
            let whole = model.sequence(strict(70), RowType::F32).unwrap().forward(&tokens, Logits::All).unwrap();
            let mut stepped = model.sequence(strict(70), RowType::F32).unwrap();
            stepped.forward(&tokens, Logits::None).unwrap();
            stepped.truncate(33);
            let last: Vec<f32> = tokens[33..].iter().flat_map(|&token| stepped.forward(&[token], Logits::Last).unwrap()).collect();
            let error = nmse(&last, &whole[33 * synthetic.vocab..]);
            // Another way through the model rounds otherwise, and now and then a code with it.
            assert!(error < 1e-6, "{family} at {keep}: {error}");
        }
    });
}

/// The heads of a model in another order, biases too.
#[test]
fn a_joint_permutation_of_heads_changes_nothing() {
    for_every_family(|family, synthetic, checkpoint, statistics, outputs| {
        let (d, group) = (synthetic.head_dim, synthetic.heads / synthetic.kv_heads);
        let reversed = |width: usize| move |row: usize| (synthetic.kv_heads - 1 - row / width) * width + row % width;
        let mut tensors = synthetic.tensors();
        for (name, tensor) in &mut tensors {
            let Some((_, projection)) = name.rsplit_once("self_attn.") else { continue };
            let old = tensor.numbers.clone();
            let columns = tensor.shape.get(1).copied().unwrap_or(1);
            if projection.starts_with("o_proj") {
                let from = reversed(d * group);
                tensor.numbers.iter_mut().enumerate().for_each(|(at, x)| *x = old[at / columns * columns + from(at % columns)]);
            } else if projection.ends_with("_proj.weight") || projection.ends_with("_proj.bias") {
                let from = reversed(if projection.starts_with('q') { d * group } else { d });
                tensor.numbers.iter_mut().enumerate().for_each(|(at, x)| *x = old[from(at / columns) * columns + at % columns]);
            }
        }
        let directory = synthetic.write_temporary();
        common::write_tensors(&directory.path().join("model.safetensors"), &tensors, Dtype::F32);
        let permuted = Checkpoint::open(directory.path()).unwrap();
        let error = nmse(&logits(&load(&permuted), RowType::F32), &logits(&load(checkpoint), RowType::F32));
        assert!(error < 1e-10, "{family}, dense: {error}");

        // Compression finds the same groups, whatever the order it meets the heads in; all heads in
        // one group, it also finds the same factors.
        let statistics_permuted = calibrate(&permuted);
        compress(checkpoint, statistics, 0.5, 8, Float::F32, &outputs.join("one")).unwrap();
        compress(&permuted, &statistics_permuted, 0.5, 8, Float::F32, &outputs.join("other")).unwrap();
        let [one, other] = ["one", "other"].map(|name| logits(&load(&Checkpoint::open(&outputs.join(name)).unwrap()), RowType::F32));
        assert!(nmse(&one, &other) < 1e-6, "{family}, factored: {}", nmse(&one, &other));
    });
}

#[test]
fn what_is_run_is_what_was_asked_for() {
    let synthetic = SyntheticModel { layers: 1, ..SyntheticModel::default() };
    let directory = synthetic.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let model = load(&checkpoint);
    let tokens = Random(80).tokens(700, synthetic.vocab);
    let options = Options { window: 300, longest: 300, sinks: 3, ..Options::default() };
    let (statistics, _) = gather(&model, std::slice::from_ref(&tokens), "s".into(), "t".into(), &options, &mut quietly).unwrap();
    assert_eq!((statistics.tokens, statistics.longest, statistics.sinks), (600, 300, 3));

    // A text is its tokens and its digest.
    let text = "the other and the inner, ".repeat(30);
    let (read, _) = lowkey::calibrate::run(&checkpoint, &model, &[&text], &options, &mut quietly).unwrap();
    let tokens_of_text = checkpoint.tokenizer().unwrap().encode(&text, false).unwrap();
    let source = source_digest(&checkpoint).unwrap();
    assert_eq!(read, gather(&model, &[tokens_of_text], source, text_digest(&[&text]), &options, &mut quietly).unwrap().0);

    let few = Options { tokens: Some(1), ..options.clone() };
    assert_eq!(gather(&model, std::slice::from_ref(&tokens), "s".into(), "t".into(), &few, &mut quietly).unwrap().0.tokens, 300);
    let (short, _) = gather(&model, &[tokens[..50].to_vec()], "s".into(), "t".into(), &options, &mut quietly).unwrap();
    assert_eq!((short.tokens, short.longest), (50, 50));
    for (tokens, options) in [
        (&tokens[..40], options.clone()),
        (&tokens[..0], options.clone()),
        (&tokens[..], Options { window: 40, ..options.clone() }),
        (&tokens[..], Options { window: 32, sensitivity: SensitivityKind::None, ..options.clone() }),
        (&tokens[..], Options { span: 3, ..options.clone() }),
        (&tokens[..], Options { tokens: Some(0), ..options.clone() }),
    ] {
        assert!(matches!(gather(&model, &[tokens.to_vec()], "s".into(), "t".into(), &options, &mut quietly), Err(Error::Argument { .. })));
    }
}

#[test]
fn statistics_come_back_as_they_were_saved_and_nothing_else_is_taken_for_them() {
    let synthetic = SyntheticModel::default();
    let directory = synthetic.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let statistics = calibrate(&checkpoint);
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("statistics.safetensors");
    statistics.save(&path).unwrap();
    assert_eq!(Statistics::load(&path).unwrap(), statistics);
    assert!(matches!(statistics.save(&path), Err(Error::Exists { .. })));
    assert_eq!(std::fs::read_dir(files.path()).unwrap().count(), 1, "a temporary file was left");

    let whole = std::fs::read(&path).unwrap();
    let bad = files.path().join("bad.safetensors");
    let refused = |bytes: &[u8], word: &str| {
        std::fs::write(&bad, bytes).unwrap();
        let message = Statistics::load(&bad).unwrap_err().to_string();
        assert!(message.contains("bad.safetensors") && message.contains(word), "{message}");
    };
    for length in [0, 7, 8, 200, whole.len() / 2, whole.len() - 1] {
        refused(&whole[..length], "safetensors");
    }
    refused(&[&u64::MAX.to_le_bytes()[..], &whole[8..]].concat(), "safetensors");
    let end = whole.len();
    refused(&[&whole[..end - 4], &f32::NAN.to_le_bytes()[..]].concat(), "finite");
    refused(&[&whole[..end - 8], &1e9f32.to_le_bytes()[..], &whole[end - 4..]].concat(), "symmetric");
    let replace = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = whole.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        [&whole[..at], to.as_bytes(), &whole[at + to.len()..]].concat()
    };
    refused(&replace("\"lowkey_statistics\":\"4\"", "\"lowkey_statistics\":\"7\""), "version 7");
    refused(&replace("\"longest\":\"160\"", "\"longest\":\"1x0\""), "longest");
    refused(&replace("layers.1.", "layers.8."), "layers.1.");
    refused(&std::fs::read(directory.path().join("model.safetensors")).unwrap(), "not a statistics file");

    for other in [SyntheticModel { seed: 99, ..synthetic.clone() }, SyntheticModel { layers: 2, ..synthetic.clone() }] {
        let directory = other.write_temporary();
        let other = Checkpoint::open(directory.path()).unwrap();
        let message = compress(&other, &statistics, 0.5, 4, Float::F16, &files.path().join("out")).unwrap_err().to_string();
        assert!(message.starts_with("statistics: ") && message.contains("gather them anew"), "{message}");
    }
}

#[test]
fn outputs_are_complete_or_absent() {
    let synthetic = SyntheticModel::default();
    let directory = synthetic.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let statistics = calibrate(&checkpoint);
    let plan = Plan::new(Method::LowKey(LowKey { budget: Budget::Times(2.0), ..LowKey::default() }));
    for form in [Form::Adapter, Form::Standalone] {
        complete_or_absent(&checkpoint, &plan, &statistics, form);
    }
    let model = load(&checkpoint);
    let stopped = gather(&model, &[vec![1; 50]], "s".into(), "t".into(), &Options::default(), &mut |_| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(Error::Interrupted)));
}

fn complete_or_absent(checkpoint: &Checkpoint, plan: &Plan, statistics: &Statistics, form: Form) {
    let outputs = tempfile::tempdir().unwrap();
    let output = outputs.path().join("out");
    let to = |path: &Path| Output { form, ..Output::adapter(path) };
    let named = |name: &str| to(&outputs.path().join(name));
    let left = || std::fs::read_dir(outputs.path()).unwrap().count();

    // Stopped at each report there is.
    let mut reports = Vec::new();
    run(checkpoint, plan, Some(statistics), &named("whole.lowkey"), &mut |progress| {
        reports.push(progress);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert!(reports.iter().any(|progress| progress.stage == "factor" && progress.done == progress.total));
    assert!(reports.last().is_some_and(|progress| progress.stage == "write" && progress.done == progress.total));
    for stop in 0..reports.len() {
        let mut seen = 0;
        let stopped = run(checkpoint, plan, Some(statistics), &to(&output), &mut |_| {
            seen += 1;
            if seen > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(stopped, Err(Error::Interrupted)));
        assert_eq!(left(), 1, "stopped at report {stop}");
    }

    // Where something is, nothing is touched.
    std::fs::create_dir(&output).unwrap();
    assert!(matches!(run(checkpoint, plan, Some(statistics), &to(&output), &mut quietly), Err(Error::Exists { .. })));
    assert_eq!(std::fs::read_dir(&output).unwrap().count(), 0);
    assert!(matches!(run(checkpoint, plan, Some(statistics), &named("no/such/place"), &mut quietly), Err(Error::Io { .. })));

    // Factors that f16 cannot hold.
    let mut vast = statistics.clone();
    vast.moments[1].mean.fill(1e30);
    let message = run(checkpoint, plan, Some(&vast), &named("vast"), &mut quietly).unwrap_err().to_string();
    assert!(message.contains("rows.1") || message.contains("layers 1 to 1"), "{message}");
    assert_eq!(left(), 2);

    // What was written is no source for compressing again, and statistics of another model are of
    // no use.
    let whole = outputs.path().join("whole.lowkey");
    let factored = match form {
        Form::Adapter => Checkpoint::open_with(checkpoint.path(), &whole).unwrap(),
        Form::Standalone => Checkpoint::open(&whole).unwrap(),
    };
    let message = run(&factored, plan, Some(statistics), &named("again"), &mut quietly).unwrap_err().to_string();
    assert!(message.contains("factored already"), "{message}");
    let (_, other) = families().remove(2);
    let directory = other.write_temporary();
    let other = Checkpoint::open(directory.path()).unwrap();
    let message = run(&other, plan, Some(statistics), &named("other"), &mut quietly).unwrap_err().to_string();
    assert!(message.starts_with("statistics: "), "{message}");
}

#[test]
fn everything_but_attention_is_copied_bit_by_bit_and_the_config_says_what_was_done() {
    let (_, synthetic) = families().into_iter().find(|(family, _)| *family == "qwen2").unwrap();
    let directory = synthetic.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let statistics = calibrate(&checkpoint);
    let outputs = tempfile::tempdir().unwrap();
    let output = outputs.path().join("out");
    let report = compress(&checkpoint, &statistics, 0.5, 4, Float::F16, &output).unwrap();
    let written = Checkpoint::open(&output).unwrap();
    for name in checkpoint.tensor_names().filter(|name| !name.contains("self_attn")) {
        let shape = checkpoint.shape(name).unwrap();
        assert_eq!(written.f16(name, shape).unwrap(), checkpoint.f16(name, shape).unwrap(), "{name}");
    }
    let factored = written.factored().unwrap();
    assert_eq!(factored.method, "recalkv");
    assert_eq!(factored.source_digest, source_digest(&checkpoint).unwrap());
    assert_eq!(factored.calibration_digest, text_digest(&["random"]));
    assert_eq!((&factored.options, factored.kv_bytes_per_token), (&report.options, report.kv_bytes_per_token));
    assert_eq!(written.config(), checkpoint.config());
    let text = "the and in other <|im_end|>";
    assert_eq!(written.tokenizer().unwrap().encode(text, true).unwrap(), checkpoint.tokenizer().unwrap().encode(text, true).unwrap());
    assert!(report.seconds.factor > 0.0 && report.seconds.write > 0.0);
    assert!(report.peak_rss_bytes.is_none_or(|bytes| bytes > 1 << 20));
}
