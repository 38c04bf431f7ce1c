//! Sequences and sessions that are saved, and go on elsewhere as if nothing had been.

mod common;

use common::rows::{coded, ways};
use common::{Random, SyntheticModel, nmse};
use lowkey::checkpoint::Checkpoint;
use lowkey::compress::{self, Method, Plan};
use lowkey::cpu::{self, RowType};
use lowkey::gpu::{self, Tier};
use lowkey::kv::{Budget, CacheMethod, Evicted, Exact, LatentSet, Read, Reviver, Saved, Selector, Xkv};
use lowkey::sequence::{Logits, Sequence, SequenceOptions};
use lowkey::session::PrefixCache;
use lowkey::task::quietly;
use lowkey::{Device, Engine, Error, LoadOptions, Model, Prompt, Sampling, Session, SessionOptions, decoder};
use safetensors::Dtype;
use std::sync::Arc;

const PROMPT: usize = 150;
const STEPS: usize = 25;
const EXACT: Exact = Exact { sinks: 4, recent: 10 };

/// A way to keep a cache, of rows if there are any.
struct Way {
    name: String,
    rows: Option<LatentSet>,
    options: SequenceOptions,
    /// How far the two devices may be apart: a code that rounds the other way travels.
    apart: f64,
}

fn options(method: CacheMethod) -> SequenceOptions {
    SequenceOptions { capacity: 260, exact: Some(EXACT), method, ..Default::default() }
}

/// A model with heads whose width is no multiple of four.
fn odd() -> SyntheticModel {
    SyntheticModel { kv_heads: 2, heads: 4, head_dim: 14, dtype: Dtype::F16, ..SyntheticModel::default() }
}

fn all_ways(checkpoint: &Checkpoint) -> Vec<Way> {
    let way = |name: &str, rows: Option<LatentSet>, method| Way {
        name: name.into(),
        apart: if rows.is_some() { 1e-3 } else { 1e-6 },
        rows,
        options: options(method),
    };
    let mut all = vec![way("dense", None, CacheMethod::default())];
    for evicted in [Evicted::None, Evicted::Mean, Evicted::Sketch, Evicted::Shrunk] {
        all.push(way(&format!("evicted as {evicted:?}"), None, CacheMethod::Evict(Reviver::new(Budget::Keep(0.3), Some(evicted)))));
    }
    for (index, (name, specs)) in ways(checkpoint.config()).into_iter().enumerate() {
        let rows = coded(checkpoint, specs, EXACT);
        let by = Selector::ALL[index % 2];
        all.push(way(&format!("{name}, chosen"), Some(rows.clone()), CacheMethod::Calibrated(Read::top(Some(24)).by(by))));
        if index % 2 == 0 {
            let budget = LatentSet::bytes_per_token(&rows.specs) + checkpoint.config().geometry().dense_bytes_per_token() / 4;
            all.push(way(&format!("{name}, evicted"), Some(rows.clone()), CacheMethod::Evict(Reviver::new(Budget::Bytes(budget), None))));
        }
        all.push(way(name, Some(rows), CacheMethod::default()));
    }
    let made = |method| compress::factor(checkpoint, &Plan::new(method), None, &mut quietly).unwrap().rows;
    all.push(way("kivi", Some(made(Method::Kivi { bits: 4 })), CacheMethod::default()));
    all.push(way("kvarn", Some(made(Method::KVarN { key_bits: 4, value_bits: 2 })), CacheMethod::default()));
    all
}

/// The processor's decoder and the device's, with these rows.
struct Models {
    cpu: Arc<cpu::Model>,
    gpu: Arc<decoder::Model>,
}

impl Models {
    fn new(checkpoint: &Checkpoint, rows: Option<LatentSet>, device: &Arc<lowkey::gpu::Device>) -> Models {
        Models {
            cpu: Arc::new(cpu::Model::with_latents(checkpoint, rows.clone()).unwrap()),
            gpu: Arc::new(decoder::Model::with_latents(checkpoint, rows, device.clone()).unwrap()),
        }
    }

    fn sequences(&self, options: SequenceOptions) -> [Box<dyn Sequence>; 2] {
        [Box::new(self.cpu.sequence(options, RowType::F16).unwrap()), Box::new(self.gpu.sequence(options).unwrap())]
    }
}

