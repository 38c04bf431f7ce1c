//! Models and caches of random numbers. Speed depends on shapes alone, so that it can be measured
//! without a checkpoint, and at any depth without reading a text first.
//!
//! Everything is filled on the device, from patterns of a few hundred thousand numbers that are
//! repeated: an 8B model is there in a second. Weights have the variance that keeps activations
//! finite, and latents are codes of normally distributed coordinates, as their coders expect them.

use super::Model;
use super::executor::Executor;
use super::feed_forward::{FeedForward, MlpTensors};
use super::latents::Latents;
use super::sequence::GpuSequence;
use super::weights::{Ends, Layer, NormTensors};
use crate::Result;
use crate::checkpoint::Config;
use crate::gpu::{Device, GROUP, Matrix, Tensor, WeightType, pad};
use crate::kernels::HeadNorm;
use crate::kernels::repeat::Repeat;
use crate::kernels::values;
use crate::kv::{LatentSet, Selection};
use crate::linalg::Random;
use crate::sequence::SequenceOptions;
use half::f16;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

/// Vectors of 16 bytes in a pattern of weights: a prime, so that no two rows of a matrix begin at
/// the same place of it.
const VECTORS: usize = 65_521;
/// Tokens in a pattern of rows.
const TOKENS: usize = 64;

/// Fills all of `to` with `pattern`.
fn repeat(device: &Device, pattern: &wgpu::Buffer, to: &wgpu::Buffer) -> Result<()> {
    let repeat = Repeat::plan(device, pattern, to)?;
    device.submit(device.encode("random numbers", |pass| repeat.record(pass), |_| ())?.0)?;
    Ok(())
}

/// What a model's weights are made of.
struct Weights<'a> {
    device: &'a Device,
    /// The type of matrices whose rows can be of it.
    kind: WeightType,
    /// Words of codes.
    codes: wgpu::Buffer,
    /// Numbers of variance 1.
    numbers: Vec<f32>,
    /// Patterns by the width of a matrix, whose inverse is their variance, and their type: weights,
    /// or scales.
    patterns: HashMap<(usize, WeightType), wgpu::Buffer>,
}

