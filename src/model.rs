//! A checkpoint loaded on something that runs it: the way in for programs that embed lowkey.

mod reader;

use crate::bench::{self, Roofline, WeightBytes};
use crate::checkpoint::{Checkpoint, Origin, Tokenizer, WeightStorage};
use crate::compress::Solver;
use crate::gpu::Tier;
use crate::kv::{CacheMethod, Exact};
use crate::machine::available_memory;
use crate::sequence::{Context, MemoryPlan, Prompted, Reader, Sequence, SequenceOptions};
use crate::session::{Session, SessionOptions};
use crate::task::{OnProgress, quietly};
use crate::{Error, Result, cpu, decoder, gpu};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// What a model is to run on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Device {
    /// The best GPU. Where there is none the processor, which is faster than a graphics driver that
    /// runs on it; [`Engine::gpu`] tells.
    #[default]
    Auto,
    /// The graphics adapter whose name contains this, in any case; the best of any kind where it is
    /// empty.
    Gpu(String),
    /// The processor.
    Cpu,
}

impl FromStr for Device {
    type Err = Error;

    /// `auto`, `gpu` for any graphics adapter, `cpu`, or a part of an adapter's name.
    fn from_str(text: &str) -> Result<Device> {
        match text.trim() {
            "" => Err(Error::Argument { name: "device".into(), message: "give `auto`, `gpu`, `cpu`, or a part of an adapter's name".into() }),
            "auto" => Ok(Device::Auto),
            "gpu" => Ok(Device::Gpu(String::new())),
            "cpu" => Ok(Device::Cpu),
            name => Ok(Device::Gpu(name.into())),
        }
    }
}

/// How to load a model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadOptions {
    /// What to run it on.
    pub device: Device,
    /// What a GPU's kernels may use; `None` for the best that it offers.
    pub tier: Option<Tier>,
    /// What a GPU's kernels are checked for while they run.
    pub checks: gpu::ShaderChecks,
    /// What weights are in memory.
    pub weights: WeightStorage,
    /// The directory with what was measured of graphics adapters ([`gpu::Tuned`]), which the
    /// command line keeps in its cache directory.
    ///
    /// `None` for built-in constants of kernels. Results are the same up to rounding.
    pub tunings: Option<PathBuf>,
}

/// An opened device, on which any number of models can be loaded.
#[derive(Clone)]
pub struct Engine {
    kind: Kind,
    weights: WeightStorage,
}

#[derive(Clone)]
enum Kind {
    Cpu,
    Gpu(Arc<gpu::Device>),
}

impl Engine {
    /// Opens what `options` ask for.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] where there is no usable graphics adapter of that name, or none at all;
    /// [`Error::Argument`] for a tier that it does not offer; [`Error::Gpu`] where the driver
    /// refuses; those of [`with_weights`](Self::with_weights).
    pub fn open(options: &LoadOptions) -> Result<Engine> {
        let open = |adapter| {
            let LoadOptions { tier, checks, tunings, .. } = options.clone();
            gpu::Device::open(&gpu::Options { adapter, tier, checks, tunings, ..gpu::Options::default() })
        };
        let kind = match &options.device {
            Device::Cpu => Kind::Cpu,
            Device::Gpu(name) => Kind::Gpu(open(Some(name.clone()))?),
            // Whoever names a tier wants its kernels, fast or not.
            Device::Auto if options.tier.is_some() => Kind::Gpu(open(None)?),
            Device::Auto => match open(None) {
                Ok(device) if !device.is_software() => Kind::Gpu(device),
                Ok(_) | Err(Error::NoAdapter { .. }) => Kind::Cpu,
                Err(error) => return Err(error),
            },
        };
        Engine { kind, weights: WeightStorage::Stored }.with_weights(options.weights)
    }

    /// The same device, on which weights are loaded as `weights` says.
    ///
    /// # Errors
    /// [`Error::Argument`] for single precision on a GPU, whose kernels do not read it.
    pub fn with_weights(self, weights: WeightStorage) -> Result<Engine> {
        if let (Kind::Gpu(_), WeightStorage::F32) = (&self.kind, weights) {
            let message = "f32 is for the processor; the GPU's kernels read f16 and blocks of few bits. --device cpu takes it".into();
            return Err(Error::Argument { name: "weights".into(), message });
        }
        Ok(Engine { weights, ..self })
    }

    /// Bytes that a model and its sequences can have: a GPU's memory, or what is available of the
    /// system's. `None` where that is not known.
    pub fn memory(&self) -> Option<u64> {
        let available = available_memory();
        match &self.kind {
            Kind::Cpu => available,
            Kind::Gpu(device) if device.is_software() => [device.memory(), available].into_iter().flatten().min(),
            Kind::Gpu(device) => device.memory(),
        }
    }

    /// What a checkpoint takes on this device, and a sequence of it with these options.
    pub fn plan_memory(&self, checkpoint: &Checkpoint, options: &SequenceOptions) -> MemoryPlan {
        match &self.kind {
            Kind::Cpu => cpu::plan_memory(checkpoint, self.weights, options),
            Kind::Gpu(_) => decoder::plan_memory(checkpoint, self.weights, options),
        }
    }

