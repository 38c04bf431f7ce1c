//! What is promised of reading checkpoints: every number comes back, in every encoding, from one
//! file or several.

mod common;

use common::gguf::{Encoded, Gguf, Meta};
use common::{SyntheticModel, Tensors, families, write_tensors};
use half::{bf16, f16};
use lowkey::checkpoint::{Architecture, Checkpoint, Config, Message, Rope, RopeScaling};
use safetensors::Dtype;
use serde_json::json;

#[test]
fn every_family_comes_back_as_it_was_written() {
    for (name, model) in families() {
        let directory = model.write_temporary();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        let config = checkpoint.config();
        assert_eq!(config.architecture, model.architecture, "{name}");
        assert_eq!(
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim),
            (model.heads, model.kv_heads, model.head_dim),
            "{name}"
        );
        assert_eq!(config.design.attention_bias, model.architecture == Architecture::Qwen2, "{name}");
        assert_eq!(config.design.qk_norm.is_some(), model.architecture == Architecture::Qwen3, "{name}");
        assert!(config.layers.len() == model.layers && config.layers.iter().all(|layer| layer.window == model.sliding_window), "{name}");
        assert_eq!(config.tie_word_embeddings, model.tied, "{name}");
        let tensors = model.tensors();
        assert!(checkpoint.tensor_names().eq(tensors.keys().map(String::as_str)), "{name}");
        for (tensor, expected) in &tensors {
            assert_eq!(checkpoint.shape(tensor), Some(&expected.shape[..]));
            let halves: Vec<f16> = expected.numbers.iter().map(|x| f16::from_f32(*x)).collect();
            assert_eq!(checkpoint.f16(tensor, &expected.shape).unwrap(), halves, "{name} {tensor}");
            let floats: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
            assert_eq!(checkpoint.f32(tensor, &expected.shape).unwrap(), floats, "{name} {tensor}");
        }
    }
}

#[test]
fn f32_is_exact_in_f32_and_bf16() {
    for (dtype, stored) in [(Dtype::F32, (|x| x) as fn(f32) -> f32), (Dtype::BF16, |x| bf16::from_f32(x).to_f32())] {
        let model = SyntheticModel { dtype, ..Default::default() };
        let directory = model.write_temporary();
        let checkpoint = Checkpoint::open(directory.path()).unwrap();
        for (name, tensor) in model.tensors() {
            let expected: Vec<f32> = tensor.numbers.iter().map(|x| stored(*x)).collect();
            assert_eq!(checkpoint.f32(&name, &tensor.shape).unwrap(), expected, "{dtype:?} {name}");
            let halves: Vec<f16> = expected.iter().map(|x| f16::from_f32(*x)).collect();
            assert_eq!(checkpoint.f16(&name, &tensor.shape).unwrap(), halves, "{dtype:?} {name}");
        }
    }
}

#[test]
fn shards_are_read_as_one() {
    let model = SyntheticModel::default();
    let directory = model.write_temporary();
    let path = directory.path();
    std::fs::remove_file(path.join("model.safetensors")).unwrap();
    let mut parts = [Tensors::new(), Tensors::new(), Tensors::new()];
    let mut map = serde_json::Map::new();
    for (index, (name, tensor)) in model.tensors().into_iter().enumerate() {
        map.insert(name.clone(), json!(format!("model-{}.safetensors", index % 3)));
        parts[index % 3].insert(name, tensor);
    }
    for (index, part) in parts.iter().enumerate() {
        write_tensors(&path.join(format!("model-{index}.safetensors")), part, Dtype::F16);
    }
    std::fs::write(path.join("model.safetensors.index.json"), json!({ "metadata": {}, "weight_map": map }).to_string()).unwrap();
    let checkpoint = Checkpoint::open(path).unwrap();
    assert_eq!(checkpoint.weight_files().count(), 3);
    for (name, tensor) in model.tensors() {
        let expected: Vec<f16> = tensor.numbers.iter().map(|x| f16::from_f32(*x)).collect();
        assert_eq!(checkpoint.f16(&name, &tensor.shape).unwrap(), expected);
    }
}

#[test]
fn config_survives_writing_and_reading() {
    for (name, model) in families() {
        let directory = model.write_temporary();
        let path = directory.path().join("model.gguf");
        SyntheticModel { rope_scaling: json!(null), ..model }.gguf().write(&path);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let again = Config::from_json(checkpoint.config_json(), directory.path()).unwrap();
        assert_eq!(&again, checkpoint.config(), "{name}");
    }
}