impl Weights<'_> {
    fn new(device: &Device, kind: WeightType, seed: u64) -> Result<Weights<'_>> {
        let mut random = Random::new(seed);
        let numbers = (0..8 * VECTORS).map(|_| (random.unit() * 2.0 - 1.0) as f32 * 3f32.sqrt()).collect();
        let words: Vec<u32> = (0..4 * VECTORS).map(|_| random.below(1 << 32) as u32).collect();
        Ok(Weights { device, kind, codes: device.upload("random codes", &words)?, numbers, patterns: HashMap::new() })
    }

    /// What is repeated to give weights of a type the variance that fits a sum of `summed` numbers:
    /// weights, or scales of codes.
    fn pattern(&mut self, kind: WeightType, summed: usize) -> Result<&wgpu::Buffer> {
        let entry = match self.patterns.entry((summed, kind)) {
            Entry::Occupied(there) => return Ok(there.into_mut()),
            Entry::Vacant(entry) => entry,
        };
        let scale = 1.0 / (summed as f32).sqrt();
        let buffer = match kind {
            WeightType::Quantised(kind) => self.device.upload("scales", &kind.like(f64::from(scale)))?,
            _ => self.device.upload("random weights", &self.numbers.iter().map(|x| f16::from_f32(x * scale)).collect::<Vec<_>>())?,
        };
        Ok(entry.insert(buffer))
    }

    /// `[rows][width]`, of the variance that fits a sum of `summed` numbers.
    fn matrix(&mut self, label: &str, rows: usize, width: usize, summed: usize) -> Result<Matrix> {
        let kind = if width.is_multiple_of(GROUP) { self.kind } else { WeightType::F16 };
        let (device, codes) = (self.device, self.codes.clone());
        let pattern = self.pattern(kind, summed)?;
        let matrix = Matrix::zeroed(device, label, kind, [rows, width])?;
        for part in &matrix.parts {
            // Beside codes stand scales first, then more codes.
            let quantised = matches!(kind, WeightType::Quantised(_));
            for (index, plane) in part.planes().enumerate() {
                repeat(device, if quantised && index != 1 { &codes } else { pattern }, plane)?;
            }
        }
        Ok(matrix)
    }

    /// A norm whose gains are ones.
    fn norm(&self, label: &str, width: usize) -> Result<NormTensors> {
        Ok(NormTensors { gain: Tensor::vector(self.device, label, &vec![1f32; width])?, bias: None })
    }

    /// Layer `l`; its norms are ones and its biases zeros.
    fn layer(&mut self, c: &Config, l: usize) -> Result<Layer> {
        let attention = &super::attention_shape(c);
        let (hidden, ffn, heads) = (c.hidden_size, c.intermediate_size, c.num_attention_heads * pad(c.head_dim));
        let label = |what: &str| format!("layer {l}'s {what}");
        let gains = match attention.qk_norm {
            None => 0,
            Some(HeadNorm::Projection) => attention.query_row() + attention.kv_row(),
            Some(_) => 2 * c.head_dim,
        };
        let (design, mut added) = (&c.design, vec![1f32; gains]);
        added.resize(gains + if design.attention_bias { attention.projection_row() } else { 0 }, 0.0);
        let inner = ffn * if design.mlp.gate.is_some() { 2 } else { 1 };
        let zeros = |what: &str, width: usize| {
            let any = design.mlp.bias.then(|| Tensor::vector(self.device, &label(what), &vec![0f32; width]));
            any.transpose()
        };
        let (gate_up_bias, down_bias) = (zeros("gate and up bias", inner)?, zeros("down bias", hidden)?);
        let norm = |name: Option<&'static str>| name.map(|name| self.norm(&label(name), hidden)).transpose();
        let [attention_norm, after_attention, mlp_norm, after_mlp] =
            [design.norms.attention, design.norms.after_attention, design.norms.mlp, design.norms.after_mlp].map(norm);
        Ok(Layer {
            attention_norm: attention_norm?,
            after_attention: after_attention?,
            projection: self.matrix(&label("projection"), attention.projection_row(), hidden, hidden)?,
            added: if added.is_empty() { None } else { Some(self.device.upload(&label("norms and biases"), &added)?) },
            bias: design.attention_bias,
            value_groups: self.device.upload(&label("value groups"), &values::groups(attention, None, false).0)?,
            output: self.matrix(&label("output projection"), hidden, heads, heads)?,
            output_bias: None,
            mlp_norm: mlp_norm?,
            after_mlp: after_mlp?,
            head_sinks: None,
            feed_forward: FeedForward::Mlp(Box::new(MlpTensors {
                gate_up: self.matrix(&label("gate and up projection"), inner, hidden, hidden)?,
                gate_up_bias,
                down: self.matrix(&label("down projection"), hidden, ffn, ffn)?,
                down_bias,
            })),
        })
    }
}

impl Model {
    /// A model of this shape with random weights of a type, whose embeddings have variance 1.
    ///
    /// Matrices whose rows are not whole groups are f16. Dense:
    /// [`random_sequence`](Self::random_sequence) brings rows. Widths are multiples of 4.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] where the device is too small, and [`crate::Error::Gpu`].
    pub fn random(config: &Config, weights: WeightType, device: Arc<Device>, seed: u64) -> Result<Model> {
        let mut weights = Weights::new(&device, weights, seed)?;
        let layers = (0..config.num_hidden_layers).map(|l| weights.layer(config, l)).collect::<Result<_>>()?;
        let mut table = |label: &str, summed| weights.matrix(label, config.vocab_size, config.hidden_size, summed);
        let ends = Ends {
            embedding: table("embedding", 1)?,
            head: if config.tie_word_embeddings { None } else { Some(table("head", config.hidden_size)?) },
            final_norm: weights.norm("final norm", config.hidden_size)?,
        };
        device.wait()?;
        Ok(Model { config: config.clone(), layers, ends, coded: None, device, executor: Executor::new() })
    }

    /// A sequence whose cache is full of random `rows`, or exact ones.
    ///
    /// [`GpuSequence::go_to`] says how many of them it has.
    ///
    /// # Errors
    /// As [`sequence`](Self::sequence), and [`crate::Error::Numeric`] where a basis does not fit 16
    /// bits.
    pub fn random_sequence(self: &Arc<Self>, rows: Option<&LatentSet>, options: SequenceOptions, seed: u64) -> Result<GpuSequence> {
        let coded = rows.map(|rows| Latents::load(&self.device, &self.config, rows)).transpose()?.map(Arc::new);
        let sequence = GpuSequence::new(self.clone(), coded, options)?;
        sequence.fill(seed)?;
        Ok(sequence)
    }
}