    /// The longest context of up to `most` tokens that this device has room for, with a fifth of
    /// its memory left to others; `None` where there is no room, or no telling.
    pub fn longest_context(&self, checkpoint: &Checkpoint, options: &SequenceOptions, most: usize) -> Option<usize> {
        let plan = |capacity| self.plan_memory(checkpoint, &SequenceOptions { capacity, ..*options });
        MemoryPlan::longest(most, self.memory()? / 5 * 4, plan)
    }

    /// Refuses what the device has no room for, before anything is allocated.
    fn afford(&self, checkpoint: &Checkpoint, options: &SequenceOptions, loaded: bool) -> Result<()> {
        // Longer ones cannot be counted, and are refused as such.
        const COUNTABLE: usize = 1 << 32;
        let (Some(memory), ..=COUNTABLE) = (self.memory(), options.capacity) else { return Ok(()) };
        let plan = self.plan_memory(checkpoint, options);
        // On the processor weights are read where they are; what is loaded is no more available.
        let own = matches!(&self.kind, Kind::Cpu) || loaded && self.is_software();
        let needed = if own { plan.total() - plan.weights } else { plan.total() };
        if needed <= memory {
            return Ok(());
        }
        let what = match self.longest_context(checkpoint, options, plan.context) {
            Some(longest) => format!("a context of {} tokens, where {longest} would fit into {memory} bytes,", plan.context),
            None => format!("the model, of which not even a short context fits into {memory} bytes,"),
        };
        Err(Error::OutOfMemory { what, bytes: needed })
    }

    /// Whether this is a graphics driver that does everything on the processor.
    pub fn is_software(&self) -> bool {
        match &self.kind {
            Kind::Cpu => false,
            Kind::Gpu(device) => device.is_software(),
        }
    }

    /// The GPU, where it is one.
    pub fn gpu(&self) -> Option<&Arc<gpu::Device>> {
        match &self.kind {
            Kind::Cpu => None,
            Kind::Gpu(device) => Some(device),
        }
    }

    /// What it is called.
    pub fn name(&self) -> String {
        match &self.kind {
            Kind::Cpu => format!("processor, {} threads", rayon::current_num_threads()),
            Kind::Gpu(device) => device.name().into(),
        }
    }

    /// What drives it.
    pub fn driver(&self) -> String {
        match &self.kind {
            Kind::Cpu => concat!("lowkey ", env!("CARGO_PKG_VERSION")).into(),
            Kind::Gpu(device) => device.driver(),
        }
    }

    /// What kernels are run through: `Vulkan`, `Metal`, `Dx12`, or `CPU`.
    pub fn backend(&self) -> String {
        match &self.kind {
            Kind::Cpu => "CPU".into(),
            Kind::Gpu(device) => device.backend(),
        }
    }

    /// The tier of its kernels: see `doctor`.
    pub fn tier(&self) -> &'static str {
        match &self.kind {
            Kind::Cpu => "cpu",
            Kind::Gpu(device) => device.tier().name(),
        }
    }

    /// Measures what it can do at best: about a second.
    ///
    /// # Errors
    /// The device's.
    pub fn roofline(&self) -> Result<Roofline> {
        match &self.kind {
            Kind::Cpu => Ok(bench::processor_roofline()),
            Kind::Gpu(device) => gpu::roofline(device),
        }
    }

    /// Loads the checkpoint at `path`, as [`Checkpoint::open`] opens it.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`] and [`load_checkpoint`](Self::load_checkpoint).
    pub fn load(&self, path: &Path) -> Result<Model> {
        self.load_checkpoint(Checkpoint::open(path)?)
    }

    /// Loads an open checkpoint.
    ///
    /// # Errors
    /// Those of reading its weights, and the device's.
    pub fn load_checkpoint(&self, checkpoint: Checkpoint) -> Result<Model> {
        self.load_telling(checkpoint, &mut quietly)
    }

    /// Loads an open checkpoint, and reports how many layers have been loaded.
    ///
    /// # Errors
    /// As [`load_checkpoint`](Self::load_checkpoint), and [`Error::Interrupted`] where on_progress
    /// says so.
    pub fn load_telling(&self, checkpoint: Checkpoint, on_progress: OnProgress<'_>) -> Result<Model> {
        let start = Instant::now();
        self.afford(&checkpoint, &SequenceOptions::from(1), false)?;
        let weights = match &self.kind {
            Kind::Cpu => Weights::Cpu(Arc::new(cpu::Model::load_as(&checkpoint, self.weights, on_progress)?)),
            Kind::Gpu(device) => Weights::Gpu(Arc::new(decoder::Model::load_as(&checkpoint, self.weights, device.clone(), on_progress)?)),
        };
        Ok(Model {
            checkpoint,
            weights,
            engine: self.clone(),
            load_seconds: start.elapsed().as_secs_f64(),
            tokenizer: OnceLock::new(),
            origin: OnceLock::new(),
        })
    }
}

