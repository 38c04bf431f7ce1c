//! The decoder on the CPU: what it computes does not depend on how it is asked.

mod common;

use common::rows::{coded, ways};
use common::{Random, SyntheticModel, families, nmse};
use lowkey::checkpoint::{Architecture, Checkpoint};
use lowkey::cpu::{self, LayerGradients, Model, Residuals, RowType};
use lowkey::kv::Exact;
use lowkey::sequence::{Logits, Sequence, SequenceOptions};
use lowkey::{Error, Result};
use nalgebra::DMatrix;
use std::collections::BTreeMap;
use std::sync::Arc;

fn load(model: &SyntheticModel) -> Arc<Model> {
    let directory = model.write_temporary();
    Arc::new(Model::load(&Checkpoint::open(directory.path()).unwrap()).unwrap())
}

/// A key or value of one token, moved in one dimension by `amount`, for the queries that do not see
/// it exactly.
struct Disturbance {
    layer: usize,
    side: Side,
    token: usize,
    dimension: usize,
    amount: f64,
    exact: Exact,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Side {
    Keys,
    Values,
}

/// The model once more, number by number in f64, straight from the tensors as they are stored:
/// `[tokens][vocab]`.
fn reference(model: &SyntheticModel, checkpoint: &Checkpoint, tokens: &[u32], disturbance: Option<&Disturbance>) -> Vec<f64> {
    let config = checkpoint.config();
    let stored = tensors_in_f64(checkpoint);
    let linear = |name: &str, x: &[f64]| -> Vec<f64> {
        let bias = stored.get(&format!("{name}.bias"));
        let rows = stored[&format!("{name}.weight")].chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>());
        rows.enumerate().map(|(i, y)| y + bias.map_or(0.0, |bias| bias[i])).collect()
    };
    let norm = |name: &str, x: &[f64]| -> Vec<f64> {
        let rms = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + f64::from(config.norm_eps)).sqrt();
        x.iter().zip(&stored[name]).map(|(x, w)| x / rms * w).collect()
    };
    let d = model.head_dim;
    let frequencies = config.rope_frequencies(0, tokens.len());
    // The heads of a query or key, each normalised where the family does, then rotated to its
    // position.
    let heads = |layer: &str, side: &str, x: &[f64], position: usize, moved: Option<&Disturbance>| -> Vec<Vec<f64>> {
        let mut heads: Vec<Vec<f64>> = linear(&format!("{layer}.{side}_proj"), x).chunks(d).map(<[f64]>::to_vec).collect();
        for (index, head) in heads.iter_mut().enumerate() {
            let shift = |head: &mut Vec<f64>, side: Side| {
                if let Some(moved) = moved.filter(|moved| moved.side == side && moved.dimension / d == index) {
                    head[moved.dimension % d] += moved.amount;
                }
            };
            let weight = format!("{layer}.{side}_norm.weight");
            if stored.contains_key(&weight) {
                *head = norm(&weight, head);
            }
            shift(head, Side::Keys);
            let old = head.clone();
            for i in 0..d / 2 {
                let (sine, cosine) = (position as f64 * frequencies[i]).sin_cos();
                head[i] = old[i] * cosine - old[i + d / 2] * sine;
                head[i + d / 2] = old[i + d / 2] * cosine + old[i] * sine;
            }
        }
        heads
    };
    let add = |x: &mut Vec<f64>, y: Vec<f64>| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    let table = &stored["model.embed_tokens.weight"];
    let mut stream: Vec<Vec<f64>> = tokens.iter().map(|&token| table[token as usize * model.hidden..][..model.hidden].to_vec()).collect();
    for layer in 0..model.layers {
        let name = format!("model.layers.{layer}");
        let attention = format!("{name}.self_attn");
        let inputs: Vec<_> = stream.iter().map(|x| norm(&format!("{name}.input_layernorm.weight"), x)).collect();
        let keys: Vec<_> = inputs.iter().enumerate().map(|(position, x)| heads(&attention, "k", x, position, None)).collect();
        let values: Vec<_> = inputs.iter().map(|x| linear(&format!("{attention}.v_proj"), x)).collect();
        let moved = disturbance.filter(|moved| moved.layer == layer);
        let moved_key = moved.map(|moved| heads(&attention, "k", &inputs[moved.token], moved.token, Some(moved)));
        let moved_value = moved.filter(|moved| moved.side == Side::Values).map(|moved| {
            let mut value = values[moved.token].clone();
            value[moved.dimension] += moved.amount;
            value
        });
        for (position, x) in inputs.iter().enumerate() {
            let sees = |t: usize| moved.is_some_and(|moved| t == moved.token && t >= moved.exact.sinks && position - t >= moved.exact.recent);
            let key = |t: usize| moved_key.as_ref().filter(|_| sees(t)).unwrap_or(&keys[t]);
            let value = |t: usize| moved_value.as_ref().filter(|_| sees(t)).unwrap_or(&values[t]);
            let mut sums = Vec::new();
            for (head, query) in heads(&attention, "q", x, position, None).iter().enumerate() {
                let kv_head = head * model.kv_heads / model.heads;
                let first = model.sliding_window.map_or(0, |window| (position + 1).saturating_sub(window));
                let score = |key: &Vec<f64>| (query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt()).exp();
                let weights: Vec<f64> = (first..=position).map(|t| score(&key(t)[kv_head])).collect();
                let total: f64 = weights.iter().sum();
                sums.extend((0..d).map(|i| (first..=position).map(|t| weights[t - first] * value(t)[kv_head * d + i]).sum::<f64>() / total));
            }
            add(&mut stream[position], linear(&format!("{attention}.o_proj"), &sums));
        }
        for x in &mut stream {
            let input = norm(&format!("{name}.post_attention_layernorm.weight"), x);
            let up = linear(&format!("{name}.mlp.up_proj"), &input);
            let gate = linear(&format!("{name}.mlp.gate_proj"), &input);
            let inner: Vec<f64> = gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
            add(x, linear(&format!("{name}.mlp.down_proj"), &inner));
        }
    }
    let head = if model.tied { "model.embed_tokens" } else { "lm_head" };
    stream.iter().flat_map(|x| linear(head, &norm("model.norm.weight", x))).collect()
}

