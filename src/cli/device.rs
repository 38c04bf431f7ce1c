//! Which device, and remarks on choices that work but that few would want.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use lowkey::checkpoint::Checkpoint;
use lowkey::gpu::{Origin, ShaderChecks, Tier};
use lowkey::pull::Store;
use lowkey::{Device, Engine, Error, LoadOptions, Result, WeightStorage};
use std::path::PathBuf;

/// What to run on.
#[derive(clap::Args, Default)]
pub struct DeviceArgs {
    /// What to run on: `auto` for the best GPU, or the processor where there is none; `gpu` for any
    /// graphics driver, be it on the processor; `cpu`, or a part of a GPU's name.
    #[arg(long, global = true, value_name = "DEVICE", default_value = "auto")]
    device: Device,
    /// What a GPU's kernels may use [default: the best there is].
    #[arg(long, global = true, value_name = "TIER", value_parser = PossibleValuesParser::new(Tier::ALL.map(Tier::name)).try_map(|name| name.parse::<Tier>()))]
    tier: Option<Tier>,
}

impl DeviceArgs {
    /// Opens it.
    ///
    /// # Errors
    /// [`Error::Argument`] for a tier of the processor, and those of [`Engine::open`].
    pub fn open(&self) -> Result<Engine> {
        self.open_with(ShaderChecks::default())
    }

    /// The same, with so many checks in its kernels.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(&self, checks: ShaderChecks) -> Result<Engine> {
        if let (Device::Cpu, Some(tier)) = (&self.device, self.tier) {
            let message = format!("{} is for a GPU; the processor (--device cpu) has no tiers", tier.name());
            return Err(Error::Argument { name: "tier".into(), message });
        }
        let tunings = tunings().ok();
        Engine::open(&LoadOptions { device: self.device.clone(), tier: self.tier, checks, tunings, ..LoadOptions::default() })
    }

    /// What to say where `engine` is the processor, for which nobody asked.
    pub fn remark(&self, engine: &Engine) -> Option<String> {
        let unasked = engine.gpu().is_none() && self.device == Device::Auto;
        unasked.then(|| "no GPU was found: running on the processor. `lowkey doctor` says what there is".into())
    }
}

/// Where `lowkey tune` keeps what it has measured: in the cache directory.
///
/// # Errors
/// Those of [`Store::standard`].
pub fn tunings() -> Result<PathBuf> {
    Ok(Store::standard()?.directory().join("tuning"))
}

/// What to say where what was measured of `engine` cannot be used.
pub fn ignored(engine: &Engine) -> Option<String> {
    match engine.gpu()?.tuning_origin() {
        Origin::Ignored { path, reason } => Some(format!("{}: {reason}", path.display())),
        _ => None,
    }
}

/// What weights are in memory.
#[derive(clap::Args)]
pub struct WeightArgs {
    /// What weights are in memory: as `stored`, blocks of few bits as they are; all `f16`, or `f32`
    /// on the processor; or what floats become, `q8` or `q4`, blocks as Q8_0's and Q4_0's.
    #[arg(long, value_name = "TYPE", default_value = "stored")]
    weights: WeightStorage,
}

impl WeightArgs {
    /// `engine`, which loads them so.
    ///
    /// # Errors
    /// Those of [`Engine::with_weights`].
    pub fn of(&self, engine: Engine) -> Result<Engine> {
        engine.with_weights(self.weights)
    }
}

/// What to say where `tokens` are more than `model` was trained for, or than its rows were made
/// for.
pub fn untrained(model: &str, checkpoint: &Checkpoint, tokens: usize) -> Option<String> {
    let trained = checkpoint.config().max_position_embeddings;
    if tokens > trained {
        return Some(format!("{model}: {tokens} tokens are beyond the {trained} that it was trained for; text out there makes little sense"));
    }
    let made = checkpoint.factored().and_then(|factored| factored.context)?;
    (tokens > made)
        .then(|| format!("{model}: {tokens} tokens are beyond the {made} that its rows were made for; compress it with --context {tokens}"))
}
