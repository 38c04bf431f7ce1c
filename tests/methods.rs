//! The published methods side by side: what holds for each of them, on every family of models.

mod common;

use common::{Random, SyntheticModel, families, nmse};
use lowkey::calibrate::{Options, Statistics, gather, source_digest, text_digest};
use lowkey::checkpoint::Checkpoint;
use lowkey::compress::{Budget, Float, Grouping, Layout, LowKey, LowRank, Method, Output, Palu, Plan, Ranks, ReCalKv, Report, run};
use lowkey::cpu::{Model, RowType};
use lowkey::kv::{Exact, LatentKind, RUN};
use lowkey::sequence::{Logits, Sequence, SequenceOptions};
use lowkey::task::Progress;
use lowkey::{Error, Result};
use safetensors::Dtype;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

/// The low-rank methods, within what `low_rank` says; in groups of so many heads where they have
/// groups.
fn published(low_rank: LowRank, group_heads: usize) -> [Method; 5] {
    let recalkv = Method::ReCalKv(ReCalKv { low_rank, group_heads, ..ReCalKv::default() });
    [Method::Palu(Palu { low_rank, group_heads }), recalkv, Method::KqSvd(low_rank), Method::KSvd(low_rank), Method::Eigen(low_rank)]
}

fn keep(keep: f64, ranks: Option<Ranks>) -> LowRank {
    LowRank { budget: Budget::Keep(keep), ranks, bits: 16 }
}

const RULES: [Option<Ranks>; 5] = [None, Some(Ranks::Uniform), Some(Ranks::Fisher), Some(Ranks::Spectrum), Some(Ranks::Energy)];

