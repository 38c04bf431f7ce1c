//! What `eval` and `bench` promise, on sequences whose every prediction is known.

mod common;
mod toy;

use lowkey::Error;
use lowkey::bench::{self, Cost, Roofline};
use lowkey::checkpoint::{Checkpoint, Message, Tokenizer};
use lowkey::eval::needle::{self, Kind};
use lowkey::eval::{self, Depths, Windowing, continuation};
use lowkey::kv::Exact;
use lowkey::sequence::{KvMemory, Logits, Sequence, StepCounters};
use lowkey::task::Progress;
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use toy::Toy;

fn subject(name: &str, toy: Toy) -> eval::Subject {
    eval::Subject { model: name.into(), method: "dense".into(), layout: "f16".into(), exact: None, sequence: Box::new(toy) }
}

fn text(length: usize) -> [eval::Text; 1] {
    [eval::Text { name: "text".into(), tokens: (0..length as u32).map(|i| (i * i + 3 * i) % 11).collect() }]
}

/// `ln p(id)` under a softmax, the plain way.
fn log_p(logits: &[f32], id: usize) -> f64 {
    logits[id] as f64 - logits.iter().map(|&x| (x as f64).exp()).sum::<f64>().ln()
}

fn quiet(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn eval_equals_the_definition_for_every_windowing() {
    let text = text(50);
    let tilted = || Toy { tilt: 0.3, chunk: 5, ..Toy::new(11, 64) };
    let plain = Windowing { window: 8, stride: 8, ..Windowing::default() };
    for (windowing, bos) in [
        (plain, None),
        (Windowing { score_from: 4, ..plain }, Some(10)),
        (Windowing { window: 10, stride: 4, ..plain }, Some(2)),
        (Windowing { window: 64, stride: 64, score_from: 3, ..plain }, None),
        (Windowing { prefill: 5, chunk: Some(1), ..plain }, None),
        (Windowing { window: 20, stride: 10, prefill: 6, score_from: 7, chunk: Some(3), ..plain }, Some(1)),
    ] {
        let (mut surprise, mut kl, mut agreed, mut count) = (0.0, Vec::new(), 0.0, 0.0);
        for window in windowing.cut(text[0].tokens.len()).unwrap() {
            assert!(window.score_from >= windowing.prefill);
            let mut seen = text[0].tokens[window.tokens.clone()].to_vec();
            let targets = seen.clone();
            seen[0] = bos.unwrap_or(seen[0]);
            let mut in_window = 0.0;
            for position in window.score_from..window.len() - 1 {
                let p = Toy::new(11, 64).logits(&seen[..=position]);
                let q = tilted().logits(&seen[..=position]);
                surprise -= log_p(&q, targets[position + 1] as usize);
                in_window += (0..11).map(|id| log_p(&p, id).exp() * (log_p(&p, id) - log_p(&q, id))).sum::<f64>();
                agreed += f64::from(lowkey::logits::argmax(&p).unwrap() == lowkey::logits::argmax(&q).unwrap());
                count += 1.0;
            }
            kl.push((in_window, window.scored() as f64));
        }
        let mean = kl.iter().map(|(kl, _)| kl).sum::<f64>() / count;
        let windows = kl.len() as f64;
        let squares: f64 = kl.iter().map(|(kl, n)| ((kl - n * mean) / count).powi(2)).sum();
        let mut subjects = [subject("exact", Toy::new(11, 64)), subject("tilted", tilted())];
        let task = eval::Task { texts: &text, bos, windowing, first_is_reference: true };
        let rows = eval::run(&task, &mut subjects, &mut quiet).unwrap();
        assert_eq!(rows[1].tokens, count as usize);
        assert!((rows[1].perplexity - (surprise / count).exp()).abs() < 1e-6 * rows[1].perplexity, "{} in {windowing:?}", rows[1].perplexity);
        assert!((rows[1].kl_mean.unwrap() - mean).abs() < 1e-6);
        match rows[1].kl_stderr {
            Some(found) => assert!((found - (windows / (windows - 1.0) * squares).sqrt()).abs() < 1e-6, "{found} in {windowing:?}"),
            None => assert_eq!(windows, 1.0),
        }
        assert!((rows[1].top1_agreement.unwrap() - agreed / count).abs() < 1e-12);
        assert_eq!((rows[0].kl_mean, rows[0].kl_p99, rows[0].top1_agreement), (Some(0.0), Some(0.0), Some(1.0)));
        assert_eq!((rows[0].kv_bytes_per_token, rows[0].kv_fixed_bytes), (24, 8));
        assert_eq!((rows[1].windows, rows[1].window), (kl.len(), windowing.window.min(50)));
        assert_eq!((&*rows[0].label.model, rows[1].reference.as_deref()), ("exact", Some("exact")));
    }
}

#[test]
fn each_text_has_a_row_per_model_and_is_evaluated_on_its_own() {
    let named = |name: &str, length| eval::Text { name: name.into(), ..text(length).into_iter().next().unwrap() };
    let texts = [named("short", 12), named("long", 40)];
    let windowing = Windowing { window: 8, stride: 8, ..Windowing::default() };
    let rows_of = |texts: &[eval::Text]| {
        let mut subjects = [subject("exact", Toy::new(11, 8)), subject("tilted", Toy { tilt: 0.3, ..Toy::new(11, 8) })];
        eval::run(&eval::Task { texts, bos: None, windowing, first_is_reference: true }, &mut subjects, &mut quiet).unwrap()
    };
    let rows = rows_of(&texts);
    let labels: Vec<_> = rows.iter().map(|row| (&*row.text, &*row.label.model, row.tokens)).collect();
    assert_eq!(labels, [("short", "exact", 7), ("short", "tilted", 7), ("long", "exact", 35), ("long", "tilted", 35)]);
    assert_eq!(rows[2..], rows_of(&texts[1..]));
    assert_eq!((rows[1].kl_stderr, rows[3].kl_stderr.is_some()), (None, true));
}

#[test]
fn every_depth_predicts_the_same_tokens_after_as_many_as_it_is_deep() {
    let text = text(4000);
    let tilted = || Toy { tilt: 0.3, chunk: 50, ..Toy::new(11, 2000) };
    let depths = [600, 2000];
    for (depth, windowing) in depths.into_iter().zip(Depths { depths: depths.into(), tokens: None }.windowings(&text).unwrap()) {
        let mut kl = Vec::new();
        let mut surprise = 0.0;
        for end in [2000, 4000] {
            for target in end - 512..end {
                let seen = &text[0].tokens[end - depth..target];
                let (p, q) = (Toy::new(11, 0).logits(seen), tilted().logits(seen));
                kl.push((0..11).map(|id| log_p(&p, id).exp() * (log_p(&p, id) - log_p(&q, id))).sum::<f64>());
                surprise -= log_p(&q, text[0].tokens[target] as usize);
            }
        }
        let mut subjects =
            [subject("exact", Toy::new(11, 2000)), eval::Subject { exact: Some(Exact { sinks: 4, recent: 9 }), ..subject("tilted", tilted()) }];
        let rows = eval::run(&eval::Task { texts: &text, bos: None, windowing, first_is_reference: true }, &mut subjects, &mut quiet).unwrap();
        let row = &rows[1];
        assert_eq!((row.window, row.windows, row.tokens, row.first_position, row.last_position), (depth, 2, 1024, depth - 513, depth - 2));
        assert_eq!((row.label.sinks, row.label.recent, rows[0].label.sinks), (Some(4), Some(9), None));
        assert!((row.kl_mean.unwrap() - kl.iter().sum::<f64>() / 1024.0).abs() < 1e-6);
        assert!((row.perplexity - (surprise / 1024.0).exp()).abs() < 1e-5 * row.perplexity);
        kl.sort_by(f64::total_cmp);
        // Of 1,024 the 1,014th, the last but one and the last.
        for (found, expected) in [(row.kl_p99, kl[1013]), (row.kl_p999, kl[1022]), (row.kl_max, kl[1023])] {
            assert!((found.unwrap() - expected).abs() < 1e-5 * expected, "{found:?} for {expected}");
        }
    }
}

#[test]
fn continuations_are_greedy_and_read_by_the_reference() {
    let texts = [text(40).into_iter().next().unwrap(), eval::Text { name: "other".into(), tokens: vec![3, 1, 4, 1, 5, 9, 2, 6] }];
    let task = continuation::Task { prompt: 8, tokens: 30 };
    let exact = |chunk| Toy { chunk, ..Toy::new(11, 38) };
    // As the reference, but for what it prefers where logits are close.
    let tilted = || Toy { tilt: 0.02, ..exact(7) };
    for chunk in [1, 5, 38] {
        let others = || [subject("tilted", tilted()), subject("same", exact(3))].into_iter().map(Ok);
        let mut reference = subject("exact", exact(chunk));
        let rows = continuation::run(&task, &texts, &mut reference, others, &mut quiet).unwrap();
        let labels: Vec<_> = rows.iter().map(|row| (&*row.text, &*row.label.model)).collect();
        let expected = ["text", "other"].map(|text| ["exact", "tilted", "same"].map(|model| (text, model)));
        assert_eq!(labels, expected.concat());
        for (rows, text) in rows.chunks(3).zip(&texts) {
            let prompt = &text.tokens[..8];
            let own = exact(1).continuation(prompt, 30);
            for (row, written) in rows.iter().zip([&own, &tilted().continuation(prompt, 30), &own]) {
                let whole = [prompt, written].concat();
                let surprise: f64 = (8..38).map(|at| -log_p(&exact(1).logits(&whole[..at]), whole[at] as usize)).sum();
                assert!((row.perplexity - (surprise / 30.0).exp()).abs() < 1e-5 * row.perplexity, "{row:?}");
                let agreed = (0..30).find(|&at| written[at] != own[at]).unwrap_or(30);
                assert_eq!((row.agreed_tokens, row.tokens, row.prompt_tokens, &*row.reference), (agreed, 30, 8, "exact"));
                let different: BTreeSet<&[u32]> = written.windows(4).collect();
                assert_eq!(row.distinct_4grams, Some(different.len() as f64 / 27.0));
            }
            assert!(rows[1].agreed_tokens < 30 && rows[1].perplexity > rows[0].perplexity, "{rows:?}");
        }
    }
    let small = continuation::run(&task, &texts, &mut subject("small", Toy::new(11, 20)), std::iter::empty, &mut quiet);
    assert!(matches!(small, Err(Error::Context { .. })));
    let stopped = continuation::run(&task, &texts, &mut subject("exact", exact(5)), std::iter::empty, &mut |_| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(Error::Interrupted)));
}

