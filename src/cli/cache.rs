//! Options of how a sequence keeps what it reads, the same for every command that reads text.

use clap::ValueEnum;
use lowkey::Result;
use lowkey::compress::{Budget, Xkv};
use lowkey::rows::Selection;
use lowkey::sequence::SequenceOptions;

#[derive(clap::Args, Debug, Clone, Default)]
pub struct CacheArgs {
    /// Compress the cache of a dense model while it exists.
    #[arg(long, value_name = "METHOD", help_heading = "Cache")]
    method: Option<Online>,
    /// How many times smaller than in f16 a token's rows are to be [default: 4].
    #[arg(long, value_name = "F", group = "cache budget", requires = "method", help_heading = "Cache")]
    times: Option<f64>,
    /// The share of the f16 cache to keep, above 0 and up to 1.
    #[arg(long, value_name = "F", group = "cache budget", requires = "method", help_heading = "Cache")]
    keep: Option<f64>,
    /// Bytes that a token may take, over the whole model.
    #[arg(long, value_name = "N", group = "cache budget", requires = "method", help_heading = "Cache")]
    kv_bytes: Option<u64>,
    /// xkv: consecutive layers that share a basis [default: 4].
    #[arg(long, value_name = "N", requires = "method", help_heading = "Cache")]
    group_layers: Option<usize>,
    /// xkv: bits of every coordinate, 16, 8 or 4 [default: as many as each is worth].
    #[arg(long, value_name = "N", requires = "method", help_heading = "Cache")]
    bits: Option<u8>,
    /// Read no more than this many coded tokens for each new one, those that its attention is likeliest to fall on: a multiple of 8.
    #[arg(long, value_name = "N", help_heading = "Cache")]
    select: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Online {
    /// One basis of the prompt's own for every few layers.
    Xkv,
}

impl CacheArgs {
    /// `options` with what was asked for.
    pub fn apply(&self, options: SequenceOptions) -> Result<SequenceOptions> {
        let budget = match (self.kv_bytes, self.keep) {
            (Some(bytes), _) => Budget::Bytes(bytes),
            (_, Some(keep)) => Budget::Keep(keep),
            _ => Budget::Times(self.times.unwrap_or(4.0)),
        };
        let xkv = self.method.map(|Online::Xkv| Xkv { layers: self.group_layers.unwrap_or(4), budget, bits: self.bits });
        let options = SequenceOptions { select: self.select.map(|tokens| Selection { tokens }), xkv, ..options };
        // What is wrong whatever the model, before one is loaded.
        options.check(true)?;
        Ok(options)
    }
}