fn tensors_in_f64(checkpoint: &Checkpoint) -> BTreeMap<String, Vec<f64>> {
    let read = |name: &str| checkpoint.f32(name, checkpoint.shape(name).unwrap()).unwrap().into_iter().map(f64::from).collect();
    checkpoint.tensor_names().map(|name| (name.to_string(), read(name))).collect()
}

#[test]
fn logits_are_those_of_the_formulas_number_by_number() {
    for (family, synthetic) in families() {
        let directory = synthetic.write_temporary();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let tokens = Random(8).tokens(37, synthetic.vocab);
        let model = Arc::new(Model::load(&checkpoint).unwrap());
        let logits = model.sequence(64, RowType::F32).unwrap().forward(&tokens, Logits::All).unwrap();
        let expected: Vec<f32> = reference(&synthetic, &checkpoint, &tokens, None).into_iter().map(|logit| logit as f32).collect();
        let error = nmse(&logits, &expected);
        assert!(error < 1e-10, "{family}: {error}");
    }
}

/// `−log p(label)` of `logits: [tokens][vocab]`, summed over the positions from `first` on.
fn loss(logits: &[f64], labels: &[u32], first: usize) -> f64 {
    let losses = logits.chunks(logits.len() / labels.len()).zip(labels).map(|(logits, &label)| {
        let highest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        highest + logits.iter().map(|logit| (logit - highest).exp()).sum::<f64>().ln() - logits[label as usize]
    });
    losses.skip(first).sum()
}

