//! Greedy text is the same whether each step waits for the one before, or begins on its token on
//! the device, or several tokens of a draft are verified together; and what that costs.

mod common;

use common::{Random, SyntheticModel};
use lowkey::Error;
use lowkey::checkpoint::Checkpoint;
use lowkey::cpu::{self, RowType};
use lowkey::decoder::{GpuSequence, Model};
use lowkey::gpu::Options;
use lowkey::kv::{Budget, CacheMethod, Exact, Read, Reviver};
use lowkey::sequence::{Logits, Sequence, SequenceOptions, StepCounters};
use std::sync::Arc;

const CAPACITY: usize = 200;

fn options(method: CacheMethod) -> SequenceOptions {
    SequenceOptions { capacity: CAPACITY, method, chunk: Some(16), ..SequenceOptions::default() }
}

/// A model with every kind of cache, by name.
fn caches() -> Vec<(String, Arc<Model>, SequenceOptions)> {
    let directory = SyntheticModel::default().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let device = common::device(Options::default());
    let dense = Arc::new(Model::load(&checkpoint, device.clone()).unwrap());
    let evict = CacheMethod::Evict(Reviver::new(Budget::Keep(0.5), None));
    let mut caches = vec![("exact".to_owned(), dense.clone(), options(CacheMethod::default())), ("evicting".to_owned(), dense, options(evict))];
    // Of the ways to code rows two are enough: each takes its time to compile.
    for (name, specs) in common::rows::ways(checkpoint.config()).into_iter().skip(1).step_by(2) {
        let rows = common::rows::coded(&checkpoint, specs, Exact { sinks: 4, recent: 10 });
        let model = Arc::new(Model::with_latents(&checkpoint, Some(rows), device.clone()).unwrap());
        caches.push((format!("{name}, some"), model.clone(), options(CacheMethod::Calibrated(Read::top(Some(32))))));
        caches.push((name.to_owned(), model, options(CacheMethod::default())));
    }
    caches
}

/// What follows `prompt`, `count` tokens by `step`.
fn text(sequence: &mut GpuSequence, prompt: &[u32], count: usize, step: fn(&mut GpuSequence, u32) -> u32) -> Vec<u32> {
    sequence.truncate(0);
    sequence.forward(prompt, Logits::None).unwrap();
    let mut text = vec![1];
    while text.len() <= count {
        text.push(step(sequence, text[text.len() - 1]));
    }
    text
}

fn wait(sequence: &mut GpuSequence, token: u32) -> u32 {
    sequence.step(token).unwrap()
}

fn ahead(sequence: &mut GpuSequence, token: u32) -> u32 {
    sequence.step_ahead(token).unwrap()
}

/// Also where what has begun is in vain: another token comes, or tokens are dropped, or another
/// sequence of the model takes its turn.
#[test]
fn steps_that_begin_early_give_the_same_text() {
    for (name, model, options) in caches() {
        let prompt = Random(3).tokens(70, model.config().vocab_size);
        let mut waiting = model.sequence(options).unwrap();
        let expected = text(&mut waiting, &prompt, 120, wait);
        let mut early = model.sequence(options).unwrap();
        assert_eq!(text(&mut early, &prompt, 120, ahead), expected, "{name}");

        let mut other = model.sequence(options).unwrap();
        let turns = |sequence: &mut GpuSequence, step: fn(&mut GpuSequence, u32) -> u32, other: &mut GpuSequence| {
            sequence.truncate(0);
            sequence.forward(&prompt, Logits::None).unwrap();
            other.truncate(0);
            let mut found = Vec::new();
            let mut token = 1;
            for turn in 0..100 {
                token = step(sequence, token);
                found.push(token);
                if turn % 3 == 0 {
                    other.step_ahead(turn).unwrap();
                }
                match turn % 7 {
                    3 => token = turn,
                    4 => {
                        // Back by one, where that does not mean all.
                        sequence.truncate(sequence.position().saturating_sub(1).max(sequence.kept_from()));
                    }
                    5 => found.extend(sequence.forward(&[turn, 2], Logits::Last).unwrap().iter().map(|logit| logit.to_bits())),
                    _ => {}
                }
            }
            found
        };
        assert_eq!(turns(&mut early, ahead, &mut other), turns(&mut waiting, wait, &mut other), "{name}");
    }
}