/// A model in memory. Sequences share it.
pub struct Model {
    checkpoint: Checkpoint,
    weights: Weights,
    /// What it was loaded with, and how long that took.
    engine: Engine,
    load_seconds: f64,
    /// Read when it is first needed: measuring speed needs none.
    tokenizer: OnceLock<Arc<Tokenizer>>,
    /// What sessions are saved with.
    origin: OnceLock<Arc<Origin>>,
}

#[derive(Clone)]
enum Weights {
    Cpu(Arc<cpu::Model>),
    Gpu(Arc<decoder::Model>),
}

impl Model {
    /// Opens a device and loads the checkpoint at `path` on it.
    ///
    /// # Errors
    /// Those of [`Engine::open`] and [`Engine::load`].
    pub fn load(path: impl AsRef<Path>, options: LoadOptions) -> Result<Model> {
        Engine::open(&options)?.load(path.as_ref())
    }

    /// How long loading it took.
    pub fn load_seconds(&self) -> f64 {
        self.load_seconds
    }

    /// What it was loaded from.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The method it was compressed with, or `dense`.
    pub fn method(&self) -> &str {
        self.checkpoint.factored().map_or("dense", |factored| &factored.method)
    }

    /// How a sequence stores its rows: `f16`, or the method's options in words.
    pub fn layout(&self) -> String {
        self.checkpoint.factored().map_or("f16".into(), |factored| factored.options.clone())
    }

    /// The types that weights have in memory, that of most of them first: `f16`, `q4 q6`.
    pub fn weight_type(&self) -> String {
        match &self.weights {
            Weights::Cpu(model) => model.weight_type(),
            Weights::Gpu(model) => model.weight_type(),
        }
    }

    /// What its weights take in memory.
    pub fn weight_bytes(&self) -> WeightBytes {
        match &self.weights {
            Weights::Cpu(model) => WeightBytes { matrices: model.matrix_bytes(), embedding: model.embedding_bytes(), number: 4 },
            Weights::Gpu(model) => WeightBytes { matrices: model.matrix_bytes(), embedding: model.embedding_bytes(), number: 2 },
        }
    }

    /// Which tokens stay exact in a sequence of this model with these options.
    ///
    /// `None` where no rows are coded and no token is evicted, so that all are.
    pub fn exact(&self, options: &SequenceOptions) -> Option<Exact> {
        let made = self.checkpoint.factored().map(|factored| factored.exact);
        let exact = options.exact.or(made).unwrap_or_default();
        let coded = match options.method {
            CacheMethod::Calibrated(_) => made.is_some(),
            CacheMethod::Full => false,
            CacheMethod::Xkv(..) | CacheMethod::Evict(_) => true,
        };
        coded.then_some(Exact { sinks: exact.sinks.min(options.capacity), recent: exact.recent.min(options.capacity) })
    }

    /// Its tokenizer.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where there is none that works.
    pub fn tokenizer(&self) -> Result<Arc<Tokenizer>> {
        match self.tokenizer.get() {
            Some(tokenizer) => Ok(tokenizer.clone()),
            None => {
                let tokenizer = Arc::new(self.checkpoint.tokenizer()?);
                Ok(self.tokenizer.get_or_init(|| tokenizer).clone())
            }
        }
    }

    /// A session with a sequence of its own.
    ///
    /// # Errors
    /// Those of [`tokenizer`](Self::tokenizer), [`sequence`](Self::sequence) and [`Session::new`].
    pub fn session(&self, options: SessionOptions) -> Result<Session> {
        const MODERATE: usize = 4096;
        let trained = self.checkpoint.config().max_position_embeddings;
        let sequence = SequenceOptions { method: options.method, ..SequenceOptions::default() };
        let longest = || self.engine.longest_context(&self.checkpoint, &sequence, trained).unwrap_or(trained.min(MODERATE));
        let sequence = SequenceOptions { capacity: options.context.unwrap_or_else(longest), ..sequence };
        let session = Session::new(self.sequence(sequence)?, self.tokenizer()?, options)?;
        Ok(session.of(self.origin.get_or_init(|| Arc::new(Origin::of(&self.checkpoint))).clone()))
    }

    /// An empty sequence.
    ///
    /// # Errors
    /// [`Error::Argument`] for a capacity of zero or beyond all bounds and for what this model or
    /// device cannot do, [`Error::OutOfMemory`] where the cache does not fit.
    pub fn sequence(&self, options: impl Into<SequenceOptions>) -> Result<Context> {
        let options = options.into();
        self.engine.afford(&self.checkpoint, &options, true)?;
        let sequence: Box<dyn Sequence> = match options.method {
            CacheMethod::Xkv(xkv, _) => {
                let (config, rows) = (self.checkpoint.config(), self.checkpoint.factored().map_or(&[][..], |factored| &factored.rows));
                options.method.check(&config.geometry(), config.window(), rows, options.capacity)?;
                Box::new(Prompted::new(self.weights.clone(), Box::new(Solver(xkv)), options, &config.geometry())?)
            }
            _ => self.weights.sequence(options)?,
        };
        Ok(Context::new(sequence))
    }
}
