//! A model on disk: config, weights, tokenizer. Safetensors (one file or sharded) or GGUF,
//! memory-mapped. Knows no GPU.
//!
//! A checkpoint is checked when it is opened, before any weight is read: that its architecture and
//! every setting are supported, that every tensor the model needs is there, in the right shape and
//! an encoding that can be decoded. Numbers are checked when they are asked for.

mod adapter;
mod arrange;
mod blocks;
mod config;
mod describe;
mod design;
mod dialect;
mod dot;
mod encoding;
mod experts;
mod factored;
mod family;
mod fields;
mod file;
mod find;
mod foreign;
mod ggml;
mod gguf;
mod gguf_model;
mod gguf_split;
mod gguf_tokenizer;
mod jinja;
mod llama_tokenizer;
mod matrix;
mod rope;
mod rope_fields;
mod safetensors;
mod source;
mod special;
mod storage;
mod strewn;
mod template;
mod tensors;
mod tokenizer;
mod unused;
mod weights;

pub use adapter::{ADAPTER, is_adapter};
pub use blocks::{Blocks, Form, Has};
pub use config::Config;
pub(crate) use config::STORED;
pub use design::{Activation, ClampedSwiglu, Design, Experts, HeadRows, LayerSpec, MlpSpec, NormKind, Norms, QkNorm, QkNormOver};
pub use dot::Vector;
pub use factored::Factored;
pub(crate) use factored::row_tensors;
pub use family::Architecture;
pub(crate) use file::OpenFiles;
pub use matrix::StoredMatrix;
#[cfg(test)]
pub(crate) use matrix::test_matrix;
pub use rope::{Rope, RopeScaling, Temperature};
pub use source::{Origin, RowsOrigin, Source};
pub use storage::WeightStorage;
pub use template::{ChatTemplate, Message};
pub use tokenizer::{TextStream, Tokenizer};

use crate::{Error, Result};
use adapter::Adapter;
use gguf_split::Parts;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use weights::Weights;

/// An open checkpoint.
///
/// Weights stay on disk until they are asked for, by their Hugging Face names and in its
/// conventions (`[out, in]`, RoPE in half-split layout), whatever the file's own.
pub struct Checkpoint {
    path: PathBuf,
    config: Config,
    config_json: Value,
    factored: Option<Factored>,
    weights: Weights,
    /// Where this is a GGUF file.
    gguf: Option<gguf::Metadata>,
    /// Where rows and some of the tensors are from an adapter file.
    adapter: Option<PathBuf>,
    /// What the user should know of how it is read.
    remarks: Vec<String>,
}

