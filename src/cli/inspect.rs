//! `lowkey inspect`: what a checkpoint is, what its cache costs, and what could be made of it.
//! Reads headers and means of rows only, and needs no device.

use super::console::Console;
use super::locate::ModelArgs;
use super::table::{bytes, multiply_adds, table};
use clap::builder::RangedU64ValueParser;
use lowkey::checkpoint::{Checkpoint, Config, Factored};
use lowkey::compress::{Budget, rotated};
use lowkey::decoder::stored_bytes;
use lowkey::kv::{Exact, LatentSet, Price};
use lowkey::{Error, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Show a model's architecture, tensors and cache.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Show what this many tokens of context take in memory.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 24))]
    context: Option<usize>,
}

#[derive(Serialize)]
struct Report {
    model: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<Adapter>,
    method: String,
    config: Config,
    parameters: u64,
    /// Bytes of all tensors on disk.
    bytes: u64,
    tensors: Vec<Kind>,
    kv_bytes_per_token: u64,
    kv_bytes_per_token_dense: u64,
    /// Operations that reading a cached token costs a decode step; a multiplication and an addition
    /// are two.
    flops_per_cached_token: u64,
    flops_per_cached_token_dense: u64,
    compresses_to: Vec<Choice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    factored: Option<Factored>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<Memory>,
}

/// The adapter file, and the model that it goes with.
#[derive(Serialize)]
struct Adapter {
    path: PathBuf,
    bytes: u64,
    model: PathBuf,
}

/// All tensors of one encoding.
#[derive(Serialize)]
struct Kind {
    dtype: String,
    tensors: usize,
    parameters: u64,
}

/// What a method would make of a dense model.
#[derive(Serialize)]
struct Choice {
    /// What to say to `compress`.
    options: String,
    kv_bytes_per_token: u64,
}

/// What a context of some length takes.
#[derive(Serialize)]
struct Memory {
    context: usize,
    /// Weights, as they are on a GPU.
    weight_bytes: u64,
    kv_bytes: u64,
    kv_bytes_dense: u64,
    total_bytes: u64,
}

impl Args {
    pub fn run(self, console: &Console) -> Result<()> {
        let checkpoint = self.model.open()?;
        let config = checkpoint.config().clone();
        let dense = config.dense_kv_bytes_per_token();
        let kv_bytes_per_token = checkpoint.factored().map_or(dense, |factored| factored.kv_bytes_per_token);
        let rows = checkpoint.factored().map_or(&[][..], |factored| &factored.rows);
        let tensors = kinds(&checkpoint);
        let parameters = tensors.iter().map(|kind| kind.parameters).sum::<u64>();
        let memory = self.context.map(|context| {
            let of = |per_token: u64| per_token.saturating_mul(context as u64);
            let weight_bytes = stored_bytes(&checkpoint);
            let total_bytes = weight_bytes.saturating_add(of(kv_bytes_per_token));
            Memory { context, weight_bytes, kv_bytes: of(kv_bytes_per_token), kv_bytes_dense: of(dense), total_bytes }
        });
        let report = Report {
            model: self.model.name(),
            adapter: checkpoint.adapter().map(|path| adapter(path, checkpoint.path())).transpose()?,
            method: checkpoint.factored().map_or("dense".into(), |factored| factored.method.clone()),
            parameters,
            bytes: checkpoint.bytes(),
            tensors,
            kv_bytes_per_token,
            kv_bytes_per_token_dense: dense,
            flops_per_cached_token: Price::of(rows, &checkpoint.mean_pairs()?, &config.geometry()).flops_per_cached_token,
            flops_per_cached_token_dense: Price::of(&[], &[], &config.geometry()).flops_per_cached_token,
            compresses_to: if checkpoint.factored().is_none() { choices(&config)? } else { Vec::new() },
            factored: checkpoint.factored().cloned(),
            memory,
            config,
        };
        console.result(&report, text)
    }
}