/// Gradients of `−log p(label)`, summed over the positions from `first` on, by layer.
fn gradients(model: &Arc<Model>, tokens: &[u32], labels: &[u32], first: usize, exact: Exact) -> Vec<LayerGradients> {
    let mut kept = Residuals::new(model.config(), tokens.len());
    model.sequence(tokens.len(), RowType::F32).unwrap().observe(tokens, Logits::None, &mut kept).unwrap();
    let loss = |position: usize, logits: &mut [f32]| {
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total: f32 = logits.iter().map(|logit| (logit - highest).exp()).sum();
        logits.iter_mut().for_each(|logit| *logit = (*logit - highest).exp() / total);
        logits[labels[position] as usize] -= 1.0;
    };
    let mut found = Vec::new();
    let mut visit = |layer, gradients| {
        found.insert(0, gradients);
        assert_eq!(layer + found.len(), model.config().num_hidden_layers);
        Ok(())
    };
    model.backward(&kept, first, &loss, exact, &mut visit).unwrap();
    found
}

#[test]
fn gradients_are_the_differences_of_the_loss_through_the_queries_that_count() {
    for (family, synthetic) in families() {
        for exact in [Exact { sinks: 0, recent: 0 }, Exact { sinks: 3, recent: 9 }] {
            // An exact sink, the first that is not, one whose only far queries are the last, one
            // whose queries are all near, one at random.
            differences(family, &synthetic, exact, (21, 47), &[2, 3, 37, 38, 4 + Random(18).below(30)]);
        }
    }
}

/// More queries than are gone through at once, with a sliding window and without.
#[test]
fn gradients_of_long_windows_are_those_differences_too() {
    for architecture in [Architecture::Llama, Architecture::Mistral] {
        let narrow = SyntheticModel { layers: 1, vocab: 40, ffn: 16, ..SyntheticModel::default() };
        let synthetic = SyntheticModel { architecture, sliding_window: (architecture == Architecture::Mistral).then_some(70), ..narrow };
        differences("long", &synthetic, Exact { sinks: 3, recent: 9 }, (250, 280), &[2, 3, 240, 249, 255, 257]);
    }
}

/// Holds gradients of keys and values of some tokens to differences of the loss of the positions
/// `first..length`.
fn differences(family: &str, synthetic: &SyntheticModel, exact: Exact, (first, length): (usize, usize), probes: &[usize]) {
    let directory = synthetic.write_temporary();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let mut random = Random(16);
    let [tokens, labels] = [0; 2].map(|_| random.tokens(length, synthetic.vocab));
    let model = Arc::new(Model::load(&checkpoint).unwrap());
    let disturbed_loss = |disturbance: &Disturbance| loss(&reference(synthetic, &checkpoint, &tokens, Some(disturbance)), &labels, first);
    let found = gradients(&model, &tokens, &labels, first, exact);
    for side in [Side::Keys, Side::Values] {
        for (layer, gradients) in found.iter().enumerate() {
            let matrix = match side {
                Side::Keys => &gradients.keys,
                Side::Values => &gradients.values,
            };
            let typical = matrix.norm() / (matrix.len() as f32).sqrt();
            assert!(typical > 1e-4, "{family}: {side:?} of layer {layer} hardly matter: {typical}");
            for &token in probes {
                let dimension = random.below(matrix.nrows());
                let mut disturbance = Disturbance { layer, side, token, dimension, amount: 1e-4, exact };
                let above = disturbed_loss(&disturbance);
                disturbance.amount = -1e-4;
                let difference = (above - disturbed_loss(&disturbance)) / 2e-4;
                let gradient = matrix[(dimension, token)];
                let what = format!("{family}, {exact:?}, {side:?} of layer {layer}, token {token}, dimension {dimension}");
                assert!((f64::from(gradient) - difference).abs() < 1e-3 * f64::from(typical), "{what}: {gradient} against {difference}");
                if token < exact.sinks || token + exact.recent >= length {
                    assert_eq!(gradient, 0.0, "{what}");
                }
            }
        }
    }
}

