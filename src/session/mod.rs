//! One conversation, or one text, being decoded.

mod cancel;
mod context;
mod random;
mod sampler;
mod stop;

pub use cancel::Cancel;
pub use context::{Context, Read};
pub use random::Random;
pub use sampler::{Candidate, Sampler, Sampling, argmax};
pub use stop::{Released, StopStrings};