#[test]
fn rope_is_read_in_both_spellings() {
    let model = SyntheticModel::default();
    let read = |edit: &dyn Fn(&mut serde_json::Value)| {
        let mut config = model.config();
        edit(&mut config);
        Config::from_json(&config, "config.json".as_ref()).unwrap()
    };
    let older = read(&|c| {
        c["rope_theta"] = json!(5e5);
        c["rope_scaling"] = json!({ "type": "linear", "factor": 4 });
    });
    let newer = read(&|c| {
        c["rope_theta"] = json!(null);
        c["rope_parameters"] = json!({ "rope_theta": 5e5, "rope_type": "linear", "factor": 4.0 });
    });
    assert_eq!(older.ropes[0].scaling, RopeScaling::Linear { factor: 4.0 });
    assert_eq!((older.ropes[0].theta, older.ropes), (5e5, newer.ropes));
}

#[test]
fn a_window_counts_only_where_it_is_switched_on() {
    let read = |architecture, edit: serde_json::Value| {
        let mut config = SyntheticModel { architecture, sliding_window: Some(64), ..Default::default() }.config();
        edit.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        Config::from_json(&config, "config.json".as_ref()).map(|config| config.layers.iter().map(|layer| layer.window).collect::<Vec<_>>())
    };
    assert_eq!(read(Architecture::Mistral, json!({})).unwrap(), [Some(64); 3]);
    assert_eq!(read(Architecture::Qwen2, json!({})).unwrap(), [None; 3]);
    assert_eq!(read(Architecture::Qwen2, json!({ "use_sliding_window": true, "max_window_layers": 0 })).unwrap(), [Some(64); 3]);
    assert_eq!(read(Architecture::Qwen2, json!({ "use_sliding_window": true, "max_window_layers": 3 })).unwrap(), [None; 3]);
    assert_eq!(read(Architecture::Qwen2, json!({ "use_sliding_window": true, "max_window_layers": 1 })).unwrap(), [None, Some(64), Some(64)]);
    let other = json!({ "use_sliding_window": true, "layer_types": ["full_attention", "linear_attention", "full_attention"] });
    let refused = read(Architecture::Qwen2, other).unwrap_err();
    assert!(refused.kind() == "unsupported" && refused.to_string().contains("linear_attention"), "{refused}");
}

#[test]
fn gguf_is_the_same_model_as_safetensors() {
    for (name, model) in families() {
        let model = SyntheticModel { rope_scaling: json!(null), ..model };
        let directory = model.write_temporary();
        let path = directory.path().join("model.gguf");
        model.gguf().write(&path);
        let (expected, found) = (Checkpoint::open(directory.path()).unwrap(), Checkpoint::open(&path).unwrap());
        assert_eq!(found.config(), expected.config(), "{name}");
        assert!(found.tensor_names().eq(expected.tensor_names()), "{name}");
        for tensor in expected.tensor_names() {
            let shape = expected.shape(tensor).unwrap();
            assert_eq!(found.f16(tensor, shape).unwrap(), expected.f16(tensor, shape).unwrap(), "{name} {tensor}");
        }
    }
}

#[test]
fn quantised_numbers_are_their_rounding_to_f16() {
    let model = SyntheticModel { hidden: 64, ..Default::default() };
    let mut file = model.gguf();
    let name = "blk.0.attn_v.weight";
    let (rows, width) = (model.kv_heads * model.head_dim, model.hidden);
    // Q4_1 with minimum 1 and a scale that is no power of two: sums need more bits than f16 has.
    let (scale, minimum) = (f16::from_f32(0.0123), f16::from_f32(1.0));
    let block: Vec<u8> = scale.to_le_bytes().into_iter().chain(minimum.to_le_bytes()).chain((0..16).map(|i| i | (15 - i) << 4)).collect();
    let bytes = block.repeat(rows * width / 32);
    let tensor = file.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap();
    *tensor = Encoded { kind: 3, bytes, ..tensor.clone() };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    file.write(&path);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let (name, shape) = ("model.layers.0.self_attn.v_proj.weight", [rows, width]);
    assert_eq!(checkpoint.dtype(name), Some("Q4_1"));
    let halves = checkpoint.f16(name, &shape).unwrap();
    let floats = checkpoint.f32(name, &shape).unwrap();
    assert_eq!(halves[3], f16::from_f32(3.0 * scale.to_f32() + 1.0));
    assert_eq!(halves[16], f16::from_f32(15.0 * scale.to_f32() + 1.0));
    assert!(halves.iter().zip(&floats).all(|(h, f)| h.to_f32() == *f));
}