#[test]
fn the_prompt_of_a_window_is_run_in_one_go() {
    let text = text(20);
    let toy = Toy::new(11, 20);
    let calls = toy.calls.clone();
    let windowing = Windowing { window: 20, stride: 20, prefill: 9, chunk: Some(3), ..Windowing::default() };
    eval::run(&eval::Task { texts: &text, bos: None, windowing, first_is_reference: false }, &mut [subject("toy", toy)], &mut quiet).unwrap();
    assert_eq!(*calls.lock().unwrap(), [9, 3, 3, 3, 1]);
}

#[test]
fn eval_runs_no_token_whose_logits_nobody_needs() {
    let text = text(40);
    let toy = Toy::new(11, 16);
    let run = toy.run.clone();
    let task =
        eval::Task { texts: &text, bos: None, windowing: Windowing { window: 16, stride: 16, ..Windowing::default() }, first_is_reference: false };
    let mut heard = Vec::new();
    let mut listen = |progress: Progress| {
        heard.push((progress.done, progress.total));
        ControlFlow::Continue(())
    };
    let rows = eval::run(&task, &mut [subject("alone", toy)], &mut listen).unwrap();
    assert_eq!(run.load(Ordering::Relaxed), 2 * 15);
    assert_eq!((rows[0].tokens, rows[0].kl_mean), (30, None));
    assert_eq!(heard.last(), Some(&(32, 32)));
    assert!(heard.is_sorted());
}

