//! What `eval` and `bench` promise, on sequences whose every prediction is known.

mod toy;

use lowkey::Error;
use lowkey::bench::{self, Cost, Roofline};
use lowkey::eval::{self, Windowing};
use lowkey::progress::Progress;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use toy::Toy;

fn subject(name: &str, toy: Toy) -> eval::Subject {
    eval::Subject { model: name.into(), method: "dense".into(), layout: "f16".into(), sequence: Box::new(toy) }
}

fn text(length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| (i * i + 3 * i) % 11).collect()
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
    for (window, stride, score_from, bos) in [(8, 8, 0, None), (8, 8, 4, Some(10)), (10, 4, 0, Some(2)), (64, 64, 3, None)] {
        let windowing = Windowing { window, stride, score_from, tokens: None };
        let (mut surprise, mut kl, mut agreed, mut count) = (0.0, 0.0, 0.0, 0.0);
        for window in windowing.cut(text.len()).unwrap() {
            let mut seen = text[window.tokens.clone()].to_vec();
            let targets = seen.clone();
            seen[0] = bos.unwrap_or(seen[0]);
            for position in window.score_from..window.len() - 1 {
                let p = Toy::new(11, 64).logits(&seen[..=position]);
                let q = tilted().logits(&seen[..=position]);
                surprise -= log_p(&q, targets[position + 1] as usize);
                kl += (0..11).map(|id| log_p(&p, id).exp() * (log_p(&p, id) - log_p(&q, id))).sum::<f64>();
                agreed += f64::from(lowkey::session::argmax(&p).unwrap() == lowkey::session::argmax(&q).unwrap());
                count += 1.0;
            }
        }
        let mut subjects = [subject("exact", Toy::new(11, 64)), subject("tilted", tilted())];
        let task = eval::Task { text: &text, bos, windowing, first_is_reference: true };
        let rows = eval::run(&task, &mut subjects, &mut quiet).unwrap();
        assert_eq!(rows[1].tokens, count as usize);
        assert!((rows[1].perplexity - (surprise / count).exp()).abs() < 1e-9 * rows[1].perplexity, "{} windows of {window}", rows[1].perplexity);
        assert!((rows[1].kl_mean.unwrap() - kl / count).abs() < 1e-9);
        assert!((rows[1].top1_agreement.unwrap() - agreed / count).abs() < 1e-12);
        assert_eq!((rows[0].kl_mean, rows[0].kl_p99, rows[0].top1_agreement), (Some(0.0), Some(0.0), Some(1.0)));
        assert_eq!((rows[0].kv_bytes_per_token, rows[0].kv_fixed_bytes), (24, 8));
    }
}

#[test]
fn eval_runs_no_token_whose_logits_nobody_needs() {
    let text = text(40);
    let toy = Toy::new(11, 16);
    let run = toy.run.clone();
    let task =
        eval::Task { text: &text, bos: None, windowing: Windowing { window: 16, stride: 16, ..Windowing::default() }, first_is_reference: false };
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
    let task = eval::Task { text: &text, bos: None, windowing, first_is_reference: true };
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
        vocab: toy.vocab,
        cost: Cost { weight_bytes: 1000, linear_flops: 500, flops_per_cached_token: 7 },
        sequence: Box::new(toy),
    }
}

#[test]
fn bench_measures_each_model_at_each_depth_and_counts_its_cost() {
    let task = bench::Task { depths: vec![9, 0, 9], prefill: 6, steps: 4, rounds: 2, seed: 1 };
    assert_eq!(task.capacity(), Some(15));
    let roofline = Roofline { copy_gbps: 1.0, f32_gflops: 1.0, f16_gflops: None };
    let toys = [Toy::new(11, 15), Toy::new(5, 15)];
    let run = toys[0].run.clone();
    let mut subjects = toys.map(racer);
    let rows = bench::run(&task, &mut subjects, &roofline, &mut quiet).unwrap();
    assert_eq!(rows.iter().map(|r| r.depth).collect::<Vec<_>>(), [0, 0, 9, 9]);
    // Filled once to depth 9; at both depths one token and one step to warm up, then two rounds of six tokens and four steps.
    assert_eq!(run.load(Ordering::Relaxed), 9 + 2 * (2 + 2 * 10));
    let deep = &rows[2];
    assert_eq!((deep.bytes_per_step, deep.flops_per_step), (1000 + 11 * 24, 500 + 11 * 7));
    assert_eq!((deep.dispatches_per_step, deep.submits_per_step, deep.readback_bytes_per_step), (3, 1, 4));
    for row in &rows {
        assert!(row.decode_ms_p10 <= row.decode_ms_p50 && row.decode_ms_p50 <= row.decode_ms_p90);
        assert!([row.prefill_tps, row.decode_tps, row.share_of_roofline].iter().all(|x| x.is_finite() && *x > 0.0));
        let share = row.decode_tps * roofline.least_seconds(row.bytes_per_step, row.flops_per_step);
        assert!((row.share_of_roofline / share - 1.0).abs() < 1e-9);
    }
}

#[test]
fn bench_refuses_what_measures_nothing_or_does_not_fit() {
    let roofline = Roofline { copy_gbps: 1.0, f32_gflops: 1.0, f16_gflops: None };
    let run = |task: bench::Task| bench::run(&task, &mut [racer(Toy::new(5, 20))], &roofline, &mut quiet);
    let task = bench::Task { prefill: 4, steps: 4, ..bench::Task::default() };
    assert!(matches!(run(bench::Task { steps: 0, ..task.clone() }), Err(Error::Argument { name, .. }) if name == "steps"));
    assert!(matches!(run(bench::Task { depths: vec![], ..task.clone() }), Err(Error::Argument { name, .. }) if name == "depth"));
    assert!(matches!(run(bench::Task { depths: vec![17], ..task.clone() }), Err(Error::Context { needed: 21, capacity: 20 })));
    assert!(matches!(run(bench::Task { depths: vec![usize::MAX], ..task }), Err(Error::Context { .. })));
}