#[test]
fn gradients_of_weights_are_differences_of_the_loss() {
    let (length, first) = (30, 11);
    for (family, synthetic) in families() {
        let synthetic = SyntheticModel { dtype: safetensors::Dtype::F32, ..synthetic };
        let mut random = Random(17);
        let [tokens, labels] = [0; 2].map(|_| random.tokens(length, synthetic.vocab));
        let directory = synthetic.write_temporary();
        let open = || Checkpoint::open(directory.path()).unwrap();
        let found = gradients(&Arc::new(Model::load(&open()).unwrap()), &tokens, &labels, first, Exact { sinks: 4, recent: 10 });
        for (part, matrix) in [("k_proj", &found[1].key_weight), ("v_proj", &found[1].value_weight)] {
            let name = format!("model.layers.1.self_attn.{part}.weight");
            let typical = f64::from(matrix.norm() / (matrix.len() as f32).sqrt());
            for _ in 0..3 {
                let (input, output) = (random.below(matrix.nrows()), random.below(matrix.ncols()));
                let [(above, high), (below, low)] = [1.0, -1.0].map(|sign| {
                    let mut tensors = synthetic.tensors();
                    let weight = &mut tensors.get_mut(&name).unwrap().numbers[output * synthetic.hidden + input];
                    *weight += sign * 1e-3;
                    let moved = f64::from(*weight);
                    common::write_tensors(&directory.path().join("model.safetensors"), &tensors, synthetic.dtype);
                    (loss(&reference(&synthetic, &open(), &tokens, None), &labels, first), moved)
                });
                let (gradient, difference) = (f64::from(matrix[(input, output)]), (above - below) / (high - low));
                assert!((gradient - difference).abs() < 1e-3 * typical, "{family}, {part}: {gradient} against {difference}, typically {typical}");
            }
        }
    }
}

#[test]
fn a_disturbed_window_is_that_of_the_formulas() {
    for (family, synthetic) in families() {
        let directory = synthetic.write_temporary();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let model = Arc::new(Model::load(&checkpoint).unwrap());
        let tokens = Random(18).tokens(41, synthetic.vocab);
        let mut kept = Residuals::new(model.config(), tokens.len());
        model.sequence(tokens.len(), RowType::F32).unwrap().observe(&tokens, Logits::None, &mut kept).unwrap();
        let exact = Exact { sinks: 2, recent: 7 };
        for (layer, token, dimension) in [(0, 20, 3), (1, 2, 7), (2, 1, 5), (2, 34, 1)] {
            for side in [Side::Keys, Side::Values] {
                let mut noise = DMatrix::zeros(synthetic.kv_heads * synthetic.head_dim, tokens.len());
                noise[(dimension, token)] = 0.75;
                let disturbance = if side == Side::Keys { cpu::Disturbance::Keys(&noise) } else { cpu::Disturbance::Values(&noise) };
                let found = model.head(&model.disturbed(&kept, layer, disturbance, exact).unwrap());
                let moved = Disturbance { layer, side, token, dimension, amount: 0.75, exact };
                let [expected, undisturbed] = [Some(&moved), None]
                    .map(|moved| reference(&synthetic, &checkpoint, &tokens, moved).into_iter().map(|logit| logit as f32).collect::<Vec<_>>());
                assert!(nmse(found.as_slice(), &expected) < 1e-10, "{family}, {side:?} of layer {layer}");
                assert_eq!(expected != undisturbed, token >= 2 && token + 7 < tokens.len(), "{family}, {side:?} of layer {layer}");
            }
        }
    }
}

