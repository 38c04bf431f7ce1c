//! Options of how a sequence keeps what it reads, the same for every command that reads text.

use clap::ValueEnum;
use lowkey::compress::{Budget, Xkv};
use lowkey::rows::{Reviver, Selection, Vague};
use lowkey::sequence::SequenceOptions;
use lowkey::{Error, Result};

#[derive(clap::Args, Debug, Clone, Default)]
pub struct CacheArgs {
    /// Compress the cache while it exists.
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
    /// kvreviver: what is left of tokens that are evicted [default: rows of a compressed model, nothing of a dense one].
    #[arg(long, value_name = "WHAT", requires = "method", help_heading = "Cache")]
    vague: Option<Trace>,
    /// Read no more than this many coded tokens for each new one, those that its attention is likeliest to fall on: an even number.
    #[arg(long, value_name = "N", help_heading = "Cache")]
    select: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Online {
    /// One basis of the prompt's own for every few layers.
    Xkv,
    /// Exact tokens by the attention they receive, and a trace of the others.
    Kvreviver,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Trace {
    /// Nothing.
    None,
    /// Their mean.
    Mean,
    /// A count-sketch, as published.
    Sketch,
    /// A count-sketch around their mean, shrunk.
    Shrunk,
    /// The coded rows of a compressed model.
    Rows,
}

impl CacheArgs {
    /// `options` with what was asked for.
    pub fn apply(&self, options: SequenceOptions) -> Result<SequenceOptions> {
        let budget = match (self.kv_bytes, self.keep) {
            (Some(bytes), _) => Budget::Bytes(bytes),
            (_, Some(keep)) => Budget::Keep(keep),
            _ => Budget::Times(self.times.unwrap_or(4.0)),
        };
        let of = |method| self.method == Some(method);
        let foreign = [
            ("vague", self.vague.is_some() && !of(Online::Kvreviver), "kvreviver"),
            ("group-layers", self.group_layers.is_some() && !of(Online::Xkv), "xkv"),
            ("bits", self.bits.is_some() && !of(Online::Xkv), "xkv"),
        ];
        if let Some((name, _, method)) = foreign.into_iter().find(|(_, given, _)| *given) {
            return Err(Error::Argument {
                name: name.into(),
                message: format!("this is an option of {method}; leave it out, or choose --method {method}"),
            });
        }
        let vague = self.vague.map(|vague| match vague {
            Trace::None => Vague::None,
            Trace::Mean => Vague::Mean,
            Trace::Sketch => Vague::Sketch,
            Trace::Shrunk => Vague::Shrunk,
            Trace::Rows => Vague::Rows,
        });
        let xkv = of(Online::Xkv).then(|| Xkv { layers: self.group_layers.unwrap_or(4), budget, bits: self.bits });
        let reviver = of(Online::Kvreviver).then_some(Reviver::new(budget, vague));
        let options = SequenceOptions { select: self.select.map(|tokens| Selection { tokens }), xkv, reviver, ..options };
        // What is wrong whatever the model, before one is loaded.
        options.check(Some(&[]))?;
        Ok(options)
    }
}