fn adapter(path: &Path, model: &Path) -> Result<Adapter> {
    let file = path.metadata().map_err(|source| Error::Io { action: "read", path: path.into(), source })?;
    Ok(Adapter { path: path.into(), bytes: file.len(), model: model.into() })
}

fn kinds(checkpoint: &Checkpoint) -> Vec<Kind> {
    let mut kinds: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for name in checkpoint.tensor_names() {
        let (Some(dtype), Some(shape)) = (checkpoint.dtype(name), checkpoint.shape(name)) else { continue };
        let kind = kinds.entry(dtype).or_default();
        kind.0 += 1;
        kind.1 += shape.iter().map(|&n| n as u64).product::<u64>();
    }
    kinds.into_iter().map(|(dtype, (tensors, parameters))| Kind { dtype: dtype.into(), tensors, parameters }).collect()
}

fn choices(config: &Config) -> Result<Vec<Choice>> {
    let dense = config.dense_kv_bytes_per_token();
    let rows = |bits| LatentSet::bytes_per_token(&rotated(config, bits, Exact::default()).specs);
    let mut choices: Vec<Choice> =
        [8, 4].map(|bits| Choice { options: format!("--method dense --bits {bits}"), kv_bytes_per_token: rows(bits) }).into();
    for times in [4.0, 8.0, 12.0] {
        choices.push(Choice { options: format!("--times {times}"), kv_bytes_per_token: Budget::Times(times).bytes(dense)? });
    }
    Ok(choices)
}

fn text(report: &Report) -> String {
    let config = &report.config;
    let mut lines = vec![
        ("model", report.model.clone()),
        ("architecture", format!("{:?}", config.architecture).to_lowercase()),
        ("method", report.method.clone()),
        ("parameters", format!("{:.1} million, {} on disk", report.parameters as f64 / 1e6, bytes(report.bytes))),
        ("tensors", report.tensors.iter().map(|kind| format!("{} {}", kind.tensors, kind.dtype)).collect::<Vec<_>>().join(", ")),
        ("layers", format!("{} of width {}, MLP {}", config.num_hidden_layers, config.hidden_size, config.intermediate_size)),
        ("heads", format!("{} on {}, of width {}", config.num_attention_heads, config.num_key_value_heads, config.head_dim)),
        ("vocabulary", format!("{}{}", config.vocab_size, if config.tie_word_embeddings { ", tied" } else { "" })),
        ("context", format!("{} tokens, RoPE base {}", config.max_position_embeddings, config.rope_theta)),
        ("cache", format!("{} bytes per token, dense {}", report.kv_bytes_per_token, report.kv_bytes_per_token_dense)),
        ("reading", multiply_adds(config.num_hidden_layers, report.flops_per_cached_token, report.flops_per_cached_token_dense)),
    ];
    if let Some(adapter) = &report.adapter {
        lines.insert(1, ("adapter", format!("{}, {}, for {}", adapter.path.display(), bytes(adapter.bytes), adapter.model.display())));
    }
    if let Some(memory) = &report.memory {
        lines
            .push(("memory", format!("for {} tokens: {} of cache (dense {})", memory.context, bytes(memory.kv_bytes), bytes(memory.kv_bytes_dense))));
        lines.push(("", format!("and {} of weights: {} in all", bytes(memory.weight_bytes), bytes(memory.total_bytes))));
    }
    let mut text: String = lines.iter().map(|(name, value)| format!("{name:<13} {value}\n")).collect();
    if !report.compresses_to.is_empty() {
        let rows: Vec<Vec<String>> = report
            .compresses_to
            .iter()
            .map(|choice| {
                let times = report.kv_bytes_per_token_dense as f64 / choice.kv_bytes_per_token.max(1) as f64;
                vec![choice.options.clone(), choice.kv_bytes_per_token.to_string(), format!("{times:.1}")]
            })
            .collect();
        text += "\n";
        text += &table(&["lowkey compress", "kv B/token", "times smaller"], &rows);
    }
    text
}