#[test]
fn eval_stops_when_told_and_refuses_a_small_context() {
    let text = text(40);
    let windowing = Windowing { window: 16, stride: 16, ..Windowing::default() };
    let task = eval::Task { texts: &text, bos: None, windowing, first_is_reference: true };
    let stopped = eval::run(&task, &mut [subject("a", Toy::new(11, 16))], &mut |_| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(Error::Interrupted)));
    let small = eval::run(&task, &mut [subject("a", Toy::new(11, 16)), subject("b", Toy::new(11, 15))], &mut quiet);
    assert!(matches!(small, Err(Error::Context { needed: 16, capacity: 15 })));
    let other = eval::run(&task, &mut [subject("a", Toy::new(11, 16)), subject("b", Toy::new(12, 16))], &mut quiet);
    assert!(other.unwrap_err().to_string().contains("vocabulary"));
}

fn racer(toy: Toy) -> bench::Subject {
    bench::Subject {
        model: "toy".into(),
        method: "dense".into(),
        layout: "f16".into(),
        weights: "f32".into(),
        parameters: 250,
        weight_bytes: 1000,
        vocab: toy.vocab,
        cost: Box::new(|_| Cost {
            weight_bytes: 1000,
            linear_flops: 500,
            flops_per_cached_token: 7,
            landmarks: [0, 0],
            most: usize::MAX,
            eviction: None,
        }),
        text: bench::Text::Read(Box::new(toy)),
    }
}

