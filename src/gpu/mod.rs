//! The device and what is made on it: tensors, matrices of weights, shaders and pipelines,
//! readback.
//!
//! Everything above speaks of kernels; only this speaks wgpu's language of adapters, error scopes
//! and mapped ranges.

mod adapters;
mod buffer;
mod canary;
mod device;
mod faults;
mod matrix;
mod pipeline;
mod profile;
mod quantised;
mod roofline;
mod shader;
mod tensor;
mod tuned;
mod tuning;
mod wait;

pub use adapters::{AdapterReport, adapters};
pub use device::{Device, Options, ShaderChecks, Tier};
pub use matrix::{Matrix, Part, Rows, Weight, WeightType};
pub use pipeline::{Access, Kernel, Pass, Spec, Work};
pub use profile::Timed;
pub use quantised::{GROUP, Packed, Quantised};
pub(crate) use roofline::empty_dispatches;
pub use roofline::{Roofline, roofline};
pub use shader::{SOURCES, preprocess};
pub use tensor::{Element, ElementType, Shape, Tensor, pad};
pub use tuned::{Adapter, Choice, Origin, Tuned};
pub(crate) use tuning::SHARING;
pub use tuning::{Tile, Tuning};

#[cfg(test)]
use roofline::spec as roofline_spec;