fn quietly(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn load(checkpoint: &Checkpoint) -> Arc<Model> {
    Arc::new(Model::load(checkpoint).unwrap())
}

/// Statistics of a few hundred random tokens, sensitivity and all.
fn calibrate(checkpoint: &Checkpoint) -> Statistics {
    let model = load(checkpoint);
    let tokens = Random(77).tokens(480, model.config().vocab_size);
    let options = Options { window: 160, longest: 160, ..Options::default() };
    gather(&model, &[tokens], source_digest(checkpoint).unwrap(), text_digest(&["random"]), &options, &mut quietly).unwrap().0
}

fn compress(checkpoint: &Checkpoint, statistics: &Statistics, plan: &Plan, output: &Path) -> Result<(Report, Checkpoint)> {
    let report = run(checkpoint, plan, Some(statistics), &Output { float: Float::F32, ..Output::adapter(output) }, &mut quietly)?;
    Ok((report, Checkpoint::open_with(checkpoint.path(), output)?))
}

/// Every query reads all but eight keys and the first four from latents.
fn logits(model: &Arc<Model>) -> Vec<f32> {
    let tokens = Random(78).tokens(150, model.config().vocab_size);
    let exact = Some(Exact { sinks: 4, recent: 8 });
    let options = SequenceOptions { capacity: tokens.len(), strict: true, exact, ..SequenceOptions::default() };
    model.sequence(options, RowType::F32).unwrap().forward(&tokens, Logits::All).unwrap()
}

/// Runs `check` on a checkpoint of every family, in f32 so that copying it rounds nothing, and its
/// statistics.
fn for_every_family(check: impl Fn(&str, &Checkpoint, &Statistics, &Path)) {
    for (family, synthetic) in families() {
        let directory = SyntheticModel { dtype: Dtype::F32, ..synthetic }.write_temporary();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let statistics = calibrate(&checkpoint);
        let outputs = tempfile::tempdir().unwrap();
        check(family, &checkpoint, &statistics, outputs.path());
    }
}

/// Only the rounding of rows to f16 is left.
#[test]
fn full_rank_gives_the_dense_logits_by_every_method() {
    for_every_family(|family, checkpoint, statistics, outputs| {
        let dense = logits(&load(checkpoint));
        for (index, ranks) in RULES.into_iter().enumerate() {
            let method = published(keep(1.0, ranks), 2)[index].clone();
            let plan = Plan::new(method.clone());
            let (_, factored) = compress(checkpoint, statistics, &plan, &outputs.join(method.name())).unwrap();
            let error = nmse(&logits(&load(&factored)), &dense);
            assert!(error < 1e-5, "{family}, {}: {error}", method.name());
        }
    });
}

#[test]
fn by_every_rule_error_falls_with_the_budget_and_the_budget_is_kept() {
    // Heads of several runs, so that there is something to choose.
    let synthetic = SyntheticModel { heads: 4, kv_heads: 2, head_dim: 64, hidden: 160, dtype: Dtype::F32, ..SyntheticModel::default() };
    let directory = synthetic.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let (statistics, dense) = (calibrate(&checkpoint), logits(&load(&checkpoint)));
    let outputs = tempfile::tempdir().unwrap();
    for which in 0..5 {
        for (index, ranks) in RULES.into_iter().enumerate() {
            let mut before = f64::INFINITY;
            for share in [0.5, 0.75, 1.0] {
                let method = published(keep(share, ranks), 4)[which].clone();
                let plan = Plan::new(method.clone());
                let (report, factored) =
                    compress(&checkpoint, &statistics, &plan, &outputs.path().join(format!("{}{index}{share}", method.name()))).unwrap();
                let error = nmse(&logits(&load(&factored)), &dense);
                assert!(error < before, "{}, {ranks:?}: {error} at {share}, {before} with less", method.name());
                before = error;
                // One run of all heads in one layer, in f16, is what a rule may be off by.
                let slack = (2 * RUN * checkpoint.config().num_key_value_heads) as f64;
                let most = share * report.kv_bytes_per_token_dense as f64 + slack;
                assert!(report.kv_bytes_per_token as f64 <= most, "{}, {ranks:?}: {} at {share}", method.name(), report.kv_bytes_per_token);
            }
        }
    }
}

/// Palu's groups are as asked for; the methods that read keys after RoPE have a row for each head.
#[test]
fn rows_are_what_the_papers_say() {
    for_every_family(|family, checkpoint, statistics, outputs| {
        let heads = checkpoint.config().num_key_value_heads;
        let [_, recalkv, kqsvd, _, eigen] = published(keep(0.5, None), heads);
        let palu = |group_heads| Method::Palu(Palu { low_rank: keep(0.5, None), group_heads });
        for (index, (method, keys, kind)) in [
            (palu(1), heads, LatentKind::PreRopeKeys),
            (palu(heads), 1, LatentKind::PreRopeKeys),
            (recalkv, 1, LatentKind::PreRopeKeys),
            (kqsvd, heads, LatentKind::PostRopeKeys),
            (eigen, heads, LatentKind::PostRopeKeys),
        ]
        .into_iter()
        .enumerate()
        {
            let plan = Plan::new(method.clone());
            let output = outputs.join(index.to_string());
            let (_, factored) = compress(checkpoint, statistics, &plan, &output).unwrap();
            let rows = factored.rows().unwrap().unwrap();
            let layers = checkpoint.config().num_hidden_layers;
            let found = rows.specs.iter().filter(|spec| spec.kind == kind).count();
            assert_eq!(found, keys * layers, "{family}, {}", method.name());
        }
    });
}

/// Whatever the grouping, heads move with all that belongs to them.
#[test]
fn grouping_by_loss_reorders_heads_and_changes_nothing_at_full_rank() {
    for_every_family(|family, checkpoint, statistics, outputs| {
        let low_rank = keep(1.0, Some(Ranks::Uniform));
        let plan = Plan::new(Method::ReCalKv(ReCalKv { low_rank, group_heads: 2, grouping: Grouping::Loss }));
        let (_, factored) = compress(checkpoint, statistics, &plan, &outputs.join("full")).unwrap();
        let error = nmse(&logits(&load(&factored)), &logits(&load(checkpoint)));
        assert!(error < 1e-5, "{family}: {error}");
    });
}

#[test]
fn what_a_rule_needs_and_options_that_cannot_be_are_named() {
    let (_, synthetic) = families().remove(0);
    let directory = SyntheticModel { dtype: Dtype::F32, ..synthetic }.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let mut statistics = calibrate(&checkpoint);
    statistics.layers.iter_mut().for_each(|layer| (layer.fisher, layer.sensitivity, layer.scalar) = (None, None, None));
    let outputs = tempfile::tempdir().unwrap();
    let output = outputs.path().join("none");
    let half = keep(0.5, None);
    let palu = |low_rank| Method::Palu(Palu { low_rank, group_heads: 4 });
    for (method, word) in [
        (palu(half), "Fisher"),
        (Method::KqSvd(keep(0.5, Some(Ranks::Spectrum))), "sensitivity"),
        (Method::Palu(Palu { group_heads: 0, ..Palu::default() }), "group_heads: "),
        (Method::KSvd(LowRank { bits: 2, ..half }), "bits: "),
        (Method::KVarN { key_bits: 4, value_bits: 16 }, "choose 2, 4 or 8"),
    ] {
        let error = compress(&checkpoint, &statistics, &Plan::new(method), &output).err().unwrap();
        assert!(matches!(error, Error::Argument { .. }) && error.to_string().contains(word), "{error}");
        assert!(!output.exists());
    }
    // These need neither.
    for method in [palu(keep(0.5, Some(Ranks::Uniform))), Method::KqSvd(half)] {
        compress(&checkpoint, &statistics, &Plan::new(method.clone()), &outputs.path().join(method.name())).unwrap();
    }
}

/// A Qwen2 whose keys have a bias of this norm in the slowest pair of RoPE of every head of two
/// layers, where no query has anything: the same model whatever the norm.
fn biased(norm: f32) -> tempfile::TempDir {
    let synthetic = SyntheticModel { dtype: Dtype::F32, ..families().into_iter().find(|(family, _)| *family == "qwen2").unwrap().1 };
    let (directory, mut tensors, d, hidden) = (synthetic.write_temporary(), synthetic.tensors(), synthetic.head_dim, synthetic.hidden);
    let slowest = [d / 2 - 1, d - 1];
    for layer in 0..2 {
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        for (dim, share) in slowest.into_iter().zip([0.8, -0.6]) {
            for head in 0..synthetic.heads {
                let row = head * d + dim;
                tensors.get_mut(&name("q_proj.weight")).unwrap().numbers[row * hidden..][..hidden].fill(0.0);
                tensors.get_mut(&name("q_proj.bias")).unwrap().numbers[row] = 0.0;
            }
            let bias = &mut tensors.get_mut(&name("k_proj.bias")).unwrap().numbers;
            (0..synthetic.kv_heads).for_each(|head| bias[head * d + dim] = share * norm);
        }
    }
    common::write_tensors(&directory.path().join("model.safetensors"), &tensors, Dtype::F32);
    directory
}

/// Rows that are coded about a mean which rotates lose no more of keys with large biases than of
/// keys without, on the processor and on a GPU in every tier, up to the end of the context.
#[test]
fn key_biases_cost_nothing_where_means_turn() {
    use lowkey::compress::factor;
    use lowkey::gpu::{Options as Device, Tier};
    let plans = [
        Plan::new(Method::Dense { bits: 4 }),
        Plan::new(Method::LowKey(LowKey { budget: Budget::Times(4.0), layout: Layout::FAST, ..LowKey::default() })),
    ];
    let mut without = [0.0; 2];
    for norm in [0.0, 100.0, 600.0, 5000.0] {
        let directory = biased(norm);
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let statistics = calibrate(&checkpoint);
        let exact = logits(&load(&checkpoint));
        for (plan, without) in plans.iter().zip(&mut without) {
            let rows = factor(&checkpoint, plan, Some(&statistics), &mut quietly).unwrap().rows;
            let model = Arc::new(Model::with_latents(&checkpoint, Some(rows.clone())).unwrap());
            let error = nmse(&logits(&model), &exact);
            if norm == 0.0 {
                *without = error;
            }
            assert!(error < 1.5 * *without, "{}, bias {norm}: {error}, {without} without one", plan.method.options());
            if norm != 600.0 {
                continue;
            }
            let tokens = Random(79).tokens(500, checkpoint.config().vocab_size);
            let (most, last) = tokens.split_at(470);
            let ends = |sequence: &mut dyn Sequence| {
                sequence.forward(most, Logits::None).unwrap();
                last.iter().flat_map(|token| sequence.forward(&[*token], Logits::Last).unwrap()).collect::<Vec<f32>>()
            };
            // The same chunks, so that the same keys are read exactly.
            let options = SequenceOptions { capacity: 512, chunk: Some(32), ..SequenceOptions::default() };
            let expected = ends(&mut model.sequence(options, RowType::F16).unwrap());
            for tier in Tier::ALL {
                let device = common::device(Device { tier: Some(tier), ..Device::default() });
                let model = Arc::new(lowkey::decoder::Model::with_latents(&checkpoint, Some(rows.clone()), device).unwrap());
                let error = nmse(&ends(&mut model.sequence(options).unwrap()), &expected);
                assert!(error < 2e-3, "{}, {tier:?}: {error}", plan.method.options());
            }
        }
    }
}

/// The methods whose size is that of their numbers, as they come and in eight bits.
fn quantised() -> Vec<Plan> {
    let eight = [Method::Oscar { bits: 8 }, Method::Kivi { bits: 8 }, Method::KVarN { key_bits: 8, value_bits: 8 }];
    let as_they_come = eight.clone().map(|method| method.name().parse().unwrap());
    as_they_come.into_iter().chain(eight).map(Plan::new).collect()
}

/// What a row takes is what the papers say: codes, and the f16 numbers that scale them.
#[test]
fn quantised_rows_take_the_bytes_of_their_codes_and_scales() {
    // Two key/value heads of 64 numbers in each of two layers.
    let synthetic = SyntheticModel { heads: 4, kv_heads: 2, head_dim: 64, hidden: 160, layers: 2, dtype: Dtype::F32, ..SyntheticModel::default() };
    let directory = synthetic.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let statistics = calibrate(&checkpoint);
    let outputs = tempfile::tempdir().unwrap();
    let numbers = 2 * 2 * 2 * 64;
    for (method, bits_of_128, options) in [
        // A least value and a step for 128 numbers.
        (Method::Oscar { bits: 2 }, 2 * 128 + 32, "2 bits"),
        (Method::Oscar { bits: 4 }, 4 * 128 + 32, "4 bits"),
        // The same for 32 numbers.
        (Method::Kivi { bits: 2 }, 3 * 128, "2 bits"),
        (Method::Kivi { bits: 4 }, 5 * 128, "4 bits"),
        // Codes; for keys of two heads in 128 tokens 128 pairs and 2 factors of every token; for
        // their values two pairs of every token and 128 factors, of which a header has room for
        // two.
        (Method::KVarN { key_bits: 4, value_bits: 2 }, (6 * 128 + (32 + 32) + (64 + 32)) / 2, "4 bits, values 2"),
    ] {
        let name = format!("{}, {options}", method.name());
        let (report, factored) = compress(&checkpoint, &statistics, &Plan::new(method), &outputs.path().join(&name)).unwrap();
        assert_eq!(report.kv_bytes_per_token, numbers / 128 * bits_of_128 / 8, "{name}");
        assert_eq!(report.options, options);
        let sequence = load(&factored).sequence(256, RowType::F16).unwrap();
        assert_eq!(sequence.memory().kv_bytes_per_token, report.kv_bytes_per_token, "{name}");
    }
}

/// Token by token and in chunks, every family, in one tier after the other: each kernel's own test
/// has all. A number that rounding leaves between two codes may get either: at two bits that shows,
/// but for less than coding does.
#[test]
fn quantised_rows_are_the_same_on_the_processor_and_on_a_gpu() {
    use lowkey::compress::factor;
    use lowkey::gpu::{Options as Device, Tier};
    let devices = Tier::ALL.map(|tier| common::device(Device { tier: Some(tier), ..Device::default() }));
    for (index, (family, synthetic)) in families().into_iter().enumerate() {
        let directory = SyntheticModel { dtype: Dtype::F32, ..synthetic }.write_temporary();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let statistics = calibrate(&checkpoint);
        let tokens = Random(79).tokens(420, checkpoint.config().vocab_size);
        let (most, last) = tokens.split_at(400);
        let run = |sequence: &mut dyn Sequence| {
            let mut all = sequence.forward(most, Logits::All).unwrap();
            last.iter().for_each(|token| all.extend(sequence.forward(&[*token], Logits::Last).unwrap()));
            all
        };
        let dense = run(&mut load(&checkpoint).sequence(SequenceOptions::from(448), RowType::F16).unwrap());
        for (at, plan) in quantised().into_iter().enumerate().filter(|(_, plan)| index == 0 || plan.method.options() == "8 bits") {
            let rows = factor(&checkpoint, &plan, Some(&statistics), &mut quietly).unwrap().rows;
            // As an evaluation reads, and as a conversation does.
            let strict = plan.method.options() == "8 bits";
            let exact = Some(Exact { sinks: 4, recent: 8 });
            let options = SequenceOptions { capacity: 448, chunk: Some(100), strict, exact, ..SequenceOptions::default() };
            let model = Arc::new(Model::with_latents(&checkpoint, Some(rows.clone())).unwrap());
            let expected = run(&mut model.sequence(options, RowType::F16).unwrap());
            let lost = nmse(&expected, &dense);
            let device = &devices[(index + at) % devices.len()];
            let model = Arc::new(lowkey::decoder::Model::with_latents(&checkpoint, Some(rows.clone()), device.clone()).unwrap());
            let error = nmse(&run(&mut model.sequence(options).unwrap()), &expected);
            let what = format!("{family}, {} {}, {:?}", plan.method.name(), plan.method.options(), device.tier());
            assert!(error < if strict { 1e-3 } else { 1e-3 + 0.2 * lost }, "{what}: {error} where coding loses {lost}");
        }
    }
}

/// Rows of a block share numbers, so a sequence that is cut within one reads its text anew; what
/// comes after is as if the rest had never been. Nothing picks single tokens out of blocks.
#[test]
fn blocks_of_tokens_can_be_cut_anywhere_and_are_read_whole() {
    use lowkey::kv::{CacheMethod, Evicted, Read, Reviver};
    let (_, synthetic) = families().remove(0);
    let directory = SyntheticModel { dtype: Dtype::F32, ..synthetic }.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let outputs = tempfile::tempdir().unwrap();
    let (tokens, other) = (Random(80).tokens(320, checkpoint.config().vocab_size), Random(81).tokens(90, checkpoint.config().vocab_size));
    for method in [Method::Kivi { bits: 2 }, Method::KVarN { key_bits: 4, value_bits: 2 }] {
        let output = outputs.path().join(method.name());
        let plan = Plan::new(method.clone());
        run(&checkpoint, &plan, None, &Output { float: Float::F32, ..Output::adapter(&output) }, &mut quietly).unwrap();
        let engine = lowkey::Engine::open(&lowkey::LoadOptions { device: lowkey::Device::Cpu, ..Default::default() }).unwrap();
        let model = engine.load_checkpoint(Checkpoint::open_with(checkpoint.path(), &output).unwrap()).unwrap();
        let exact = Some(Exact { sinks: 4, recent: 8 });
        let options = SequenceOptions { capacity: 448, strict: true, exact, ..SequenceOptions::default() };
        for cut in [2, 70, 150, 300] {
            let mut sequence = model.sequence(options).unwrap();
            sequence.forward(&tokens, Logits::None).unwrap();
            sequence.truncate(cut);
            assert_eq!(sequence.position(), cut);
            let after = sequence.forward(&other, Logits::All).unwrap();
            let mut fresh = model.sequence(options).unwrap();
            fresh.forward(&tokens[..cut], Logits::None).unwrap();
            let error = nmse(&after, &fresh.forward(&other, Logits::All).unwrap());
            assert!(error < 1e-2, "{}, cut at {cut}: {error}", method.name());
        }
        let evict = CacheMethod::Evict(Reviver::new(Budget::Keep(0.5), Some(Evicted::None)));
        for (method, name) in [(CacheMethod::Calibrated(Read::top(Some(16))), "select"), (evict, "method")] {
            let error = model.sequence(SequenceOptions { method, ..options }).err().unwrap();
            assert!(matches!(&error, Error::Argument { name: found, .. } if found == name) && error.to_string().contains("blocks of"), "{error}");
        }
    }
}