#[test]
fn bench_measures_each_model_at_each_depth_and_counts_its_cost() {
    let task = bench::Task { depths: vec![9, 0, 9], prefill: 6, steps: 4, rounds: 2, seed: 1, time: None, row_time: None };
    assert_eq!(task.capacity(), Some(15));
    let roofline = Roofline { copy_gbps: 1.0, f32_gflops: 1.0, f16_gflops: None };
    let toys = [Toy::new(11, 15), Toy::new(5, 15)];
    let run = toys[0].run.clone();
    let mut subjects = toys.map(racer);
    let mut heard = Vec::new();
    let mut hear = |rows: &[bench::Row]| {
        heard.push(rows.to_vec());
        Ok(())
    };
    let rows = bench::run(&task, &mut subjects, &roofline, &mut hear, &mut quiet).unwrap();
    // After each measurement all that there is.
    assert_eq!(heard.iter().map(Vec::len).collect::<Vec<_>>(), [1, 2, 2, 2, 3, 4, 4, 4]);
    assert_eq!(heard.last(), Some(&rows));
    assert_eq!(rows.iter().map(|r| r.depth).collect::<Vec<_>>(), [0, 0, 9, 9]);
    // Filled once to depth 9; at both depths two tokens and one step to warm up, then two rounds of
    // six tokens and four steps.
    assert_eq!(run.load(Ordering::Relaxed), 9 + 2 * (3 + 2 * 10));
    let deep = &rows[2];
    assert_eq!((deep.bytes_per_step, deep.flops_per_step), (1000 + 11 * 24, 500 + 11 * 7));
    assert_eq!((deep.dispatches_per_step, deep.submits_per_step, deep.readback_bytes_per_step), (3, 1, 4));
    for row in &rows {
        assert_eq!((row.rounds, row.prefill, row.steps, row.parameters), (2, 6, 4, 250));
        assert!(row.prefill_tps_deviation >= 0.0 && row.decode_tps_deviation >= 0.0);
        assert!(row.decode_ms_p10 <= row.decode_ms_p50 && row.decode_ms_p50 <= row.decode_ms_p90);
        assert!([row.prefill_tps, row.decode_tps, row.share_of_roofline].iter().all(|x| x.is_finite() && *x > 0.0));
        let share = row.decode_tps * roofline.least_seconds(row.bytes_per_step, row.flops_per_step);
        assert!((row.share_of_roofline / share - 1.0).abs() < 1e-9);
    }
}

#[test]
fn bench_measures_less_where_a_row_has_no_time() {
    let roofline = Roofline { copy_gbps: 1.0, f32_gflops: 1.0, f16_gflops: None };
    let task = bench::Task { prefill: 6, steps: 4, rounds: 3, row_time: Some(Duration::ZERO), ..bench::Task::default() };
    let rows = bench::run(&task, &mut [racer(Toy::new(11, 15))], &roofline, &mut |_| Ok(()), &mut quiet).unwrap();
    assert_eq!((rows[0].rounds, rows[0].prefill, rows[0].steps, rows[0].decode_tps_deviation), (1, 6, 2, 0.0));
    let task = bench::Task { row_time: Some(Duration::from_secs(3600)), ..task };
    let rows = bench::run(&task, &mut [racer(Toy::new(11, 15))], &roofline, &mut |_| Ok(()), &mut quiet).unwrap();
    assert_eq!((rows[0].rounds, rows[0].steps), (3, 4));
}

#[test]
fn bench_refuses_what_measures_nothing_or_does_not_fit() {
    let roofline = Roofline { copy_gbps: 1.0, f32_gflops: 1.0, f16_gflops: None };
    let run = |task: bench::Task| bench::run(&task, &mut [racer(Toy::new(5, 20))], &roofline, &mut |_| Ok(()), &mut quiet);
    let task = bench::Task { prefill: 4, steps: 4, ..bench::Task::default() };
    assert!(matches!(run(bench::Task { steps: 0, ..task.clone() }), Err(Error::Argument { name, .. }) if name == "steps"));
    assert!(matches!(run(bench::Task { depths: vec![], ..task.clone() }), Err(Error::Argument { name, .. }) if name == "depth"));
    assert!(matches!(run(bench::Task { depths: vec![17], ..task.clone() }), Err(Error::Context { needed: 21, capacity: 20 })));
    assert!(matches!(run(bench::Task { depths: vec![usize::MAX], ..task.clone() }), Err(Error::Context { .. })));
    // Without time nothing begins.
    assert_eq!(run(bench::Task { time: Some(Duration::ZERO), ..task }).unwrap(), []);
}

/// What a [`Reader`] was told to do.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Call {
    /// To read so many tokens.
    Forward(usize),
    Step,
    /// To go back to this position.
    Truncate(usize),
}

/// A sequence that has read all of its text, but only remembers the end of it: asked for a number,
/// it tells the first that it remembers.
struct Reader {
    tokenizer: Tokenizer,
    vocab: usize,
    tokens: Vec<u32>,
    /// The share of its tokens that it remembers.
    memory: f64,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Reader {
    const CERTAINTY: f32 = 12.0;

    fn new(checkpoint: &Checkpoint, memory: f64) -> Reader {
        let (tokenizer, vocab) = (checkpoint.tokenizer().unwrap(), checkpoint.config().vocab_size);
        Reader { tokenizer, vocab, tokens: Vec::new(), memory, calls: Arc::default() }
    }

    fn read(&mut self, tokens: &[u32], logits: Logits) -> Vec<f32> {
        let mut all = Vec::new();
        for (index, &token) in tokens.iter().enumerate() {
            self.tokens.push(token);
            if logits == Logits::All || (logits == Logits::Last && index + 1 == tokens.len()) {
                let next = self.next();
                all.extend((0..self.vocab as u32).map(|id| if id == next { Reader::CERTAINTY } else { 0.0 }));
            }
        }
        all
    }

    fn next(&self) -> u32 {
        let forgotten = (self.tokens.len() as f64 * (1.0 - self.memory)) as usize;
        let text = self.tokenizer.decode(&self.tokens[forgotten..]).unwrap();
        let digits = text.trim_start_matches(|c: char| !c.is_ascii_digit());
        let Some(number) = digits.get(..5) else { return common::EOS };
        let answer = self.tokenizer.encode(&format!(" {number}"), false).unwrap();
        let said = (0..=answer.len()).rev().find(|&said| self.tokens.ends_with(&answer[..said])).unwrap();
        answer.get(said).copied().unwrap_or(common::EOS)
    }
}

impl Sequence for Reader {
    fn position(&self) -> usize {
        self.tokens.len()
    }