#[test]
fn chunks_steps_and_one_pass_give_the_same_logits() {
    for (family, synthetic) in families() {
        let model = load(&synthetic);
        // More than one chunk, more than any window, no round number.
        let tokens = Random(9).tokens(301, synthetic.vocab);
        let whole = model.sequence(400, RowType::F32).unwrap().forward(&tokens, Logits::All).unwrap();
        assert_eq!(whole.len(), tokens.len() * synthetic.vocab);

        let mut parts = model.sequence(400, RowType::F32).unwrap();
        let mut pieced = Vec::new();
        for part in [1, 7, 1, 64, 2, 150, 76].iter().scan(0, |end, length| {
            *end += length;
            Some(*end - length..*end)
        }) {
            pieced.extend(parts.forward(&tokens[part], Logits::All).unwrap());
        }
        assert_eq!(parts.position(), tokens.len());
        assert!(nmse(&pieced, &whole) < 1e-9, "{family}: {}", nmse(&pieced, &whole));

        let mut last = model.sequence(400, RowType::F32).unwrap();
        assert!(last.forward(&tokens[..300], Logits::None).unwrap().is_empty());
        let best = last.step(tokens[300]).unwrap() as usize;
        let expected = &whole[300 * synthetic.vocab..];
        assert!(expected.iter().all(|&logit| logit <= expected[best] + 1e-4), "{family}");
        last.truncate(300);
        assert!(nmse(&last.forward(&tokens[300..], Logits::Last).unwrap(), expected) < 1e-9, "{family}");
    }
}

/// Few queries read coded rows as coordinates, many read what is rebuilt of them: the same.
#[test]
fn coded_rows_are_read_alike_by_few_and_by_many() {
    for (family, synthetic) in families() {
        let directory = synthetic.write_temporary();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let tokens = Random(10).tokens(150, synthetic.vocab);
        let exact = Exact { sinks: 4, recent: 8 };
        // Rows over several layers are coded when the last of these has been read: who reads them
        // depends on who comes along.
        for (way, specs) in ways(checkpoint.config()).into_iter().filter(|(_, specs)| specs.iter().all(|spec| spec.layers == 1)) {
            let model = Arc::new(Model::with_latents(&checkpoint, Some(coded(&checkpoint, specs, exact))).unwrap());
            let options = SequenceOptions { capacity: 150, strict: true, exact: Some(exact), ..SequenceOptions::default() };
            let mut many = model.sequence(options, RowType::F32).unwrap();
            many.forward(&tokens[..120], Logits::None).unwrap();
            let expected = many.forward(&tokens[120..], Logits::All).unwrap();
            let mut few = model.sequence(options, RowType::F32).unwrap();
            few.forward(&tokens[..120], Logits::None).unwrap();
            let found: Vec<f32> = [120..128, 128..129, 129..132, 132..140, 140..147, 147..150]
                .into_iter()
                .flat_map(|part| few.forward(&tokens[part], Logits::All).unwrap())
                .collect();
            assert!(nmse(&found, &expected) < 1e-9, "{family}, {way}: {}", nmse(&found, &expected));
        }
    }
}

#[test]
fn a_truncated_sequence_continues_as_a_fresh_one() {
    for (family, synthetic) in families() {
        let model = load(&synthetic);
        let tokens = Random(10).tokens(90, synthetic.vocab);
        let mut used = model.sequence(128, RowType::F16).unwrap();
        used.forward(&Random(11).tokens(120, synthetic.vocab), Logits::None).unwrap();
        used.truncate(500);
        assert_eq!(used.position(), 120);
        used.truncate(0);
        used.forward(&tokens[..40], Logits::None).unwrap();
        used.forward(&Random(12).tokens(60, synthetic.vocab), Logits::None).unwrap();
        used.truncate(40);
        assert_eq!(used.position(), 40);
        let continued = used.forward(&tokens[40..], Logits::All).unwrap();

        let mut fresh = model.sequence(128, RowType::F16).unwrap();
        fresh.forward(&tokens[..40], Logits::None).unwrap();
        assert_eq!(continued, fresh.forward(&tokens[40..], Logits::All).unwrap(), "{family}");
    }
}