/// Single tokens: the logits after each of them.
fn go_on(sequence: &mut dyn Sequence, tokens: &[u32]) -> Vec<f32> {
    tokens.iter().flat_map(|token| sequence.forward(&[*token], Logits::Last).unwrap()).collect()
}

/// A prompt, some steps, and what is saved then.
fn saved(sequence: &mut dyn Sequence, tokens: &[u32]) -> Saved {
    sequence.forward(&tokens[..PROMPT], Logits::None).unwrap();
    go_on(sequence, &tokens[PROMPT..PROMPT + STEPS]);
    sequence.save().unwrap()
}

/// Whatever is kept and wherever: what goes on from a saved sequence does so as the one that was
/// saved, to the bit on the same device, and also where both are cut back first.
#[test]
fn a_sequence_goes_on_from_a_saved_one() {
    let directory = odd().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let device = common::device(Default::default());
    let tokens = Random(3).tokens(PROMPT + STEPS + 20, checkpoint.config().vocab_size);
    let rest = &tokens[PROMPT + STEPS..];
    for Way { name, rows, options, apart } in all_ways(&checkpoint) {
        let models = Models::new(&checkpoint, rows, &device);
        let made = models.sequences(options).map(|mut sequence| (saved(&mut *sequence, &tokens), go_on(&mut *sequence, rest)));
        let apart = apart.max(2.0 * nmse(&made[0].1, &made[1].1));
        let mut others = models.sequences(options);
        // Something else was there before.
        others.iter_mut().for_each(|other| assert!(other.forward(&tokens[7..60], Logits::None).is_ok()));
        for (from, (saved, own)) in made.iter().enumerate() {
            assert_eq!(saved.standing.position, PROMPT + STEPS);
            for (to, other) in others.iter_mut().enumerate() {
                let what = format!("{name}, from {from} to {to}");
                other.restore(saved).unwrap_or_else(|error| panic!("{what}: {error}"));
                if from != to {
                    let error = nmse(&go_on(&mut **other, rest), own);
                    assert!(error < apart, "{what}: {error}");
                    continue;
                }
                assert!(other.save().unwrap() == *saved, "{what}: saved again it is another");
                assert!(go_on(&mut **other, rest) == *own, "{what}");
            }
        }
    }
}

/// From one tier of kernels to every other.
#[test]
fn a_sequence_goes_on_in_another_tier() {
    let directory = odd().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let tokens = Random(6).tokens(PROMPT + STEPS + 10, checkpoint.config().vocab_size);
    let devices = Tier::ALL.map(|tier| common::device(gpu::Options { tier: Some(tier), ..Default::default() }));
    let some = ["dense", "evicted as Shrunk", "eight bits throughout"];
    for Way { name, rows, options, apart } in all_ways(&checkpoint).into_iter().filter(|way| some.contains(&&*way.name)) {
        let mut sequences = devices.each_ref().map(|device| {
            let model = decoder::Model::with_latents(&checkpoint, rows.clone(), device.clone()).unwrap();
            Arc::new(model).sequence(options).unwrap()
        });
        for from in 0..sequences.len() {
            sequences[from].truncate(0);
            let saved = saved(&mut sequences[from], &tokens);
            let own = go_on(&mut sequences[from], &tokens[PROMPT + STEPS..]);
            for (to, other) in sequences.iter_mut().enumerate() {
                other.restore(&saved).unwrap();
                let error = nmse(&go_on(other, &tokens[PROMPT + STEPS..]), &own);
                assert!(if from == to { error == 0.0 } else { error < apart }, "{name}, from tier {from} to {to}: {error}");
            }
        }
    }
}