impl GpuSequence {
    /// Random rows for as many tokens as there is room for.
    fn fill(&self, seed: u64) -> Result<()> {
        let (device, c) = (&self.model.device, &self.model.config);
        let mut random = Random::new(seed);
        let mut gaussians = |count: usize| (0..count).map(|_| random.gaussian() as f32).collect::<Vec<f32>>();
        let (padded, heads) = (pad(c.head_dim), c.num_key_value_heads);
        for layer in &self.cache.layers {
            for buffer in [&layer.keys, &layer.values] {
                let mut numbers: Vec<f16> = gaussians(TOKENS * heads * padded).into_iter().map(f16::from_f32).collect();
                numbers.chunks_exact_mut(padded).for_each(|head| head[c.head_dim..].fill(f16::ZERO));
                repeat(device, &device.upload("random rows", &numbers)?, buffer)?;
            }
        }
        let (specs, layout) = self.rows.as_ref().map_or((&[][..], &[][..]), |rows| (&rows.specs, &rows.layout.places));
        for (index, store) in self.cache.stores.iter().enumerate() {
            let width = self.rows.as_ref().map_or(0, |rows| rows.layout.stores[index]);
            let mut words = vec![0u32; TOKENS * width];
            for (spec, place) in specs.iter().zip(layout).filter(|(_, place)| place.store == index) {
                for row in words.chunks_exact_mut(width) {
                    spec.format.encode(&gaussians(spec.format.rank()), &mut row[place.word..][..spec.format.words()]);
                }
            }
            repeat(device, &device.upload("random rows", &words)?, store)?;
        }
        let each = Selection::format(c.head_dim).words();
        for landmarks in &self.cache.landmarks {
            let mut words = vec![0u32; TOKENS * heads * each];
            words.chunks_exact_mut(each).for_each(|words| Selection::pack(&gaussians(c.head_dim), words));
            repeat(device, &device.upload("random landmarks", &words)?, &landmarks.words)?;
        }
        device.wait()
    }

    /// Goes on as if the first `position` tokens had gone through the model.
    ///
    /// There has to be room for them; they have left what the cache holds.
    pub fn go_to(&mut self, position: usize) {
        let done = self.exact().map_or(0, |exact| exact.coded(position));
        self.cursor.resume(position, done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Design, QkNorm, Rope};
    use crate::compress::rotated;
    use crate::gpu::{Options, Quantised};
    use crate::kv::{CacheMethod, Exact, Read};
    use crate::sequence::{Logits, Sequence};

    #[test]
    fn a_random_model_decodes_at_any_depth() {
        let device = Device::open(&Options::default()).unwrap();
        let q4 = WeightType::Quantised(Quantised::Q4);
        for (weights, qk_norm, bias, tied) in [(WeightType::F16, false, false, true), (q4, true, true, false)] {
            let heads =
                Config { hidden_size: 192, num_attention_heads: 6, num_key_value_heads: 3, head_dim: 32, vocab_size: 1000, ..Config::example() };
            let rope = vec![Rope::new(1e4, heads.head_dim)];
            let design = Design { attention_bias: bias, qk_norm: qk_norm.then_some(QkNorm::HEADS), ..Design::llama(heads.head_dim) };
            let c = Config { design, ropes: rope, tie_word_embeddings: tied, ..heads };
            let model = Arc::new(Model::random(&c, weights, device.clone(), 1).unwrap());
            let rows = rotated(&c, 4, Exact::default());
            for (rows, select) in [(None, None), (Some(&rows), None), (Some(&rows), Some(16))] {
                let method = CacheMethod::Calibrated(Read::top(select));
                let mut sequence = model.random_sequence(rows, SequenceOptions { capacity: 500, method, ..SequenceOptions::default() }, 2).unwrap();
                let mut found = Vec::new();
                // Forwards and back.
                for depth in [0, 300, 450, 300] {
                    sequence.go_to(depth);
                    assert_eq!(sequence.position(), depth);
                    found.push(sequence.forward(&[5, 6, 7], Logits::Last).unwrap());
                    assert_eq!(sequence.position(), depth + 3);
                    sequence.step(9).unwrap();
                }
                let [a, b, c, d] = [0, 1, 2, 3].map(|i| &found[i]);
                assert!(a != b && b != c, "what is in the cache matters");
                // The ring of newest tokens has come round meanwhile where there is one.
                assert!(rows.is_some() || b == d, "what is in the cache stays");
                assert!(a.iter().any(|x| x.abs() > 0.1));
            }
        }
    }
}
