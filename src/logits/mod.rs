//! What is made of a model's logits: the next token, and how far two models' predictions are apart.

pub(crate) mod exponential;
mod predictions;
mod sampler;

pub use predictions::{Divergence, Predictions};
pub use sampler::{Candidate, Sampler, Sampling, argmax};
