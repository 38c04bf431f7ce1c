//! A chat in a program of your own: several turns, streamed, with what each of them took.
//!
//! `cargo run --release --example chat -- MODEL`, with `cpu` as a second argument where there is no
//! GPU. Every line of stdin is a question.

use lowkey::checkpoint::{ChatTemplate, Message};
use lowkey::{Error, LoadOptions, Model, Prompt, Session, SessionOptions};
use std::io::{BufRead, Write};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: chat MODEL [DEVICE]")?;
    let device = arguments.next().as_deref().unwrap_or("auto").parse()?;

    let model = Model::load(path, LoadOptions { device, ..LoadOptions::default() })?;
    let template = model.checkpoint().chat_template()?;
    let mut session = model.session(SessionOptions { max_tokens: Some(500), ..SessionOptions::default() })?;
    // From another thread, a handle that `session.cancel()` gives stops an answer.

    let mut messages = Vec::new();
    print!("> ");
    std::io::stdout().flush()?;
    for question in std::io::stdin().lock().lines() {
        messages.push(Message::new("user", question?));
        let answer = answer(&mut session, &template, &mut messages)?;
        messages.push(Message::new("assistant", answer));
        print!("> ");
        std::io::stdout().flush()?;
    }
    println!();
    Ok(())
}

/// Asks the last of `messages`, and prints the answer.
///
/// Where they have become too many for the context, the oldest are dropped.
fn answer(session: &mut Session, template: &ChatTemplate, messages: &mut Vec<Message>) -> lowkey::Result<String> {
    loop {
        // All of the conversation, every time: what the session has read before, it does not read
        // again.
        let prompt = template.render(messages, true)?;
        let mut generation = match session.generate(Prompt::Rendered(&prompt)) {
            Err(Error::Context { .. }) if messages.len() > 2 => {
                messages.drain(..2);
                continue;
            }
            generation => generation?,
        };
        let mut text = String::new();
        for token in generation.by_ref() {
            let token = token?;
            print!("{token}");
            // A terminal that cannot be written to is no reason to lose the answer.
            let _ = std::io::stdout().flush();
            text += &token.text;
        }
        let summary = generation.summary();
        println!("\n[{} tokens, {:.1} per second; {} bytes of cache]", summary.tokens, summary.decode_tps, summary.kv_bytes);
        return Ok(text);
    }
}