#[test]
fn llama_3_frequencies_are_recognised_in_gguf() {
    let mut model = SyntheticModel { head_dim: 32, heads: 4, kv_heads: 2, hidden: 64, ..Default::default() };
    model.rope_scaling =
        json!({ "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192 });
    let config = Config::from_json(&model.config(), "config.json".as_ref()).unwrap();
    let plain = Rope::new(1e4, 32);
    let divisors =
        plain.frequencies(32, 1).iter().zip(config.rope_frequencies(0, 1)).map(|(plain, scaled)| (plain / scaled) as f32).collect::<Vec<_>>();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let write = |divisors: &[f32]| {
        let mut file = model.gguf();
        let bytes = divisors.iter().flat_map(|x| x.to_le_bytes()).collect();
        file.tensors.push(Encoded { name: "rope_freqs.weight".into(), dimensions: vec![16], kind: 0, bytes });
        file.write(&path);
        Checkpoint::open(&path)
    };
    assert_eq!(write(&divisors).unwrap().config().ropes, config.ropes);
    let other: Vec<f32> = (0..16).map(|i| 1.0 + i as f32).collect();
    let refused = write(&other).err().unwrap().to_string();
    assert!(refused.contains("rope_freqs.weight"), "{refused}");
}

#[test]
fn both_kinds_of_file_give_the_same_tokens() {
    let model = SyntheticModel::default();
    let directory = model.write_temporary();
    let path = directory.path().join("model.gguf");
    model.gguf().write(&path);
    let (a, b) = (Checkpoint::open(directory.path()).unwrap(), Checkpoint::open(&path).unwrap());
    let (a, b) = (a.tokenizer().unwrap(), b.tokenizer().unwrap());
    for text in ["", "the thing and another", "  spaces  and\nlines\n\n", "naïve 東京 🦀 'll", "<|im_start|>user\nhi<|im_end|>", "12345.678"] {
        let tokens = a.encode(text, true).unwrap();
        assert_eq!(tokens, b.encode(text, true).unwrap(), "{text}");
        let visible = text.replace("<|im_start|>", "").replace("<|im_end|>", "");
        assert_eq!(a.decode(&tokens).unwrap(), visible);
        assert_eq!(b.decode(&tokens).unwrap(), visible);
    }
    assert_eq!(a.bos(), Some(common::BOS));
    // The config names the end of a turn, the vocabulary the end of a text.
    assert_eq!((a.eos_ids(), b.eos_ids()), (&[2, 0][..], &[2, 0][..]));
}

/// A SentencePiece vocabulary: special tokens, bytes, characters and words with falling scores.
fn sentence_piece(file: &mut Gguf) {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    let words = ["▁", "o", "n", "c", "e", "u", "p", "on", "ce", "once", "▁once", "up", "▁up", "upon", "▁upon", "▁u", "▁o"];
    tokens.extend(words.map(String::from));
    let kinds = (0..tokens.len()).map(|id| [2, 3, 3].get(id).copied().unwrap_or(if id < 259 { 6 } else { 1 })).collect();
    let scores = (0..tokens.len()).map(|id| if id < 259 { 0.0 } else { 259.0 - id as f32 }).collect();
    file.set("tokenizer.ggml.model", Meta::Text("llama".into()));
    file.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
    file.set("tokenizer.ggml.token_type", Meta::Integers(kinds));
    file.set("tokenizer.ggml.scores", Meta::Floats(scores));
    file.set("tokenizer.ggml.bos_token_id", Meta::U32(1));
    file.set("tokenizer.ggml.eos_token_id", Meta::U32(2));
}

#[test]
fn sentence_piece_merges_the_best_piece_first_and_falls_back_to_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let mut file = SyntheticModel::default().gguf();
    sentence_piece(&mut file);
    file.write(&path);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let pieces =
        |text: &str, special: bool| tokenizer.encode(text, special).unwrap().into_iter().map(|id| tokenizer.token(id).unwrap()).collect::<Vec<_>>();
    assert_eq!(pieces("once upon", true), ["<s>", "▁once", "▁upon"]);
    assert_eq!(pieces("upe", false), ["▁up", "e"]);
    assert_eq!(pieces("né", false), ["▁", "n", "<0xC3>", "<0xA9>"]);
    for text in ["once upon", "né 東 up", " two  spaces"] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text, true).unwrap()).unwrap(), text);
    }
    assert_eq!(tokenizer.bos(), Some(1));
    assert_eq!(tokenizer.eos_ids(), [2]);
}

