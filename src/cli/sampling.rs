//! The options of generation, as `generate` and `chat` take them.

use super::cache::CacheArgs;
use clap::builder::RangedU64ValueParser;
use lowkey::{Result, Sampling, SessionOptions};

/// How tokens are chosen, and when to stop.
#[derive(clap::Args)]
#[command(next_help_heading = "Generation")]
pub struct SamplingArgs {
    /// Room for this many tokens, prompt and answer together [default: the model's, at most 4096].
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// The longest answer.
    #[arg(long, short = 'n', value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    max_tokens: Option<usize>,
    /// Text that ends the answer; may be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Divides the logits; 0 always takes the likeliest token.
    #[arg(long, short, default_value_t = Sampling::default().temperature, value_name = "T")]
    temperature: f32,
    /// Choose among this many of the likeliest tokens; 0 for all.
    #[arg(long, default_value_t = Sampling::default().top_k, value_name = "N")]
    top_k: usize,
    /// Choose among the likeliest tokens that together have this probability.
    #[arg(long, default_value_t = Sampling::default().top_p, value_name = "P")]
    top_p: f32,
    /// Choose among tokens at least this many times as likely as the likeliest.
    #[arg(long, default_value_t = Sampling::default().min_p, value_name = "P")]
    min_p: f32,
    /// Make tokens that occurred lately less likely; 1 does not.
    #[arg(long, default_value_t = Sampling::default().repetition_penalty, value_name = "F")]
    repetition_penalty: f32,
    /// How many of the last tokens count as lately.
    #[arg(long, default_value_t = Sampling::default().repetition_window, value_name = "N")]
    repetition_window: usize,
    /// Draft up to N tokens at a time from what the text has said before, and verify them together:
    /// the same text in fewer steps where it repeats itself. Of use at temperature 0 alone.
    #[arg(long, default_value_t = 0, value_name = "N")]
    draft: usize,
    /// Seed of all draws.
    #[arg(long, default_value_t = Sampling::default().seed, value_name = "N")]
    seed: u64,
}

impl SamplingArgs {
    /// The longest answer.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens.unwrap_or(usize::MAX)
    }

    /// The library's options, with a cache as `cache` says.
    ///
    /// # Errors
    /// [`lowkey::Error::Argument`] where that cannot be.
    pub fn resolve(self, cache: &CacheArgs) -> Result<SessionOptions> {
        Ok(SessionOptions {
            method: cache.method()?,
            context: self.context,
            max_tokens: self.max_tokens,
            stop: self.stop,
            draft: self.draft,
            sampling: Sampling {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                repetition_window: self.repetition_window,
                seed: self.seed,
            },
            ..SessionOptions::default()
        })
    }
}
