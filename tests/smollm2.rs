//! SmolLM2-135M-Instruct, the model of `make demo`: the GPU writes what the CPU writes. `make test`
//! fetches it and names it in `LOWKEY_TEST_MODEL`.

mod common;

use lowkey::checkpoint::{Checkpoint, Message};
use lowkey::cpu::{self, RowType};
use lowkey::decoder;
use lowkey::gpu::Options;
use lowkey::sequence::{Logits, Sequence};
use std::path::PathBuf;
use std::sync::Arc;

const TOKENS: usize = 64;
/// Logits closer than this may change places between two ways of adding the same numbers up.
const TIE: f32 = 1e-3;

fn checkpoint() -> Checkpoint {
    let path = std::env::var_os("LOWKEY_TEST_MODEL")
        .expect("LOWKEY_TEST_MODEL names the model: run `make test`, or set it to what `lowkey pull smollm2-135m-instruct` prints");
    Checkpoint::open(&PathBuf::from(path)).unwrap()
}

fn best_two(logits: &[f32]) -> (u32, f32) {
    let best = logits.iter().enumerate().fold(0, |best, (i, l)| if *l > logits[best] { i } else { best });
    let second = logits.iter().enumerate().filter(|(i, _)| *i != best).map(|(_, l)| *l).fold(f32::MIN, f32::max);
    (best as u32, logits[best] - second)
}

#[test]
fn greedy_text_on_the_gpu_is_that_of_the_cpu() {
    let checkpoint = checkpoint();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let template = checkpoint.chat_template().unwrap();
    let device = common::device(Options::default());
    let mut gpu = Arc::new(decoder::Model::load(&checkpoint, device).unwrap()).sequence(512).unwrap();
    let mut cpu = Arc::new(cpu::Model::load(&checkpoint).unwrap()).sequence(512, RowType::F16).unwrap();
    let question = |text: &str| template.render(&[Message { role: "user".into(), content: text.into() }], true).unwrap();
    let prompts =
        [question("What is the capital of France?"), question("Explain in one paragraph why the sky is blue."), "Once upon a time".to_owned()];
    for prompt in prompts {
        let mut tokens = tokenizer.encode(&prompt, false).unwrap();
        let begin = tokens.len();
        gpu.truncate(0);
        cpu.truncate(0);
        // The GPU leads; the CPU reads along and must agree with every token.
        let last = tokens.pop().unwrap();
        gpu.forward(&tokens, Logits::None).unwrap();
        cpu.forward(&tokens, Logits::None).unwrap();
        tokens.push(last);
        while tokens.len() < begin + TOKENS {
            let token = *tokens.last().unwrap();
            let next = gpu.step(token).unwrap();
            let logits = cpu.forward(&[token], Logits::Last).unwrap();
            let (expected, lead) = best_two(&logits);
            assert!(next == expected || lead < TIE, "{prompt:?}: after {} tokens {next} for {expected}, which leads by {lead}", tokens.len() - begin);
            tokens.push(next);
        }
        let text = tokenizer.decode(&tokens[begin..]).unwrap();
        if prompt.contains("France") {
            assert!(text.contains("Paris"), "{text:?}");
        }
    }
}