#[test]
fn streamed_pieces_join_to_the_whole_text_and_are_whole_characters() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let mut file = SyntheticModel::default().gguf();
    let byte_level = {
        file.write(&path);
        Checkpoint::open(&path).unwrap().tokenizer().unwrap()
    };
    sentence_piece(&mut file);
    file.write(&path);
    let sentence_piece = Checkpoint::open(&path).unwrap().tokenizer().unwrap();
    for (kind, tokenizer) in [("byte-level", byte_level), ("SentencePiece", sentence_piece)] {
        for text in ["once upon once", "é", "日本語 and 🦀🦀 on", "年年年年年年年年年年 up", " up", "on\u{FFFD}on", "e\u{301}"] {
            let tokens = tokenizer.encode(text, true).unwrap();
            for start in 0..tokens.len() {
                let before = tokenizer.decode(&tokens[..start]).unwrap();
                if !text.starts_with(&before) {
                    continue; // Within a character.
                }
                let mut stream = tokenizer.stream(&tokens[..start]).unwrap();
                let pieces: Vec<String> = tokens[start..].iter().map(|token| stream.push(*token).unwrap()).collect();
                let rest = stream.finish().unwrap();
                assert_eq!(format!("{before}{}{rest}", pieces.concat()), text, "{kind} from {start}");
                assert!(text.contains('\u{FFFD}') || pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{kind} {pieces:?}");
            }
        }
        // The first two bytes of a character of three, and nothing more.
        let mut tokens = tokenizer.encode("日", false).unwrap();
        tokens.pop();
        let mut stream = tokenizer.stream(&[]).unwrap();
        assert!(tokens.iter().all(|token| stream.push(*token).unwrap().trim().is_empty()), "{kind}");
        assert!(stream.finish().unwrap().contains('\u{FFFD}'), "{kind}");
    }
}

#[test]
fn chat_templates_render_as_the_model_was_trained() {
    let directory = SyntheticModel::default().write_temporary();
    let settings = directory.path().join("tokenizer_config.json");
    let turns = [Message::new("system", "Be <b>brief</b>."), Message::new("user", "Hi")];
    let render = |template: serde_json::Value| {
        let value = json!({ "bos_token": { "content": "<s>" }, "eos_token": "</s>", "chat_template": template });
        std::fs::write(&settings, value.to_string()).unwrap();
        Checkpoint::open(directory.path()).unwrap().chat_template().and_then(|template| template.render(&turns, true))
    };
    let chat_ml = "<|im_start|>system\nBe <b>brief</b>.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(render(json!(common::TEMPLATE)).unwrap(), chat_ml);
    assert_eq!(render(json!([{ "name": "tool_use", "template": "no" }, { "name": "default", "template": common::TEMPLATE }])).unwrap(), chat_ml);
    // What real templates use: blocks on lines of their own, Python's methods, slices, namespaces,
    // JSON as Python writes it.
    let python = "{%- set ns = namespace(n=0) %}\n{% for m in messages[1:] %}\n  {% if m.content.startswith('H') %}\n{% set ns.n = ns.n + 1 %}\n{{ bos_token }}{{ m.role.upper() }} {{ m | tojson }}\n  {% endif %}\n{% endfor %}\n{{ ns.n }}{{ eos_token }}{% if tools is not none %}tools{% endif %}";
    assert_eq!(render(json!(python)).unwrap(), "<s>USER {\"role\": \"user\", \"content\": \"Hi\"}\n1</s>");
    let dated = render(json!("{{ strftime_now('%Y') }}")).unwrap();
    assert!(dated.parse::<u32>().unwrap() >= 2025, "{dated}");
    let refusal = render(json!("{{ raise_exception('turns must alternate') }}")).unwrap_err().to_string();
    assert!(refusal.contains("turns must alternate"), "{refusal}");
    let broken = render(json!("{% if %}")).unwrap_err().to_string();
    assert!(broken.contains("chat template is not valid"), "{broken}");
    let missing = render(json!(null)).unwrap_err().to_string();
    assert!(missing.contains("there is no chat template"), "{missing}");
    std::fs::write(directory.path().join("chat_template.jinja"), "{{ messages[0].role }}").unwrap();
    assert_eq!(render(json!(null)).unwrap(), "system");
}

#[test]
fn a_written_tokenizer_is_the_same() {
    let directory = SyntheticModel::default().write_temporary();
    let path = directory.path().join("model.gguf");
    SyntheticModel::default().gguf().write(&path);
    let text = "the thing 🦀";
    for source in [directory.path(), &path] {
        let copy = SyntheticModel::default().write_temporary();
        std::fs::remove_file(copy.path().join("tokenizer.json")).unwrap();
        std::fs::remove_file(copy.path().join("tokenizer_config.json")).unwrap();
        let original = Checkpoint::open(source).unwrap();
        original.write_tokenizer(copy.path()).unwrap();
        let copy = Checkpoint::open(copy.path()).unwrap();
        let tokens = |checkpoint: &Checkpoint| checkpoint.tokenizer().unwrap().encode(text, true).unwrap();
        assert_eq!(tokens(&copy), tokens(&original));
        let rendered = |checkpoint: &Checkpoint| checkpoint.chat_template().unwrap().render(&[Message::new("user", text)], true).unwrap();
        assert_eq!(rendered(&copy), rendered(&original));
    }
}