/// What is cut back after it was restored is what is cut back without.
#[test]
fn a_restored_sequence_is_cut_as_the_one_that_was_saved() {
    let directory = odd().write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let device = common::device(Default::default());
    let tokens = Random(4).tokens(PROMPT + STEPS + 10, checkpoint.config().vocab_size);
    // Every row exact, every way to evict and to code at once.
    let some = ["dense", "evicted as Shrunk", "joint rows over two layers, evicted", "eight bits throughout, chosen", "kvarn"];
    let ways: Vec<Way> = all_ways(&checkpoint).into_iter().filter(|way| some.contains(&&*way.name)).collect();
    assert_eq!(ways.len(), some.len());
    for Way { name, rows, options, .. } in ways {
        let models = Models::new(&checkpoint, rows, &device);
        let pairs = models.sequences(options).into_iter().zip(models.sequences(options));
        for (on, (mut sequence, mut other)) in pairs.enumerate() {
            let saved = saved(&mut *sequence, &tokens);
            for back in [PROMPT + STEPS - 3, 100] {
                other.restore(&saved).unwrap();
                sequence.restore(&saved).unwrap();
                let ends = [&mut sequence, &mut other].map(|sequence| {
                    sequence.truncate(back);
                    (sequence.position(), go_on(&mut **sequence, &tokens[PROMPT + STEPS..]))
                });
                assert!(ends[0] == ends[1], "{name} on {on}, to {back}");
                assert_eq!(ends[0].0 == 0, back < saved.kept_from(), "{name}");
            }
        }
    }
}

fn load(path: &std::path::Path, device: Device) -> Model {
    Engine::open(&LoadOptions { device, ..Default::default() }).unwrap().load(path).unwrap()
}

fn devices() -> [Device; 2] {
    [Device::Cpu, Device::Gpu(String::new())]
}

/// An answer of so many tokens to the end of what is said, and how many tokens were read anew.
fn answer(session: &mut Session, text: &mut Vec<u32>) -> (Vec<u32>, usize) {
    let mut generation = session.generate(Prompt::Tokens(text)).unwrap();
    let tokens: Vec<u32> = generation.by_ref().map(|token| token.unwrap().id).collect();
    let summary = generation.summary();
    text.extend(&tokens);
    (tokens, summary.prompt_tokens - summary.reused_tokens)
}

/// Of every method that exists while a text is read: a session that is saved and goes on in another
/// model's session, on either device, says the same and reads no token of the prompt again.
#[test]
fn a_session_goes_on_from_its_file() {
    let directory = SyntheticModel { head_dim: 16, ..odd() }.write_temporary();
    let models = devices().map(|device| load(directory.path(), device));
    let file = directory.path().join("a.session");
    let tokens = Random(5).tokens(PROMPT, 515);
    let xkv = |layers| CacheMethod::Xkv(Xkv { layers, budget: Budget::Times(3.0), bits: None }, Read::All);
    let chosen = CacheMethod::Xkv(Xkv { layers: 3, budget: Budget::Times(3.0), bits: Some(4) }, Read::top(Some(16)));
    let evict = CacheMethod::Evict(Reviver::new(Budget::Keep(0.5), Some(Evicted::Shrunk)));
    for (method, prompt) in [(CacheMethod::default(), PROMPT), (xkv(2), PROMPT), (chosen, PROMPT), (xkv(2), 5), (evict, PROMPT)] {
        for temperature in [0.0, 0.8] {
            let sampling = Sampling { temperature, seed: 9, ..Sampling::default() };
            let options = SessionOptions { context: Some(400), max_tokens: Some(20), ignore_eos: true, sampling, method, ..Default::default() };
            for from in &models {
                let mut session = from.session(options.clone()).unwrap();
                let mut text = tokens[..prompt].to_vec();
                answer(&mut session, &mut text);
                let bytes = session.save(&file, "a note").unwrap();
                assert_eq!(bytes, std::fs::metadata(&file).unwrap().len());
                let (expected, read) = answer(&mut session, &mut text.clone());
                assert_eq!(read, 1);
                for to in &models {
                    let what = format!("{method:?} at {temperature}, {} tokens", prompt);
                    let mut session = to.session(options.clone()).unwrap();
                    let restored = session.restore(&file).unwrap();
                    assert_eq!((restored.tokens, &*restored.note), (text.len() - 1, "a note"), "{what}");
                    let (found, read) = answer(&mut session, &mut text.clone());
                    assert_eq!(read, 1, "{what}: the last token alone, which had not been read before");
                    if std::ptr::eq(from, to) {
                        assert_eq!(found, expected, "{what}");
                    } else {
                        let common = found.iter().zip(&expected).take_while(|(a, b)| a == b).count();
                        assert!(common >= 1, "{what}: {found:?}, {expected:?}");
                    }
                }
            }
        }
    }
}

