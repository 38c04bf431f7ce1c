//! Every family of models computes what transformers computes: the checkpoints and logits of
//! tests/data/families, which tests/tools/families.py makes, on the CPU and on the GPU in every
//! tier, dense and with coded rows.

mod common;

use common::nmse;
use common::rows::{coded, ways};
use lowkey::checkpoint::Checkpoint;
use lowkey::cpu::{self, RowType};
use lowkey::decoder;
use lowkey::gpu::{Options, Tier};
use lowkey::kv::{Exact, LatentSet};
use lowkey::sequence::{Logits, Sequence, SequenceOptions};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MOST_CPU: f64 = 1e-5;
const MOST_GPU: f64 = 1e-4;

/// A checkpoint with a text, and the logits after some of its tokens.
struct Fixture {
    name: String,
    checkpoint: Checkpoint,
    tokens: Vec<u32>,
    positions: Vec<usize>,
    logits: Vec<f32>,
}

impl Fixture {
    fn open(path: &Path) -> Fixture {
        let bytes = std::fs::read(path.join("expected.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: &str| -> Vec<u32> {
            tensors.tensor(name).unwrap().data().chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
        };
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        Fixture {
            checkpoint: Checkpoint::open(path).unwrap_or_else(|error| panic!("{name}: {error}")),
            tokens: words("tokens"),
            positions: words("positions").into_iter().map(|position| position as usize).collect(),
            logits: words("logits").into_iter().map(f32::from_bits).collect(),
            name,
        }
    }

    fn options(&self) -> SequenceOptions {
        SequenceOptions { capacity: self.tokens.len(), chunk: Some(64), ..Default::default() }
    }

    /// Logits after the fixture's positions: most tokens in chunks, the last ones in single steps.
    fn logits(&self, sequence: &mut dyn Sequence) -> Vec<f32> {
        let (vocab, chunked) = (self.checkpoint.config().vocab_size, 130);
        let mut all = sequence.forward(&self.tokens[..chunked], Logits::All).unwrap();
        self.tokens[chunked..].iter().for_each(|token| all.extend(sequence.forward(&[*token], Logits::Last).unwrap()));
        self.positions.iter().flat_map(|position| all[position * vocab..][..vocab].to_vec()).collect()
    }

    fn cpu(&self, rows: Option<&LatentSet>, row_type: RowType) -> Vec<f32> {
        let model = Arc::new(cpu::Model::with_latents(&self.checkpoint, rows.cloned()).unwrap());
        self.logits(&mut model.sequence(self.options(), row_type).unwrap())
    }

    fn gpu(&self, rows: Option<&LatentSet>, tier: Tier) -> Vec<f32> {
        let device = common::device(Options { tier: Some(tier), ..Default::default() });
        let model = Arc::new(decoder::Model::with_latents(&self.checkpoint, rows.cloned(), device).unwrap());
        self.logits(&mut model.sequence(self.options()).unwrap())
    }
}

/// All of them, or those whose names have a part that `LOWKEY_FAMILIES` names.
fn fixtures() -> Vec<Fixture> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/families");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() > 20, "{} holds too few", root.display());
    let asked = std::env::var("LOWKEY_FAMILIES").unwrap_or_default();
    let is_asked = |path: &PathBuf| asked.is_empty() || asked.split(',').any(|part| path.to_str().unwrap().contains(part));
    paths.iter().filter(|path| is_asked(path)).map(|path| Fixture::open(path)).collect()
}

/// Prints what is found, and fails after all of them where some are too far off.
fn compare(most: f64, found: impl Iterator<Item = (String, f64)>) {
    let found: Vec<_> = found.inspect(|(name, error)| println!("{name}: {error:.1e}")).collect();
    let bad: Vec<_> = found.iter().filter(|(_, error)| error.is_nan() || *error > most).collect();
    assert!(bad.is_empty(), "{bad:?}");
}

#[test]
fn the_processor_computes_what_transformers_does() {
    compare(MOST_CPU, fixtures().iter().map(|f| (f.name.clone(), nmse(&f.cpu(None, RowType::F32), &f.logits))));
}

fn dense(tier: Tier) {
    compare(MOST_GPU, fixtures().iter().map(|f| (f.name.clone(), nmse(&f.gpu(None, tier), &f.logits))));
}

#[test]
fn a_gpu_computes_what_transformers_does_with_f16_and_subgroups() {
    dense(Tier::F16Subgroups);
}

#[test]
fn a_gpu_computes_what_transformers_does_with_f16() {
    dense(Tier::F16);
}

#[test]
fn a_gpu_computes_what_transformers_does_in_the_baseline_tier() {
    dense(Tier::Baseline);
}

/// Keys before RoPE that are rebuilt and keys after it that are absorbed, over layers that differ.
#[test]
fn coded_rows_are_read_alike() {
    for (index, fixture) in fixtures().iter().enumerate() {
        for (number, (way, specs)) in ways(fixture.checkpoint.config()).into_iter().enumerate().filter(|(number, _)| (number + index) % 5 == 0) {
            let rows = coded(&fixture.checkpoint, specs, Exact { sinks: 4, recent: 10 });
            let [expected, full] = [RowType::F16, RowType::F32].map(|row_type| fixture.cpu(Some(&rows), row_type));
            let found = fixture.gpu(Some(&rows), Tier::ALL[number % 3]);
            let (error, own) = (nmse(&found, &expected), nmse(&full, &expected));
            println!("{}, {way}: {error:.1e}, where f16 rows alone make {own:.1e}", fixture.name);
            assert!(error < 1e-5f64.max(10.0 * own), "{}, {way}: {error}, where f16 rows alone make {own}", fixture.name);
        }
    }
}