/// What follows `prompt`, where drafts of `truth` are verified with every fifth token wrong.
fn drafted(sequence: &mut dyn Sequence, prompt: &[u32], truth: &[u32]) -> (Vec<u32>, usize) {
    sequence.truncate(0);
    sequence.forward(prompt, Logits::None).unwrap();
    let (mut text, mut calls) = (vec![truth[0]], 0);
    while text.len() < truth.len() {
        let (at, most) = (text.len(), sequence.verifiable());
        let draft = truth[at..].iter().zip(at..).take(most - 1).map(|(token, i)| if i % 5 == 0 { token ^ 1 } else { *token });
        let given: Vec<u32> = text.last().copied().into_iter().chain(draft).collect();
        let next = sequence.verify(&given).unwrap();
        assert_eq!(next.len(), given.len());
        let right = given[1..].iter().zip(&next).take_while(|(draft, next)| draft == next).count();
        sequence.truncate(sequence.position() - (given.len() - 1 - right));
        text.extend(&next[..=right]);
        calls += 1;
    }
    text.truncate(truth.len());
    (text, calls)
}

#[test]
fn drafts_give_the_same_text_in_fewer_calls() {
    for (name, model, options) in caches() {
        let prompt = Random(3).tokens(70, model.config().vocab_size);
        let truth = text(&mut model.sequence(options).unwrap(), &prompt, 120, wait);
        let mut sequence = model.sequence(options).unwrap();
        let (found, calls) = drafted(&mut sequence, &prompt, &truth);
        assert_eq!(found, truth, "{name}");
        // Where a token chooses what it reads, or is counted, it goes alone.
        let alone = name == "evicting" || name.ends_with("some");
        assert!(if alone { calls == 120 } else { calls < 60 }, "{name}: {calls} calls");
        let too_many = vec![1; sequence.verifiable() + 1];
        assert!(matches!(sequence.verify(&too_many), Err(Error::Argument { .. })) || alone, "{name}");
    }
}

#[test]
fn the_processor_drafts_too() {
    let directory = SyntheticModel::default().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let prompt = Random(3).tokens(70, checkpoint.config().vocab_size);
    let specs = common::rows::ways(checkpoint.config()).remove(1).1;
    for rows in [None, Some(common::rows::coded(&checkpoint, specs, Exact { sinks: 4, recent: 10 }))] {
        let model = Arc::new(cpu::Model::with_latents(&checkpoint, rows).unwrap());
        let mut sequence = model.sequence(options(CacheMethod::default()), RowType::F16).unwrap();
        sequence.forward(&prompt, Logits::None).unwrap();
        let mut truth = vec![1];
        while truth.len() <= 120 {
            truth.push(sequence.step(truth[truth.len() - 1]).unwrap());
        }
        let (found, calls) = drafted(&mut sequence, &prompt, &truth);
        assert_eq!(found, truth);
        assert!(calls < 60, "{calls} calls");
    }
}

/// 100 tokens: one submit and four bytes each, and nothing made on the way.
#[test]
fn a_step_makes_nothing_and_reads_back_a_token() {
    for (name, model, options) in caches() {
        let mut sequence = model.sequence(options).unwrap();
        sequence.forward(&Random(3).tokens(70, model.config().vocab_size), Logits::None).unwrap();
        let mut token = ahead(&mut sequence, 1);
        let before = model.device().made();
        let mut all = StepCounters::default();
        for _ in 0..100 {
            token = ahead(&mut sequence, token);
            all += sequence.counters();
        }
        assert_eq!(model.device().made(), before, "{name}");
        assert_eq!((all.submits, all.readback_bytes), (100, 400), "{name}");
    }
}