#[test]
fn f16_rows_are_close_to_f32_rows_and_half_their_size() {
    for (family, synthetic) in families() {
        let model = load(&synthetic);
        let tokens = Random(13).tokens(70, synthetic.vocab);
        let [(half, half_memory), (full, full_memory)] = [RowType::F16, RowType::F32].map(|row_type| {
            let mut sequence = model.sequence(70, row_type).unwrap();
            (sequence.forward(&tokens, Logits::All).unwrap(), sequence.memory())
        });
        let error = nmse(&half, &full);
        assert!(error > 0.0 && error < 1e-5, "{family}: {error}");
        assert_eq!(2 * half_memory.allocated_bytes, full_memory.allocated_bytes);
    }
}

#[test]
fn memory_is_what_is_allocated() {
    let synthetic = SyntheticModel::default();
    let model = load(&synthetic);
    for asked in [1, 64, 65, 1000] {
        let sequence = model.sequence(asked, RowType::F16).unwrap();
        let memory = sequence.memory();
        assert_eq!(sequence.capacity(), asked);
        assert_eq!(memory.kv_bytes_per_token, model.config().dense_kv_bytes_per_token());
        assert_eq!(memory.allocated_bytes, memory.kv_bytes_per_token * sequence.capacity() as u64 + memory.kv_fixed_bytes);
    }
    for impossible in [0, usize::MAX, usize::MAX / 64] {
        assert!(matches!(model.sequence(impossible, RowType::F16), Err(Error::Argument { .. })), "{impossible}");
    }
}

#[test]
fn only_tokens_in_the_window_are_seen() {
    let (_, synthetic) = families().into_iter().find(|(family, _)| *family == "mistral").unwrap();
    let window = synthetic.sliding_window.unwrap();
    // With one layer, what lies outside the window of the last token cannot reach it.
    let model = load(&SyntheticModel { layers: 1, ..synthetic.clone() });
    let last = |tokens: &[u32]| model.sequence(64, RowType::F32).unwrap().forward(tokens, Logits::Last).unwrap();
    let mut tokens = Random(14).tokens(60, synthetic.vocab);
    let before = last(&tokens);
    tokens[60 - window - 1] ^= 1;
    assert!(nmse(&last(&tokens), &before) == 0.0);
    tokens[60 - window] ^= 1;
    assert!(nmse(&last(&tokens), &before) > 1e-8);
}

#[test]
fn what_cannot_be_run_is_refused_and_changes_nothing() -> Result<()> {
    let synthetic = SyntheticModel::default();
    let model = load(&synthetic);
    let mut sequence = model.sequence(64, RowType::F16)?;
    sequence.forward(&[1, 2, 3], Logits::None)?;
    let full = Random(15).tokens(62, synthetic.vocab);
    assert!(matches!(sequence.forward(&full, Logits::All), Err(Error::Context { needed: 65, capacity: 64 })));
    assert!(matches!(sequence.step(synthetic.vocab as u32), Err(Error::Argument { .. })));
    assert!(matches!(sequence.forward(&[], Logits::Last), Err(Error::Argument { .. })));
    assert!(sequence.forward(&[], Logits::All)?.is_empty());
    assert_eq!(sequence.position(), 3);
    sequence.forward(&full[..61], Logits::Last)?;
    assert!(matches!(sequence.step(1), Err(Error::Context { .. })));
    Ok(())
}

#[test]
fn an_overflow_is_an_error_that_names_the_position() {
    let synthetic = SyntheticModel { dtype: safetensors::Dtype::F32, ..SyntheticModel::default() };
    let directory = synthetic.write_temporary();
    let mut tensors = synthetic.tensors();
    tensors.get_mut("model.norm.weight").unwrap().numbers.fill(3e38);
    common::write_tensors(&directory.path().join("model.safetensors"), &tensors, safetensors::Dtype::F32);
    let model = Arc::new(Model::load(&Checkpoint::open(directory.path()).unwrap()).unwrap());
    let message = model.sequence(8, RowType::F32).unwrap().forward(&[5, 6], Logits::Last).unwrap_err().to_string();
    assert!(message.contains("position 1"), "{message}");
}
