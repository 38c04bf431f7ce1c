//! What a session promises, on a sequence whose every prediction is known.

mod common;
mod toy;

use common::{EOS, SyntheticModel};
use lowkey::checkpoint::{Checkpoint, Tokenizer};
use lowkey::sequence::Context;
use lowkey::session::{Finish, Summary};
use lowkey::{Error, Prompt, Sampling, Session, SessionOptions};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use toy::Toy;

/// As many as the synthetic tokenizer has.
const VOCAB: usize = 273;

fn tokenizer() -> Arc<Tokenizer> {
    let directory = SyntheticModel::default().write_temporary();
    Arc::new(Checkpoint::open(directory.path()).unwrap().tokenizer().unwrap())
}

fn session(toy: Toy, options: SessionOptions) -> (Session, Arc<AtomicUsize>) {
    let run = toy.run.clone();
    (Session::new(Context::new(Box::new(toy)), tokenizer(), options).unwrap(), run)
}

/// Runs an answer to its end.
fn answer(session: &mut Session, prompt: &[u32]) -> (Vec<u32>, String, Summary) {
    let mut generation = session.generate(Prompt::Tokens(prompt)).unwrap();
    let tokens: Vec<_> = generation.by_ref().map(|token| token.unwrap()).collect();
    let summary = generation.summary();
    assert!(generation.next().is_none());
    (tokens.iter().map(|token| token.id).collect(), tokens.iter().map(|token| token.text.as_str()).collect(), summary)
}

fn at_most(max_tokens: usize) -> SessionOptions {
    SessionOptions { max_tokens: Some(max_tokens), ignore_eos: true, ..SessionOptions::default() }
}

/// A prompt whose greedy continuation has the model's end token at a place from 3 to 29.
fn prompt_that_ends() -> (Vec<u32>, usize) {
    let toy = Toy::new(VOCAB, 0);
    (3..)
        .find_map(|id| {
            let prompt = vec![5, 6, id];
            let end = toy.continuation(&prompt, 30).iter().position(|&token| token == EOS)?;
            (end >= 3).then_some((prompt, end))
        })
        .unwrap()
}

#[test]
fn a_greedy_answer_is_the_models_own_continuation() {
    let prompt = [3, 14, 15, 92, 65, 35, 89];
    let (mut session, run) = session(Toy::new(VOCAB, 64), at_most(12));
    let (tokens, text, summary) = answer(&mut session, &prompt);
    assert_eq!(tokens, Toy::new(VOCAB, 0).continuation(&prompt, 12));
    assert_eq!(text, tokenizer().decode(&[&prompt[..], &tokens].concat()).unwrap()[tokenizer().decode(&prompt).unwrap().len()..]);
    assert_eq!((summary.prompt_tokens, summary.reused_tokens, summary.tokens, summary.finish), (7, 0, 12, Some(Finish::Length)));
    // The last token chosen is never run: nothing follows it.
    assert_eq!(run.load(Ordering::Relaxed), 7 + 11);
    assert_eq!(summary.kv_bytes, 18 * 24 + 8);
    assert!(summary.prefill_tps > 0.0 && summary.decode_tps > 0.0);
}

#[test]
fn what_prompts_have_in_common_is_run_once() {
    let (mut session, run) = session(Toy::new(VOCAB, 128), at_most(6));
    let first = [10, 11, 12, 13, 14];
    let (tokens, ..) = answer(&mut session, &first);
    // A conversation goes on: everything so far, and something new. The answer's last token has not
    // been run yet.
    let second = [&first[..], &tokens, &[50, 51, 52]].concat();
    run.store(0, Ordering::Relaxed);
    let (more, _, summary) = answer(&mut session, &second);
    assert_eq!(summary.reused_tokens, first.len() + 5);
    assert_eq!(run.load(Ordering::Relaxed), (1 + 3) + 5);
    assert_eq!(more, Toy::new(VOCAB, 0).continuation(&second, 6));
    // It is taken back in the middle, and goes on differently.
    let third = [&first[..], &[99]].concat();
    run.store(0, Ordering::Relaxed);
    let (other, _, summary) = answer(&mut session, &third);
    assert_eq!((summary.reused_tokens, run.load(Ordering::Relaxed)), (5, 1 + 5));
    assert_eq!(other, Toy::new(VOCAB, 0).continuation(&third, 6));
    // The same once more: only the last token is needed, for its logits.
    let (again, _, summary) = answer(&mut session, &third);
    assert_eq!((again, summary.reused_tokens), (other, 5));
    session.reset();
    assert_eq!(session.position(), 0);
    assert_eq!(answer(&mut session, &third).2.reused_tokens, 0);
}

