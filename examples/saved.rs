//! What a session takes on disk, how long it takes to save and to restore, and whether another
//! process goes on from it as this one does: a table, by how the cache is kept.
//!
//! ```sh
//! cargo run --release --example saved -- MODEL TEXT TOKENS [ADAPTER...]
//! ```
//!
//! `LOWKEY_DEVICE` names the device, the processor where it is not set.

use lowkey::checkpoint::Checkpoint;
use lowkey::kv::{Budget, CacheMethod, Evicted, Read, Reviver, Xkv};
use lowkey::{Device, Engine, LoadOptions, Model, Prompt, Result, Session, SessionOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Tokens that either process says.
const SAID: usize = 100;

/// The ways to keep a dense model's cache.
fn dense_ways() -> Vec<(&'static str, CacheMethod)> {
    let evict = |evicted| CacheMethod::Evict(Reviver::new(Budget::Keep(0.25), Some(evicted)));
    vec![
        ("f16", CacheMethod::default()),
        ("xkv, 4 times smaller", CacheMethod::Xkv(Xkv { layers: 4, budget: Budget::Times(4.0), bits: None }, Read::All)),
        ("kvreviver, a quarter, nothing of the evicted", evict(Evicted::None)),
        ("kvreviver, a quarter, a shrunk sketch", evict(Evicted::Shrunk)),
    ]
}

/// And a compressed one's.
fn small_ways() -> Vec<(&'static str, CacheMethod)> {
    vec![("", CacheMethod::default()), (", 256 selected", CacheMethod::Calibrated(Read::top(Some(256))))]
}

fn load(model: &Path, adapter: Option<&Path>) -> Result<Model> {
    let device = std::env::var("LOWKEY_DEVICE").map_or(Ok(Device::Cpu), |name| name.parse())?;
    let engine = Engine::open(&LoadOptions { device, ..LoadOptions::default() })?;
    engine.load_checkpoint(match adapter {
        Some(adapter) => Checkpoint::open_with(model, adapter)?,
        None => Checkpoint::open(model)?,
    })
}

fn session(model: &Model, method: CacheMethod, tokens: usize) -> Result<Session> {
    model.session(SessionOptions { context: Some(tokens + 2 * SAID), max_tokens: Some(SAID), ignore_eos: true, method, ..Default::default() })
}

/// What the model says next, after so many tokens that were not read again.
fn say(session: &mut Session, text: &[u32]) -> Result<(Vec<u32>, usize)> {
    let mut generation = session.generate(Prompt::Tokens(text))?;
    let said = generation.by_ref().map(|token| Ok(token?.id)).collect::<Result<_>>()?;
    Ok((said, generation.summary().reused_tokens))
}

/// Where the text and what is said after it are.
fn beside(file: &Path) -> PathBuf {
    file.with_extension("tokens")
}

/// Another process: goes on from the file, and says how long that took.
fn check([model, adapter, method, file]: [&str; 4]) -> Result<()> {
    let (adapter, file) = ((adapter != "-").then(|| Path::new(adapter)), Path::new(file));
    let ways = if adapter.is_some() { small_ways() } else { dense_ways() };
    let numbers = std::fs::read_to_string(beside(file)).unwrap_or_default();
    let numbers: Vec<u32> = numbers.split(' ').filter_map(|number| number.parse().ok()).collect();
    let (text, expected) = numbers.split_at(numbers.len() - SAID);
    let mut session = session(&load(Path::new(model), adapter)?, ways[method.parse::<usize>().unwrap_or(0)].1, text.len())?;
    let start = Instant::now();
    session.restore(file)?;
    let seconds = start.elapsed().as_secs_f64();
    let (said, reused) = say(&mut session, text)?;
    let alike = said.iter().zip(expected).take_while(|(a, b)| a == b).count();
    println!("{seconds:.2} | {} | {alike} of {SAID}", text.len() - 1 - reused);
    Ok(())
}

/// One line of the table.
fn line([path, adapter, name]: [&str; 3], model: &Model, tokens: &[u32], (index, method): (usize, CacheMethod)) -> Result<()> {
    let mut session = session(model, method, tokens.len())?;
    let start = Instant::now();
    // All but the last one, whose logits are needed to go on.
    session.read(Prompt::Tokens(&tokens[..tokens.len() - 1]))?;
    let read = start.elapsed().as_secs_f64();
    let file = std::env::temp_dir().join(format!("lowkey-{}.session", std::process::id()));
    let start = Instant::now();
    let bytes = session.save(&file, "")? as f64;
    let saved = start.elapsed().as_secs_f64();
    let (memory, count) = (session.memory(), tokens.len() as f64);
    let all = memory.kv_bytes_per_token * tokens.len() as u64 + memory.kv_fixed_bytes;
    let said = say(&mut session, tokens)?.0;
    let numbers = tokens.iter().chain(&said).map(u32::to_string).collect::<Vec<_>>().join(" ");
    std::fs::write(beside(&file), numbers).unwrap_or_default();
    drop(session);
    let arguments = ["check", path, adapter, &index.to_string(), &file.to_string_lossy()].map(String::from);
    let output = Command::new(std::env::current_exe().unwrap_or_default()).args(arguments).output();
    let there = output.map_or_else(
        |error| error.to_string(),
        |output| {
            let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).trim().to_string());
            if out.is_empty() { err } else { out }
        },
    );
    [&file, &beside(&file)].into_iter().for_each(|file| _ = std::fs::remove_file(file));
    println!("| {name} | {:.0} | {:.0} | {:.1} | {saved:.2} | {read:.1} | {there} |", all as f64 / count, bytes / count, bytes / 1e6);
    Ok(())
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match &words[..] {
        ["check", model, adapter, method, file] => check([*model, *adapter, *method, *file]),
        [path, text, count, adapters @ ..] => {
            println!(
                "| cache | bytes a token in memory | on disk | MB on disk | s to save | s to read | s to restore | tokens read again | next tokens alike |"
            );
            println!("|---|---|---|---|---|---|---|---|---|");
            let text = std::fs::read_to_string(text).unwrap_or_default();
            for adapter in [None].into_iter().chain(adapters.iter().map(|adapter| Some(*adapter))) {
                let model = load(Path::new(path), adapter.map(Path::new))?;
                let tokens = model.tokenizer()?.encode(&text, true)?;
                let tokens = &tokens[..tokens.len().min(count.parse().unwrap_or(512))];
                let ways = if adapter.is_some() { small_ways() } else { dense_ways() };
                for (index, (name, method)) in ways.into_iter().enumerate() {
                    let stem = PathBuf::from(adapter.unwrap_or_default()).file_stem().unwrap_or_default().to_string_lossy().into_owned();
                    // What a layout has no such way for is left out.
                    if let Err(error) = line([path, adapter.unwrap_or("-"), &format!("{stem}{name}")], &model, tokens, (index, method)) {
                        eprintln!("{stem}{name}: {error}");
                    }
                }
            }
            Ok(())
        }
        _ => {
            println!("saved MODEL TEXT TOKENS [ADAPTER...]");
            Ok(())
        }
    }
}