fn message(session: &mut Session, file: &std::path::Path) -> String {
    match session.restore(file).unwrap_err() {
        Error::Session { path, message } => {
            assert_eq!(path, file);
            message
        }
        other => panic!("{other}"),
    }
}

/// What cannot be gone on from is refused with what it is, and what was there before stays.
#[test]
fn what_does_not_belong_is_refused_by_name() {
    let directory = odd().write_temporary();
    let other = SyntheticModel { seed: 99, ..odd() }.write_temporary();
    let adapter = directory.path().join("kivi.lowkey");
    let plan = Plan::new(Method::Kivi { bits: 4 });
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    compress::run(&checkpoint, &plan, None, &compress::Output::adapter(&adapter), &mut quietly).unwrap();
    let engine = Engine::open(&LoadOptions { device: Device::Cpu, ..Default::default() }).unwrap();
    let [dense, wrong] = [directory.path(), other.path()].map(|path| engine.load(path).unwrap());
    let coded = engine.load_checkpoint(Checkpoint::open_with(directory.path(), &adapter).unwrap()).unwrap();
    let options = |method| SessionOptions { context: Some(300), max_tokens: Some(3), ignore_eos: true, method, ..Default::default() };
    let session = |model: &Model, method| model.session(options(method)).unwrap();
    let evict = |keep| CacheMethod::Evict(Reviver::new(Budget::Keep(keep), Some(Evicted::Mean)));
    let xkv = CacheMethod::Xkv(Xkv { layers: 2, budget: Budget::Times(3.0), bits: None }, Read::All);
    let file = directory.path().join("a.session");
    let mut text = Random(5).tokens(PROMPT, 515);
    let save = |model: &Model, method| {
        let mut session = session(model, method);
        session.read(Prompt::Tokens(&text)).unwrap();
        session.save(&file, "").unwrap();
    };
    save(&dense, CacheMethod::default());
    let whole = std::fs::read(&file).unwrap();
    let mut at_home = session(&dense, CacheMethod::default());
    at_home.read(Prompt::Tokens(&text[..9])).unwrap();
    assert!(message(&mut session(&wrong, CacheMethod::default()), &file).contains("is another model"));
    assert!(message(&mut session(&coded, CacheMethod::default()), &file).contains("with no adapter, and the model is opened with kivi.lowkey (kivi"));
    assert!(message(&mut session(&dense, evict(0.5)), &file).contains("open it with the same --method"));
    assert!(message(&mut session(&dense, xkv), &file).contains("leave out --method xkv"));
    let mut short = dense.session(SessionOptions { context: Some(100), ..options(CacheMethod::default()) }).unwrap();
    assert!(matches!(short.restore(&file), Err(Error::Context { needed: PROMPT, capacity: 100 })));
    for (at, word) in [(whole.len() / 2, "checksum"), (whole.len() - 1, "checksum")] {
        let mut damaged = whole.clone();
        damaged[at] ^= 4;
        std::fs::write(&file, damaged).unwrap();
        assert!(message(&mut at_home, &file).contains(word));
    }
    for cut in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&file, &whole[..cut]).unwrap();
        let message = message(&mut at_home, &file);
        assert!(message.contains("cut short") || message.contains("is no session"), "{message}");
    }
    let version = br#"\"format\":"#;
    let newer = whole.windows(version.len()).position(|window| window == version).map(|at| at + version.len());
    let mut later = whole.clone();
    later[newer.unwrap()] = b'7';
    std::fs::write(&file, later).unwrap();
    let found = message(&mut at_home, &file);
    assert!(found.contains("is of format 7, and this release reads 1"), "{found}");
    // All of that has left the session as it was.
    assert_eq!(at_home.tokens(), &text[..9]);
    std::fs::write(&file, &whole).unwrap();
    assert_eq!(at_home.restore(&file).unwrap().tokens, PROMPT);
    assert_eq!(answer(&mut at_home, &mut text).1, 1);

    let text = text;
    let save = |model: &Model, method| {
        let mut session = session(model, method);
        session.read(Prompt::Tokens(&text)).unwrap();
        session.save(&file, "").unwrap();
    };
    save(&coded, CacheMethod::default());
    assert!(message(&mut session(&dense, CacheMethod::default()), &file).contains("open it with the same one"));
    assert!(message(&mut session(&coded, CacheMethod::Full), &file).contains("open it with the same --method"));
    save(&dense, evict(0.5));
    assert!(message(&mut session(&dense, evict(0.2)), &file).contains("and the same budget"));
    save(&dense, xkv);
    assert!(message(&mut session(&dense, CacheMethod::default()), &file).contains("xkv"));
}