#[test]
fn a_full_context_refuses_prompts_and_ends_answers() {
    let (mut session, run) = session(Toy::new(VOCAB, 10), SessionOptions { ignore_eos: true, ..SessionOptions::default() });
    let refused = session.generate(Prompt::Tokens(&[7; 11])).err().unwrap();
    assert!(matches!(refused, Error::Context { needed: 11, capacity: 10 }));
    assert_eq!(run.load(Ordering::Relaxed), 0);
    let prompt = [7; 6];
    let (tokens, _, summary) = answer(&mut session, &prompt);
    // Four more have room; the token predicted by the last of them needs none.
    assert_eq!(tokens, Toy::new(VOCAB, 0).continuation(&prompt, 5));
    assert_eq!((summary.finish, session.position()), (Some(Finish::Context), 10));
    // A prompt that fills it to the brim has one token to say.
    assert_eq!(answer(&mut session, &[8; 10]).0.len(), 1);
    assert!(matches!(session.generate(Prompt::Tokens(&[])).err(), Some(Error::Argument { .. })));
}

#[test]
fn the_end_token_ends_an_answer_unless_told_otherwise() {
    let (prompt, end) = prompt_that_ends();
    let (mut ending, _) = session(Toy::new(VOCAB, 64), SessionOptions { max_tokens: Some(40), ..SessionOptions::default() });
    let (tokens, text, summary) = answer(&mut ending, &prompt);
    assert_eq!((tokens.len(), tokens.last(), summary.finish), (end + 1, Some(&EOS), Some(Finish::Stop)));
    assert!(!text.contains("<|im_end|>"));
    let (mut going_on, _) = session(Toy::new(VOCAB, 64), at_most(40));
    let (all, _, summary) = answer(&mut going_on, &prompt);
    assert_eq!((all.len(), &all[..=end], summary.finish), (40, &tokens[..], Some(Finish::Length)));
}

#[test]
fn stop_strings_end_answers_wherever_tokens_begin() {
    let prompt = [40, 41, 42];
    let (mut free, _) = session(Toy::new(VOCAB, 128), at_most(30));
    let (_, text, _) = answer(&mut free, &prompt);
    let characters: Vec<(usize, char)> = text.char_indices().collect();
    for start in (2..characters.len() - 4).step_by(3) {
        let stop: String = characters[start..start + 4].iter().map(|c| c.1).collect();
        let options = SessionOptions { stop: vec!["never in it".into(), stop.clone()], ..at_most(30) };
        let (mut stopping, _) = session(Toy::new(VOCAB, 128), options);
        let (_, stopped, summary) = answer(&mut stopping, &prompt);
        assert_eq!(stopped, text[..text.find(&stop).unwrap()], "stopped by {stop:?}");
        assert_eq!(summary.finish, Some(Finish::Stop));
    }
    // The beginning of a stop string at the end of an answer is text after all.
    let last: String = characters[characters.len() - 2..].iter().map(|c| c.1).collect();
    let (mut open, _) = session(Toy::new(VOCAB, 128), SessionOptions { stop: vec![format!("{last}!")], ..at_most(30) });
    assert_eq!(answer(&mut open, &prompt).1, text);
}

