//! How a sequence keeps its keys and values, and how many of them a token reads.

use super::{Geometry, LatentSet, LatentSpec, Reviver, Selection, Selector, Xkv};
use crate::{Error, Result};

/// How a sequence keeps keys and values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum CacheMethod {
    /// What the model comes with: latents where `compress` made some, else exact ones.
    Calibrated(Read),
    /// Exact rows of every token, whatever the model comes with.
    Full,
    /// A dense model's prompt in latents of its own bases.
    Xkv(Xkv, Read),
    /// Some tokens are evicted on the way.
    Evict(Reviver),
}

/// Which latents a token reads that goes through the model alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Read {
    /// All.
    #[default]
    All,
    /// Those of the tokens that its attention is likeliest to fall on.
    Top(Selection),
}

impl Default for CacheMethod {
    fn default() -> CacheMethod {
        CacheMethod::Calibrated(Read::All)
    }
}

impl Read {
    /// The most likely `tokens`, or all.
    pub fn top(tokens: Option<usize>) -> Read {
        tokens.map_or(Read::All, |tokens| Read::Top(Selection { tokens, by: Selector::default() }))
    }

    /// The same, chosen `by` this.
    pub fn by(self, by: Selector) -> Read {
        self.selection().map_or(Read::All, |selection| Read::Top(Selection { by, ..selection }))
    }

    /// How many tokens are chosen, where some are.
    pub fn selection(self) -> Option<Selection> {
        match self {
            Read::All => None,
            Read::Top(selection) => Some(selection),
        }
    }
}

impl CacheMethod {
    /// Which latents a token reads.
    pub fn read(&self) -> Read {
        match self {
            CacheMethod::Calibrated(read) | CacheMethod::Xkv(_, read) => *read,
            CacheMethod::Full | CacheMethod::Evict(_) => Read::All,
        }
    }

    /// How tokens are evicted, if they are.
    pub fn eviction(&self) -> Option<Reviver> {
        match self {
            CacheMethod::Evict(reviver) => Some(*reviver),
            _ => None,
        }
    }

    /// The same method, but every latent is read.
    pub fn reading_all(self) -> CacheMethod {
        match self {
            CacheMethod::Calibrated(_) => CacheMethod::Calibrated(Read::All),
            CacheMethod::Xkv(xkv, _) => CacheMethod::Xkv(xkv, Read::All),
            method => method,
        }
    }

    /// The name of a method that compresses the cache while it exists.
    ///
    /// `None` for what needs no work then.
    pub fn name(&self) -> Option<&'static str> {
        match self {
            CacheMethod::Calibrated(_) => None,
            CacheMethod::Full => Some("full"),
            CacheMethod::Xkv(..) => Some("xkv"),
            CacheMethod::Evict(_) => Some("kvreviver"),
        }
    }

    /// How rows are stored, in words, where those of the checkpoint are stored as `layout` says.
    pub fn layout(&self, layout: &str) -> String {
        let rows = match self {
            CacheMethod::Calibrated(_) => layout.into(),
            CacheMethod::Full => "f16".into(),
            CacheMethod::Xkv(xkv, _) => xkv.options(),
            CacheMethod::Evict(reviver) => format!("{}, {layout}", reviver.options(layout != "f16")),
        };
        match self.read() {
            Read::All => rows,
            Read::Top(Selection { tokens, by }) if by == Selector::default() => format!("{rows}, {tokens} selected"),
            Read::Top(Selection { tokens, by }) => format!("{rows}, {tokens} selected by {}", by.name()),
        }
    }

    /// Checks whether a model can be read so, in `capacity` tokens.
    ///
    /// `window`: how far back the layers see that see least; `rows`: those it comes with, none
    /// where it is dense.
    ///
    /// # Errors
    /// [`Error::Argument`] with what is possible.
    pub fn check(&self, geometry: &Geometry, window: Option<usize>, rows: &[LatentSpec], capacity: usize) -> Result<()> {
        let refuse = |name: &str, message: String| Err(Error::Argument { name: name.into(), message });
        let coded_by = |what: &str| format!("{what}, and this model's rows are coded already; give the dense model");
        let block = LatentSet::block(rows);
        let together = format!("this model's rows are coded in blocks of {block} tokens, and are read whole");
        match (self, self.read()) {
            (CacheMethod::Xkv(..), _) if !rows.is_empty() => refuse("method", coded_by("xkv makes bases of keys and values")),
            (CacheMethod::Xkv(xkv, _), Read::All) => xkv.check(geometry),
            (CacheMethod::Evict(_), _) if block > 1 => refuse("method", format!("{together}; take another --method")),
            (CacheMethod::Evict(_), _) if window.is_some_and(|window| window < capacity) => {
                let message =
                    "layers of this model see no further back than a window and forget the rest by themselves; kvreviver has nothing to keep there";
                refuse("method", message.into())
            }
            (_, Read::All) => Ok(()),
            (CacheMethod::Calibrated(_), _) if rows.is_empty() => {
                refuse("select", "a dense cache has no rows to be rebuilt, so there is nothing to choose from; compress the model first".into())
            }
            (_, Read::Top(_)) if block > 1 => refuse("select", format!("{together}; leave it out")),
            (CacheMethod::Xkv(xkv, _), Read::Top(selection)) => selection.check().and_then(|()| xkv.check(geometry)),
            (_, Read::Top(selection)) => selection.check(),
        }
    }
}