/// What the child of the next test does until it is killed, and nothing elsewhere: saves two
/// states of a session in turns under one name, and prefixes into a directory that is always too
/// small for them.
#[test]
fn saves_until_it_is_killed() {
    let Some(directory) = std::env::var_os("LOWKEY_TEST_SAVES").map(std::path::PathBuf::from) else { return };
    let model = load(&directory.join("model"), Device::Cpu);
    let mut session = model.session(SessionOptions { context: Some(300), ..Default::default() }).unwrap();
    let prefixes = PrefixCache::open(directory.join("prefixes"), 100_000).unwrap();
    let tokens = Random(5).tokens(240, 515);
    for count in [200, 240].into_iter().cycle() {
        session.read(Prompt::Tokens(&tokens[..count])).unwrap();
        session.save(&directory.join("a.session"), &count.to_string()).unwrap();
        std::fs::write(directory.join("ready"), "").unwrap();
        prefixes.save(&mut session).unwrap();
    }
}

/// Whenever the process that saves is killed, what is there is the old state or the new one, and
/// every prefix is whole.
#[cfg(unix)]
#[test]
fn a_killed_save_leaves_the_old_state_or_the_new_one() {
    let directory = tempfile::tempdir().unwrap();
    odd().write(&directory.path().join("model"));
    let model = load(&directory.path().join("model"), Device::Cpu);
    let (file, ready) = (directory.path().join("a.session"), directory.path().join("ready"));
    let tokens = Random(5).tokens(240, 515);
    let mut random = Random(77);
    let mut seen = std::collections::BTreeSet::new();
    for round in 0..50 {
        let _ = std::fs::remove_file(&ready);
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["saves_until_it_is_killed", "--exact"]).env("LOWKEY_TEST_SAVES", directory.path());
        let mut child = command.stdout(std::process::Stdio::null()).spawn().unwrap();
        while !ready.exists() {
            assert!(child.try_wait().unwrap().is_none(), "it ended too early");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::thread::sleep(std::time::Duration::from_micros(random.below(10_000 * (1 + round % 20)) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        let mut session = model.session(SessionOptions { context: Some(300), ..Default::default() }).unwrap();
        let restored = session.restore(&file).unwrap();
        assert!([200, 240].contains(&restored.tokens) && restored.note == restored.tokens.to_string(), "round {round}: {restored:?}");
        assert_eq!(session.tokens(), &tokens[..restored.tokens]);
        seen.insert(restored.tokens);
        for entry in std::fs::read_dir(directory.path().join("prefixes")).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "session") {
                session.restore(&path).unwrap_or_else(|error| panic!("round {round}: {error}"));
                assert_eq!(session.tokens(), &tokens[..session.position()]);
            }
        }
    }
    assert_eq!(seen.len(), 2, "killed before and after: {seen:?}");
}

/// A session that has no room for a prefix reads its prompt itself, and leaves it to those that
/// have.
#[test]
fn a_prefix_that_does_not_fit_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    odd().write(&directory.path().join("model"));
    let model = load(&directory.path().join("model"), Device::Cpu);
    let prefixes = PrefixCache::open(directory.path().join("prefixes"), 1 << 30).unwrap();
    let tokens = Random(5).tokens(240, 515);
    let session = |context: usize| model.session(SessionOptions { context: Some(context), ..Default::default() }).unwrap();
    let mut long = session(300);
    long.read(Prompt::Tokens(&tokens)).unwrap();
    prefixes.save(&mut long).unwrap();
    assert_eq!(prefixes.restore(&mut session(40), &tokens[..30]).unwrap(), 0);
    assert_eq!(prefixes.restore(&mut session(300), &tokens[..200]).unwrap(), 199);
}
