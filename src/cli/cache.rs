//! Options of how a sequence keeps what it reads, the same for every command that reads text.

use clap::ValueEnum;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use lowkey::kv::{Budget, CacheMethod, Evicted, Read, Reviver, Selector, Xkv};
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
    /// kvreviver: what is left of tokens that are evicted [default: rows of a compressed model,
    /// nothing of a dense one].
    #[arg(long, value_name = "WHAT", requires = "method", help_heading = "Cache")]
    evicted: Option<EvictedArg>,
    /// Read no more than this many coded tokens for each new one, those that its attention is
    /// likeliest to fall on: an even number.
    #[arg(long, value_name = "N", help_heading = "Cache")]
    select: Option<usize>,
    /// How these are chosen [default: shadowkv].
    #[arg(long, value_name = "SELECTOR", requires = "select", help_heading = "Cache",
        value_parser = PossibleValuesParser::new(Selector::ALL.map(Selector::name)).try_map(|name| name.parse::<Selector>()))]
    select_by: Option<Selector>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Online {
    /// One basis of the prompt's own for every few layers.
    Xkv,
    /// Exact rows of every token, also of a compressed model.
    Full,
    /// Exact tokens by the attention they receive, and a trace of the others.
    Kvreviver,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EvictedArg {
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
    /// What was asked for.
    ///
    /// # Errors
    /// [`Error::Argument`] for what is wrong whatever the model: options of another method among
    /// them.
    pub fn method(&self) -> Result<CacheMethod> {
        let budget = match (self.kv_bytes, self.keep) {
            (Some(bytes), _) => Budget::Bytes(bytes),
            (_, Some(keep)) => Budget::Keep(keep),
            _ => Budget::Times(self.times.unwrap_or(4.0)),
        };
        let of = |method| self.method == Some(method);
        let budgeted = of(Online::Xkv) || of(Online::Kvreviver);
        let foreign = [
            ("evicted", self.evicted.is_some() && !of(Online::Kvreviver), "kvreviver"),
            ("group-layers", self.group_layers.is_some() && !of(Online::Xkv), "xkv"),
            ("bits", self.bits.is_some() && !of(Online::Xkv), "xkv"),
            ("times", self.times.is_some() && !budgeted, "xkv"),
            ("keep", self.keep.is_some() && !budgeted, "xkv"),
            ("kv-bytes", self.kv_bytes.is_some() && !budgeted, "xkv"),
        ];
        if let Some((name, _, method)) = foreign.into_iter().find(|(_, given, _)| *given) {
            return Err(Error::Argument {
                name: name.into(),
                message: format!("this is an option of {method}; leave it out, or choose --method {method}"),
            });
        }
        let evicted = self.evicted.map(|evicted| match evicted {
            EvictedArg::None => Evicted::None,
            EvictedArg::Mean => Evicted::Mean,
            EvictedArg::Sketch => Evicted::Sketch,
            EvictedArg::Shrunk => Evicted::Shrunk,
            EvictedArg::Rows => Evicted::Rows,
        });
        let read = Read::top(self.select).by(self.select_by.unwrap_or_default());
        read.selection().map_or(Ok(()), |selection| selection.check())?;
        let all = |method: CacheMethod, why: &str| match read {
            Read::All => Ok(method),
            Read::Top(_) => Err(Error::Argument { name: "select".into(), message: format!("{why}; leave out --select, or take another method") }),
        };
        match self.method {
            None => Ok(CacheMethod::Calibrated(read)),
            Some(Online::Xkv) => Ok(CacheMethod::Xkv(Xkv { layers: self.group_layers.unwrap_or(4), budget, bits: self.bits }, read)),
            Some(Online::Full) => all(CacheMethod::Full, "an exact cache has no coded rows to choose from"),
            Some(Online::Kvreviver) => {
                let evict = CacheMethod::Evict(Reviver::new(budget, evicted));
                all(evict, "kvreviver keeps what its candidates are, and every token reads all of it")
            }
        }
    }
}