    fn capacity(&self) -> usize {
        usize::MAX
    }

    fn chunk(&self) -> usize {
        usize::MAX
    }

    fn forward(&mut self, tokens: &[u32], logits: Logits) -> lowkey::Result<Vec<f32>> {
        self.calls.lock().unwrap().push(Call::Forward(tokens.len()));
        Ok(self.read(tokens, logits))
    }

    fn step(&mut self, token: u32) -> lowkey::Result<u32> {
        self.calls.lock().unwrap().push(Call::Step);
        lowkey::logits::argmax(&self.read(&[token], Logits::Last))
    }

    fn truncate(&mut self, position: usize) {
        self.calls.lock().unwrap().push(Call::Truncate(position));
        self.tokens.truncate(position);
    }

    fn memory(&self) -> KvMemory {
        KvMemory::default()
    }

    fn counters(&self) -> StepCounters {
        StepCounters::default()
    }
}

const FILLER: &str = "The ring went in and out. Nobody on the other shore had an answer!\nIt rained on. \"Then go,\" she said, and they went on and on in the \
     other order. The sun (which was low) shone again. A boat came in.";

#[test]
fn a_needle_is_where_it_was_asked_for() {
    let directory = common::SyntheticModel::default().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let (tokenizer, template) = (checkpoint.tokenizer().unwrap(), checkpoint.chat_template().unwrap());
    let longest = FILLER.split_inclusive(['.', '!']).map(|sentence| tokenizer.encode(sentence, false).unwrap().len()).max().unwrap();
    let task = needle::Task { lengths: vec![600, 1500], trials: 4, seed: 3, ..needle::Task::default() };
    for template in [None, Some(&template)] {
        let questions = task.questions(FILLER, &tokenizer, template).unwrap();
        assert_eq!(questions.len(), 2 * 5 * 4);
        let mut wordings = BTreeSet::new();
        for question in &questions {
            let [turn] = &question.turns[..] else { panic!("{} turns", question.turns.len()) };
            let used = turn.len() + 16;
            assert!(used <= question.length && used + longest + 5 > question.length, "{used} of {}", question.length);
            assert_eq!(tokenizer.decode(&question.answer).unwrap().trim(), question.number);
            let prompt = tokenizer.decode(turn).unwrap();
            assert_eq!(prompt.matches(|c: char| c.is_ascii_digit()).count(), 5);
            let (before, after) =
                prompt.split_once(&format!("{}. ", question.number)).or_else(|| prompt.split_once(&format!("{}.", question.number))).unwrap();
            let begins = if template.is_some() { "user\nHere is a text, and after it a question.\n\n" } else { "" };
            let before = before.strip_prefix(begins).unwrap();
            // The fact is a sentence of its own.
            let fact = before.rfind(['.', '!', '"']).map_or(0, |end| end + 1);
            wordings.insert(before[fact..].trim().to_string());
            let (text, asked) = after.split_once("What is the secret number of the ").unwrap();
            let thing = before.rsplit_once(" is ").unwrap().0.rsplit_once("number of the ").unwrap().1;
            assert!(asked.starts_with(&format!("{thing}?")) && asked.ends_with(&format!("The secret number of the {thing} is")), "{asked}");
            let share = fact as f64 / (fact + text.len()) as f64;
            let slack = (longest + 20) as f64 / (fact + text.len()) as f64;
            assert!((share - f64::from(question.depth_percent) / 100.0).abs() < slack, "{share} for {} %", question.depth_percent);
            assert!(fact == 0 || question.depth_percent > 0);
        }
        // Drawn per trial: the same ones for each length and depth.
        assert_eq!(wordings.len(), 4);
        assert_eq!(questions, task.questions(FILLER, &tokenizer, template).unwrap());
        assert_ne!(questions, needle::Task { seed: 4, ..task.clone() }.questions(FILLER, &tokenizer, template).unwrap());
    }
}

/// Sentences that say something about secret numbers, each with the share of the other text that
/// stands before it.
fn statements(text: &str) -> Vec<(f64, &str)> {
    let mut found = Vec::new();
    let mut before = 0;
    for sentence in text.split_inclusive(['.', '!']) {
        match sentence.contains("secret number") {
            true => found.push((before as f64, sentence.trim())),
            false => before += sentence.len(),
        }
    }
    found.iter_mut().for_each(|(share, _)| *share /= before as f64);
    found
}

fn numbers(text: &str) -> Vec<&str> {
    text.split(|c: char| !c.is_ascii_digit()).filter(|run| !run.is_empty()).collect()
}

/// The thing that `asked` is about.
fn thing(asked: &str) -> &str {
    asked.split_once("What is the secret number of the ").unwrap().1.split_once('?').unwrap().0
}

#[test]
fn each_kind_of_needle_is_what_it_promises() {
    let directory = common::SyntheticModel::default().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let (tokenizer, template) = (checkpoint.tokenizer().unwrap(), checkpoint.chat_template().unwrap());
    let longest = FILLER.split_inclusive(['.', '!']).map(str::len).max().unwrap();
    for (kind, count, template) in [
        (Kind::Single, 1, None),
        (Kind::MultiKey, 5, None),
        (Kind::MultiKey, 5, Some(&template)),
        (Kind::Tracking, 4, None),
        (Kind::Tracking, 4, Some(&template)),
        (Kind::MultiTurn, 2, None),
        (Kind::MultiTurn, 2, Some(&template)),
    ] {
        let task = needle::Task { kinds: vec![kind], lengths: vec![1200, 2000], trials: 3, seed: 5, ..needle::Task::default() };
        let questions = task.questions(FILLER, &tokenizer, template).unwrap();
        assert_eq!(questions.len(), 2 * 5 * 3);
        for (index, question) in questions.iter().enumerate() {
            // A trial is at all depths before the next.
            let same = &questions[index % 15];
            let first = &questions[if kind == Kind::MultiKey { index % 15 } else { index % 15 / 5 * 5 }];
            assert_eq!((question.kind, &question.number), (kind, &first.number), "the trials are the same everywhere");
            assert_eq!(question.depth_percent, same.depth_percent);
            let shared = question.text() == questions[index / 5 * 5].text();
            assert_eq!(shared, kind == Kind::MultiKey || index % 5 == 0, "several questions about one text");
            let used: usize = question.turns.iter().map(|turn| turn.len() + 16).sum();
            // Where several questions are about one text, that with the longest names has room too.
            let names = if kind == Kind::MultiKey { 3 * "northern library".len() } else { 0 };
            assert!(used <= question.length && used + longest + names + 5 > question.length, "{used} of {}", question.length);
            assert_eq!(tokenizer.decode(&question.answer).unwrap().trim(), question.number);

            let turns: Vec<String> = question.turns.iter().map(|turn| tokenizer.decode(turn).unwrap()).collect();
            let (text, _) = turns[0].split_once("What is the secret number of the ").unwrap();
            let read = tokenizer.decode(question.text()).unwrap();
            assert_eq!(
                text.strip_prefix(&read).unwrap().trim(),
                if template.is_some() { "" } else { "Question:" },
                "the text is read before the question"
            );
            let statements = statements(text.strip_prefix("user\nHere is a text, and after it a question.\n\n").unwrap_or(text));
            assert_eq!(statements.len(), count, "{text}");
            let told: Vec<&str> = numbers(text);
            assert_eq!(numbers(&turns.concat()), told, "nothing but the text tells a number");
            assert_eq!(told.iter().collect::<BTreeSet<_>>().len(), if kind == Kind::Tracking { 2 } else { count });

            let (share, sentence) = statements.iter().find(|(_, sentence)| sentence.contains(&question.number)).unwrap();
            let slack = longest as f64 / (text.len() - statements.iter().map(|(_, sentence)| sentence.len()).sum::<usize>()) as f64;
            assert!((share - f64::from(question.depth_percent) / 100.0).abs() < slack, "{share} for {} % in {text}", question.depth_percent);
            let asked = thing(turns.last().unwrap());
            let stated = |thing: &str, number: &str| format!("the secret number of the {thing} is {number}.");
            let states = |sentence: &str, what: String| sentence.to_lowercase().contains(&what);
            match kind {
                Kind::Tracking => {
                    let links: Vec<_> = statements
                        .iter()
                        .filter_map(|(share, sentence)| Some((share, sentence.strip_prefix("The ")?.strip_suffix('.')?)))
                        .filter_map(|(share, link)| Some((share, link.split_once(" has the same secret number as the ")?)))
                        .collect();
                    assert_eq!(links.len(), 2);
                    let (linked, (_, source)) = links.iter().find(|(_, (last, _))| *last == asked).unwrap();
                    assert!(states(sentence, stated(source, &question.number)), "{text}");
                    assert!(*linked >= share);
                    // The other chain is as complete, and has another number.
                    let (_, (_, other)) = links.iter().find(|(_, (last, _))| *last != asked).unwrap();
                    let number = told.iter().find(|number| **number != question.number).unwrap();
                    assert!(statements.iter().any(|(_, sentence)| states(sentence, stated(other, number))), "{text}");
                }
                _ => assert!(states(sentence, stated(asked, &question.number)), "{asked}: {text}"),
            }
            if kind != Kind::Tracking {
                let mut shares: Vec<f64> = statements.iter().map(|(share, _)| *share).collect();
                shares.dedup();
                assert_eq!(shares.len(), count, "each stands elsewhere");
            }
            assert_eq!(turns.len(), if kind == Kind::MultiTurn { 2 } else { 1 });
            if kind == Kind::MultiTurn {
                let other = thing(&turns[0]);
                let number = told.iter().find(|number| **number != question.number).unwrap();
                assert!(statements.iter().any(|(_, sentence)| states(sentence, stated(other, number))) && other != asked);
                // Put together, it is the conversation in which the first question was answered
                // rightly.
                let begun = |thing: &str| format!("The secret number of the {thing} is");
                let whole = match template {
                    Some(template) => {
                        let asking = |text: &str, thing: &str| format!("{text}What is the secret number of the {thing}? Answer with the number.");
                        let said = [
                            Message::new("user", asking(text.trim_start_matches("user\n"), other)),
                            Message::new("assistant", format!("{} {number}", begun(other))),
                            Message::new("user", asking("", asked)),
                        ];
                        template.render(&said, true).unwrap() + &begun(asked)
                    }
                    None => format!("{} {number}\n\nQuestion: What is the secret number of the {asked}?\nAnswer: {}", turns[0], begun(asked)),
                };
                let answered = [&question.turns[0][..], &tokenizer.encode(&format!(" {number}"), false).unwrap(), &question.turns[1]].concat();
                assert_eq!(answered, tokenizer.encode(&whole, template.is_none()).unwrap(), "{whole}");
            }
        }
        assert_eq!(questions, task.questions(FILLER, &tokenizer, template).unwrap());
        assert_ne!(questions, needle::Task { seed: 6, ..task.clone() }.questions(FILLER, &tokenizer, template).unwrap());
    }
}

fn reading(reader: Reader) -> eval::Subject {
    eval::Subject { model: "reader".into(), method: "m".into(), layout: "l".into(), exact: None, sequence: Box::new(reader) }
}

#[test]
fn a_second_question_goes_on_with_the_same_cache_and_answers_are_scored_token_by_token() {
    let directory = common::SyntheticModel::default().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let (tokenizer, template) = (checkpoint.tokenizer().unwrap(), checkpoint.chat_template().unwrap());
    let task = needle::Task { kinds: vec![Kind::MultiTurn], lengths: vec![800], trials: 1, ..needle::Task::default() };
    for template in [None, Some(&template)] {
        let questions = task.questions(FILLER, &tokenizer, template).unwrap();
        for question in &questions {
            let reader = Reader::new(&checkpoint, 1.0);
            let calls = reader.calls.clone();
            let rows = needle::run(std::slice::from_ref(question), &mut reading(reader), &tokenizer, &mut quiet).unwrap();
            // It always tells the first number of the text.
            let told = if question.depth_percent < 50 { 1.0 } else { 0.0 };
            assert_eq!((rows.len(), rows[0].kind, rows[0].accuracy), (1, Kind::MultiTurn, told), "at {} %", question.depth_percent);

            let [first, second] = [0, 1].map(|turn| question.turns[turn].len());
            let said = question.answer.len();
            let mut expected =
                vec![Call::Truncate(0), Call::Forward(question.text), Call::Truncate(question.text), Call::Forward(first - question.text)];
            expected.extend(vec![Call::Forward(1); said]);
            expected.push(Call::Forward(second));
            expected.extend(vec![Call::Forward(1); said]);
            // Back to where it goes wrong, if it does: what was said to the first question is still
            // there.
            let right = if told == 1.0 { said - 1 } else { 1 };
            expected.push(Call::Truncate(first + said + second + right));
            // The last token's own prediction is not needed.
            expected.extend(vec![Call::Forward(1); said - 1 - right]);
            assert_eq!(*calls.lock().unwrap(), expected);
        }
    }
}

#[test]
fn kinds_have_rows_of_their_own() {
    let directory = common::SyntheticModel::default().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let task = needle::Task { kinds: Kind::ALL.to_vec(), lengths: vec![900], depth_percents: vec![0, 50], trials: 2, ..needle::Task::default() };
    let questions = task.questions(FILLER, &tokenizer, None).unwrap();
    let rows = needle::run(&questions, &mut reading(Reader::new(&checkpoint, 1.0)), &tokenizer, &mut quiet).unwrap();
    let labels: Vec<_> = rows.iter().map(|row| (row.kind.name(), row.depth_percent, row.trials, row.accuracy)).collect();
    // Of several numbers the first is told, whichever is asked for.
    let expected = [("single", [1.0, 1.0]), ("multi-key", [1.0, 0.0]), ("tracking", [1.0, 0.0]), ("multi-turn", [1.0, 0.0])];
    assert_eq!(labels, expected.into_iter().flat_map(|(kind, [at, deep])| [(kind, 0, 2, at), (kind, 50, 2, deep)]).collect::<Vec<_>>());
}

#[test]
fn what_is_forgotten_is_not_found() {
    let directory = common::SyntheticModel::default().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let (tokenizer, vocab) = (checkpoint.tokenizer().unwrap(), checkpoint.config().vocab_size);
    let task = needle::Task { lengths: vec![800], trials: 2, ..needle::Task::default() };
    let questions = task.questions(FILLER, &tokenizer, None).unwrap();
    let rows = |memory| needle::run(&questions, &mut reading(Reader::new(&checkpoint, memory)), &tokenizer, &mut quiet).unwrap();
    // ln p of what it says, and of anything else.
    let said = Reader::CERTAINTY as f64 - ((Reader::CERTAINTY as f64).exp() + vocab as f64 - 1.0).ln();
    let unsaid = said - Reader::CERTAINTY as f64;
    for row in rows(1.0) {
        assert_eq!((row.length, row.trials, row.accuracy), (800, 2, 1.0));
        assert!((row.log_probability / (6.0 * said) - 1.0).abs() < 1e-3, "{}", row.log_probability);
    }
    // It forgets the first half, a little more than that is text.
    let half = rows(0.62);
    assert_eq!(half.iter().map(|row| (row.depth_percent, row.accuracy)).collect::<Vec<_>>(), [(0, 0.0), (25, 0.0), (50, 1.0), (75, 1.0), (100, 1.0)]);
    assert!((half[0].log_probability / (6.0 * unsaid) - 1.0).abs() < 1e-3, "{} for {}", half[0].log_probability, 6.0 * unsaid);
    let stopped = {
        let mut subject = subject("toy", Toy::new(vocab, 800));
        needle::run(&questions, &mut subject, &tokenizer, &mut |_| ControlFlow::Break(()))
    };
    assert!(matches!(stopped, Err(Error::Interrupted)));
}

#[test]
fn needles_that_cannot_be_hidden_are_refused_by_name() {
    let directory = common::SyntheticModel::default().write_temporary();
    let tokenizer = Checkpoint::open(directory.path()).unwrap().tokenizer().unwrap();
    let name = |task: needle::Task, filler: &str| match task.questions(filler, &tokenizer, None) {
        Err(Error::Argument { name, .. }) => name,
        _ => "accepted".into(),
    };
    let task = needle::Task::default();
    assert_eq!(name(needle::Task { kinds: vec![], ..task.clone() }, FILLER), "needle");
    assert_eq!(name(needle::Task { trials: 0, ..task.clone() }, FILLER), "needle-trials");
    assert_eq!(name(needle::Task { lengths: vec![50], ..task.clone() }, FILLER), "needle-lengths");
    assert_eq!(name(needle::Task { lengths: vec![], ..task.clone() }, FILLER), "needle-lengths");
    assert_eq!(name(needle::Task { depth_percents: vec![101], ..task.clone() }, FILLER), "needle-depths");
    assert_eq!(name(needle::Task { depth_percents: (0..9).collect(), ..task.clone() }, FILLER), "needle-depths");
    assert_eq!(name(task.clone(), " \n"), "text");
    assert_eq!(name(task.clone(), &"word ".repeat(2000)), "text");
    for kind in Kind::ALL {
        assert_eq!(kind.name().parse::<Kind>().unwrap(), kind);
        assert_eq!(name(needle::Task { kinds: vec![kind], lengths: vec![80], ..task.clone() }, FILLER), "needle-lengths");
        assert_eq!(name(needle::Task { kinds: vec![kind], lengths: vec![1500], ..task.clone() }, FILLER), "accepted");
    }
    assert!(matches!("several".parse::<Kind>(), Err(Error::Argument { name, .. }) if name == "needle"));
}

#[test]
fn a_template_that_takes_back_what_was_said_has_no_second_question() {
    let directory = common::SyntheticModel::default().write_temporary();
    let settings = directory.path().join("tokenizer_config.json");
    let forgetful = "{% for message in messages[-1:] %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}<|im_start|>";
    let original: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&settings).unwrap()).unwrap();
    std::fs::write(&settings, serde_json::json!({ "eos_token": original["eos_token"], "chat_template": forgetful }).to_string()).unwrap();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let (tokenizer, template) = (checkpoint.tokenizer().unwrap(), checkpoint.chat_template().unwrap());
    let asked =
        |kind| needle::Task { kinds: vec![kind], lengths: vec![900], ..needle::Task::default() }.questions(FILLER, &tokenizer, Some(&template));
    assert!(asked(Kind::MultiKey).is_ok());
    match asked(Kind::MultiTurn) {
        Err(Error::Argument { name, message }) => assert!(name == "needle" && message.contains("multi-turn"), "{name}: {message}"),
        other => panic!("{other:?}"),
    }
}