#[test]
fn sampling_is_a_matter_of_the_seed() {
    let sampled = |seed, temperature| {
        let sampling = Sampling { temperature, top_p: 0.95, seed, ..Sampling::default() };
        let (mut session, _) = session(Toy::new(VOCAB, 64), SessionOptions { sampling, ..at_most(20) });
        answer(&mut session, &[9, 8, 7]).0
    };
    assert_eq!(sampled(1, 1.0), sampled(1, 1.0));
    assert_ne!(sampled(1, 1.0), sampled(2, 1.0));
    // As cold as this, sampling is greedy, though by another path.
    assert_eq!(sampled(1, 1e-6), Toy::new(VOCAB, 0).continuation(&[9, 8, 7], 20));
}

#[test]
fn a_penalty_keeps_greedy_answers_from_repeating() {
    // A model that always wants token 20 most and 19 next.
    let toy = || Toy { tilt: 100.0, ..Toy::new(21, 64) };
    let sampling = Sampling { repetition_penalty: 2.0, repetition_window: 3, ..Sampling::default() };
    let (mut session, _) = session(toy(), SessionOptions { sampling, ..at_most(8) });
    let (tokens, ..) = answer(&mut session, &[3]);
    assert_eq!(tokens, [20, 19, 18, 17, 20, 19, 18, 17]);
    assert_eq!(toy().continuation(&[3], 3), [20, 20, 20]);
}

#[test]
fn an_answer_stops_when_cancelled() {
    let prompt: Vec<u32> = (0..12).collect();
    let (mut session, run) = session(Toy::new(VOCAB, 64), at_most(30));
    let cancel = session.cancel();
    cancel.set();
    let (tokens, _, summary) = answer(&mut session, &prompt);
    assert_eq!((tokens.len(), summary.finish, run.load(Ordering::Relaxed)), (0, Some(Finish::Cancelled), 0));
    cancel.clear();
    let mut generation = session.generate(Prompt::Tokens(&prompt)).unwrap();
    generation.by_ref().take(3).for_each(|token| assert!(token.is_ok()));
    cancel.set();
    assert_eq!(generation.by_ref().count(), 1);
    assert_eq!(generation.summary().finish, Some(Finish::Cancelled));
    // What was read stays read.
    cancel.clear();
    let (tokens, _, summary) = answer(&mut session, &prompt);
    assert_eq!((tokens, summary.reused_tokens), (Toy::new(VOCAB, 0).continuation(&prompt, 30), 11));
}

#[test]
fn after_a_failure_the_session_goes_on_where_it_was() {
    let prompt: Vec<u32> = (30..41).collect();
    // The third chunk of the prompt fails.
    let (mut session, _) = session(Toy { fail_in: Some(3), ..Toy::new(VOCAB, 64) }, at_most(10));
    let mut generation = session.generate(Prompt::Tokens(&prompt)).unwrap();
    assert!(matches!(generation.next(), Some(Err(Error::DeviceLost { .. }))));
    assert!(generation.next().is_none());
    assert_eq!(generation.summary().finish, None);
    assert_eq!(session.position(), 8);
    let (tokens, _, summary) = answer(&mut session, &prompt);
    assert_eq!((tokens, summary.reused_tokens), (Toy::new(VOCAB, 0).continuation(&prompt, 10), 8));
}

#[test]
fn bad_options_are_refused_before_anything_runs() {
    let refuse = |options: SessionOptions| match Session::new(Context::new(Box::new(Toy::new(VOCAB, 8))), tokenizer(), options) {
        Err(Error::Argument { name, .. }) => name,
        _ => "accepted".into(),
    };
    let sampling = Sampling { top_p: 2.0, ..Sampling::default() };
    assert_eq!(refuse(SessionOptions { sampling, ..SessionOptions::default() }), "top-p");
    assert_eq!(refuse(SessionOptions { stop: vec![String::new()], ..SessionOptions::default() }), "stop");
    let (mut nothing, run) = session(Toy::new(VOCAB, 8), at_most(0));
    assert_eq!((answer(&mut nothing, &[1, 2]).0.len(), run.load(Ordering::Relaxed)), (0, 0));
}
