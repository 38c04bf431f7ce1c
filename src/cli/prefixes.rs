//! What prompts begin with, kept in a directory between runs.

use lowkey::session::{Begun, PrefixCache, Summary};
use lowkey::{Prompt, Result, Session};
use std::path::PathBuf;

/// Four binary gigabytes.
const MOST: u64 = 4 << 30;

#[derive(clap::Args, Debug, Clone, Default)]
pub struct PrefixArgs {
    /// Keep the cache of what prompts begin with in this directory: the system prompt, or the
    /// whole prompt where there is none. What is there is not read again, by whatever process.
    #[arg(long, value_name = "DIR", help_heading = "Cache")]
    prefix_cache: Option<PathBuf>,
    /// What the directory may hold; what was used longest ago goes first.
    #[arg(long, value_name = "N", default_value_t = MOST, requires = "prefix_cache", help_heading = "Cache")]
    prefix_cache_bytes: u64,
}

impl PrefixArgs {
    /// The directory, if one was named.
    ///
    /// # Errors
    /// [`lowkey::Error::Io`].
    pub fn open(&self) -> Result<Option<PrefixCache>> {
        self.prefix_cache.as_ref().map(|directory| PrefixCache::open(directory, self.prefix_cache_bytes)).transpose()
    }
}

/// Reads what `prompt`, as a template has rendered it, has in common with what `other` makes of
/// other questions, or all of it where that is nothing.
///
/// # Errors
/// Those of [`PrefixCache::begin`].
pub fn begin(prefixes: &PrefixCache, session: &mut Session, prompt: Prompt, other: &dyn Fn(&str) -> Option<String>) -> Result<Begun> {
    let tokens = session.encode(prompt)?;
    let mut shared = tokens.len();
    // Two that begin otherwise: what all three have in common is none of the question's.
    for question in ["0", "A"] {
        if let Some(other) = other(question) {
            let other = session.encode(Prompt::Rendered(&other))?;
            shared = shared.min(tokens.iter().zip(&other).take_while(|(a, b)| a == b).count());
        }
    }
    prefixes.begin(session, &tokens, shared)
}

/// An answer's numbers with those of what its prompt began with.
pub fn with(summary: Summary, begun: Option<Begun>) -> Summary {
    let Some(Begun { reused, read, seconds }) = begun else { return summary };
    let later = (summary.prompt_tokens - summary.reused_tokens) as f64;
    let seconds = seconds + if summary.prefill_tps > 0.0 { later / summary.prefill_tps } else { 0.0 };
    let prefill_tps = if seconds > 0.0 { (read as f64 + later) / seconds } else { 0.0 };
    Summary { reused_tokens: reused, prefill_tps, ..summary }
}
