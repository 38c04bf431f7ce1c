//! A language model in a native program: load, ask, stream the answer.
//!
//! `cargo run --release --example embed -- MODEL "Why is the sea salt?"`, with `cpu` as a third
//! argument where there is no GPU.

use lowkey::{LoadOptions, Model, Prompt, SessionOptions, checkpoint::Message};
use std::io::Write;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (path, question) = arguments.next().zip(arguments.next()).ok_or("usage: embed MODEL QUESTION [DEVICE]")?;
    let device = arguments.next().as_deref().unwrap_or("auto").parse()?;

    let model = Model::load(path, LoadOptions { device, ..LoadOptions::default() })?;
    let mut session = model.session(SessionOptions { max_tokens: Some(200), ..SessionOptions::default() })?;
    let prompt = model.checkpoint().chat_template()?.render(&[Message::new("user", question)], true)?;
    let mut answer = session.generate(Prompt::Rendered(&prompt))?;
    for token in answer.by_ref() {
        print!("{}", token?);
        std::io::stdout().flush()?;
    }
    println!("\n{:.1} tokens per second", answer.summary().decode_tps);
    Ok(())
}