impl Checkpoint {
    /// Opens a directory, a `.gguf` file, or a `.lowkey` adapter file.
    ///
    /// A directory has a `config.json` and safetensors; an adapter is opened with the model that it
    /// was made for.
    ///
    /// That model is looked for beside the adapter file and, with the feature `pull`, among the
    /// models that have been fetched: first by its name, then by its fingerprint.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model that lowkey does not run, before its weights are looked
    /// at, and for an adapter file of another version; [`Error::Checkpoint`] and [`Error::Tensor`]
    /// for files that are damaged, or tensors that are missing or do not fit; [`Error::Checkpoint`]
    /// where an adapter file's model is not found.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        if !is_adapter(path) {
            return Self::open_model(path);
        }
        let adapter = Adapter::open(path)?;
        let model = find::model_of(&adapter)?;
        adapter.attach(model)
    }

    /// Opens the directory or `.gguf` file `model` with an adapter file that was made for it.
    ///
    /// # Errors
    /// As [`open`](Self::open), and [`Error::Checkpoint`] where the adapter file was made for
    /// another model, or `model` has been compressed already.
    pub fn open_with(model: &Path, adapter: &Path) -> Result<Checkpoint> {
        if is_adapter(model) {
            let message = format!("is an adapter file itself, and {} goes with the model that it was made for; name that", adapter.display());
            return Err(Error::Checkpoint { path: model.into(), message });
        }
        Adapter::open(adapter)?.attach(Self::open_model(model)?)
    }

    /// Opens what is no adapter file.
    fn open_model(path: &Path) -> Result<Checkpoint> {
        let checkpoint = if path.is_dir() { Self::open_directory(path)? } else { Self::open_gguf(path)? };
        checkpoint.check_tensors()?;
        Ok(checkpoint)
    }

    fn open_directory(path: &Path) -> Result<Checkpoint> {
        let config_path = path.join("config.json");
        if !config_path.exists()
            && let Some(error) = foreign::directory(path)
        {
            return Err(error);
        }
        let config_json = read_json(&config_path)?;
        let mut config = Config::from_json(&config_json, &config_path)?;
        let generation = path.join("generation_config.json");
        if generation.is_file() {
            config.take_end_tokens(&read_json(&generation)?, &generation)?;
        }
        let factored = match config_json.get("lowkey") {
            Some(object) => Some(Factored::from_json(object, &config, &config_path)?),
            None => None,
        };
        let mut weights = safetensors::open(path)?;
        arrange::beside_head(&mut weights);
        // As in transformers: a head that is stored and is not the table is the head.
        let other_head = config.tie_word_embeddings && !weights.is_same("lm_head.weight", "model.embed_tokens.weight");
        config.tie_word_embeddings &= !other_head;
        let remark = "its config says that the output head is the embedding table (tie_word_embeddings), and another head is stored, which is used";
        let remarks = other_head.then(|| remark.into()).into_iter().collect();
        arrange::take_apart(&mut weights, &config)?;
        experts::arrange(&mut weights, &config, false)?;
        arrange::order(&mut weights, &config, config.design.head_rows);
        Ok(Checkpoint { path: path.into(), config, config_json, factored, weights, gguf: None, adapter: None, remarks })
    }

    fn open_gguf(path: &Path) -> Result<Checkpoint> {
        let Parts { files, header } = gguf_split::open(path)?;
        let config_json = gguf_model::config(path, &header, &files)?;
        let config = Config::from_json(&config_json, path)?;
        let mut weights = Weights::default();
        let (mut tensors, rows) = gguf_model::tensors(path, &header.metadata, header.tensors)?;
        for (index, file) in files.into_iter().enumerate() {
            weights.add(file, tensors.extract_if(.., |(_, stored)| stored.file == index).collect())?;
        }
        arrange::take_apart(&mut weights, &config)?;
        experts::arrange(&mut weights, &config, true)?;
        arrange::order(&mut weights, &config, rows);
        let remarks = gguf_tokenizer::remark(&header.metadata).into_iter().collect();
        Ok(Checkpoint { path: path.into(), config, config_json, factored: None, weights, gguf: Some(header.metadata), adapter: None, remarks })
    }

    fn check_tensors(&self) -> Result<()> {
        unused::refuse_other_packages(&self.weights)?;
        let required = tensors::required(&self.config, self.factored.as_ref());
        let present = tensors::optional(&self.config, self.factored.as_ref()).into_iter().filter(|(name, _)| self.has(name));
        let known: BTreeMap<String, Vec<usize>> = required.into_iter().chain(present).collect();
        for (name, shape) in &known {
            let path = self.adapter.as_deref().filter(|_| name.starts_with("rows.")).unwrap_or(&self.path);
            self.weights.expect(path, name, shape)?;
        }
        unused::refuse(&self.weights, &self.config, |name| known.contains_key(name))
    }

    /// The model that was opened: a directory or a `.gguf` file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the user should know of how its files are read.
    pub fn remarks(&self) -> &[String] {
        &self.remarks
    }

    /// The adapter file that was opened with it.
    pub fn adapter(&self) -> Option<&Path> {
        self.adapter.as_deref()
    }

    /// The model's geometry.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// `config.json` as it was read; for GGUF, what it would be.
    pub fn config_json(&self) -> &Value {
        &self.config_json
    }

    /// The rows' layout, where the model has been compressed.
    ///
    /// By an adapter file, or in a checkpoint that stands alone.
    pub fn factored(&self) -> Option<&Factored> {
        self.factored.as_ref()
    }

    /// The files that hold the weights, in a stable order.
    pub fn weight_files(&self) -> impl Iterator<Item = &Path> {
        self.weights.paths()
    }

    /// All tensors' names, sorted.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.weights.names()
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.weights.get(name).is_some()
    }

    /// A tensor's shape, row-major.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.weights.get(name).map(|stored| &stored.shape[..])
    }

    /// The file's word for how a tensor's numbers are stored: `F16`, `Q4_1`.
    pub fn dtype(&self, name: &str) -> Option<&str> {
        self.weights.get(name).map(|stored| stored.dtype.as_str())
    }

    /// Bytes of all tensors on disk.
    pub fn bytes(&self) -> u64 {
        self.weights.bytes()
    }

    /// A tensor's numbers in f32, row-major; its shape must be `shape`.
    ///
    /// GGUF's quantised blocks are rounded to f16 first: in f16 they *are* the model.
    ///
    /// # Errors
    /// [`Error::Tensor`] where it is missing, has another shape, or holds numbers that are not
    /// finite.
    pub fn f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.weights.f32(&self.path, name, shape)
    }

    /// What a norm multiplies by, `[width]`: the tensor `name`, and one more where gains are stored
    /// less one.
    ///
    /// # Errors
    /// As [`f32`](Self::f32).
    pub fn gain(&self, name: &str, width: usize) -> Result<Vec<f32>> {
        let mut gain = self.f32(name, &[width])?;
        if self.config.design.gains_less_one {
            gain.iter_mut().for_each(|gain| *gain += 1.0);
        }
        Ok(gain)
    }

    /// A tensor's numbers rounded to f16, row-major; its shape must be `shape`.
    ///
    /// # Errors
    /// As [`f32`](Self::f32), and where a number is too large for f16.
    pub fn f16(&self, name: &str, shape: &[usize]) -> Result<Vec<half::f16>> {
        self.weights.f16(&self.path, name, shape)
    }

    /// A matrix in the type that is asked for, in place where it is stored so; its shape must be
    /// `shape`.
    ///
    /// # Errors
    /// As [`f32`](Self::f32), and as [`f16`](Self::f16) where that is asked for.
    pub fn matrix(&self, name: &str, shape: [usize; 2], storage: WeightStorage) -> Result<StoredMatrix> {
        self.weights.check_finite(&self.path, name, shape)?;
        self.weights.matrix(&self.path, name, shape, storage)
    }

    /// The codes and scales of a matrix, row-major, in the type that is asked for.
    ///
    /// `None` where that is floats, and where [`f16`](Self::f16) says what is wrong with it.
    ///
    /// # Errors
    /// As [`matrix`](Self::matrix).
    pub fn blocks(&self, name: &str, shape: [usize; 2], storage: WeightStorage) -> Result<Option<Blocks>> {
        self.weights.matrix(&self.path, name, shape, storage)?.blocks()
    }

    /// The files that hold the weights, open.
    pub(crate) fn files(&self) -> OpenFiles {
        OpenFiles(self.weights.files().to_vec())
    }

    /// Bytes of all weights on the processor, where they are to be as `storage` says; bases are
    /// left out.
    pub fn weight_bytes(&self, storage: WeightStorage) -> u64 {
        let bytes = |(_, stored): (&str, &weights::Stored)| {
            let (Some(encoding), numbers) = (stored.encoding, stored.shape.iter().product::<usize>()) else { return 0 };
            let encoding = match stored.shape[..] {
                [_, cols] => storage.encoding(encoding, cols),
                _ => encoding,
            };
            encoding.bytes(numbers) as u64
        };
        self.weights.iter().filter(|(name, _)| !name.starts_with("rows.")).map(bytes).sum()
    }

    /// How a matrix is quantised that is to be as `storage` says; `None` where that is floats, or
    /// there is none.
    pub fn form(&self, name: &str, storage: WeightStorage) -> Option<Form> {
        let stored = self.weights.get(name)?;
        match stored.shape[..] {
            [_, cols] => storage.encoding(stored.encoding?, cols).form(),
            _ => None,
        }
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    foreign::refuse_pointer(path, &bytes)?;
    serde_json::from_slice(&bytes).map_err(|e| Error::Checkpoint { path: path.into(), message: format!("not valid JSON: {e}") })
}
