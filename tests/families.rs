//! Every family of models computes what transformers computes: the checkpoints and logits of
//! tests/data/families, which tests/tools/families.py makes, on the CPU and on the GPU in every
//! tier, dense and with coded rows.

mod common;

use common::rows::{coded, ways};
use common::{Random, compressed_as, nmse};
use lowkey::checkpoint::Checkpoint;
use lowkey::compress::{Float, Output};
use lowkey::cpu::{self, Disturbance, LayerGradients, Residuals, RowType};
use lowkey::decoder;
use lowkey::gpu::{Device, Options, Tier};
use lowkey::kv::{Exact, LatentSet};
use lowkey::sequence::{Logits, Sequence, SequenceOptions};
use nalgebra::{DMatrix, DVectorView};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

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
        let device = device(tier);
        let model = Arc::new(decoder::Model::with_latents(&self.checkpoint, rows.cloned(), device).unwrap());
        self.logits(&mut model.sequence(self.options()).unwrap())
    }
}

/// One for all that runs in a tier: what kernels have in common is compiled once.
fn device(tier: Tier) -> Arc<Device> {
    static DEVICES: [OnceLock<Arc<Device>>; 3] = [const { OnceLock::new() }; 3];
    DEVICES[tier as usize].get_or_init(|| common::device(Options { tier: Some(tier), ..Default::default() })).clone()
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
            assert!(error < MOST_GPU.max(10.0 * own), "{}, {way}: {error}, where f16 rows alone make {own}", fixture.name);
        }
    }
}

/// The sum of `−log p(label)` over the positions from `FIRST` on, of what leaves the last layer.
fn loss(model: &cpu::Model, x: &DMatrix<f32>, labels: &[u32]) -> f64 {
    let of_position = |(logits, label): (DVectorView<f32>, &u32)| {
        let highest = f64::from(logits.max());
        let total: f64 = logits.iter().map(|logit| (f64::from(*logit) - highest).exp()).sum();
        total.ln() + highest - f64::from(logits[*label as usize])
    };
    model.head(x).column_iter().zip(labels).skip(FIRST).map(of_position).sum()
}

/// The first position whose loss counts, of how many: longer than the windows are.
const FIRST: usize = 20;
const LENGTH: usize = 60;
/// Small enough that hardly a clamp begins or ends to matter.
const NOISE: f32 = 2e-3;

/// The loss's slope in a random direction of all keys, or all values, of a layer.
#[test]
fn gradients_are_the_slopes_of_the_loss() {
    for fixture in fixtures() {
        let model = Arc::new(cpu::Model::load(&fixture.checkpoint).unwrap());
        let (tokens, labels, exact) = (&fixture.tokens[..LENGTH], &fixture.tokens[1..=LENGTH], Exact { sinks: 3, recent: 9 });
        let mut kept = Residuals::new(model.config(), LENGTH);
        model.sequence(LENGTH, RowType::F32).unwrap().observe(tokens, Logits::None, &mut kept).unwrap();
        let undo = |position: usize, logits: &mut [f32]| {
            let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f32 = logits.iter().map(|logit| (logit - highest).exp()).sum();
            logits.iter_mut().for_each(|logit| *logit = (*logit - highest).exp() / total);
            logits[labels[position] as usize] -= 1.0;
        };
        let mut random = Random(3);
        let mut visit = |layer: usize, gradients: LayerGradients| {
            for (is_key, gradient) in [(true, &gradients.keys), (false, &gradients.values)] {
                let noise = DMatrix::from_vec(gradient.nrows(), LENGTH, random.normals(gradient.len(), NOISE));
                let at = |noise: &DMatrix<f32>| {
                    let disturbance = if is_key { Disturbance::Keys(noise) } else { Disturbance::Values(noise) };
                    loss(&model, &model.disturbed(&kept, layer, disturbance, exact).unwrap(), labels)
                };
                let (found, expected) = ((at(&noise) - at(&-&noise)) / 2.0, f64::from(gradient.dot(&noise)));
                let typical = f64::from(gradient.norm() * NOISE);
                println!("{}, layer {layer}, keys: {is_key}: {found:.5} for {expected:.5}, of {typical:.5}", fixture.name);
                assert!(typical > 1e-4, "{}: keys: {is_key} of layer {layer} hardly matter: {typical}", fixture.name);
                assert!((found - expected).abs() < 2e-2 * typical, "{}, layer {layer}, keys: {is_key}: {found} for {expected}", fixture.name);
            }
            Ok(())
        };
        model.backward(&kept, FIRST, &undo, exact, &mut visit).unwrap();
    }
}

/// Heads in another order and rows in bases of full rank are the model that they are made of,
/// beside it and as a checkpoint of their own.
#[test]
fn at_full_rank_a_compressed_family_is_the_dense_one() {
    for fixture in fixtures() {
        let directory = tempfile::tempdir().unwrap();
        let [model, adapter, alone] = ["model", "small.lowkey", "alone"].map(|name| directory.path().join(name));
        std::fs::create_dir(&model).unwrap();
        ["config.json", "model.safetensors"].iter().for_each(|name| {
            std::fs::copy(fixture.checkpoint.path().join(name), model.join(name)).unwrap();
        });
        common::write_tokenizer(&model);
        let dense = Checkpoint::open(&model).unwrap();
        [Output::adapter(&adapter), Output::standalone(&alone)]
            .into_iter()
            .for_each(|output| compressed_as(&dense, 1.0, 2, &Output { float: Float::F32, ..output }));
        for (what, checkpoint) in [("adapter", Checkpoint::open_with(&model, &adapter)), ("alone", Checkpoint::open(&alone))] {
            let made = cpu::Model::load(&checkpoint.unwrap_or_else(|error| panic!("{}, {what}: {error}", fixture.name))).unwrap();
            let error = nmse(&fixture.logits(&mut Arc::new(made).sequence(fixture.options(), RowType::F32).unwrap()), &fixture.logits);
            println!("{}, {what}: {error:.1e}", fixture.name);
            assert!(error < 1e-4, "{}, {what}: {error}", fixture.name);
        }
    }
}
