//! `lowkey inspect`: what a checkpoint is, what its cache costs, where it fits, and what could be
//! made of it. Reads headers and means of rows only, and opens no device.

use super::console::Console;
use super::locate::ModelArgs;
use super::table::{bytes, multiply_adds, table};
use clap::builder::RangedU64ValueParser;
use lowkey::checkpoint::{Checkpoint, Config, Factored};
use lowkey::compress::{Budget, rotated};
use lowkey::gpu::adapters;
use lowkey::kv::{Exact, LatentSet, Price};
use lowkey::sequence::{MemoryPlan, SequenceOptions};
use lowkey::{Error, Result, WeightStorage, available_memory, cpu, decoder};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Show a model's architecture, tensors and cache.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Show what this many tokens of context take in memory, on each device [default: as many as
    /// fit, up to those that the model was trained for].
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
    memory: Vec<Memory>,
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

/// What a device has, and what a context takes on it.
#[derive(Serialize)]
struct Memory {
    device: String,
    /// What it has, or what is available of it; `None` where that is not known.
    has_bytes: Option<u64>,
    /// Of the context that is asked for, or else of the longest that fits.
    #[serde(flatten)]
    plan: MemoryPlan,
    total_bytes: u64,
    fits: Option<bool>,
    /// The longest that fits, up to what the model was trained for.
    longest_context: Option<usize>,
}

impl Memory {
    /// `plan` counts what some tokens take; a fifth of the memory is left to others.
    fn of(device: String, has_bytes: Option<u64>, asked: Option<usize>, trained: usize, plan: impl Fn(usize) -> MemoryPlan) -> Memory {
        let longest_context = has_bytes.and_then(|has| MemoryPlan::longest(trained, has / 5 * 4, &plan));
        let plan = plan(asked.or(longest_context).unwrap_or(trained));
        let total_bytes = plan.total();
        Memory { device, has_bytes, plan, total_bytes, fits: has_bytes.map(|has| total_bytes <= has), longest_context }
    }

    fn text(&self) -> String {
        let MemoryPlan { context, weights, bases, exact_rows, coded_rows, scratch, staging } = self.plan;
        let parts = [
            ("weights", weights),
            ("bases", bases),
            ("exact rows", exact_rows),
            ("coded rows", coded_rows),
            ("scratch", scratch),
            ("staging", staging),
        ];
        let parts: Vec<String> = parts.into_iter().filter(|(_, count)| *count > 0).map(|(name, count)| format!("{name} {}", bytes(count))).collect();
        let has = self.has_bytes.map_or("of unknown memory".into(), |has| format!("with {}", bytes(has)));
        let verdict = match (self.fits, self.longest_context) {
            (Some(false), Some(longest)) => format!(", too much; {longest} tokens fit"),
            (Some(false), None) => ", too much, and so is any context".into(),
            _ => String::new(),
        };
        format!("{}, {has}: {context} tokens take {}{verdict}: {}", self.device, bytes(self.total_bytes), parts.join(", "))
    }
}

impl Args {
    pub fn run(self, console: &Console) -> Result<()> {
        let checkpoint = self.model.open()?;
        checkpoint.remarks().iter().for_each(|remark| console.remark(remark));
        let config = checkpoint.config().clone();
        let dense = config.dense_kv_bytes_per_token();
        let kv_bytes_per_token = checkpoint.factored().map_or(dense, |factored| factored.kv_bytes_per_token);
        let rows = checkpoint.factored().map_or(&[][..], |factored| &factored.rows);
        let tensors = kinds(&checkpoint);
        let parameters = tensors.iter().map(|kind| kind.parameters).sum::<u64>();
        let (trained, options) = (config.max_position_embeddings, |capacity| SequenceOptions::from(capacity));
        let processor = |capacity| cpu::plan_memory(&checkpoint, WeightStorage::Stored, &options(capacity));
        let gpu = |capacity| decoder::plan_memory(&checkpoint, WeightStorage::Stored, &options(capacity));
        let mut memory = vec![Memory::of("processor".into(), available_memory(), self.context, trained, processor)];
        for adapter in adapters().into_iter().filter(|adapter| adapter.tier.is_some()) {
            memory.push(Memory::of(adapter.name, adapter.memory, self.context, trained, gpu));
        }
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

/// Its width, or how many experts there are.
fn mlp(config: &Config) -> String {
    let Some(experts) = &config.design.experts else { return format!("MLP {}", config.intermediate_size) };
    let shared = experts.shared.map_or(String::new(), |width| format!(", and one of {width}"));
    format!("{} of {} experts of {}{shared}", experts.chosen, experts.count, experts.width)
}

fn text(report: &Report) -> String {
    let config = &report.config;
    let mut lines = vec![
        ("model", report.model.clone()),
        ("architecture", format!("{:?}", config.architecture).to_lowercase()),
        ("method", report.method.clone()),
        ("parameters", format!("{:.1} million, {} on disk", report.parameters as f64 / 1e6, bytes(report.bytes))),
        ("tensors", report.tensors.iter().map(|kind| format!("{} {}", kind.tensors, kind.dtype)).collect::<Vec<_>>().join(", ")),
        ("layers", format!("{} of width {}, {}", config.num_hidden_layers, config.hidden_size, mlp(config))),
        ("heads", format!("{} on {}, of width {}", config.num_attention_heads, config.num_key_value_heads, config.head_dim)),
        ("vocabulary", format!("{}{}", config.vocab_size, if config.tie_word_embeddings { ", tied" } else { "" })),
        ("context", format!("{} tokens, RoPE base {}", config.max_position_embeddings, config.ropes[0].theta)),
        ("cache", format!("{} bytes per token, dense {}", report.kv_bytes_per_token, report.kv_bytes_per_token_dense)),
        ("reading", multiply_adds(config.num_hidden_layers, report.flops_per_cached_token, report.flops_per_cached_token_dense)),
    ];
    if let Some(adapter) = &report.adapter {
        lines.insert(1, ("adapter", format!("{}, {}, for {}", adapter.path.display(), bytes(adapter.bytes), adapter.model.display())));
    }
    for (index, memory) in report.memory.iter().enumerate() {
        lines.push((if index == 0 { "memory" } else { "" }, memory.text()));
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
